"""The matrix of passes and families is what the passes say."""

from __future__ import annotations

from typing import ClassVar

import pytest

from bench import matrix
from mmcompress import passes
from mmcompress.errors import UsageError
from mmcompress.families import FAMILIES
from mmcompress.passes.prune import Prune
from tests import tiny


def test_every_class_and_every_pass_is_in_it(found: list[matrix.Row]) -> None:
    assert {label.split(" ")[0] for label, _, _ in found} == {
        name for family in FAMILIES.values() for name in family.architectures
    }
    assert {name for name, _ in matrix.COLUMNS.values()} == set(passes.PASSES)
    assert all(set(answers) == {*matrix.COLUMNS, matrix.EXPORT} for _, _, answers in found)


def test_a_row_by_hand(found: list[matrix.Row]) -> None:
    (_, towers, answers) = next(row for row in found if row[0] == "ClapModel")
    assert towers == ("audio", "text")
    assert answers["prune heads"] == answers["quantize"] == {"audio": "", "text": ""}
    assert answers["prune blocks"]["text"] == ""
    assert "pairs" in answers["prune blocks"]["audio"]
    line = next(line for line in matrix.section(found).splitlines() if line.startswith("| `ClapModel`"))
    assert line.startswith("| `ClapModel` | audio, text | ✓ | audio <sup>")


def test_a_setting_that_no_graph_can_say_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.bundle("blip")
    made.model.generation_config.repetition_penalty = 1.2
    monkeypatch.setattr(tiny, "EVERY", ("blip",))
    monkeypatch.setattr(tiny, "bundle", lambda _name: made)
    assert "sets repetition_penalty to 1.2" in matrix.section()


def test_a_pass_that_starts_to_refuse_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fussy(Prune):
        name: ClassVar[str] = "prune"

        def check(self, bundle: object) -> None:
            raise UsageError("not on a Sunday", hint="wait")

    monkeypatch.setattr(tiny, "EVERY", ("clip",))
    before = matrix.section()
    monkeypatch.setattr("mmcompress.passes.prune.Prune", Fussy)
    after = matrix.section()
    assert "not on a Sunday" in after
    assert before != after
