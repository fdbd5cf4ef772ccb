"""Questions about drawings and scenes: right answers, folders the product reads, splits that do not touch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import assets
from bench.scenes import WORDS
from bench.vqa_data import (
    Drawn,
    ask_drawing,
    colour_name,
    drawing_turns,
    main_colour,
    write_naming,
    write_slices,
)
from mmcompress.data import open_data


@pytest.fixture
def drawings(tmp_path: Path) -> list[Drawn]:
    (tmp_path / "vendor").mkdir()
    found = []
    for number, colour in enumerate(("red", "green", "white")):
        file = tmp_path / "vendor" / f"{number}.png"
        Image.new("RGB", (8, 8), colour).save(file)
        row = {"text": f"{colour} fish hook pot", "group": "food & drink", "label": "fruit", "tags": []}
        found.append(Drawn(file, row))
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("pixel", "name"),
    [
        ((1, 0, 0), "red"),
        ((1, 0.5, 0), "orange"),
        ((0.5, 0.25, 0), "brown"),
        ((1, 0.9, 0), "yellow"),
        ((0, 0.6, 0), "green"),
        ((0, 0.3, 1), "blue"),
        ((0.5, 0, 0.7), "purple"),
        ((1, 0.6, 0.7), "pink"),
        ((0.05, 0.05, 0.05), "black"),
        ((0.5, 0.5, 0.5), "grey"),
        ((1, 1, 1), None),
    ],
)
def test_colours_have_everyday_names(pixel: tuple[float, float, float], name: str | None) -> None:
    assert colour_name(*pixel) == name


def test_a_main_colour_is_that_of_most_ink() -> None:
    image = Image.new("RGB", (32, 32), "white")
    assert main_colour(image) is None
    image.paste("red", (0, 0, 32, 7))
    image.paste("blue", (0, 10, 32, 13))
    assert main_colour(image) == "red"  # 7 of 10 inked rows
    image.paste("blue", (0, 10, 32, 16))
    assert main_colour(image) is None  # 7 of 13


def test_a_drawing_without_main_colour_is_not_asked_for_it(drawings: list[Drawn]) -> None:
    assert "colour" not in ask_drawing(drawings[0].row, None)
    groups = [[turn.group for turn in drawing_turns(drawing)] for drawing in drawings]
    assert groups == [["naming", "category", "kind", "colour"]] * 2 + [["naming", "category", "kind"]]


def test_slices_are_full_and_the_product_reads_them(drawings: list[Drawn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    count = write_slices(drawings, 50, each=3, out=out)
    found = rows(out)
    assert count == len(found) == 18
    assert set(Counter(row["group"] for row in found).values()) == {3}
    assert len({row["id"] for row in found}) == len(found)
    assert {row["texts"][0] for row in found if row["group"] == "reading"} <= set(WORDS)
    earlier = [row for row in found if "turns" in row]
    assert earlier
    assert all(row["question"] not in dict(row["turns"]) for row in earlier)
    assert [sample.question for sample in open_data(out)] == [row["question"] for row in found]


def test_the_naming_folder_asks_about_every_drawing(drawings: list[Drawn], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert write_naming(drawings, out) == 3
    assert [row["texts"] for row in rows(out)] == [[drawing.row["text"]] for drawing in drawings]


@pytest.mark.real
def test_held_out_and_training_folders_share_nothing() -> None:
    heldout, training = assets.vqa("heldout"), assets.vqa("training")
    assert Counter(row["group"] for row in rows(heldout)) == dict.fromkeys(
        ("naming", "category", "colour", "counting", "reading", "position"), 300
    )
    assert len(rows(training)) >= 3000
    assert not {row["file_name"] for row in rows(heldout)} & {row["file_name"] for row in rows(training)}
