"""The whole of `mmc compress` (and of prune, merge, reduce, quantize, distill, which are recipes of one step).

    load -> evaluate the original -> steps, each measured and set beside a random selection -> export and time the final
    artifact -> verdict -> gates -> publish

Everything is written under a hidden directory beside the output and renamed at the end; a killed run resumes there.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mmcompress
from mmcompress import checkpoint, pipeline, streamed, weights
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Sample, open_data
from mmcompress.errors import GateFailed, MmcError
from mmcompress.evaluate.findings import Finding
from mmcompress.evaluate.verdict import Facts, Speed, verdict
from mmcompress.jobs import token_pictures
from mmcompress.jobs.gates import judge, require_measurable
from mmcompress.jobs.refusals import require_alone, require_quantized, require_usable, with_tasks
from mmcompress.jobs.result import Result
from mmcompress.jobs.sensitivity import judged_groups, mixed_findings
from mmcompress.jobs.sparsity import sparse_findings
from mmcompress.jobs.speed import TowerSpeed, compare_exports, compare_in_torch
from mmcompress.jobs.stages import Measurements, headlines, load_again
from mmcompress.jobs.stopwatch import stopwatch
from mmcompress.measure.cost import cost_of
from mmcompress.measure.machine import default_threads, machine_facts
from mmcompress.passes.base import Context
from mmcompress.passes.prune_split import recorded_splits
from mmcompress.pipeline import Stage, Workplace
from mmcompress.progress import Progress, Silent
from mmcompress.recipe import Gates, Recipe
from mmcompress.room import fits
from mmcompress.staging import free_name, partial_path, publish, refuse_existing


def compress(
    model: str | Path | Bundle,
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    explain: Sequence[Path] = (),
    question: str = "",
) -> Result:
    """Run `recipe` on `model` and write the result to `output`, with drawings of what became of the patches of `explain`.

    `question` is what a language model is asked about those: what is left of their tokens may depend on it.

    Where tokens of pictures become fewer, the first evaluation samples are drawn too. Raises UsageError for a bad model, recipe,
    data or an existing output, and GateFailed when a gate fails; the refused result then lies beside `output`, named in the hint.
    """
    output, progress = Path(output), progress or Silent()
    refuse_existing(output)
    todo = pipeline.stages(recipe.steps)
    require_usable(recipe, todo)
    require_alone(todo)
    shown = token_pictures.named(explain, question)
    if isinstance(model, str | Path) and not allow_pickle and not shown and streams(recipe, todo, model):
        return _streamed(model, recipe, todo, output, progress, resume)
    bundle = load_again(model, recipe.device, allow_pickle)
    data = open_data(recipe.data.calibration) if recipe.data.calibration else None
    evaluation_data = _evaluation_data(recipe)
    recipe = with_tasks(recipe, bundle, evaluation_data)
    require_quantized(todo, bundle)
    place = Workplace(partial_path(output), _identity(bundle.source.sha256, recipe, data, evaluation_data), resume)
    context = dataclasses.replace(_context(recipe, data, progress), stopwatch=stopwatch(recipe.export))
    run = Measurements(model, recipe, place, context, evaluation_data, allow_pickle=allow_pickle)
    run.context = dataclasses.replace(context, teacher=run.fresh)
    try:
        run.original(bundle)
        measured = headlines(run.reference) if run.reference else ()
        require_measurable(
            recipe.gates, measured, timed=_will_be_timed(run, bundle), weighed=bool(_bytes_of(model, bundle))
        )
        bundle = pipeline.run(bundle, todo, run.context, place, after=run.after)
        return _finish(run, bundle, output, shown)
    except (MmcError, OSError):
        # Going on would fail the same way. What was killed or crashed stays, to be resumed.
        place.remove()
        raise
    finally:
        place.close()


def streams(recipe: Recipe, todo: list[Stage], model: str | Path) -> bool:
    """Whether nothing has to be measured, and no step needs more of the model than a layer at a time.

    With data, where `model` does not fit into memory, of one step: the next would be shown what is not there to run yet. In memory
    each layer is read once, whatever the number of looks; what is decided is the same.
    """
    if recipe.data.evaluation or recipe.tasks or recipe.export.to or recipe.gates != Gates():
        return False
    if not recipe.data.calibration:
        return all(streamed.can_stream(stage.made) for stage in todo)
    alone = len(todo) == 1 and recipe.device == "cpu" and streamed.can_stream(todo[0].made, data=True)
    return alone and not fits(weights.weight_files(weights.locate(str(model))), torch.float32.itemsize)


def _context(recipe: Recipe, data: Dataset | None, progress: Progress) -> Context:
    """Return what every run lets passes use."""
    return Context(
        data=data,
        num_samples=recipe.data.num_samples,
        batch_size=recipe.data.batch_size,
        seed=recipe.seed,
        progress=progress,
    )


def _streamed(
    model: str | Path, recipe: Recipe, todo: list[Stage], output: Path, progress: Progress, resume: bool
) -> Result:
    """Run the steps without ever having the model in memory; what it became is not measured, only recounted."""
    before = _bytes_in(weights.locate(str(model)))
    findings: tuple[Finding, ...] = ()
    rows: list[dict[str, Any]] = []

    def after(name: str, bundle: Bundle) -> None:
        rows.append({"stage": name, **cost_of(bundle).to_json()})

    def measured(directory: Path) -> dict[str, Any]:
        nonlocal findings
        after = _bytes_in(directory)
        (directory / "recipe.yaml").write_text(recipe.to_yaml())
        findings = tuple(verdict(Facts(bytes_before=before, bytes_after=after, random_expected=False), recipe.seed))
        return {
            "verdict": [finding.to_json() for finding in findings],
            "stages": rows,
            "speeds": [],
            "gates": [],
            "metrics": {},
            "bytes": {"original": before, "compressed": after},
            "machine": {},
        }

    data = open_data(recipe.data.calibration) if recipe.data.calibration else None
    context = _context(recipe, data, progress)
    sha256 = weights.digest(weights.weight_files(weights.locate(str(model))))
    place = Workplace(partial_path(output), _identity(sha256, recipe, data), resume)
    try:
        manifest = streamed.run(
            model, todo, output, context, place, sha256, after=after, measured=measured, recipe=recipe.to_dict()
        )
    except (MmcError, OSError):
        place.remove()
        raise
    finally:
        place.close()
    place.remove()
    return Result(output, manifest, findings, tuple(rows), split=tuple(recorded_splits(manifest.records)))


def follow(model: str | Path, recipe: Recipe, output: str | Path, *, allow_pickle: bool = False) -> None:
    """Take part in a run that another process leads (torchrun, accelerate launch): same steps, nothing measured or written."""
    todo = pipeline.stages(recipe.steps)
    require_alone(todo)
    context = Context(
        data=open_data(recipe.data.calibration) if recipe.data.calibration else None,
        num_samples=recipe.data.num_samples,
        batch_size=recipe.data.batch_size,
        seed=recipe.seed,
        teacher=lambda: load_again(model, recipe.device, allow_pickle),
    )
    place = Workplace.join(partial_path(Path(output)))
    pipeline.run(load_again(model, recipe.device, allow_pickle), todo, context, place, leads=False)


def _finish(run: Measurements, bundle: Bundle, output: Path, shown: dict[str, Sample]) -> Result:
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
    elif run.data is not None and _computes_in_float(bundle):
        threads = recipe.export.threads or default_threads()
        speeds = compare_in_torch(run.fresh(), bundle, threads, recipe.export.rounds, run.context.progress)
    before, after = _bytes_of(run.model, bundle), _bytes_in(_newest(place, recipe))
    facts = Facts(
        compressed=run.last if run.data else None,
        original=run.reference,
        speeds=[Speed(speed.what, speed.ratio, speed.against) for speed in speeds],
        bytes_before=before or None,
        bytes_after=after,
        random_expected=False,
        tolerated=recipe.gates.max_drop,
    )
    busy = [Finding("note", machine["busy"])] if speeds and machine["busy"] else []
    here = bundle.history[run.earlier :]
    said = (
        *sparse_findings(bundle, run.earlier),
        *mixed_findings(here),
        *verdict(facts, recipe.seed),
        *run.findings,
        *busy,
    )
    findings = tuple(sorted(said, key=_badness))
    gates = judge(recipe.gates, facts, speeds)
    measured = {
        "verdict": [finding.to_json() for finding in findings],
        "stages": run.rows,
        "speeds": [speed.to_json() for speed in speeds],
        "gates": [dataclasses.asdict(gate) for gate in gates],
        "metrics": run.metric_table(),
        "bytes": {"original": before, "compressed": after},
        "machine": machine if speeds else {},
    }
    manifest = checkpoint.save(bundle, final, measured=measured, recipe=recipe.to_dict(), seed=recipe.seed)
    (final / "recipe.yaml").write_text(recipe.to_yaml())
    _keep_reports(run, final)
    drawn = token_pictures.draw_all(bundle, shown, run.data, final / "reports", run.context.progress)
    if exported is not None:
        shutil.copytree(exported / "compressed", final / recipe.export.to)
    failed = [gate for gate in gates if not gate.passed]
    target = free_name(output.with_name(output.name + ".rejected")) if failed else output
    pictures = tuple(target / "reports" / name for name in drawn)
    judged = tuple(judged_groups([record for record in here if record.params.get("sensitivity")]))
    result = Result(
        output, manifest, findings, tuple(run.rows), speeds, gates, pictures, judged, tuple(recorded_splits(here))
    )
    publish(final, target)
    place.remove()
    if failed:
        raise GateFailed(
            "; ".join(gate.text for gate in failed),
            hint=f"the result was kept as {target}",
            document=dataclasses.replace(result, output=target).to_json(),
        )
    return result


def _keep_reports(run: Measurements, final: Path) -> None:
    """Copy what was measured beside the weights, so that later runs can be paired with this one."""
    reports = final / "reports"
    reports.mkdir()
    for file in sorted(run.place.directory.glob("*.npz")):
        shutil.copyfile(file, reports / file.name)


def _will_be_timed(run: Measurements, bundle: Bundle) -> bool:
    """Whether `_finish` will time the result; foretold from the steps where it depends on them."""
    integers = any(step.name == "quantize" for step in run.recipe.steps) or not _computes_in_float(bundle)
    return bool(run.recipe.export.to) or (run.data is not None and not integers)


def _bytes_of(model: str | Path | Bundle, bundle: Bundle) -> int:
    """Bytes of the weights that the run started from, which may be an output itself; 0: not known."""
    if isinstance(model, Bundle):
        return 0 if model.history else bundle.source.bytes
    return _bytes_in(weights.locate(str(model)))


def _bytes_in(directory: Path) -> int:
    return sum(file.stat().st_size for file in weights.weight_files(directory, allow_pickle=True))


def _computes_in_float(bundle: Bundle) -> bool:
    """Torch emulates integer layers in float, so timing them there would say nothing about where they run."""
    return not any(tensor.dtype == torch.int8 for tensor in bundle.model.state_dict().values())


def _evaluation_data(recipe: Recipe) -> Dataset | None:
    if not recipe.data.evaluation:
        return None
    data = open_data(recipe.data.evaluation)
    return data.subset(recipe.data.evaluation_samples, recipe.seed) if recipe.data.evaluation_samples else data


def _identity(sha256: str, recipe: Recipe, *data: Dataset | None) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    return {
        "model": sha256,
        "recipe": recipe.to_dict(),
        "data": [used.fingerprint() if used else "" for used in data],
        "mmc": mmcompress.__version__,
    }


def _newest(place: Workplace, recipe: Recipe) -> Path:
    return place.directory / f"{len(recipe.steps):02d}-{recipe.steps[-1].name}"


def _badness(finding: Finding) -> int:
    return {"bad": 0, "note": 1, "good": 2}[finding.level]
