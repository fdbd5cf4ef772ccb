"""A run that is killed anywhere and resumed ends in the same bytes; a run that fails leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mmcompress import checkpoint
from mmcompress.errors import GateFailed, UsageError
from mmcompress.jobs.compress import compress
from mmcompress.pipeline import Workplace
from mmcompress.recipe import parse
from mmcompress.staging import partial_path
from tests import tiny
from tests.processes import PROCESSES

STEPS = [
    {"prune": {"ratio": 0.3}},
    {"merge-tokens": {"keep": 0.6}},
    {"distill": {"steps": 4, "batch_size": 4, "save_minutes": 0}},
    {"quantize": {"scheme": "W8A8"}},
]


class Fuse:
    """Progress that kills its own process at the event number `at`, and counts events otherwise."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.seen = at, 0

    def _event(self) -> None:
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1

    def start(self, label: str, total: int | None) -> None:
        self._event()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._event()

    def finish(self) -> None:
        self._event()

    def say(self, line: str) -> None:
        self._event()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("model")
    checkpoint.save(tiny.bundle("dual_encoder_dinov2"), home / "model")
    (home / "model/mmc.json").unlink()  # as if it came from elsewhere
    data = home / "data"
    data.mkdir()
    rows = []
    for sample in tiny.dataset(16):
        sample.image.save(data / f"{sample.key}.png")
        rows.append({"file_name": f"{sample.key}.png", "text": f"{sample.texts[0]} {sample.key}"})
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home / "model"


def recipe(model: Path, steps: list[dict[str, object]] | None = None, **more: object) -> object:
    data = {"calibration": str(model.parent / "data"), "evaluation": str(model.parent / "data"), "batch_size": 8}
    return parse({"steps": steps or STEPS, "data": data, "export": {"threads": 1, "rounds": 3}, **more})


def content(directory: Path) -> dict[str, object]:
    """Every file's bytes; of mmc.json all but the seconds, the one thing that may differ."""
    found: dict[str, object] = {}
    for file in sorted(directory.rglob("*")):
        if file.name == "mmc.json":
            document = json.loads(file.read_text())
            for record in document["records"]:
                record.pop("seconds")
                record["facts"] = {k: v for k, v in record["facts"].items() if "second" not in k}
            found[file.name] = document
        elif file.is_file():
            found[str(file.relative_to(directory))] = file.read_bytes()
    return found


def run_until(at: int, model: Path, output: Path) -> None:
    """Compress as `recipe` says, until the event number `at` kills this process."""
    compress(model, recipe(model), output, progress=Fuse(at))


def kill_at(at: int, model: Path, output: Path) -> None:
    """Have another process compress and be killed on its way."""
    process = PROCESSES.Process(target=run_until, args=(at, model, output))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], int]:
    output, fuse = tmp_path_factory.mktemp("whole") / "out", Fuse()
    compress(model, recipe(model), output, progress=fuse)
    assert [p.name for p in output.parent.iterdir()] == ["out"]
    return content(output), fuse.seen


