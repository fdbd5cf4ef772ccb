"""Packs the drawings that ship with the package: mmcompress/demo/{test.tar.gz, train.tar.gz, classes.json, NOTICE}.

    python -m bench.demo_data

test.tar.gz holds the held-out vendor's drawings, train.tar.gz one drawing per concept of the training vendors (for calibration and
distillation). Both are webdataset shards, packed: `<hexcode>.png` beside `<hexcode>.json` with text, tags, label, group. The same
input gives the same bytes: sorted names, no times, no owners.
"""

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from bench import assets
from bench.drawings import VENDORS

TRAIN_VENDORS = ("fluent-emoji-flat", "noto", "fxemoji")
TRAIN_SIZE = 1200
TEMPLATES = ["{}", "a drawing of {}", "an emoji of {}"]
Sample = tuple[str, bytes, dict[str, Any]]

NOTICE = """\
The files of this folder, their makers and their licences
==========================================================

test.tar.gz holds drawings of Twemoji, (c) Twitter, Inc. and other contributors, licensed under CC-BY-4.0
(https://creativecommons.org/licenses/by/4.0/). Changes: rendered from SVG at 112 pixels on white, stored as palette PNG.

train.tar.gz holds drawings, rendered and stored in the same way, of
  Fluent Emoji (flat), (c) Microsoft Corporation, MIT licence
  Noto Emoji, (c) Google Inc., Apache License 2.0
  FxEmojis, (c) Mozilla, Apache License 2.0

The captions, tags and groups in both, and the vocabulary of the tokenizer, come from emojibase-data,
(c) Miles Johnson, MIT licence; its annotations derive from Unicode CLDR, (c) Unicode, Inc., Unicode License v3.

clip/ is a CLIP-shaped model trained for this project. Weights of DINOv2 ViT-S/14, (c) Meta Platforms, Inc. and affiliates,
Apache License 2.0, initialised its vision tower. Its teacher is bench/trained/dual_encoder.safetensors on top of DINOv2 and of
all-MiniLM-L6-v2 (sentence-transformers), Apache License 2.0. Both were trained on drawings of EmojiOne 2 (CC-BY-4.0, (c)
EmojiOne), Fluent Emoji (MIT), Noto Emoji and Noto Emoji v1 (Apache-2.0) and FxEmojis (Apache-2.0), never on Twemoji.

The Apache License 2.0 is in LICENSE at the root of the project.

MIT licence (Fluent Emoji, emojibase-data):
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software
is furnished to do so, subject to the following conditions: The above copyright notice and this permission notice shall be
included in all copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND,
EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY,
WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR
OTHER DEALINGS IN THE SOFTWARE.
"""


def rows(vendor_folder: Path) -> list[dict[str, Any]]:
    """The metadata records of one vendor."""
    lines = (vendor_folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def palette_png(file: Path) -> bytes:
    """The drawing with at most 96 colours, which flat artwork hardly exceeds, as a small PNG."""
    with Image.open(file) as image:
        few = image.convert("RGB").quantize(96, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def sample(vendor_folder: Path, row: dict[str, Any]) -> Sample:
    """(key, PNG bytes, description) of one drawing."""
    description = {name: row[name] for name in ("text", "tags", "label", "group")}
    return Path(row["file_name"]).stem, palette_png(vendor_folder / row["file_name"]), description


def pack(samples: list[Sample], shard: Path) -> None:
    """Writes a packed webdataset shard whose bytes depend on the samples alone."""
    with (
        shard.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tarball,
    ):
        for key, png, description in sorted(samples, key=lambda one: one[0]):
            text = json.dumps(description, ensure_ascii=False, sort_keys=True).encode()
            for suffix, content in (("json", text), ("png", png)):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tarball.addfile(member, io.BytesIO(content))


def unpack(shard: Path, folder: Path) -> None:
    """Writes a shard back as an ImageFolder: PNG files and metadata.jsonl."""
    folder.mkdir(parents=True)
    records = []
    with tarfile.open(shard) as tarball:
        for member in tarball:
            stream = tarball.extractfile(member)
            if stream is None:
                continue
            key, _, suffix = member.name.partition(".")
            if suffix == "json":
                records.append({"file_name": f"{key}.png", **json.load(stream)})
            else:
                (folder / member.name).write_bytes(stream.read())
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def calibration_rows(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """One drawing per concept, its vendor rotating with the concept, thinned evenly to TRAIN_SIZE."""
    by_concept: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for vendor in TRAIN_VENDORS:
        for row in rows(folder / vendor):
            by_concept.setdefault(row["file_name"], []).append((folder / vendor, row))
    names = sorted(by_concept)
    for number in range(TRAIN_SIZE):
        name = names[number * len(names) // TRAIN_SIZE]
        choices = by_concept[name]
        yield choices[number % len(choices)]


def main() -> None:
    """Writes the four files and prints their sizes."""
    assets.DEMO.mkdir(parents=True, exist_ok=True)
    vendor = next(vendor.name for vendor in VENDORS if vendor.heldout)
    heldout = assets.redrawn_heldout() / vendor
    test = [sample(heldout, row) for row in rows(heldout)]
    train = [sample(folder, row) for folder, row in calibration_rows(assets.training_drawings())]
    pack(test, assets.DEMO / "test.tar.gz")
    pack(train, assets.DEMO / "train.tar.gz")
    classes = {"classes": sorted({description["label"] for _, _, description in test + train}), "templates": TEMPLATES}
    (assets.DEMO / "classes.json").write_text(json.dumps(classes, indent=1) + "\n", encoding="utf-8")
    (assets.DEMO / "NOTICE").write_text(NOTICE, encoding="utf-8")
    for file, count in (("test.tar.gz", len(test)), ("train.tar.gz", len(train))):
        print(f"{file}: {count} drawings, {(assets.DEMO / file).stat().st_size / 2**20:.2f} MiB")
    print(f"classes.json: {len(classes['classes'])} classes")


if __name__ == "__main__":
    main()
