"""`mmc check`: the same passes, worse fails, and what is missing is an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mmcompress.errors import UsageError
from mmcompress.evaluate.harness import read_results
from mmcompress.evaluate.store import write_evaluation
from mmcompress.jobs.check import Checked, Limits, _quotient, check
from mmcompress.jobs.check_reports import junit, markdown, write_markdown
from mmcompress.ops.statistics import Estimate
from tests.jobs.outputs import output, seen


def failed(checked: Checked) -> set[str]:
    return {case.kind for case in checked.failed}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return output(tmp_path / "base")


def test_the_same_run_passes_everything(base: Path) -> None:
    found = check(base, base)
    assert not found.failed
    assert {case.kind for case in found.cases} == {"accuracy", "latency", "size"}
    assert all(case.value == 0 for case in found.cases)


def test_lost_accuracy_fails_and_nothing_else(base: Path, tmp_path: Path) -> None:
    found = check(output(tmp_path / "worse", noise=3.4), base)
    assert failed(found) == {"accuracy"}
    assert found.cases[0].name in ("retrieval.image_to_text_r1", "retrieval.text_to_image_r1")
    assert found.cases[0].value == max(case.value for case in found.failed)  # the worst first


def test_better_never_fails(base: Path, tmp_path: Path) -> None:
    better = output(tmp_path / "better", noise=1.0, ratio=9.0, size=1_000_000)
    assert not check(better, base).failed


def test_a_drop_that_is_accepted_passes(base: Path, tmp_path: Path) -> None:
    worse = output(tmp_path / "worse", noise=3.4)
    assert not check(worse, base, Limits(max_drop=100)).failed


def test_a_drop_within_its_interval_passes(tmp_path: Path) -> None:
    """With eight samples no drop of one or two is beyond the interval."""
    paths = [tmp_path / "before.npz", tmp_path / "after.npz"]
    for path, noise in zip(paths, (2.2, 2.3), strict=True):
        write_evaluation(seen(noise, 8), path)
    assert not check(paths[1], paths[0]).failed


def test_a_slowdown_beyond_noise_fails(base: Path, tmp_path: Path) -> None:
    slower = output(tmp_path / "slower", ratio=1.8)
    found = check(slower, base)
    assert failed(found) == {"latency"}
    assert found.cases[0].value == pytest.approx(2.4 / 1.8 - 1)
    assert not check(slower, base, Limits(max_slowdown=0.5)).failed


def test_a_slowdown_within_noise_passes(base: Path, tmp_path: Path) -> None:
    """2.4 to 2.32 times is 3.4%; both are known to 3%, so their quotient to 3% * sqrt(2)."""
    assert not check(output(tmp_path / "run", ratio=2.32), base, Limits(max_slowdown=0)).failed


def test_growth_fails(base: Path, tmp_path: Path) -> None:
    larger = output(tmp_path / "larger", size=10_000_000)
    assert failed(check(larger, base)) == {"size"}
    assert not check(larger, base, Limits(max_growth=0.05)).failed


def test_a_missing_metric_is_an_error(base: Path, tmp_path: Path) -> None:
    for name, breaks in (("accuracy", "reports"), ("speeds", "speeds")):
        run = output(tmp_path / name)
        if breaks == "reports":
            for file in (run / "reports").iterdir():
                file.unlink()
        else:
            _edit(run, lambda document: document["measured"].pop("speeds"))
        with pytest.raises(UsageError, match="was not evaluated|was timed for base and not for"):
            check(run, base)
    run = output(tmp_path / "size")
    _edit(run, lambda document: document["measured"].pop("bytes"))
    with pytest.raises(UsageError, match="was weighed for base and not for size"):
        check(run, base)


def test_other_samples_are_an_error(base: Path, tmp_path: Path) -> None:
    write_evaluation(seen(2.3, 90), tmp_path / "other.npz")
    with pytest.raises(UsageError, match="90 samples|90"):
        check(tmp_path / "other.npz", base)


def test_nothing_to_compare_is_an_error(tmp_path: Path, base: Path) -> None:
    _edit(base, lambda document: document.update(measured={}))
    with pytest.raises(UsageError, match="was not measured"):
        check(base, base)
    for name in ("none", "plain.txt"):
        if name == "plain.txt":
            (tmp_path / name).write_text("?")
        with pytest.raises(UsageError):
            check(base, tmp_path / name)


def bench_document(p50: float, cpu: str = "one", ratio: float | None = None, width: float = 0.02) -> dict[str, Any]:
    def estimate(value: float) -> dict[str, Any]:
        return Estimate(value, value * (1 - width), value * (1 + width), 50).to_json()

    names = ["original", "small"] if ratio else ["small"]
    return {
        "kind": "bench",
        "machine": {"cpu": cpu, "threads": 2},
        "targets": [{"name": name, "bytes": 1000} for name in names],
        "results": [
            {"target": name, "tower": "vision", "batch": 1, "runner": "openvino", "p50_ms": estimate(p50)}
            for name in names
        ],
        "ratios": [
            {"target": "small", "tower": "vision", "batch": 1, "runner": runner, "ratio": estimate(ratio)}
            for runner in ("openvino", "best of each: torch against openvino")
            if ratio
        ],
    }


def bench_file(path: Path, **of: Any) -> Path:
    path.write_text(json.dumps(bench_document(**of)))
    return path


def test_absolute_times_of_benches(tmp_path: Path) -> None:
    before = bench_file(tmp_path / "a.json", p50=10.0)
    assert not check(before, before).failed
    assert failed(check(bench_file(tmp_path / "b.json", p50=13.0), before)) == {"latency"}
    with pytest.raises(UsageError, match="different machines"):
        check(bench_file(tmp_path / "c.json", p50=10.0, cpu="other"), before)


def test_ratios_of_benches_hold_on_another_machine(tmp_path: Path) -> None:
    """Twice as slow a machine with the same ratio is no slowdown."""
    before = bench_file(tmp_path / "a.json", p50=10.0, ratio=3.0)
    assert not check(bench_file(tmp_path / "b.json", p50=20.0, cpu="other", ratio=3.0), before).failed
    found = check(bench_file(tmp_path / "c.json", p50=10.0, ratio=2.0), before)
    assert len(found.failed) == 2
    assert found.failed[0].value == pytest.approx(0.5)


def test_a_quotient_of_estimates() -> None:
    """Both known to a factor of 1.1: the quotient is known to a factor of 1.1 ** sqrt(2)."""
    above, below = Estimate(20, 20 / 1.1, 20 * 1.1, 9), Estimate(10, 10 / 1.1, 10 * 1.1, 7)
    found = _quotient(above, below)
    factor = math.exp(math.sqrt(2) * math.log(1.1))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((2, 2 / factor, 2 * factor, 7))
    unbounded = _quotient(Estimate(20, -math.inf, math.inf, 1), below)
    assert (unbounded.low, unbounded.high) == (0, math.inf)


def test_limits_are_checked() -> None:
    for name in ("max_drop", "max_slowdown", "max_growth"):
        for value in (-1.0, math.nan, math.inf):
            with pytest.raises(UsageError, match=name.replace("_", "-")):
                Limits(**{name: value})


def test_junit_counts_and_names(base: Path, tmp_path: Path) -> None:
    found = check(output(tmp_path / "worse", noise=3.4, size=20_000_000), base)
    suite = ElementTree.fromstring(junit(found))
    assert int(suite.get("tests", "")) == len(found.cases) == len(suite)
    failures = [case for case in suite if case.find("failure") is not None]
    assert int(suite.get("failures", "")) == len(failures) == len(found.failed) == 3
    assert failures[0].get("classname") == "mmc.check.accuracy"


def test_names_cannot_break_out_of_the_reports(tmp_path: Path) -> None:
    strange = output(tmp_path / "a|b<img src=x>`", ratio=2.0)
    found = check(strange, strange)
    assert "<img" not in markdown(found)
    assert "a|b" not in markdown(found)
    ElementTree.fromstring(junit(found))


def test_markdown_goes_to_the_job_summary_too(base: Path, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("earlier\n")
    write_markdown(check(base, base), tmp_path / "new" / "table.md", {"GITHUB_STEP_SUMMARY": str(summary)})
    table = (tmp_path / "new" / "table.md").read_text()
    assert "passed: all" in table
    assert summary.read_text() == "earlier\n" + table


def _edit(directory: Path, change: Any) -> None:
    path = directory / "mmc.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_task_that_is_not_ours_is_compared_by_all_its_metrics(tmp_path: Path) -> None:
    for name, hits in (("before", 40), ("after", 10)):
        documents = [
            {"doc_id": i, "doc_hash": str(i), "filter": "none", "metrics": ["acc"], "acc": float(i < hits)}
            for i in range(40)
        ]
        found = read_results("lm-eval:legs", {"samples": {"legs": documents}}, seed=0)
        write_evaluation(found, tmp_path / f"{name}.npz")
    checked = check(tmp_path / "after.npz", tmp_path / "before.npz")
    assert [(case.name, case.value) for case in checked.failed] == [("lm-eval:legs.acc", pytest.approx(75))]
