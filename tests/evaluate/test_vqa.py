"""What counts as the same answer, and how far people agree with one."""

from __future__ import annotations

import pytest

from mmcompress.evaluate.vqa import accuracy, answer_words, mentions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000 dogs!", "1000 dogs"),
        ("3.5", "3.5"),
        ("red/white", "red white"),
        ("t-shirt", "t shirt"),
        ("It isn't", "it isnt"),
        ("It isn’t", "it isnt"),
        ("A", "a"),
        ("  on the\nleft ", "on left"),
        ("twelve", "twelve"),
        ("", ""),
    ],
)
def test_answers_are_compared_as_their_words(text: str, expected: str) -> None:
    assert answer_words(text) == expected.split()


def test_a_match_with_any_accepted_answer_is_right_where_few_answered() -> None:
    assert accuracy("The sofa", ["couch", "sofa"]) == 1
    assert accuracy("two", ["2"]) == 1
    assert accuracy("a red sofa", ["couch", "sofa"]) == 0
    assert accuracy("", ["sofa"]) == 0
    assert accuracy("yes", ["yes"] * 1 + ["no"] * 8) == 1  # nine people: still any


@pytest.mark.parametrize(("people", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_of_ten_people_an_answer_is_as_right_as_they_agree(people: int, expected: float) -> None:
    # Leaving out one of the 3 who agree leaves 2 / 3 (3 times), leaving out another 3 / 3 (7 times): (3 * 2 / 3 + 7) / 10.
    assert accuracy("Red.", ["red"] * people + ["blue"] * (10 - people)) == pytest.approx(expected)


def test_a_sentence_may_mention_an_answer() -> None:
    assert mentions("It is a big red bus.", ["red bus"])
    assert mentions("There are three of them", ["3"])
    assert not mentions("It is red", ["red bus"])
    assert not mentions("Anything", ["...", ""])
