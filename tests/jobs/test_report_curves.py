"""Accuracy by tokens kept, in the report of several runs."""

from __future__ import annotations

import re
from pathlib import Path

from mmcompress.jobs.compress import compress
from mmcompress.jobs.report import write_report
from mmcompress.jobs.report_curves import GREY, Curve, curves
from mmcompress.ops.statistics import Estimate
from mmcompress.recipe import parse
from tests import tiny


def score(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, 50)


def test_a_line_for_each_method_and_a_mark_for_each_share() -> None:
    whole = score(0.8)
    made = curves(
        "Title",
        "R@1",
        [
            Curve("tome", {1.0: whole, 0.5: score(0.7), 0.25: score(0.4)}),
            Curve("random", {1.0: whole, 0.5: score(0.3)}),
        ],
    )
    assert made.count("<polyline") == 2
    assert made.count("<circle") == 5
    assert made.count(f'stroke="{GREY}" stroke-width="1.6" stroke-dasharray="6 4"') == 1
    # More is higher, and more tokens are further to the right.
    lines = re.findall(r'points="([^"]+)"', made)
    tome = [tuple(map(float, spot.split(","))) for spot in lines[0].split()]
    assert [x for x, _ in tome] == sorted(x for x, _ in tome)
    assert [y for _, y in tome] == sorted((y for _, y in tome), reverse=True)
    assert not curves("Title", "R@1", [Curve("tome", {1.0: whole})])


def test_the_report_of_runs_at_several_shares_has_them(tmp_path: Path) -> None:
    folder = tiny.write_pairs(tmp_path / "data", 12)
    for keep in (0.8, 0.6):
        recipe = parse(
            {"steps": [{"merge-tokens": {"keep": keep}}], "tasks": ["retrieval"], "data": {"evaluation": str(folder)}}
        )
        compress(tiny.bundle("clip"), recipe, tmp_path / f"keep-{keep}")
    write_report([tmp_path / "keep-0.8", tmp_path / "keep-0.6"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy by tokens kept: merge-tokens" in page
    figure = page[page.index("Accuracy by tokens kept: merge-tokens") :]
    assert figure[: figure.index("</svg>")].count("<circle") == 6
    write_report([tmp_path / "keep-0.8"], tmp_path / "one.html")
    assert "Accuracy by tokens kept" not in (tmp_path / "one.html").read_text()
