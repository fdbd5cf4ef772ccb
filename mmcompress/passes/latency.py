"""Solving a pass for a budget of milliseconds: shares are tried out, each exported and timed on this machine."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Record
from mmcompress.ops.budget import largest_within
from mmcompress.passes.base import Context, Pass, Plan
from mmcompress.surgery.watch import evaluating, watch_inputs
from mmcompress.views import Tower

TRIALS = 5
"""Halvings between the least that can be kept and all."""
SECONDS = (TRIALS + 2) * 15.0
"""About, to export and time so many models of a hundred million parameters."""
AGAIN = 3
"""How often a share is timed that took longer than a larger one, or a little longer than it may."""
NEAR = 1.5
"""How many times the budget is a little: other programs, and where memory happens to lie, have cost as much."""
NOISE = 1.05
"""How much longer is put down to noise."""
TRIED = "tried_ms"
"""The decision that holds what was timed: milliseconds by share."""


def solved(
    name: str,
    budget: float,
    stages: tuple[str, ...],
    at: Callable[[float], Pass],
    least: float,
    bundle: Bundle,
    context: Context,
    *,
    instead: str = "keep",
    grows: bool = True,
    planned: Callable[[Any, Bundle, bool], Plan] | None = None,
) -> Plan:
    """Return the plan of the largest share whose exported `stages` take `budget` milliseconds at most, with what was timed.

    `at` makes the pass `name` that keeps a share, from `least` to 1. `instead` is the parameter that says the share; `planned`
    makes plans in place of the pass, and is told whether they are only to be timed. `grows`: whether more kept takes longer, all
    else being noise. Raises UsageError where even `least` takes longer, naming how long, where nothing can be timed, and with
    `grows` on a machine so busy that less takes longer again and again.
    """
    milliseconds = context.require_stopwatch(f"{name}.latency_ms", target="", hint=f"use {instead}").model
    tried: dict[str, Any] = {}

    def cost(share: float) -> float:
        trial, made = copy.deepcopy(bundle), at(share)
        plan = planned(made, trial, True) if planned else made.plan(trial, context)
        made.apply(trial, plan)
        # What is exported prepares its inputs by what its records say.
        trial.history.append(Record(name, _given(made), plan.decisions))
        limit = min((took for key, took in tried.items() if float(key) > share), default=float("inf")) * NOISE
        found = round(milliseconds(trial, stages), 3)
        for _ in range(AGAIN - 1):
            if found > limit or (not grows and budget < found <= NEAR * budget):
                found = min(found, round(milliseconds(trial, stages), 3))
        if grows and found > limit:
            raise UsageError(
                f"{name}.latency_ms cannot be solved: keep {share:.3f} takes {found:.2f} ms, and with more kept it took "
                f"{limit / NOISE:.2f} ms",
                hint=f"the machine is busy; run it again when it is idle, or give {instead}",
            )
        context.progress.say(f"keep {share:.3f}: {' and '.join(stages)} take {found:.2f} ms")
        tried[f"{share:.4f}"] = found
        return found

    share = largest_within(cost, budget, least, TRIALS)
    if share is None:
        raise UsageError(
            f"{name}.latency_ms is {budget:g}, but with the least that can stay (keep {least:.3f}) {' and '.join(stages)} take "
            f"{tried[f'{least:.4f}']:.2f} ms",
            hint="allow more, or compress it in other ways as well",
        )
    made = at(share)
    plan = planned(made, bundle, False) if planned else made.plan(bundle, context)
    return dataclasses.replace(plan, decisions={**plan.decisions, TRIED: tried})


def stages_of(bundle: Bundle, towers: Sequence[Tower]) -> tuple[str, ...]:
    """Return what is timed of `towers`: of the one that writes, what reading a prompt takes."""
    answering = getattr(bundle.family, "answering", "")
    return tuple("prompt" if tower.name == answering else tower.name for tower in towers)


def _given(made: Pass) -> dict[str, Any]:
    """Return the parameters of a pass that are not as usual."""
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    return {field.name: value for field in fields if (value := getattr(made, field.name)) != field.default}


def linear_rows(bundle: Bundle, tower: Tower) -> dict[str, int]:
    """Return for how many rows each Linear of a tower is called by its example, by path."""
    rows: dict[str, int] = {}
    linears = {
        path: layer for path, layer in bundle.model.named_modules() if tower.owns(path) and isinstance(layer, nn.Linear)
    }

    def record(path: str, tokens: Tensor) -> None:
        rows[path] = rows.get(path, 0) + len(tokens)

    with evaluating(bundle.model), torch.inference_mode(), watch_inputs(linears, record):
        bundle.encode(tower.name, bundle.example_inputs(tower.name))
    return rows
