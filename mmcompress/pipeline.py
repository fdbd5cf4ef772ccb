"""Running the steps of a recipe, so that a killed run loses at most the step it was in.

    check every pass -> for each step: check, plan, apply, fit, verify -> checkpoint

Finished steps are checkpoints in a hidden directory beside the output (`staging.partial_path`); a step's directory appears by
rename, so its presence is the journal. `--resume` loads the newest one. Every step starts from a state that a checkpoint holds
exactly (weights rounded to their stored dtype) and from its own seed, so a resumed run ends in the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from mmcompress import checkpoint, passes
from mmcompress.bundle import Bundle
from mmcompress.errors import MmcError, UsageError
from mmcompress.kept import write_atomically
from mmcompress.manifest import Record
from mmcompress.passes.base import Context, Pass
from mmcompress.recipe import Step
from mmcompress.staging import LOCK_FILE, lock

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Stage:
    """One step of a run: the pass, and where its finished checkpoint lies."""

    number: int
    step: Step
    made: Pass

    @property
    def name(self) -> str:
        return f"{self.number:02d}-{self.step.name}"


def stages(steps: tuple[Step, ...]) -> list[Stage]:
    """Build every pass first, so that a mistake in the last step is found before the first one runs. Raises UsageError."""
    return [Stage(number, step, passes.build(step.name, step.params)) for number, step in enumerate(steps, 1)]


class Workplace:
    """The hidden directory of one run: what identifies it, finished steps, and whatever else is worth not doing twice."""

    def __init__(self, directory: Path, identity: dict[str, Any], resume: bool) -> None:
        """Open or create the directory.

        Raises UsageError when a run is at work there, when an interrupted one is there and `resume` is false, or when that
        was another run.
        """
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._lock: IO[bytes] | None = lock(directory)
        try:
            self._open(identity, resume)
        except UsageError:
            self.close()
            raise

    def _open(self, identity: dict[str, Any], resume: bool) -> None:
        file = self.directory / RUN_FILE
        if not file.exists():
            # Without run.json nothing in here can be trusted: the run died while creating it.
            for left in self.directory.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK_FILE:
                    left.unlink()
            write_atomically(file, json.dumps(identity, indent=1, sort_keys=True))
            return
        if not resume:
            raise UsageError(
                f"an interrupted run lies in {self.directory}",
                hint="--resume continues it; remove the directory to start over",
            )
        before = json.loads(file.read_text())
        changed = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
        if changed:
            raise UsageError(
                f"the interrupted run in {self.directory} was another one: {', '.join(changed)} changed",
                hint="repeat the original command with --resume, or remove the directory to start over",
            )

    @classmethod
    def join(cls, directory: Path, patience: float = 600) -> Workplace:
        """Wait for the directory that the leading process of several opens, and share it. Raises MmcError when it never comes."""
        waited = 0.0
        while not (directory / RUN_FILE).exists():
            if waited > patience:
                raise MmcError(
                    f"the first process did not open {directory} in {patience:.0f} s", hint="look at its output"
                )
            time.sleep(0.1)
            waited += 0.1
        shared = cls.__new__(cls)
        shared.directory, shared._lock = directory, None
        return shared

    def checkpoint_of(self, stage: Stage) -> Path:
        """Return where the checkpoint after `stage` lies or will lie."""
        return self.directory / stage.name

    def scratch(self, stage: Stage) -> Path:
        """Return the directory a stage's `fit` may keep its own progress in."""
        path = self.directory / f"{stage.name}.work"
        path.mkdir(exist_ok=True)
        return path

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the JSON value kept under `name`, computing and keeping it first when it is not there."""
        file = self.directory / f"{name}.json"
        if not file.exists():
            write_atomically(file, json.dumps(make(), sort_keys=True))
        return json.loads(file.read_text())

    def remove(self) -> None:
        """Delete the directory, after success or after an error that resuming would only repeat."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let other runs have the directory; what is in it stays."""
        if self._lock is not None:
            self._lock.close()


