"""Words and edits: values by hand, and laws that hold for any two lists of words."""

from __future__ import annotations

import numpy as np
import pytest

from mmcompress.evaluate.words import Edits, Wording, common_start, edits


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("the cat sat", "the cat sat", Edits()),
        ("the cat sat", "the hat sat", Edits(substitutions=1)),
        ("the cat sat", "the cat", Edits(deletions=1)),
        ("the cat sat", "the big cat sat", Edits(insertions=1)),
        ("the cat sat", "", Edits(deletions=3)),
        ("", "you you", Edits(insertions=2)),
        ("", "", Edits()),
        # Levenshtein's classic, letter by letter: k -> s, e -> i, and a g at the end.
        ("k i t t e n", "s i t t i n g", Edits(substitutions=2, insertions=1)),
        # One word moved: taken out here and put in there.
        ("one two three four five", "two three four five one", Edits(deletions=1, insertions=1)),
        ("cat", "cat cat cat", Edits(insertions=2)),
    ],
)
def test_edits_by_hand(reference: str, answer: str, expected: Edits) -> None:
    assert edits(reference.split(), answer.split()) == expected


def slow(reference: list[str], answer: list[str]) -> int:
    """The recursion as it is defined, cell by cell."""
    row = list(range(len(answer) + 1))
    for r, word in enumerate(reference, start=1):
        row, above = [r], row
        for a, other in enumerate(answer, start=1):
            row.append(min(above[a - 1] + (word != other), above[a] + 1, row[a - 1] + 1))
    return row[-1]


def test_edits_are_the_fewest_and_add_up_for_any_words() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        reference, answer = (list(map(str, rng.integers(0, 4, rng.integers(0, 13)))) for _ in range(2))
        found = edits(reference, answer)
        assert found.total == slow(reference, answer)
        # Kept words are those neither substituted nor deleted; as many must stand in the answer.
        kept = len(reference) - found.substitutions - found.deletions
        assert kept == len(answer) - found.substitutions - found.insertions
        assert min(kept, found.substitutions, found.deletions, found.insertions) >= 0
        assert edits(answer, reference).total == found.total


def test_common_start_by_hand() -> None:
    assert common_start(["a", "b", "c"], ["a", "b", "d"]) == 2
    assert common_start(["a", "b"], ["a", "b", "d"]) == 2
    assert common_start([], ["a"]) == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Mr. Brown can't go!", "mister brown can not go"),
        ("He has, um, twenty-one cats.", "he has 21 cats"),
        ("They're  here [laughs]", "they are here"),
    ],
)
def test_english_is_compared_by_what_was_said(first: str, second: str) -> None:
    assert Wording().words(first) == Wording().words(second)


def test_spellings_are_unified_where_the_tokenizer_brings_a_table() -> None:
    table = Wording("en", {"colour": "color"})
    assert table.words("The colour") == table.words("the color")
    assert Wording().words("The colour") != Wording().words("the color")
    assert table.name != Wording().name


def test_other_languages_lose_case_and_punctuation_only() -> None:
    assert Wording("de").words("Öl, über alles: 21!") == ["öl", "über", "alles", "21"]
    assert Wording("de", {"öl": "oil"}).words("Öl") == ["öl"]


def test_languages_without_spaces_are_compared_by_characters() -> None:
    assert Wording("ja").words("こんにちは。") == list("こんにちは")


def test_a_text_without_words_has_none() -> None:
    assert Wording().words("[silence] (um) ... !") == []
