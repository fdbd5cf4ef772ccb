"""The whole main job on the model, the drawings and the recipe that come with the package: no network, no choices to make."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmcompress import demo as assets
from mmcompress import recipe as recipes
from mmcompress.errors import GateFailed, MissingError
from mmcompress.jobs.compress import compress
from mmcompress.jobs.report import write_report
from mmcompress.jobs.result import Result
from mmcompress.jobs.speed import usable_runners
from mmcompress.progress import Progress, Silent
from mmcompress.recipe import Export, Recipe
from mmcompress.staging import refuse_existing, staging
from mmcompress.weights import DEMO_MODEL


@dataclass(frozen=True)
class Demo:
    """What a demonstration left behind."""

    output: Path
    result: Result
    report: Path
    runners: tuple[str, ...]
    """Where both sides were timed; empty when no runtime for ONNX files is installed."""
    seconds: float

    @property
    def compressed(self) -> Path:
        return self.output / "compressed"


def demo(
    output: Path, overrides: Sequence[str] = (), *, model: str = DEMO_MODEL, progress: Progress | None = None
) -> Demo:
    """Compress `model` by the packaged recipe into `output`/compressed and write `output`/report.html; all of it or nothing.

    `overrides` change the recipe as ``--set`` does. Raises UsageError for an existing output, MissingError when the package
    came without its model, GateFailed where they set a gate that fails.
    """
    started, progress = time.perf_counter(), progress or Silent()
    refuse_existing(output)
    recipe, runners = _exportable(recipes.read(assets.RECIPE, overrides), progress)
    with staging(output) as directory:
        try:
            result = compress(model, recipe, directory / "compressed", progress=progress)
        except GateFailed as failed:
            failed.document = {**(failed.document or {}), "output": None}
            failed.hint = "the demo keeps nothing that a gate refused; mmc compress does"
            raise
        write_report([directory / "compressed"], directory / "report.html")
    result = dataclasses.replace(result, output=output / "compressed")
    return Demo(output, result, output / "report.html", runners, time.perf_counter() - started)


def _exportable(recipe: Recipe, progress: Progress) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe, without its export where nothing could run the files."""
    if not recipe.export.to:
        return recipe, ()
    try:
        return recipe, usable_runners(recipe.export.runners)
    except MissingError as error:
        progress.say(f"not exported and not timed: {error.message}; {error.hint}")
        return dataclasses.replace(recipe, export=Export()), ()
