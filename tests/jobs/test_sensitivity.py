"""What was judged, as rows, as a drawing and as what has to be said."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mmcompress.jobs.report_sensitivity import LINE, SHOWN, TOP, dots, shortened
from mmcompress.jobs.sensitivity import Row, judged_groups, mixed_findings
from mmcompress.manifest import Record


def record(plan: dict[str, Any], name: str = "quantize") -> Record:
    return Record(name, {}, plan, seconds=1.0)


def options(*given: tuple[str, str, int, float, bool]) -> list[dict[str, Any]]:
    keys = ("layers", "scheme", "bytes_saved", "loss", "chosen")
    return [dict(zip(keys, each, strict=True)) for each in given]


MIXED = {
    "towers": {
        "vision": {
            "scheme": "AUTO",
            "cosine": 0.99,
            "options": options(
                ("blocks.0.mlp", "W4A16", 300, 0.02, False),
                ("blocks.0.mlp", "W8A16", 200, 0.0001, True),
                ("blocks.0.mlp", "W16A16", 0, 0.0, False),
                ("head", "W4A16", 30, 0.003, True),
                ("head", "W16A16", 0, 0.0, False),
            ),
        }
    }
}


def test_rows_are_the_worst_first_and_without_floats() -> None:
    assert [
        (row.layers, row.scheme, row.bytes_saved, row.loss, row.chosen) for row in judged_groups([record(MIXED)])
    ] == [
        ("blocks.0.mlp", "W4A16", 300, 0.02, False),
        ("head", "W4A16", 30, 0.003, True),
        ("blocks.0.mlp", "W8A16", 200, 0.0001, True),
    ]
    assert judged_groups([record(MIXED, "prune")]) == []


def test_older_records_have_neither_bytes_nor_several_schemes() -> None:
    plan = {"towers": {"text": {"scheme": "W8A8", "sensitivity": {"a": 0.1, "b": 0.2}, "kept_float": ["b"]}}}
    assert judged_groups([record(plan)]) == [
        Row("text", "b", "W8A8", None, 0.2, False),
        Row("text", "a", "W8A8", None, 0.1, True),
    ]


@pytest.mark.parametrize(
    ("kept", "level", "said"),
    [
        ("auto", "good", "auto loses less than any one scheme for all layers: 1 - cosine 2.00e-03 within bits 5"),
        ("uniform W4A16", "bad", "auto is NO BETTER than one scheme for all layers"),
    ],
)
def test_findings_say_which_was_better(kept: str, level: str, said: str) -> None:
    mixed = {"budget": {"bits": 5.0}, "kept": kept, "measured_loss": 0.002, "uniform_loss": {"W4A16": 0.001}}
    (found,) = mixed_findings([record({"mixed": mixed})])
    assert found.level == level
    assert said in found.text
    assert "W4A16 1.00e-03" in found.text
    if kept != "auto":
        assert found.text.endswith("uniform W4A16 was kept")


def test_what_was_drawn_at_random_is_no_finding() -> None:
    assert mixed_findings([record({"mixed": {"budget": {"bits": 5.0}, "assigned": "random"}}), record({})]) == []


def test_a_line_for_each_group_and_a_filled_dot_for_what_it_has() -> None:
    drawing = dots("vision", judged_groups([record(MIXED)]))
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+" class="([^"]+)"', drawing)
    assert [style for _, _, style in circles[:2]] == ["run0", "run1"]  # the legend
    placed = {(float(y), style): float(x) for x, y, style in circles[2:]}
    first, second = TOP + LINE / 2, TOP + 1.5 * LINE
    assert set(placed) == {(first, "run0 open"), (first, "run1"), (second, "run0")}
    assert placed[first, "run1"] < placed[second, "run0"] < placed[first, "run0 open"]
    # Decades are equally wide: 0.02 and 0.003 are 0.824 of one apart, 0.02 and 0.0001 2.301.
    near = placed[first, "run0 open"] - placed[second, "run0"]
    far = placed[first, "run0 open"] - placed[first, "run1"]
    assert far / near == pytest.approx(2.30103 / 0.823909, rel=0.01)


def test_many_groups_are_cut_and_said_to_be() -> None:
    many = [Row("text", f"blocks.{index}.mlp", "W8A16", 1, 0.01 / (index + 1), True) for index in range(SHOWN + 5)]
    drawing = dots("text", many)
    assert f"the worst {SHOWN} of {SHOWN + 5}" in drawing
    assert f">{SHOWN - 1}.mlp<" in drawing
    assert f">{SHOWN}.mlp<" not in drawing
    assert dots("text", many[:1]) == ""


def test_names_lose_what_all_begin_with_and_what_does_not_fit() -> None:
    assert shortened(["a.b.0.mlp", "a.b.1.mlp"]) == {"a.b.0.mlp": "0.mlp", "a.b.1.mlp": "1.mlp"}
    assert shortened(["head", "body.mlp"]) == {"head": "head", "body.mlp": "body.mlp"}
    long = f"{'x' * 40}.{'y' * 20}.mlp"
    assert shortened([long, "head"])[long] == f"…{'y' * 20}.mlp"


def test_losses_of_0_are_drawn_at_the_left_end() -> None:
    assert "<svg" in dots("text", [Row("text", "a", "W8A16", 1, 0.0, True), Row("text", "b", "W8A16", 1, 0.1, True)])
