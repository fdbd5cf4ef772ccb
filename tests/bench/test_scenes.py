"""Rendered scenes: the answers are what was drawn, the splits do not touch."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from bench.scenes import (
    CELL,
    COLOURS,
    PLACES,
    SIDE,
    WORDS,
    Kind,
    Scene,
    Word,
    ask_scene,
    draw_scene,
    make_scene,
    plural,
)

WHITE = (255, 255, 255)


def asked(scene: Scene) -> dict[str, str]:
    return {turn.question: turn.answers[0] for turn in ask_scene(scene)}


def test_answers_follow_from_the_scene() -> None:
    word, lone, many = Word("PEAR", 1, "red"), Kind("star", "blue", (2,)), Kind("cross", "green", (0, 6, 8))
    answers = asked(Scene(7, WHITE, (word,), (lone, many)))
    expected = {
        "What word is written?": "PEAR",
        "What colour is the word?": "red",
        "How many stars are there?": "1",
        "What colour is the star?": "blue",
        "Where is the star?": "top right",
        "How many crosses are there?": "3",
        "What colour are the crosses?": "green",
    }
    # one scene in four is asked for a shape that it lacks, too
    extra = {question: answer for question, answer in answers.items() if question not in expected}
    assert {question: answers[question] for question in expected} == expected
    assert set(extra.values()) <= {"0"}


def test_two_words_are_told_apart_by_their_rows() -> None:
    answers = asked(Scene(7, WHITE, (Word("PEAR", 0, "red"), Word("FIG", 2, "blue")), ()))
    assert answers["What word is written at the top?"] == "PEAR"
    assert answers["What word is written at the bottom?"] == "FIG"
    assert answers["What colour is the word at the bottom?"] == "blue"


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star", "cross", "ring"])
def test_a_shape_is_drawn_in_its_cell_and_colour_only(shape: str) -> None:
    for cell in range(9):
        image = draw_scene(Scene(cell, WHITE, (), (Kind(shape, "red", (cell,)),)))
        row, column = divmod(cell, 3)
        box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
        inked = Image.eval(image.convert("L"), lambda value: 255 - value).getbbox()
        assert inked is not None
        assert box[0] <= inked[0]
        assert box[1] <= inked[1]
        assert inked[2] <= box[2]
        assert inked[3] <= box[3]
        assert min(inked[2] - inked[0], inked[3] - inked[1]) >= 30
        assert {colour for _, colour in image.getcolors() or ()} == {WHITE, COLOURS["red"]}


def test_words_are_high_and_inside() -> None:
    for seed in range(40):
        image = draw_scene(Scene(seed, WHITE, (Word("WWWWW", seed % 3, "black"),), ()))
        box = Image.eval(image.convert("L"), lambda value: 255 - value).getbbox()
        assert box is not None
        assert box[3] - box[1] >= 30
        assert box[0] > 0
        assert box[2] < SIDE


def test_a_scene_is_its_number() -> None:
    first, again, other = (make_scene(number) for number in (5, 5, 6))
    assert first == again != other
    assert draw_scene(first).tobytes() == draw_scene(again).tobytes()


def test_no_scene_puts_two_things_in_one_place() -> None:
    for seed in range(300):
        scene = make_scene(seed)
        cells = [cell for kind in scene.kinds for cell in kind.cells]
        assert len(set(cells)) == len(cells)
        assert not {word.row for word in scene.words} & {cell // 3 for cell in cells}
        colours = [kind.colour for kind in scene.kinds] + [word.colour for word in scene.words]
        assert len(set(colours)) == len(colours)


def test_every_word_is_shown_about_as_often_as_any_other() -> None:
    shown = Counter(word.text for seed in range(4000) for word in make_scene(seed).words)
    assert set(shown) == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)
    assert max(shown.values()) < 2 * min(shown.values())


def test_places_read_row_by_row() -> None:
    assert PLACES[0] == "top left"
    assert PLACES[5] == "right"
    assert PLACES[7] == "bottom"
    assert [plural(shape) for shape in ("ring", "cross")] == ["rings", "crosses"]