@pytest.mark.parametrize("share", [0.02, 0.12, 0.25, 0.4, 0.55, 0.65, 0.75, 0.85, 0.97])
def test_killed_anywhere_and_resumed_ends_in_the_same_bytes(
    share: float, model: Path, uninterrupted: tuple[dict[str, object], int], tmp_path: Path
) -> None:
    want, events = uninterrupted
    output = tmp_path / "out"
    at = int(share * events)
    kill_at(at, model, output)
    assert not output.exists()
    assert partial_path(output).exists()
    with pytest.raises(UsageError, match="interrupted run") as caught:
        compress(model, recipe(model), output)
    assert "--resume" in caught.value.hint
    compress(model, recipe(model), output, resume=True)
    got = content(output)
    assert sorted(got) == sorted(want)
    for name in want:
        assert got[name] == want[name], name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_recipe_does_not_resume(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    kill_at(9, model, output)
    with pytest.raises(UsageError, match="another one: recipe changed"):
        compress(model, recipe(model, [{"prune": {"ratio": 0.5}}]), output, resume=True)


def test_a_mistake_in_the_last_step_is_found_before_the_first_runs(model: Path, tmp_path: Path) -> None:
    fuse = Fuse()
    with pytest.raises(UsageError, match="ratio"):
        compress(model, recipe(model, [*STEPS, {"prune": {"ratio": 1.5}}]), tmp_path / "out", progress=fuse)
    assert list(tmp_path.iterdir()) == []
    assert fuse.seen == 0


def test_an_existing_output_is_refused_before_anything_runs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        compress(model, recipe(model), tmp_path / "out")


def test_a_failed_gate_keeps_the_result_aside(model: Path, tmp_path: Path) -> None:
    made = recipe(model, [{"merge-tokens": {"keep": 0.6}}], gates={"max_size": 0.001})
    with pytest.raises(GateFailed, match="size is") as caught:
        compress(model, made, tmp_path / "out")
    assert "out.rejected" in caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.rejected"]
    with pytest.raises(GateFailed) as caught:
        compress(model, made, tmp_path / "out")
    assert "out.rejected-2" in caught.value.hint
    assert (tmp_path / "out.rejected" / "mmc.json").exists()


class Lines(Fuse):
    """What was said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"tasks": ["retrival"]}, "no task 'retrival'"),
        ({"export": {"to": "onnx", "runners": ["onxruntime"]}}, "no runner 'onxruntime'"),
        ({"gates": {"max_drop": {"retrieval.r1": 0.1}}}, "names 'retrieval.r1', which is not measured"),
    ],
)
def test_what_could_only_fail_after_the_last_step_is_refused_before_the_first(
    more: dict[str, object], error: str, model: Path, tmp_path: Path
) -> None:
    heard = Lines()
    with pytest.raises(UsageError, match=error):
        compress(model, recipe(model, STEPS[:1], **more), tmp_path / "out", progress=heard)
    assert not any(line.startswith("step") for line in heard.said)
    assert list(tmp_path.iterdir()) == []


def test_a_gate_on_what_is_not_measured_is_refused_before_the_first_step(model: Path, tmp_path: Path) -> None:
    unmeasured = {"calibration": str(model.parent / "data")}
    for steps, gates, data, error in (
        (STEPS[:1], {"max_drop": {"retrieval.image_to_text_r1": 0.1}}, unmeasured, "accuracy is not measured"),
        (STEPS[:1], {"min_speedup": 1.5}, unmeasured, "nothing is timed"),
        (STEPS[3:], {"min_speedup": 1.5}, {**unmeasured, "evaluation": str(model.parent / "data")}, "nothing is timed"),
    ):
        heard = Lines()
        with pytest.raises(UsageError, match=error):
            compress(model, parse({"steps": steps, "data": data, "gates": gates}), tmp_path / "out", progress=heard)
        assert not any(line.startswith("step") for line in heard.said)


def test_a_step_is_announced_once_and_not_again_by_its_control(model: Path, tmp_path: Path) -> None:
    heard = Lines()
    compress(model, recipe(model, STEPS[:2]), tmp_path / "out", progress=heard)
    assert [line for line in heard.said if line.startswith(("step", "control"))] == [
        "step 1 of 2: prune",
        "control: prune with a random selection",
        "step 2 of 2: merge-tokens",
        "control: merge-tokens with a random selection",
    ]


def test_size_is_compared_with_the_model_given_even_where_that_is_an_output(model: Path, tmp_path: Path) -> None:
    """As accuracy and speed are: the first run's gain is not told twice."""
    compress(model, recipe(model, [{"prune": {"ratio": 0.5}}]), tmp_path / "pruned")
    result = compress(tmp_path / "pruned", recipe(model, [{"merge-tokens": {"keep": 0.6}}]), tmp_path / "merged")
    given = (tmp_path / "pruned" / "model.safetensors").stat().st_size
    assert result.manifest.measured["bytes"] == {"original": given, "compressed": given}
    assert any("as large as the original" in finding.text for finding in result.findings)


def test_agreement_may_be_asked_for(model: Path, tmp_path: Path) -> None:
    made = recipe(model, [{"merge-tokens": {"keep": 0.6}}], tasks=["retrieval", "agreement"])
    result = compress(model, made, tmp_path / "out")
    assert "agreement.top1" in result.rows[1]["metrics"]


def test_a_pickle_that_was_allowed_serves_the_control_too(model: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled)
    bundle = checkpoint.load(model)
    (pickled / "model.safetensors").unlink()
    torch.save(bundle.model.state_dict(), pickled / "pytorch_model.bin")
    result = compress(pickled, recipe(model, [{"merge-tokens": {"keep": 0.6}}]), tmp_path / "out", allow_pickle=True)
    assert [row["stage"] for row in result.rows] == ["original", "merge-tokens", "merge-tokens (random)"]


def test_an_error_names_the_step_and_what_had_run(model: Path, tmp_path: Path) -> None:
    twice = [{"merge-tokens": {"keep": 0.6}}, {"merge-tokens": {"keep": 0.5}}]
    with pytest.raises(UsageError, match=r"step 2, merge-tokens \(after merge-tokens\): .*merges tokens already"):
        compress(model, recipe(model, twice), tmp_path / "out")


def test_random_selection_is_measured_beside_what_selects(model: Path, tmp_path: Path) -> None:
    result = compress(model, recipe(model, STEPS[:2]), tmp_path / "out")
    stages = [row["stage"] for row in result.rows]
    assert stages == ["original", "prune", "prune (random)", "merge-tokens", "merge-tokens (random)"]
    assert any("random selection" in finding.text for finding in result.findings)


def test_two_runs_do_not_share_an_output(model: Path, tmp_path: Path) -> None:
    partial = partial_path(tmp_path / "out")
    running = Workplace(partial, {"seed": 0}, resume=False)
    for resume in (False, True):
        with pytest.raises(UsageError, match="another run is writing"):
            Workplace(partial, {"seed": 0}, resume)
    running.close()
    with pytest.raises(UsageError, match="an interrupted run"):
        Workplace(partial, {"seed": 0}, resume=False)
    Workplace(partial, {"seed": 0}, resume=True).remove()
    assert not partial.exists()
