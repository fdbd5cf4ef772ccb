"""`mmc report`: one HTML page about one or more outputs of `mmc compress`, derived from what they recorded.

The verdict comes first and the worst of it on top. Everything else is evidence: the plots, what each step cost and gave, the
exported files, and how to make the result again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcompress import manifest as manifests
from mmcompress.errors import UsageError
from mmcompress.evaluate.evaluation import Evaluation, compare
from mmcompress.evaluate.store import read_evaluation
from mmcompress.export.artifact import Artifact, is_artifact, open_artifact
from mmcompress.jobs import report_sections as sections
from mmcompress.jobs.check import final_evaluation
from mmcompress.jobs.report_curves import token_curves
from mmcompress.jobs.report_html import page
from mmcompress.jobs.report_points import plots
from mmcompress.jobs.token_pictures import PREFIX
from mmcompress.manifest import Manifest
from mmcompress.ops.statistics import Estimate
from mmcompress.staging import refuse_existing

ORIGINAL = "00-original.npz"


@dataclass(frozen=True)
class Run:
    """One output, read back."""

    name: str
    manifest: Manifest
    artifact: Artifact | None = None
    original: Evaluation | None = None
    compressed: Evaluation | None = None
    differences: dict[str, Estimate] = field(default_factory=dict)
    """Paired, by "task.metric"."""
    recipe: str = ""
    pictures: tuple[Path, ...] = ()
    """Drawings of what became of patches."""

    @property
    def measured(self) -> dict[str, Any]:
        return self.manifest.measured

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The rows of the steps, the original first and without the random controls."""
        return [row for row in self.measured.get("stages", []) if not row.get("control")]


def write_report(directories: Sequence[str | Path], output: Path) -> list[Run]:
    """Write one page about `directories` to `output`, which must not exist; nothing is written when anything fails.

    Raises UsageError for a directory that is no output of mmc, or a damaged one.
    """
    refuse_existing(output)
    runs = [read_run(Path(directory)) for directory in directories]
    text = render(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.writing-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return runs


def read_run(directory: Path) -> Run:
    """Read an output of mmc compress, prune, merge, reduce, quantize or distill. Raises UsageError."""
    manifest = manifests.read(directory)
    if manifest is None:
        raise UsageError(f"{directory} has no {manifests.FILE_NAME}", hint="give an output of mmc compress")
    artifacts = [place for place in sorted(directory.iterdir()) if place.is_dir() and is_artifact(place)]
    original = directory / "reports" / ORIGINAL
    before = read_evaluation(original) if original.exists() else None
    after = final_evaluation(directory) if before else None
    recipe = directory / "recipe.yaml"
    return Run(
        name=directory.name,
        manifest=manifest,
        artifact=open_artifact(artifacts[0]) if artifacts else None,
        original=before,
        compressed=after,
        differences=_differences(before, after),
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        pictures=tuple(sorted((directory / "reports").glob(f"{PREFIX}*.png"))),
    )


def render(runs: Sequence[Run]) -> str:
    """Return the page. Raises UsageError when what a run recorded does not have the form that mmc writes."""
    try:
        body = [sections.heading(runs), sections.verdicts(runs), plots(runs), token_curves(runs)]
        body += [sections.evidence(run, runs) for run in runs]
        return page(f"mmc report: {', '.join(run.name for run in runs)}", *body)
    except (KeyError, TypeError, AttributeError, ValueError, json.JSONDecodeError) as error:
        raise UsageError(
            f"a run's {manifests.FILE_NAME} has an unexpected form: {type(error).__name__}: {error}",
            hint="was it written by another version or edited? compress again",
        ) from error


def _differences(before: Evaluation | None, after: Evaluation | None) -> dict[str, Estimate]:
    if before is None or after is None:
        return {}
    return {
        f"{task}.{metric}": found
        for task, by_metric in compare(before, after).items()
        for metric, found in by_metric.items()
    }
