"""The sentences that are spoken: many, different, the same every time, and none of the training's in the test."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import assets
from bench.speech import COUNTS, PATTERNS, nouns, sentences
from mmcompress.data import open_data
from tests.built import built


@pytest.fixture
def emojibase(tmp_path: Path) -> Path:
    """Two hundred made-up names, and some that must not be spoken."""
    letters = "abcdefghij"
    labels = [f"{letters[i // 100 % 10]}o{letters[i // 10 % 10]}a{letters[i % 10]}" for i in range(200)]
    rows = [{"label": label, "group": 7} for label in labels]
    rows += [{"label": "flag: Chad", "group": 7}, {"label": "grinning face", "group": 0}, {"label": "ox", "group": 3}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_names_of_things_that_can_be_read_aloud(emojibase: Path) -> None:
    found = nouns(emojibase)
    assert len(found) == len(set(found)) == 200
    assert found == nouns(emojibase)
    assert found != sorted(found)


def test_sentences_are_many_short_and_disjoint(emojibase: Path) -> None:
    made = {split: sentences(split, emojibase) for split in COUNTS}
    for split, texts in made.items():
        assert len(set(texts)) == COUNTS[split]
        assert {True} == {4 <= len(text.split()) <= 20 for text in texts}
        assert texts == sentences(split, emojibase)
    assert COUNTS["test"] >= 150
    assert not set(PATTERNS["test"]) & set(PATTERNS["train"])
    known = set(nouns(emojibase))
    used = {split: known & set(re.findall(r"\w+", " ".join(texts))) for split, texts in made.items()}
    assert used["test"]
    assert not used["test"] & used["train"]


@pytest.mark.real
def test_they_are_spoken() -> None:
    data = open_data(str(built(assets.speech)))
    assert len(data) == COUNTS["test"]
    seconds = [len(data[index].waveform(16_000)) / 16_000 for index in range(0, 200, 20)]
    assert 1 < min(seconds) < max(seconds) < 15
