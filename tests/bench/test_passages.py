"""Prose to go on with: which sentence is asked about, and that no speech is on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.passages import QUESTION, Split, passage, read_passages, write_split

FIRST = "This sentence is written so that it takes more than sixty characters in all."
NEXT = "What follows is judged. " * 20
SPLITS: tuple[Split, ...] = ("test", "calibration", "asked")


def test_the_sentence_in_the_middle_is_asked_about_and_what_follows_is_cut_at_a_word() -> None:
    beginning, following = passage(f"Short. No.\n\nNever. {FIRST}  {NEXT}".replace("Never.", "Never. " * 18))
    assert beginning == FIRST
    # 240 characters end within "judged."; the last whole word stays.
    assert following == " ".join(NEXT.split())[:240].rsplit(" ", 1)[0]
    assert not following.endswith(" ")


def test_speeches_without_such_a_sentence_are_refused() -> None:
    with pytest.raises(ValueError, match="no sentence"):
        passage("Thank you. " * 50)


def speeches(folder: Path, count: int) -> Path:
    made = folder / "speeches"
    made.mkdir()
    for year in range(1800, 1800 + count):
        text = f"{'Thank you. ' * 22}{FIRST} In {year} we met. {NEXT}"
        (made / f"{year}.json").write_text(json.dumps({"year": str(year), "text": text}))
    return made


def test_every_eighth_speech_is_for_calibration(tmp_path: Path) -> None:
    folder = speeches(tmp_path, 20)
    keys = {split: [row["id"] for row in read_passages(split, folder)] for split in SPLITS}
    assert keys["calibration"] == ["1800", "1808", "1816"]
    assert not set(keys["test"]) & set(keys["calibration"])
    assert len(keys["test"]) == 17
    row = read_passages("test", folder)[0]
    assert row["question"] == QUESTION + FIRST
    assert row["text"].startswith("In 1801 we met. What follows")


def test_pictures_come_with_questions_about_them(tmp_path: Path) -> None:
    folder, drawings = speeches(tmp_path, 80), tmp_path / "drawings"
    drawings.mkdir()
    rows = [{"file_name": f"{number}.png", "text": f"thing {number}"} for number in range(12)]
    for row in rows:
        (drawings / row["file_name"]).write_bytes(b"png")
    (drawings / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = {}
    for split in SPLITS:
        out = tmp_path / split
        out.mkdir()
        write_split(split, folder, drawings, out)
        written = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
        shown[split] = [row for row in written if "file_name" in row]
        assert len(list(out.glob("*.png"))) == len(shown[split])
    assert {split: len(found) for split, found in shown.items()} == {"test": 0, "calibration": 8, "asked": 8}
    assert shown["asked"][3]["text"] == "thing 3"
