"""The whole of `mmc compress` (and of prune, merge, quantize, distill, which are recipes of one step).

    load -> evaluate the original -> steps, each measured and set beside a random selection -> export and time the final
    artifact -> verdict -> gates -> publish

Everything is written under a hidden directory beside the output and renamed at the end; a killed run resumes there.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mmcompress
from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, open_data
from mmcompress.errors import GateFailed, MmcError
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.evaluate.findings import Finding
from mmcompress.evaluate.store import read_evaluation, write_evaluation
from mmcompress.evaluate.verdict import Facts, Speed, random_findings, verdict
from mmcompress.jobs.gates import GateResult, judge
from mmcompress.jobs.speed import TowerSpeed, compare_exports, compare_in_torch
from mmcompress.manifest import Manifest
from mmcompress.measure.cost import cost_of
from mmcompress.measure.machine import machine_facts, usable_cores
from mmcompress.passes.base import Context
from mmcompress.pipeline import Stage, Workplace
from mmcompress.progress import Progress, Silent
from mmcompress.recipe import Recipe
from mmcompress.staging import partial_path, publish, refuse_existing

ORIGINAL = "00-original"


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    output: Path
    manifest: Manifest
    findings: tuple[Finding, ...]
    rows: tuple[dict[str, Any], ...]
    """One row per stage, the original first: parameters, MACs per tower, headline metrics."""
    speeds: tuple[TowerSpeed, ...] = ()
    gates: tuple[GateResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the document of ``--json``."""
        return {
            "output": str(self.output),
            "verdict": [finding.to_json() for finding in self.findings],
            "stages": list(self.rows),
            "speeds": [speed.to_json() for speed in self.speeds],
            "gates": [dataclasses.asdict(gate) for gate in self.gates],
            "plain_transformers": self.manifest.plain_transformers,
            "why": self.manifest.why,
        }


@dataclass
class _Run:
    """What the measurements of one run need to share."""

    original: Bundle | str | Path
    recipe: Recipe
    place: Workplace
    context: Context
    evaluation_data: Dataset | None
    reference: Evaluation | None = None
    last: Evaluation | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    control_findings: list[Finding] = field(default_factory=list)

    def fresh(self) -> Bundle:
        """Load the original again: the teacher of distillation, and the start of a control of the first step."""
        return _load(self.original, self.recipe.device)


