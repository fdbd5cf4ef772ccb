"""Recordings: what is decoded, what is refused, and that resampling keeps the sound."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcompress.data import Audio, Sample, Stored, Waveform, open_data
from mmcompress.data import sound as sounds
from mmcompress.errors import MissingError, UsageError

soundfile = pytest.importorskip("soundfile", reason="pip install 'mmcompress[audio]'")
pytest.importorskip("soxr", reason="pip install 'mmcompress[audio]'")


def tone(pitch: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def stored(path: Path) -> Sample:
    return Sample(path.name, audio=Audio(Stored(path, path.stat().st_size)))


def written(folder: Path, samples: np.ndarray, rate: int, name: str = "a.wav", **options: Any) -> Sample:
    soundfile.write(folder / name, samples, rate, **options)
    return stored(folder / name)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_common_formats_give_the_sound_back(name: str, tmp_path: Path) -> None:
    found = written(tmp_path, tone(440, 16_000), 16_000, name).waveform(16_000)
    assert found.dtype == np.float32
    assert len(found) == pytest.approx(8_000, abs=1_200)  # MP3 pads to whole frames
    assert np.abs(np.fft.rfft(found, 16_000)).argmax() == pytest.approx(440, abs=2)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(440, 16_000), np.zeros(8_000, np.float32)
    found = written(tmp_path, np.stack((left, right), 1), 16_000, subtype="FLOAT").waveform(16_000)
    np.testing.assert_allclose(found, left / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_pitch_and_the_length(rate: int, tmp_path: Path) -> None:
    wave = tone(440, rate, 1)
    found = written(tmp_path, wave, rate, subtype="FLOAT").waveform(16_000)
    assert len(found) == pytest.approx(16_000, abs=2)
    assert np.abs(np.fft.rfft(found[:16_000], 16_000)).argmax() == 440
    np.testing.assert_array_equal(found, Sample("b", audio=Waveform(wave, rate)).waveform(16_000))


def test_values_stay_within_one() -> None:
    loud = Waveform(np.array([0.5, 3, -7], np.float32), 16_000)
    assert Sample("a", audio=loud).waveform(16_000).tolist() == [0.5, 1, -1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"not a recording", "not a readable recording"),
        (b"RIFF" + b"\xff" * 400, "not a readable recording"),
        (b"ID3" + bytes(200), "not a readable recording"),
    ],
    ids=["nothing", "text", "header only", "mp3 tag only"],
)
def test_damaged_files_are_refused_by_name(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(content)
    with pytest.raises(UsageError, match=rf"bad\.wav.* {reason}"):
        stored(tmp_path / "bad.wav").waveform(16_000)


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.wav is empty"):
        written(tmp_path, np.zeros(0, np.float32), 16_000, "none.wav").waveform(16_000)


def test_rare_formats_are_refused(tmp_path: Path) -> None:
    sample = written(tmp_path, tone(440, 16_000), 16_000, "a.wav", format="AU")
    with pytest.raises(UsageError, match=r"a\.wav is a AU recording"):
        sample.waveform(16_000)


def test_a_recording_too_long_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = written(tmp_path, tone(440, 16_000), 16_000, "a.flac")
    monkeypatch.setattr(sounds, "MAX_SAMPLES", 7_999)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(UsageError, match=r"a\.flac has 8,000 samples in 1 channels; at most 7,999"):
        sample.waveform(16_000)


def test_a_header_that_claims_one_sample_a_second_is_not_believed(tmp_path: Path) -> None:
    sample = written(tmp_path, tone(440, 16_000), 16_000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = struct.pack("<I", 1)
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(UsageError, match=r"lasts 8,000 s by its rate of 1 samples a second"):
        sample.waveform(16_000)


@pytest.mark.parametrize(
    ("wave", "reason"),
    [
        (Waveform(np.array([0.0, np.nan], np.float32), 16_000), "not numbers"),
        (Waveform(np.zeros((5, 2), np.float32), 16_000), r"shape \(5, 2\)"),
        (Waveform(np.zeros(5, np.float32), 0), "at 0 a second"),
        (Waveform(np.zeros(0, np.float32), 16_000), "is empty"),
    ],
)
def test_recordings_in_memory_are_checked_too(wave: Waveform, reason: str) -> None:
    with pytest.raises(UsageError, match=f"sample 'a' .*{reason}"):
        Sample("a", audio=wave).waveform(16_000)


def test_a_sample_without_a_recording_says_so() -> None:
    with pytest.raises(UsageError, match="sample 'a' has no audio"):
        Sample("a", ("text",)).waveform(16_000)


@pytest.mark.parametrize(("package", "rate"), [("soundfile", 16_000), ("soxr", 8_000)])
def test_a_missing_package_is_named_with_the_command(
    package: str, rate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = written(tmp_path, tone(440, 16_000), 16_000)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(MissingError, match=f"needs {package}") as caught:
        sample.waveform(rate)
    assert caught.value.hint == "pip install 'mmcompress[audio]'"


def test_sizes_count_sound(tmp_path: Path) -> None:
    assert Sample("a", audio=Waveform(np.zeros(10, np.float32), 16_000)).size == 40
    sample = written(tmp_path, tone(440, 16_000), 16_000)
    assert sample.size == (tmp_path / "a.wav").stat().st_size


def test_a_folder_of_recordings_is_heard(tmp_path: Path) -> None:
    written(tmp_path, tone(440, 22_050), 22_050, "a.flac")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.flac", "text": "a tone"}\n')
    (sample,) = open_data(str(tmp_path))
    assert len(sample.waveform(16_000)) == pytest.approx(8_000, abs=2)


def test_a_long_recording_is_cut_where_it_is_quiet_and_nothing_is_lost() -> None:
    rate, longest = 1_000, 30_000
    samples = np.ones(70_000, np.float32)
    samples[27_000:27_400] = 0  # in the last five seconds of the first window
    samples[54_000:54_300] = 0.1
    samples[10_000:12_000] = 0  # quieter for longer, but the window would be short
    found = sounds.windows(samples, rate, longest)
    np.testing.assert_array_equal(np.concatenate(found), samples)
    ends = np.cumsum([len(window) for window in found]).tolist()
    # Of equally quiet stretches of 0.2 s the last one, and its middle: 27.2 to 27.4 s, 54.1 to 54.3 s.
    assert ends == [27_300, 54_200, 70_000]


def test_what_fits_is_left_whole_and_a_last_window_is_no_click() -> None:
    assert [len(window) for window in sounds.windows(np.zeros(30_000), 1_000, 30_000)] == [30_000]
    assert [len(window) for window in sounds.windows(np.zeros(0), 1_000, 30_000)] == [0]
    lengths = [len(window) for window in sounds.windows(np.zeros(30_001), 1_000, 30_000)]
    assert lengths == [28_901, 1_100]  # a second is kept for the last; the cut is the middle of 0.2 s before that
    loud = np.random.default_rng(0).normal(size=200_123).astype(np.float32)
    lengths = [len(window) for window in sounds.windows(loud, 1_000, 30_000)]
    assert all(25_000 <= length <= 30_000 for length in lengths[:-1])
    assert 1_000 <= lengths[-1] <= 30_000
    assert sum(lengths) == 200_123