def run(
    bundle: Bundle,
    todo: list[Stage],
    context: Context,
    place: Workplace,
    after: Callable[[Stage, Bundle, Path | None], None] | None = None,
    leads: bool = True,
) -> Bundle:
    """Run the stages in order and return the bundle they lead to.

    `after(stage, bundle, before)` is called after each finished stage with the checkpoint it started from (None for the
    model given), for measurements; it must not change the bundle. With `leads` false nothing is written: one of several processes
    that another one leads. Raises what a pass raises, naming the step.
    """
    done = [stage for stage in todo if place.checkpoint_of(stage).exists()]
    before: Path | None = None
    if done:
        before = place.checkpoint_of(done[-1])
        context.progress.say(f"resuming after step {done[-1].number} of {len(todo)} ({done[-1].step.name})")
        bundle = checkpoint.load(before, device=str(bundle.device))
    else:
        for stage in todo:
            with named(stage):
                stage.made.check(bundle)
    starts = [None, *(place.checkpoint_of(stage) for stage in done)]
    for stage, start in zip(done, starts, strict=False):
        # All but the last were measured before the next one began, so they need no bundle of their own any more.
        if after:
            after(stage, bundle, start)
    for stage in todo[len(done) :]:
        context.progress.say(f"step {stage.number} of {len(todo)}: {stage.step.name}")
        with named(stage, todo):
            run_stage(bundle, stage, dataclasses.replace(_with_teacher(stage, context), workdir=place.scratch(stage)))
            if leads:
                checkpoint.save(bundle, place.checkpoint_of(stage), seed=context.seed)
        if leads:
            shutil.rmtree(place.scratch(stage))
        if after:
            after(stage, bundle, before)
        before = place.checkpoint_of(stage)
    return bundle


def run_stage(bundle: Bundle, stage: Stage, context: Context) -> Record:
    """Check, plan, apply, fit and verify one pass; append its record to the bundle's history and return it."""
    started = time.perf_counter()
    torch.manual_seed(context.seed + stage.number)
    stage.made.check(bundle)
    plan = stage.made.plan(bundle, context)
    stage.made.apply(bundle, plan)
    facts = {**plan.facts, **stage.made.fit(bundle, context)}
    verify(bundle, stage.step.name)
    record = Record(
        name=stage.step.name,
        params=stage.step.params,
        # Through JSON, so that what a resumed run reads is what this run goes on with.
        plan=json.loads(json.dumps(plan.decisions)),
        facts=json.loads(json.dumps(facts)),
        seconds=round(time.perf_counter() - started, 3),
    )
    bundle.history.append(record)
    return record


@torch.inference_mode()
def verify(bundle: Bundle, name: str) -> None:
    """Raise MmcError when a tower gives NaN, infinity or the same embedding for different inputs."""
    bundle.model.eval()
    for tower in bundle.towers():
        embeddings = bundle.encode(tower.name, bundle.example_inputs(tower.name, 2)).float()
        if not torch.isfinite(embeddings).all():
            raise MmcError(f"after {name} the {tower.name} tower gives NaN or infinity", hint="use milder parameters")
        if torch.equal(embeddings[0], embeddings[1]):
            raise MmcError(
                f"after {name} the {tower.name} tower gives one embedding for every input", hint="use milder parameters"
            )


def _with_teacher(stage: Stage, context: Context) -> Context:
    """A pass that names its teacher gets that checkpoint; the others the uncompressed original."""
    named = getattr(stage.made, "teacher", "")
    return dataclasses.replace(context, teacher=lambda: checkpoint.load(named)) if named else context


@contextlib.contextmanager
def named(stage: Stage, todo: Sequence[Stage] = ()) -> Iterator[None]:
    """Say in an error which step it was and, of those `todo`, what had run before it."""
    try:
        yield
    except MmcError as error:
        ran = [earlier.step.name for earlier in todo[: stage.number - 1]]
        before = f" (after {', '.join(ran)})" if ran else ""
        error.message = f"step {stage.number}, {stage.step.name}{before}: {error.message}"
        error.args = (error.message,)
        raise
