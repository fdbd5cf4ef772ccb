"""What the report shows of answers: those that changed, and what is scored without looking."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mmcompress.evaluate import evaluate
from mmcompress.jobs.report_answers import SHOWN, changed_answers, controls
from tests.evaluate.recordings import Hearing, Saying, spoken
from tests.evaluate.test_questions import Asked, knows, questions
from tests.evaluate.worlds import Seeing, world


def run(before: Any, after: Any, data: Any) -> Any:
    """A run that was measured on `data`."""
    original = evaluate(before, data)
    return SimpleNamespace(original=original, compressed=evaluate(after, data, reference=original))


def test_answers_that_changed_stand_beside_what_is_right() -> None:
    shown = changed_answers(
        run(Saying("red", "<b>", "cat"), Saying("red ", "blue", "cat"), spoken("Red", "Blue", "Cat"))
    )
    assert "Answers that changed: 1 of 3" in shown
    assert "<td>s1</td><td>Blue</td><td>&lt;b&gt;</td><td>blue</td>" in shown
    many = changed_answers(run(Saying(*["a"] * 30), Saying(*["b"] * 30), spoken(*["red"] * 30)))
    assert "30 of 30" in many
    assert many.count("<tr>") == 1 + SHOWN


def test_no_change_is_said_and_embeddings_say_nothing() -> None:
    same = changed_answers(run(Saying("red", "blue"), Saying("red", "blue"), spoken("Red", "Blue")))
    assert "All 2 answers are those of the original" in same
    assert changed_answers(run(Seeing(), Seeing(0.5), world(8))) == ""
    assert changed_answers(SimpleNamespace(original=None, compressed=None)) == ""  # type: ignore[arg-type]


def test_controls_stand_beside_those_of_the_original() -> None:
    shown = controls(run(Asked(knows), Asked(lambda *_: "red"), questions(8)))
    row = next(part for part in shown.split("<tr>") if "blank image" in part)
    # The original scores nothing without the picture; one that always says "red" still has one question in eight.
    assert ">0.000 [" in row
    assert ">0.125 [" in row
    assert "+0.0 [" in row
    heard = controls(run(Hearing(), Hearing(silence="you"), spoken("Red", "Blue")))
    assert "transcription.answered" in heard
    assert controls(SimpleNamespace(original=None, compressed=None)) == ""  # type: ignore[arg-type]
