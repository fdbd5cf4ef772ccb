"""The report: complete, self-contained, harmless whatever names it is given, and labels that do not collide."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from mmcompress.errors import UsageError
from mmcompress.jobs.report import write_report
from mmcompress.jobs.report_html import VOID, breakable, tag
from mmcompress.jobs.report_plots import (
    HEIGHT,
    WIDTH,
    Kind,
    Point,
    front,
    nice_step,
    pareto_plot,
    place_labels,
    scales,
    side_by_side,
)
from tests.jobs.outputs import output


class Reader(HTMLParser):
    """Collects elements, attributes and text, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


@pytest.fixture
def page(tmp_path: Path) -> Reader:
    write_report([output(tmp_path / "half")], tmp_path / "report.html")
    return read(tmp_path / "report.html")


def test_nothing_is_fetched_from_anywhere(tmp_path: Path, page: Reader) -> None:
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "onload", "onclick", "action"}
    assert not set(page.tags) & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    text = (tmp_path / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?:|//[a-z]", text)


def test_the_verdict_comes_first_the_worst_on_top(page: Reader) -> None:
    order = [
        page.text.index(word)
        for word in ("Verdict", "accuracy drop beyond", "faster than", "Accuracy against cost", "Steps")
    ]
    assert order == sorted(order)


def test_all_that_was_recorded_is_there(page: Reader) -> None:
    for said in (
        "clip → prune → merge-tokens → distill → quantize",
        "prune (random)",
        "8.92",  # 21.4 ms / 2.4
        "patch_embedding",
        "2.10e-03",
        "size is 0.200 of the original's",
        "ab" * 32,
        '{"ratio": 0.3}',
        "A Processor",
        "torch 2.13.0",
        "does not give this model",
        "mmc compress clip recipe.yaml -o OUT",
    ):
        assert said in page.text, said
    assert page.tags.count("svg") == 4


def test_a_strange_name_is_only_text(tmp_path: Path) -> None:
    strange = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    run = output(tmp_path / "a<b>&'\"", source=strange)
    document = json.loads((run / "mmc.json").read_text())
    document["measured"]["verdict"][0]["text"] = strange
    document["measured"]["stages"][1]["stage"] = strange
    document["records"][0]["params"] = {strange: strange}
    (run / "mmc.json").write_text(json.dumps(document))
    (run / "recipe.yaml").write_text(strange)
    write_report([run], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert not set(page.tags) & {"script", "img"}
    assert page.text.count(strange) >= 5
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_an_attribute_cannot_end_early() -> None:
    assert tag("p", class_='"><script>') == '<p class="&quot;&gt;&lt;script&gt;"></p>'


def test_long_names_may_be_broken_and_still_read_the_same() -> None:
    assert breakable("a.b_c<d") == "a.<wbr/>b_<wbr/>c&lt;d"


def test_several_runs_share_a_page(tmp_path: Path) -> None:
    runs = [output(tmp_path / "half"), output(tmp_path / "quarter", noise=3.6, ratio=3.9)]
    write_report(runs, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "half: verdict" in page.text
    assert "quarter: verdict" in page.text
    assert page.text.index("quarter: verdict") < page.text.index("half: steps")


def test_a_run_without_measurements_says_so(tmp_path: Path) -> None:
    run = output(tmp_path / "run")
    document = json.loads((run / "mmc.json").read_text())
    (run / "mmc.json").write_text(json.dumps({**document, "measured": {}}))
    write_report([run], tmp_path / "report.html")
    assert "nothing was measured" in read(tmp_path / "report.html").text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = output(tmp_path / "run")
    write_report([run], tmp_path / "one.html")
    write_report([run], tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


@pytest.mark.parametrize(
    "damage", [{"stages": 5}, {"stages": [{}]}, {"verdict": ["bad"]}, {"speeds": [{"tower": "v"}]}]
)
def test_a_damaged_run_leaves_no_page(tmp_path: Path, damage: dict[str, object]) -> None:
    run = output(tmp_path / "run")
    document = json.loads((run / "mmc.json").read_text())
    document["measured"].update(damage)
    (run / "mmc.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="unexpected form"):
        write_report([run], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no mmc\.json"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")


def point(label: str, x: float, y: float, kind: Kind = "step", half: float = 0.03) -> Point:
    return Point(label, x, y, y - half, y + half, kind)


CROWDED = [
    point("original", 100, 0.62, "original"),
    point("prune", 70, 0.55),
    point("prune (random)", 70, 0.46, "random"),
    point("merge-tokens", 52, 0.53),
    point("merge-tokens (random)", 52, 0.48, "random"),
    point("distill", 52, 0.6),
    point("quantize", 52, 0.59),
]


TOGETHER = [point(f"equally good {number}", 30, 0.57 + number / 2000, half=0.01) for number in range(4)]
"""Each one's nearest free place is also its neighbour's."""


def test_labels_do_not_cover_each_other_or_a_point() -> None:
    points = [*CROWDED, *TOGETHER]
    x, y = scales(points)
    spots = side_by_side(points, x, y)
    labels = place_labels(points, spots, y)
    boxes = [label.box for label in labels]
    for index, box in enumerate(boxes):
        assert box.left >= 0
        assert box.right <= WIDTH
        assert box.top >= 0
        assert box.bottom <= HEIGHT
        assert not [other for other in boxes[:index] if box.overlap(other)]
        for across, down in spots:
            assert not (box.left < across < box.right and box.top < down < box.bottom)


def test_points_of_one_cost_stand_side_by_side() -> None:
    x, y = scales(CROWDED)
    spots = side_by_side(CROWDED, x, y)
    across = sorted(spot[0] for spot in spots)
    assert min(b - a for a, b in pairwise(across)) > 5
    alone = CROWDED.index(CROWDED[0])
    assert spots[alone][0] == x(100)
    same = [spots[index][0] for index in (3, 4, 5, 6)]
    assert sum(same) / 4 == pytest.approx(x(52))


def test_the_front_is_what_nothing_beats() -> None:
    """By cost: 30 is the cheapest; 52 is better than it; 60 is dearer and worse than 52; 100 is the best."""
    points = [point("d", 100, 0.9), point("a", 30, 0.2), point("c", 60, 0.4), point("b", 52, 0.5), point("e", 52, 0.3)]
    assert [found.label for found in front(points)] == ["a", "b", "d"]


def test_the_original_is_marked_and_controls_are_hollow() -> None:
    drawn = pareto_plot("title", "cost", "metric", CROWDED)
    assert drawn.count('class="original"') == 1
    assert drawn.count("<rect") == 1
    assert drawn.count('class="random"') == 2
    assert drawn.count('class="whisker random"') == 6


def test_an_unbounded_interval_draws_no_whisker() -> None:
    alone = [point("a", 1, 0.5), Point("b", 2, 0.5, -math.inf, math.inf, "step")]
    drawn = pareto_plot("title", "cost", "metric", alone)
    assert drawn.count("whisker") == 3
    assert "nan" not in drawn
    assert 'y1="inf' not in drawn


def test_equal_costs_give_no_plot() -> None:
    assert not pareto_plot("title", "cost", "metric", [point("a", 5, 0.1), point("b", 5, 0.2)])


@pytest.mark.parametrize(("rough", "step"), [(0.7, 0.5), (1.0, 1.0), (4.9, 2.0), (5.0, 5.0), (0.023, 0.02), (812, 500)])
def test_ticks_are_round(rough: float, step: float) -> None:
    assert nice_step(rough) == pytest.approx(step)