def compress(
    model: str | Path | Bundle,
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Run `recipe` on `model` and write the result to `output`.

    Raises UsageError for a bad model, recipe, data or an existing output, and GateFailed when a gate fails; the refused result
    then lies beside `output`, named in the hint.
    """
    output, progress = Path(output), progress or Silent()
    refuse_existing(output)
    todo = pipeline.stages(recipe.steps)
    bundle = _load(model, recipe.device, allow_pickle)
    data = open_data(recipe.data.calibration) if recipe.data.calibration else None
    evaluation_data = _evaluation_data(recipe)
    place = Workplace(partial_path(output), _identity(bundle, recipe, data, evaluation_data), resume)
    context = Context(
        data=data,
        num_samples=recipe.data.num_samples,
        batch_size=recipe.data.batch_size,
        seed=recipe.seed,
        progress=progress,
    )
    run = _Run(model, recipe, place, context, evaluation_data)
    run.context = dataclasses.replace(context, teacher=run.fresh)
    try:
        _measure_stage(run, ORIGINAL, bundle)
        run.reference = run.last
        bundle = pipeline.run(bundle, todo, run.context, place, after=lambda *stage: _after(run, *stage))
        return _finish(run, bundle, output)
    except (MmcError, OSError):
        # Going on would fail the same way. What was killed or crashed stays, to be resumed.
        place.remove()
        raise


def follow(model: str | Path, recipe: Recipe, output: str | Path, *, allow_pickle: bool = False) -> None:
    """Take part in a run that another process leads (torchrun, accelerate launch): same steps, nothing measured or written."""
    todo = pipeline.stages(recipe.steps)
    context = Context(
        data=open_data(recipe.data.calibration) if recipe.data.calibration else None,
        num_samples=recipe.data.num_samples,
        batch_size=recipe.data.batch_size,
        seed=recipe.seed,
        teacher=lambda: _load(model, recipe.device),
    )
    place = Workplace.join(partial_path(Path(output)))
    pipeline.run(_load(model, recipe.device, allow_pickle), todo, context, place, leads=False)


def _finish(run: _Run, bundle: Bundle, output: Path) -> Result:
    """Export and time the artifact, judge it, and let it appear under `output`."""
    recipe, place = run.recipe, run.place
    final = place.directory / "final"
    shutil.rmtree(final, ignore_errors=True)
    speeds: tuple[TowerSpeed, ...] = ()
    exported: Path | None = None
    machine = machine_facts(recipe.export.threads or None)
    if recipe.export.to:
        exported = place.directory / "exported"
        speeds = compare_exports(run.fresh, bundle, exported, recipe.export, run.context.progress)
    elif run.evaluation_data is not None and _computes_in_float(bundle):
        threads = recipe.export.threads or usable_cores()
        speeds = compare_in_torch(run.fresh(), bundle, threads, recipe.export.rounds, run.context.progress)
    weights = sum(file.stat().st_size for file in _newest(place, recipe).glob("*.safetensors"))
    facts = Facts(
        compressed=run.last if run.evaluation_data else None,
        original=run.reference,
        speeds=[Speed(speed.what, speed.ratio, speed.against) for speed in speeds],
        bytes_before=bundle.source.bytes or None,
        bytes_after=weights,
        random_expected=False,
        tolerated=recipe.gates.max_drop,
    )
    findings = tuple(sorted((*verdict(facts, recipe.seed), *run.control_findings), key=_badness))
    gates = judge(recipe.gates, facts, speeds)
    measured = {
        "verdict": [finding.to_json() for finding in findings],
        "stages": run.rows,
        "speeds": [speed.to_json() for speed in speeds],
        "gates": [dataclasses.asdict(gate) for gate in gates],
        "metrics": _metric_table(run),
        "bytes": {"original": bundle.source.bytes, "compressed": weights},
        "machine": machine if speeds else {},
    }
    manifest = checkpoint.save(bundle, final, measured=measured, recipe=recipe.to_dict(), seed=recipe.seed)
    (final / "recipe.yaml").write_text(recipe.to_yaml())
    _keep_reports(run, final)
    if exported is not None:
        shutil.copytree(exported / "compressed", final / recipe.export.to)
    result = Result(output, manifest, findings, tuple(run.rows), speeds, gates)
    failed = [gate for gate in gates if not gate.passed]
    target = output.with_name(output.name + ".rejected") if failed else output
    if failed:
        shutil.rmtree(target, ignore_errors=True)
    publish(final, target)
    place.remove()
    if failed:
        raise GateFailed("; ".join(gate.text for gate in failed), hint=f"the result was kept as {target}")
    return result


def _after(run: _Run, stage: Stage, bundle: Bundle, before: Path | None) -> None:
    """Measure a finished step, and a random selection at the same ratio where the pass has such a twin."""
    _measure_stage(run, stage.name, bundle)
    twin = stage.made.control()
    if run.evaluation_data is None or not run.recipe.control or twin is None:
        return

    def measure_control() -> Evaluation:
        control = run.fresh() if before is None else checkpoint.load(before, device=run.recipe.device)
        run.context.progress.say(f"control: {stage.step.name} with a random selection")
        pipeline.run_stage(control, dataclasses.replace(stage, made=twin), run.context)
        return _evaluate(run, control, None)

    evaluation = _remembered(run, f"{stage.name}-random", measure_control)
    assert run.last is not None
    run.control_findings += [
        Finding(finding.level, f"{stage.step.name}: {finding.text}")
        for finding in random_findings([evaluation], run.last, run.recipe.seed)
    ]
    run.rows.append({"stage": f"{stage.step.name} (random)", "metrics": _headlines(evaluation), "control": True})


def _measure_stage(run: _Run, name: str, bundle: Bundle) -> None:
    row: dict[str, Any] = {"stage": name[3:], **run.place.remember(f"{name}-cost", lambda: cost_of(bundle).to_json())}
    if run.evaluation_data is not None:
        run.last = _remembered(run, name, lambda: _evaluate(run, bundle, run.reference))
        row["metrics"] = _headlines(run.last)
    run.rows.append(row)


def _remembered(run: _Run, name: str, make: Any) -> Evaluation:
    """An evaluation from this run's directory, made and kept there first when it is not there yet."""
    path = run.place.directory / f"{name}.npz"
    if not path.exists():
        temporary = path.with_suffix(".writing.npz")
        write_evaluation(make(), temporary)
        temporary.replace(path)
    return read_evaluation(path)


def _evaluate(run: _Run, bundle: Bundle, reference: Evaluation | None) -> Evaluation:
    assert run.evaluation_data is not None
    tasks = [*run.recipe.tasks, *(["agreement"] if reference and "agreement" not in run.recipe.tasks else [])]
    return evaluate(
        bundle,
        run.evaluation_data,
        tasks,
        reference=reference,
        seed=run.recipe.seed,
        batch=run.recipe.data.batch_size,
        progress=run.context.progress,
    )


def _headlines(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    return {
        f"{task}.{metric}": estimate.to_json()
        for task, by_metric in evaluation.estimates.items()
        for metric, estimate in by_metric.items()
    }


def _metric_table(run: _Run) -> dict[str, dict[str, str]]:
    if run.reference is None or run.last is None:
        return {}
    before, after = run.reference.estimates, run.last.estimates
    return {
        f"{task}.{metric}": {"original": str(before[task][metric]), "compressed": str(estimate)}
        for task, by_metric in after.items()
        for metric, estimate in by_metric.items()
        if metric in before.get(task, {})
    }


def _keep_reports(run: _Run, final: Path) -> None:
    """Copy what was measured beside the weights, so that later runs can be paired with this one."""
    reports = final / "reports"
    reports.mkdir()
    for file in sorted(run.place.directory.glob("*.npz")):
        shutil.copyfile(file, reports / file.name)


def _load(model: str | Path | Bundle, device: str, allow_pickle: bool = False) -> Bundle:
    if isinstance(model, Bundle):
        # The caller's model stays as it is.
        return copy.deepcopy(model)
    return checkpoint.load(model, device=device, allow_pickle=allow_pickle)


def _computes_in_float(bundle: Bundle) -> bool:
    """Torch emulates integer layers in float, so timing them there would say nothing about where they run."""
    return not any(tensor.dtype == torch.int8 for tensor in bundle.model.state_dict().values())


def _evaluation_data(recipe: Recipe) -> Dataset | None:
    if not recipe.data.evaluation:
        return None
    data = open_data(recipe.data.evaluation)
    return data.subset(recipe.data.evaluation_samples, recipe.seed) if recipe.data.evaluation_samples else data


def _identity(bundle: Bundle, recipe: Recipe, *data: Dataset | None) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    return {
        "model": bundle.source.sha256,
        "recipe": recipe.to_dict(),
        "data": [used.fingerprint() if used else "" for used in data],
        "mmc": mmcompress.__version__,
    }


def _newest(place: Workplace, recipe: Recipe) -> Path:
    return place.directory / f"{len(recipe.steps):02d}-{recipe.steps[-1].name}"


def _badness(finding: Finding) -> int:
    return {"bad": 0, "note": 1, "good": 2}[finding.level]
