"""CIDEr-D by hand: how rare, how long, how often, and over several references."""

from __future__ import annotations

import math

import pytest

from mmcompress.evaluate.cider import cider_d


def score(*pairs: tuple[str, tuple[str, ...]]) -> list[float]:
    """Return the scores of captions with their references."""
    return cider_d([caption.split() for caption, _ in pairs], [[text.split() for text in told] for _, told in pairs])


FAR = ("x", ("x y",))
"""A second picture whose references share no word: every n-gram of the first weighs ln 2."""


def test_a_caption_equal_to_its_reference_scores_ten_from_four_words_on() -> None:
    assert score(("a b c d", ("a b c d",)), FAR)[0] == pytest.approx(10)
    # Two words have no 3-grams and no 4-grams: half of the four cosines are 0.
    assert score(("a b", ("a b",)), FAR)[0] == pytest.approx(5)


def test_a_shorter_caption_pays_for_what_it_lacks_and_for_its_length() -> None:
    # 1-grams: ln2 * ln2 / (ln2 * sqrt(2) ln2); nothing else in common; one word shorter.
    assert score(("a", ("a b",)), FAR)[0] == pytest.approx(10 / 4 * math.sqrt(0.5) * math.exp(-1 / 72))


def test_a_word_said_more_often_than_in_the_reference_does_not_pay() -> None:
    # min(2 ln2, ln2) * ln2 / (2 ln2 * sqrt(2) ln2), at equal length.
    assert score(("a a", ("a b",)), FAR)[0] == pytest.approx(10 / 4 / math.sqrt(8))


def test_what_every_picture_has_counts_nothing() -> None:
    # "the" is in both references, so it weighs ln(2 / 2) = 0; 1-grams: a alone; 2-grams: "the a" = "the a".
    assert score(("the a", ("the a",)), ("the b", ("the b",)))[0] == pytest.approx(5)
    assert score(("the", ("the a",)), ("the b", ("the b",)))[0] == 0


def test_references_are_averaged_and_count_once_a_picture() -> None:
    # "a b" stands in both references of the first picture, and still in one picture of two.
    first, alone = score(("a b", ("a b", "c d")), FAR)[0], score(("a b", ("a b",)), FAR)[0]
    assert first == pytest.approx(alone / 2)


def test_rare_words_weigh_more() -> None:
    # Three pictures; "red" is in two of them: ln 1.5, "cat" in one: ln 3. 1-grams of "red" against "red cat":
    rare, common = math.log(3), math.log(1.5)
    found = score(("red", ("red cat",)), ("red", ("red",)), ("x", ("x",)))[0]
    assert found == pytest.approx(10 / 4 * common / math.hypot(common, rare) * math.exp(-1 / 72))


def test_empty_captions_score_nothing_and_missing_references_are_an_error() -> None:
    assert score(("", ("a b",)), FAR)[0] == 0
    with pytest.raises(ValueError, match="every caption needs a reference"):
        cider_d([["a"]], [[]])
