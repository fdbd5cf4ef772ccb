"""Recordings as samples: decoded with libsndfile, mixed down to one channel, resampled to what a model listens at."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from mmcompress.errors import MissingError, UsageError

SOUND_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
# As float32 that is 256 MB: 22 minutes of one channel at 48 kHz. Speech models hear half a minute at a time.
MAX_SAMPLES = 64_000_000
# Seconds: how far before the end of a window its cut may lie, over what loudness is taken, and the shortest last window.
SEARCHED, LOUDNESS, LEAST = 5.0, 0.2, 1.0


@dataclass(frozen=True, eq=False)
class Waveform:
    """A recording in memory: what `Sample.audio` may be instead of a file, for data made in Python."""

    samples: np.ndarray
    """(N,) in -1..1, one channel."""
    sampling_rate: int
    """Samples per second."""


def decode_sound(content: bytes, name: str) -> Waveform:
    """Return the recording in the bytes of a sound file, its channels averaged; `name` is what errors call it.

    Raises MissingError without the soundfile package, UsageError when it is not a readable recording or too long.
    """
    soundfile = _package("soundfile", "reading recordings")
    _require_all(content, name)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if file.format not in SOUND_FORMATS:
                # libsndfile reads two dozen rarer formats: a way in for hostile files and no benefit to speech data.
                raise UsageError(f"{name} is a {file.format} recording", hint=_readable())
            values = file.frames * file.channels
            if values > MAX_SAMPLES:
                raise UsageError(
                    f"{name} has {file.frames:,} samples in {file.channels} channels; at most {MAX_SAMPLES:,} are decoded",
                    hint="cut the recording, or remove it from the data",
                )
            found = file.read(dtype="float32", always_2d=True)
            rate = int(file.samplerate)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        reason = "it is empty" if not content else str(getattr(error, "error_string", error)).rstrip(".")
        raise UsageError(f"{name} is not a readable recording: {reason}", hint=_readable()) from error
    return Waveform(found.mean(axis=1), rate)


def _require_all(content: bytes, name: str) -> None:
    """Raise UsageError for a WAV file that ends before its header says; libsndfile would take the rest for all of it.

    Programs that write into a pipe cannot know the length, and say 0 or the largest there is.
    """
    said = int.from_bytes(content[4:8], "little")
    if content[:4] == b"RIFF" and 0 < said < 0x7FFFFFFF and said > len(content):
        raise UsageError(
            f"{name} is cut off: its header speaks of {said + 8:,} bytes, and it has {len(content):,}",
            hint="copy or record the file again",
        )


def resampled(wave: Waveform, rate: int, name: str) -> np.ndarray:
    """Return the samples (N,) at `rate` per second, float32, clipped to -1..1.

    Raises UsageError when there are none, when one is not a number, and when they would be too many; MissingError without the
    soxr package, which is needed only where the rates differ.
    """
    samples = np.asarray(wave.samples, dtype=np.float32)
    if samples.ndim != 1 or wave.sampling_rate < 1:
        raise UsageError(
            f"{name} has samples of shape {samples.shape} at {wave.sampling_rate} a second",
            hint="give one channel (N,) and a positive rate",
        )
    if not samples.size:
        raise UsageError(f"{name} is empty: it has no samples", hint="replace or remove it")
    if not np.isfinite(samples).all():
        raise UsageError(f"{name} has samples that are not numbers (NaN or infinite)", hint="replace or remove it")
    if wave.sampling_rate != rate:
        # A header may claim one sample a second; believed, it would be stretched to gigabytes.
        wanted = samples.size * rate // wave.sampling_rate
        if wanted > MAX_SAMPLES:
            raise UsageError(
                f"{name} lasts {samples.size / wave.sampling_rate:,.0f} s by its rate of {wave.sampling_rate} samples a "
                f"second; at {rate} that is {wanted:,} samples, and at most {MAX_SAMPLES:,} are made",
                hint="check its sampling rate, or cut it",
            )
        samples = _package("soxr", "resampling recordings").resample(samples, wave.sampling_rate, rate)
        if not samples.size:
            raise UsageError(f"{name} is too short: no sample is left at {rate} a second", hint="replace or remove it")
    return np.clip(samples, -1, 1)


def windows(samples: np.ndarray, rate: int, longest: int) -> list[np.ndarray]:
    """Return the recording `samples` (N,) in pieces of at most `longest` samples, one after the other; whole where it is no longer.

    Each is cut at the quietest place of its last five seconds: where the mean square over 0.2 s is least, of equals the last. A
    word is then rarely cut in two, and no window but the last is shorter than `longest` less five seconds. The same recording is
    always cut alike, whoever listens.
    """
    made, start = [], 0
    while len(samples) - start > longest:
        # What is left for the last window must not be a mere click.
        end = min(start + longest, len(samples) - min(int(LEAST * rate), longest // 4))
        begin = max(start + longest - int(SEARCHED * rate), start + longest // 2)
        cut = begin + _quietest(samples[begin:end], max(1, int(LOUDNESS * rate)))
        made.append(samples[start:cut])
        start = cut
    return [*made, samples[start:]]


def _quietest(samples: np.ndarray, width: int) -> int:
    """Return the middle of the quietest stretch of `width` samples, of equals the last."""
    power = np.cumsum(np.concatenate([[0.0], samples.astype(np.float64) ** 2]))
    if len(samples) <= width:
        return len(samples)
    # Rounded, because a running sum leaves crumbs in digital silence.
    loudness = np.round(power[width:] - power[:-width], 9)
    return len(loudness) - 1 - int(loudness[::-1].argmin()) + width // 2


def _package(name: str, what: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        raise MissingError(f"{what} needs {name}", hint="pip install 'mmcompress[audio]'")
    return importlib.import_module(name)


def _readable() -> str:
    return "replace or remove the file; readable are WAV, FLAC, OGG (Vorbis, Opus) and MP3"
