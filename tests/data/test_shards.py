"""Tar shards: grouping, patterns, random access, and every way a tar can be broken."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import pytest

from mmcompress.data import open_data
from mmcompress.data.opening import expand
from mmcompress.errors import MissingError, UsageError
from tests.data.layouts import png, shard

MEMBERS = {
    "x/0001.jpg": png(kind="JPEG"),
    "x/0001.txt": "first\n\nsecond\n",
    "x/0001.json": '{"caption": "first", "tags": ["t"], "url": "u", "group": "g"}',
    "x/0001.cls": "3\n",
    "x/0002.PNG": png(size=(7, 5)),
    "x/0002.txt": "other",
}


def test_members_are_grouped_by_name_and_read_at_random(tmp_path: Path) -> None:
    data = open_data(shard(tmp_path / "a.tar", MEMBERS))
    second, first = data[1], data[0]
    assert (first.key, second.key) == ("x/0001", "x/0002")
    assert (first.texts, first.label, first.tags, first.group) == (("first", "second"), "3", ("t",), "g")
    assert (second.texts, second.label) == (("other",), None)
    assert second.image.size == (7, 5)
    assert first.image.size == (4, 3)


def test_long_names_folders_and_hidden_members_do_no_harm(tmp_path: Path) -> None:
    long = "f/" + "long" * 60  # needs an extended header before the member's own
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("f")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in (
            (f"{long}ü.png", png()),
            ("f/._x.png", b"mac"),
            (f"{long}ü.txt", b"text"),
            ("b.txt", b"b"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = open_data(path)
    assert [sample.key for sample in data] == [f"{long}ü", "b"]
    assert data[0].texts == ("text",)
    assert data[0].image.size == (4, 3)


def test_several_shards_come_in_order_with_keys_that_differ(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"s-{number:02d}.tar", {"0.png": png(), "0.txt": f"text {number}"})
    expected = ["text 0", "text 1", "text 2"]
    for spec in (tmp_path, tmp_path / "s-{00..02}.tar", tmp_path / "s-*.tar", tmp_path / "s-{00,01,02}.tar"):
        data = open_data(spec)
        assert [sample.texts[0] for sample in data] == expected
        assert [sample.key for sample in data] == ["s-00/0", "s-01/0", "s-02/0"]
    assert [sample.texts[0] for sample in open_data(tmp_path / "s-{02,00}.tar")] == ["text 2", "text 0"]


def test_shards_of_one_name_in_two_folders_keep_their_keys_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        shard(tmp_path / folder / "s.tar", {"0.png": png()})
    assert [sample.key for sample in open_data(tmp_path / "*" / "s.tar")] == ["a/s/0", "b/s/0"]


def test_braces_expand_in_the_order_written(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-08", "b-09", "b-10"):
        (tmp_path / name).touch()
    found = expand(str(tmp_path / "{b,a}-{08..10}"))
    assert [path.name for path in found] == ["b-08", "b-09", "b-10", "a-08", "a-09", "a-10"]


def test_data_can_be_sent_to_a_worker_process(tmp_path: Path) -> None:
    data = open_data(shard(tmp_path / "a.tar", MEMBERS))
    assert pickle.loads(pickle.dumps(data))[1].image.size == (7, 5)


def test_truncation_is_found_at_opening_wherever_it_happened(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {f"{i}.{ext}": png() for i in range(4) for ext in ("png", "jpg")})
    whole = path.read_bytes()
    end = 8 * 1024  # eight members, each a header block and a block of content
    for size in [*range(100, end, 500), 512, 1024, 2048, end]:
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"a\.tar (is truncated|is not a readable tar)") as caught:
            open_data(path)
        assert caught.value.hint
    path.write_bytes(whole[: end + 512])  # a lone zero block ends it well enough
    assert len(open_data(path)) == 4


def test_numbered_members_are_several_images_or_frames(tmp_path: Path) -> None:
    members = {f"a.{number}.png": png((number, 0, 0)) for number in (10, 2, 9)} | {"a.txt": "x", "a.mask.png": png()}
    members |= {f"b.frames.{number:02d}.jpg": png((number, 0, 0), kind="JPEG") for number in (8, 6, 4)}
    members |= {
        "b.json": '{"question": "what?", "answer": "x", "fps": 1, "images": 3}',
        "c.png": png(),
        "c.1.png": png(),
    }
    first, second, third = open_data(shard(tmp_path / "a.tar", members))
    assert [str(picture).rpartition(":")[2] for picture in first.pictures] == ["a.2.png", "a.9.png", "a.10.png"]
    assert second.video is not None
    assert [str(frame).rpartition(":")[2][-6:] for frame in second.video.frames] == ["04.jpg", "06.jpg", "08.jpg"]
    assert (second.video.rate, second.pictures, second.question) == (1.0, (), "what?")
    assert [str(picture).rpartition(":")[2] for picture in third.pictures] == ["c.png", "c.1.png"]


@pytest.mark.parametrize("content", [b"", b"x" * 2000, b"\0" * 100])
def test_a_file_that_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.tar"):
        open_data(tmp_path / "a.tar")


def test_a_second_archive_behind_the_first_is_not_lost_silently(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"0.png": png()})
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UsageError, match="truncated or damaged"):
        open_data(path)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("0.png")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(UsageError, match=r"'0\.png', which is a link, device"):
        open_data(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"../0.png": png()}, "leads out"),
        ({"/0.png": png()}, "leads out"),
        ({"0.png": png(), "1.png": png(), "0.txt": "x"}, "'0' do not lie next to each other"),
        ({"0.png": png(), "0.PNG": png()}, r"'0\.PNG' twice"),
        ({"0.png": png(), "0.jpg": png()}, "several images"),
        ({f"0.frames.{number}.png": png() for number in (1, 2, 4)}, "frame 3 is missing"),
        ({"0.npy": "x"}, r"0\.npy belongs to no image"),
        ({"0.png": png(), "0.json": "{"}, r"0\.json is not JSON"),
        ({"0.png": png(), "0.txt": b"\xff\xfe"}, r"0\.txt is not UTF-8"),
        ({"0.png": b"no", "0.txt": "x"}, r"a\.tar:0\.png is not a readable image"),
        ({}, "holds no samples"),
        ({"classes.json": "[]"}, r"classes\.json holds a list"),
    ],
)
def test_each_mistake_in_a_shard_is_named(tmp_path: Path, members: dict[str, bytes | str], words: str) -> None:
    path = shard(tmp_path / "a.tar", members)
    with pytest.raises(UsageError, match=words) as caught:
        _ = open_data(path)[0].image
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_specs_that_name_no_shard(tmp_path: Path) -> None:
    shard(tmp_path / "s-0.tar", {"0.png": png()})
    (tmp_path / "s.tar.gz").touch()
    (tmp_path / "notes.txt").touch()
    for spec, words, hint in (
        ("s-{0..1}.tar", r"s-1\.tar does not exist", "numbers in the braces"),
        ("t-*.tar", "no file matches", "pattern"),
        ("s.tar.gz", r"not a \.tar", "unpack"),
        ("notes.txt", r"not a \.tar", "folder"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            open_data(tmp_path / spec)
        assert hint in caught.value.hint


def test_demo_data_has_names_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no demo data") as caught:
        open_data("demo:tset")
    assert caught.value.hint == "did you mean 'demo:test'?"
    monkeypatch.setattr("mmcompress.data.opening.resources.files", lambda package: tmp_path)
    with pytest.raises(MissingError, match="not part of this installation"):
        open_data("demo:test")
    plain = shard(tmp_path / "plain.tar", {"0.png": png(), "0.txt": "x"})
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "test.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    monkeypatch.setenv("MMC_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "demo" / "classes.json").write_text('{"classes": ["a", "b"]}')
    data = open_data("demo:test")
    assert (data.name, len(data)) == ("demo:test", 1)
    assert data.zero_shot is not None
    assert data.zero_shot.labels == ("a", "b")
