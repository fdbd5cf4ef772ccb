"""bench, export, report and demo as commands, on tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mmcompress import demo as assets
from mmcompress.cli.check import Share
from mmcompress.cli.compress import tables
from mmcompress.cli.export import numbers, profile
from mmcompress.errors import UsageError
from mmcompress.evaluate.scene import Task
from mmcompress.evaluate.tasks import TASKS
from mmcompress.export.tensorrt import Profile
from mmcompress.jobs import demo as jobs
from mmcompress.recipe import read
from mmcompress.staging import free_name
from tests.cli.conftest import Mmc
from tests.jobs.outputs import output


def test_export_then_bench(mmc: Mmc, saved: Path, tmp_path: Path) -> None:
    made = mmc("export", saved, "-o", tmp_path / "onnx", "--tower", "text", "--check-batches", "1,3")
    assert made.code == 0
    assert "text.onnx" in made.out
    assert "next: mmc bench" in made.err
    words = ("bench", tmp_path / "onnx", tmp_path / "onnx", "--runner", "onnxruntime", "--rounds", "5", "--no-memory")
    shown = mmc(*words, "--save", tmp_path / "bench.json")
    assert shown.code == 0
    assert "x [" in shown.out.splitlines()[0]
    assert json.loads((tmp_path / "bench.json").read_text())["kind"] == "bench"
    gated = mmc(*words, "--require-speedup", "1000", "--json")
    assert gated.code == 3
    assert "at least 1000x is asked for" in gated.error
    assert len(gated.document["results"]) == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--opset", "99"), 2),
        (("--tower", "audio"), 2),
        (("--check-batches", "1,x"), 2),
        (("--to", "tensorrt", "--batch", "8:1:4"), 2),
        (("--to", "tensorrt", "--opset", "20"), 2),
        (("--to", "tensorrt", "--api", "tensorrt"), 4),
    ],
)
def test_an_export_that_cannot_be_made_leaves_nothing(
    words: tuple[str, ...], code: int, mmc: Mmc, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as where it is not installed
    found = mmc("export", saved, "-o", tmp_path / "made", *words)
    assert found.code == code
    assert found.error
    assert not list(tmp_path.iterdir())


def test_profiles_are_read() -> None:
    assert profile("1:8:32", "--batch") == Profile(1, 8, 32)
    assert profile("4", "--batch") == Profile(4, 4, 4)
    assert numbers("1,2,7", "--check-batches", ",") == (1, 2, 7)
    for text in ("1:2", "0:1:2", "a:b:c", ""):
        with pytest.raises(UsageError, match="--batch"):
            profile(text, "--batch")


def test_shares_are_read() -> None:
    assert Share().convert("5%", None, None) == pytest.approx(0.05)
    assert Share().convert("0.05", None, None) == 0.05


def test_report_prints_the_verdict_and_writes_the_page(mmc: Mmc, tmp_path: Path) -> None:
    run = output(tmp_path / "run")
    found = mmc("report", run, "-o", tmp_path / "pages" / "report.html")
    assert found.code == 0
    assert "accuracy drop beyond its interval" in found.out.splitlines()[0]
    assert (tmp_path / "pages" / "report.html").read_text().startswith("<!doctype html>")


GATED = """
data: {calibration: DATA, evaluation: DATA}
steps: [merge-tokens: {keep: 0.6}]
export: {threads: 1, rounds: 2}
gates: {max_size: SIZE}
"""


def test_a_failed_gate_shows_what_was_measured(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    for size, code, said in (("0.1", 3, "gate FAILED: size is 1.000"), ("1.0", 0, "gate passed: size is 1.000")):
        (tmp_path / "recipe.yaml").write_text(GATED.replace("DATA", str(data)).replace("SIZE", size))
        found = mmc("compress", saved, tmp_path / "recipe.yaml", "-o", tmp_path / "out")
        assert found.code == code
        assert "random selection" in found.out  # a finding
        for word in ("merge-tokens (random)", "image_to_text_r1", "vision MMACs", "times faster", said):
            assert word in found.out
    document = mmc(
        "compress", saved, tmp_path / "recipe.yaml", "-o", tmp_path / "b", "--set", "gates.max_size=0.1", "--json"
    )
    assert document.code == 3
    assert document.document["gates"][0]["passed"] is False


def test_tables_fit_a_terminal_of_100_columns(
    mmc: Mmc, saved: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number and no name is broken over two lines."""
    monkeypatch.setattr("mmcompress.cli.render.WIDTH", 100)
    found = mmc(
        "merge", saved, "-o", tmp_path / "out", "--keep", "0.6", "--eval-data", data, "--set", "export.rounds=2"
    )
    assert found.code == 0
    assert "image_to_text_r1" in found.out.split("Accuracy")[1]
    assert "text_to_image_r1" in found.out.split("Accuracy")[1]
    accuracy = found.out.split("Accuracy after each step")[1].splitlines()
    assert any(
        line.startswith("merge-tokens (random)") and line.count("[") == line.count("]") == 2 for line in accuracy
    )


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_tasks_headline_is_shown(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    """Of models that answer too, for whom no metric ends in r1."""
    row = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    measured = {f"{task.name}.{task.headlines[0]}": row, f"{task.name}.something": row}
    tables({"verdict": [], "stages": [{"stage": "original", "metrics": measured}], "speeds": [], "gates": []})
    said = capsys.readouterr().out
    assert task.headlines[0] in said
    assert "something" not in said


def test_quiet_is_quiet_and_verbose_names_the_stages(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    words = ("merge", saved, "--keep", "0.6", "--eval-data", data, "--set", "export.rounds=2")
    assert mmc(*words, "-o", tmp_path / "a", "-q").err == ""
    assert mmc("inspect", saved, "-q").err == ""
    assert "embedding images" not in mmc(*words, "-o", tmp_path / "b").err
    assert "embedding images" in mmc(*words, "-o", tmp_path / "c", "-v").err


def test_tracebacks_are_shown_when_asked_for(mmc: Mmc, tmp_path: Path) -> None:
    for words, shown in (("-v",), False), (("-vv",), True), (("-v", "-v"), True), (("--verbose", "-v"), True):
        assert ("Traceback" in mmc("inspect", tmp_path / "nowhere", *words).err) == shown


def test_files_are_saved_into_new_folders(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    assert mmc("eval", saved, "--data", data, "--save", tmp_path / "new" / "a.npz").code == 0
    assert (tmp_path / "new" / "a.npz").exists()


def test_a_dry_run_says_what_would_be_done(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    words = ("merge", saved, "-o", tmp_path / "out", "--keep", "0.6", "--eval-data", data, "--dry-run")
    found = mmc(*words)
    assert "merge-tokens  keep=0.6" in found.out
    assert "MiB of disk while it runs" in found.out
    assert mmc(*words, "--json").document["steps"][0]["params"] == {"keep": 0.6}
    assert not (tmp_path / "out").exists()


def test_a_second_demo_finds_a_free_name(tmp_path: Path) -> None:
    assert free_name(tmp_path / "demo").name == "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert free_name(tmp_path / "demo").name == "demo-3"


def test_the_demo_recipe_has_all_four_passes() -> None:
    assert [step.name for step in read(assets.RECIPE).steps] == ["prune", "merge-tokens", "distill", "quantize"]


def test_the_demo_on_a_tiny_model(
    mmc: Mmc, saved: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of `mmc demo`, on a model and six pictures that take seconds."""
    real = jobs.demo
    monkeypatch.setattr(jobs, "demo", lambda *rest, **more: real(*rest, **{**more, "model": str(saved)}))
    settings = {
        "data.calibration": data, "data.evaluation": data, "distill.max_minutes": 0.02, "distill.batch_size": 3,
        "export.rounds": 3, "export.runners": "[onnxruntime]", "quantize.min_cosine": 0.5, "quantize.embeddings": "false",
    }  # fmt: skip
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    found = mmc("demo", "-o", tmp_path / "out" / "demo", *changes)
    assert found.code == 0, found.err
    made = tmp_path / "out" / "demo"
    assert sorted(path.name for path in made.iterdir()) == ["compressed", "report.html"]
    assert (made / "compressed" / "onnx" / "vision.onnx").exists()
    *_, first, second, third = found.out.strip().splitlines()
    assert all(line.strip().startswith("mmc ") for line in (first, second, third))
    assert str(made / "report.html") in found.out
    assert "prune (random)" in (made / "report.html").read_text()
    gated = mmc("demo", "-o", tmp_path / "gated", *changes, "--set", "gates.max_size=0.01", "--set", "export.to=''")
    assert gated.code == 3
    assert "gate FAILED: size is" in gated.out
    assert "the demo keeps nothing" in gated.err
    assert not (tmp_path / "gated").exists()


def test_the_demo_without_its_model(mmc: Mmc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.weights.CLIP", tmp_path / "none")
    found = mmc("demo", "-o", tmp_path / "out")
    assert found.code == 4
    assert "not part of this installation" in found.error
    assert not list(tmp_path.iterdir())


def test_how_a_budget_was_split_is_shown(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    words = (
        "prune",
        saved,
        "-o",
        tmp_path / "out",
        "--ratio",
        "0.2",
        "--score",
        "obs",
        "--allocate",
        "even",
        "--data",
        data,
    )
    done = mmc(*words)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    start = lines.index("How the budget was split")
    heads = [line.split() for line in lines[start + 2 : start + 6]]
    assert [row[1:5] for row in heads] == [
        ["vision", "heads", "12", "9"],
        ["vision", "neurons", "288", "216"],
        ["text", "heads", "8", "6"],
        ["text", "neurons", "128", "96"],
    ]
    assert [row[5] for row in heads] == ["0.250"] * 4
