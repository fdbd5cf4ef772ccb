"""Folders of images: what is read, in which order, and how each mistake is named."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmcompress.data import Video, open_data
from mmcompress.data.folder import frames_of
from mmcompress.data.sample import seen
from mmcompress.errors import UsageError
from tests.data.layouts import RED, image_folder, png


def refused(folder: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        open_data(folder)
    error = caught.value
    assert "\n" not in error.message
    assert error.hint
    return error


def test_metadata_folder_keeps_the_order_of_its_lines(tmp_path: Path) -> None:
    rows = [
        {"file_name": "b.png", "text": " a red square ", "tags": ["red", "flat"], "label": "square", "group": "shape"},
        {"file_name": "sub/a.png", "texts": ["one", "two", "one"], "label": 7},
        {"file_name": "c.png", "caption": "three"},
    ]
    data = open_data(image_folder(tmp_path / "set", rows))
    assert [sample.key for sample in data] == ["b.png", "sub/a.png", "c.png"]
    assert [sample.texts for sample in data] == [("a red square",), ("one", "two"), ("three",)]
    assert [sample.label for sample in data] == ["square", "7", None]
    assert (data[0].tags, data[0].group) == (("red", "flat"), "shape")
    assert data[-1].key == "c.png"
    assert (data.name, len(data)) == ("set", 3)
    assert data[0].image.size == (4, 3)
    assert data[0].image.getpixel((0, 0)) == RED


def test_the_metadata_file_itself_names_the_folder_and_blank_lines_count_for_nothing(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, [{"file_name": "a.png", "text": "a"}, "", {"file_name": "b.png", "text": "b"}])
    assert [sample.key for sample in open_data(folder / "metadata.jsonl")] == ["a.png", "b.png"]


def test_questions_about_one_picture_are_samples_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"id": "a-1", "file_name": "a.png", "question": " how many? ", "answers": ["two", "2"], "group": "counting"},
        {"id": 7, "file_name": "a.png", "prompt": "what?", "answer": "a cat", "turns": [["how many?", "two"]]},
    ]
    data = open_data(image_folder(tmp_path, rows))
    assert [sample.key for sample in data] == ["a-1", "7"]
    assert [sample.question for sample in data] == ["how many?", "what?"]
    assert [sample.texts for sample in data] == [("two", "2"), ("a cat",)]
    assert [sample.turns for sample in data] == [(), (("how many?", "two"),)]


def test_audio_is_carried_with_its_sampling_rate_and_may_stand_beside_an_image(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, [{"file_name": "a.png", "audio_file_name": "a.wav", "sampling_rate": 16000}])
    (folder / "a.wav").write_bytes(b"RIFF....")
    sample = open_data(folder)[0]
    assert sample.audio is not None
    assert (sample.audio.sampling_rate, sample.audio.stored.read()) == (16000, b"RIFF....")
    assert sample.image.size == (4, 3)
    assert sample.size == len(png()) + 8


def test_a_sample_without_an_image_says_so(tmp_path: Path) -> None:
    data = open_data(image_folder(tmp_path, [{"text": "only words"}]))
    with pytest.raises(UsageError, match="has no image"):
        _ = data[0].image


def test_class_folders_are_labels_in_sorted_order(tmp_path: Path) -> None:
    for name in ("dog/2.png", "dog/10.png", "cat/1.PNG", "dog/notes.txt", ".hidden/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    data = open_data(tmp_path)
    assert [(sample.key, sample.label) for sample in data] == [
        ("cat/1.PNG", "cat"), ("dog/10.png", "dog"), ("dog/2.png", "dog"),
    ]  # fmt: skip


def test_a_flat_folder_of_images_has_neither_texts_nor_labels(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(png(kind="JPEG"))
    (tmp_path / "a.webp").write_bytes(png(kind="WEBP"))
    data = open_data(tmp_path)
    assert [(sample.key, sample.texts, sample.label) for sample in data] == [("a.webp", (), None), ("b.jpg", (), None)]
    assert [sample.image.size for sample in data] == [(4, 3), (4, 3)]


@pytest.mark.parametrize(
    ("row", "words", "hint"),
    [
        ("{broken", "line 2 is not JSON", "JSON object"),
        ("[1]", "line 2 holds a list", "write"),
        ({"file_name": "gone.png", "text": "x"}, "'gone.png', which does not exist", "add the file"),
        ({"file_name": "../out.png", "text": "x"}, "'../out.png', which leads out", "inside"),
        ({"file_name": "/etc/passwd", "text": "x"}, "'/etc/passwd', which leads out", "inside"),
        ({"file_name": "..\\out.png", "text": "x"}, "leads out", "inside"),
        ({"file_name": "a\0.png", "text": "x"}, "leads out", "inside"),
        ({"file_name": "first.png", "captoin": "x"}, "no text column; it has 'captoin'", "did you mean 'caption'?"),
        ({"file_name": "first.png", "zzz": "x"}, "no text column; it has 'zzz'", "known: text, texts"),
        ({"file_name": "first.png", "text": 3}, "'text' must be a text", "quotes"),
        ({"file_name": "first.png", "label": 1.5}, "'label' must be", "one label"),
        ({"file_name": "first.png", "text": "x"}, "lines 1 and 2 both name 'first.png'", "texts"),
        ({"file_name": "a.png", "question": ["how?"]}, "the question must be a text", "one line a question"),
        (
            {"file_name": "a.png", "text": "x", "turns": [["how?"]]},
            "'turns' must be a list of pairs",
            "earlier question",
        ),
        ({"file_name": "a.png", "text": "x", "turns": "how?"}, "'turns' must be a list of pairs", "earlier question"),
        ({"file_name": "metadata.jsonl", "text": "x"}, "neither an image nor audio", ".png"),
        ({"file_name": "dir.png", "text": "x"}, "'dir.png', which is not a file", "name an image"),
        ({"file_name": 3, "text": "x"}, "'file_name' must be", "path inside"),
        ({"label": "x"}, "neither file_name nor text", "file_name"),
        ({"file_name": "first.png", "text": "x", "sampling_rate": 0}, "sampling_rate 0", "samples per second"),
    ],
)
def test_each_mistake_in_the_metadata_names_its_line(tmp_path: Path, row: Any, words: str, hint: str) -> None:
    folder = image_folder(tmp_path / "data", [{"file_name": "first.png", "text": "ok"}])
    (tmp_path / "out.png").write_bytes(png())
    (folder / "dir.png").mkdir()
    with open(folder / "metadata.jsonl", "a") as file:
        file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    error = refused(folder)
    assert words in error.message
    assert "metadata.jsonl line" in error.message or "neither an image" in error.message or "lines" in error.message
    assert hint in error.hint


def test_links_out_of_the_folder_are_refused_and_links_inside_are_not(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", [{"file_name": "a.png", "text": "x"}])
    os.symlink("a.png", folder / "inside.png")
    (tmp_path / "secret.png").write_bytes(png())
    os.symlink(tmp_path / "secret.png", folder / "outside.png")
    image_folder(folder, [{"text": "y"}])
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "inside.png", "text": "x"}\n')
    assert open_data(folder)[1].image.size == (4, 3)
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "outside.png", "text": "x"}\n')
    assert "a link that leads out" in refused(folder).message


def test_folders_that_hold_nothing_usable(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none").message
    (tmp_path / "empty").mkdir()
    assert "holds no samples" in refused(tmp_path / "empty").message
    (tmp_path / "empty" / "metadata.jsonl").write_text("\n\n")
    assert "holds no samples" in refused(tmp_path / "empty").message
    image_folder(tmp_path / "splits" / "train", [{"file_name": "a.png", "text": "x"}])
    error = refused(tmp_path / "splits")
    assert "splits train" in error.message
    assert str(tmp_path / "splits" / "train") in error.hint
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metadata.csv").write_text("file_name,text\n")
    assert "metadata.csv" in refused(tmp_path / "csv").message


@pytest.mark.parametrize(
    "content", [b"", b"hello world", png()[:40], png()[:-30], png(kind="JPEG")[:200], b"%!PS-Adobe-3.0"]
)
def test_a_picture_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    folder = image_folder(tmp_path, [{"file_name": "a.png", "text": "x"}])
    (folder / "a.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.png is not a readable image") as caught:
        _ = open_data(folder)[0].image
    assert "\n" not in caught.value.message


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, [{"file_name": "a.png", "text": "x"}])
    for side in (8001, 10_000, 20_000):  # above our limit; where Pillow only warns; where Pillow refuses
        Image.new("1", (side, side)).save(folder / "a.png")
        with pytest.raises(UsageError, match=r"a\.png (has|is not a readable image)") as caught:
            _ = open_data(folder)[0].image
        assert caught.value.hint


def test_a_file_that_changed_after_opening_is_noticed(tmp_path: Path) -> None:
    data = open_data(image_folder(tmp_path, [{"file_name": "a.png", "text": "x"}]))
    sample = data[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        _ = sample.image
    with pytest.raises(UsageError, match="does not exist"):
        _ = data[0]


def test_pictures_become_upright_rgb_on_white(tmp_path: Path) -> None:
    rows = [{"file_name": name} for name in ("clear.png", "grey16.png", "turned.jpg", "palette.png")]
    folder = image_folder(tmp_path, rows)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("I;16", (2, 2), 0x8000).save(folder / "grey16.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter
    Image.new("RGB", (6, 2), RED).save(folder / "turned.jpg", exif=exif)
    Image.new("P", (2, 2), 0).save(folder / "palette.png", transparency=0)
    clear, grey, turned, palette = (sample.image for sample in open_data(folder))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert grey.getpixel((0, 0)) == (128, 128, 128)
    assert turned.size == (2, 6)
    assert palette.getpixel((0, 0)) == (255, 255, 255)


def numbered(folder: Path, names: list[str], size: tuple[int, int] = (4, 3)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        (folder / name).write_bytes(png((place, 0, 0), size))


def test_several_images_of_a_sample_keep_their_order(tmp_path: Path) -> None:
    """Under the names Hugging Face's ImageFolder gives columns of files, and as a plain list of images."""
    numbered(tmp_path, ["b.png", "a.png", "c.png"])
    rows = [
        {"id": "1", "file_names": ["b.png", "a.png"], "text": "x"},
        {"id": "2", "images": ["c.png", "b.png", "a.png"], "question": "which?", "answers": ["c"]},
        {"id": "3", "left_file_name": "a.png", "right_file_name": "c.png", "text": "x"},
        {"file_name": "c.png", "further_file_names": ["a.png"], "text": "x"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = open_data(tmp_path)
    shades = [[seen(picture).getpixel((0, 0))[0] for picture in sample.pictures] for sample in data]
    assert shades == [[0, 1], [2, 0, 1], [1, 2], [2, 1]]
    assert [sample.key for sample in data] == ["1", "2", "3", "c.png"]
    assert data[0].size == sum((tmp_path / name).stat().st_size for name in ("a.png", "b.png"))
    with pytest.raises(UsageError, match="'2' has 3 images where one image is looked at"):
        _ = data[1].image


def test_frames_of_a_video_lie_in_a_folder_or_are_listed(tmp_path: Path) -> None:
    numbered(tmp_path / "clip", ["f8.png", "f10.png", "f9.png"])
    rows = [
        {"frames": "clip", "text": "x", "fps": 4},
        {"id": "listed", "frames_file_names": ["clip/f10.png", "clip/f8.png"], "text": "x"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = open_data(tmp_path)
    assert first.video is not None
    assert second.video is not None
    shades = [[seen(f).getpixel((0, 0))[0] for f in video.frames] for video in (first.video, second.video)]
    assert shades == [[0, 2, 1], [1, 0]]  # 8, 9, 10; and as they are listed
    assert (first.video.rate, second.video.rate) == (4.0, 2.0)
    assert (first.key, first.pictures, first.shown, second.key) == ("clip", (), True, "listed")
    with pytest.raises(UsageError, match="video frames where one image is looked at"):
        _ = first.image


@pytest.mark.parametrize(
    ("row", "names", "words", "hint"),
    [
        (
            {"frames": "clip"},
            ["1.png", "2.png", "4.png"],
            r"frame 3 is missing between '2\.png' and '4\.png'",
            "add it",
        ),
        ({"frames": "clip"}, ["1.png", "01.png"], r"frames '01\.png' and '1\.png' have one number", "once"),
        ({"frames": "clip"}, ["1.png", "last.png"], r"'last\.png', which has no number", "0001"),
        ({"frames": "clip"}, [], "holds no frames", "numbered"),
        ({"frames": "absent"}, [], "'absent' for its frames, which is no folder", "list them"),
        ({"frames": "../clip"}, [], "which is no folder inside", "list them"),
        ({"frames": []}, [], "'frames' must be a list", '"1.png"'),
        ({"frames": 3}, [], "'frames' must be a list", '"1.png"'),
        ({"frames": ["clip/1.png", "clip/2.png"]}, ["1.png"], r"'clip/2\.png', which does not exist", "add the file"),
        ({"frames": ["metadata.jsonl"]}, [], "a video is read as its frames", "ffmpeg"),
        (
            {"frames": "clip", "frames_file_names": ["clip/1.png"]},
            ["1.png"],
            "both frames and frames_file_names",
            "one",
        ),
        ({"frames": "clip", "fps": 0}, ["1.png"], "fps 0 is not a positive number", "2"),
        ({"frames": "clip", "fps": "24"}, ["1.png"], "fps '24' is not", "2"),
        ({"frames": ["clip/1.png"] * 769}, ["1.png"], "has 769 frames; at most 768", "every second"),
        ({"file_names": "clip/1.png"}, ["1.png"], "'file_names' must be a list", '"1.png"'),
        ({"images": ["clip/1.png", 2]}, ["1.png"], "'images' must be a file name", "path inside"),
    ],
)
def test_each_mistake_in_lists_of_files_is_named(
    tmp_path: Path, row: dict[str, Any], names: list[str], words: str, hint: str
) -> None:
    numbered(tmp_path / "clip", names)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({**row, "text": "x"}))
    error = refused(tmp_path)
    assert re.search(words, error.message), error.message
    assert hint in error.hint


def test_frames_left_out_evenly_are_no_mistake_and_frames_of_two_sizes_are(tmp_path: Path) -> None:
    numbered(tmp_path, ["0.png", "15.png", "5.png", "10.png"])
    frames = frames_of(tmp_path)
    assert [Path(str(frame)).name for frame in frames] == ["0.png", "5.png", "10.png", "15.png"]
    (tmp_path / "15.png").write_bytes(png(size=(5, 3)))
    with pytest.raises(UsageError, match=r"frame 4 of sample 'a' \(.*15\.png\) has 5 x 3 pixels, the first has 4 x 3"):
        Video(tuple(frames_of(tmp_path))).decoded("a")
    with pytest.raises(UsageError, match="no folder at"):
        frames_of(tmp_path / "absent")
    for rate in (0, -1, float("nan")):
        with pytest.raises(UsageError, match="frames per second"):
            Video(tuple(frames), rate)
