"""The training loop: a lesson's gradients, AdamW, a cosine schedule, and state that survives a kill.

The model stays in evaluation mode: no dropout, so that a compressed model is tuned as it will run, and passes over the same samples
agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.distill_pace import Pace
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_state import State
from mmcompress.progress import Progress
from mmcompress.surgery.quantized import QuantizedEmbedding

PLAIN_ATTENTION = 256
"""Tokens up to which bfloat16 on a CPU computes attention as plain matrix products: torch 2.13's fused kernel has a slow
backward there (a quarter of the whole step at 65 tokens), but more tokens would take too much memory."""
USUAL_RATE, USUAL_STEPS = 1e-4, 100
"""The peak learning rate where none is given, and the fewest steps that have all of it. AdamW's first steps have one size,
however small the gradient is, and a short run cannot make up for them: a nearly perfect student is thrown back."""
TIMED_STEPS = 3
"""Gradients computed to learn the speed where a time limit decides the number of steps; the first only warms up."""


@dataclass(frozen=True)
class Schedule:
    """How many steps, and how large each is."""

    steps: int | None
    """None: as many as `seconds` allow."""
    learning_rate: float | None
    """At its peak; None: the usual one, in proportion less where there are few steps."""
    weight_decay: float
    warmup: float
    clip: float
    ema: float
    save_minutes: float
    seconds: float | None = None
    """Time left for training; fewer steps are made where `steps` would take longer."""

    def peak(self, steps: int) -> float:
        """Return the highest learning rate of `steps` steps."""
        return USUAL_RATE * min(1.0, steps / USUAL_STEPS) if self.learning_rate is None else self.learning_rate

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` of `steps`: a linear rise over the warm-up share, then half a cosine."""
        rise = min(1.0, (step + 1) / max(1, round(self.warmup * steps)))
        return self.peak(steps) * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


class Student(nn.Module):
    """The towers that train, as one module with one forward, which data parallelism needs."""

    def __init__(self, bundle: Bundle, half: bool) -> None:
        super().__init__()
        self.model = bundle.model
        self._family = bundle.family
        self._half = half
        self._tokens = {tower.name: tower.stream.tokens for tower in bundle.towers() if tower.stream}

    def forward(self, inputs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the float32 rows (B, C) of `encode` of each tower in `inputs`."""
        device = next(self.model.parameters()).device.type
        made = {}
        for name, given in inputs.items():
            tokens = self._tokens.get(name) or max(value.shape[-1] for value in given.values())
            plain = self._half and device == "cpu" and tokens <= PLAIN_ATTENTION
            kernel = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
            with torch.autocast(device, torch.bfloat16, enabled=self._half), kernel:
                made[name] = self._family.encode(self.model, name, given).float()
        return made


class Lesson(Protocol):
    """What the steps learn from: batches in an order that depends on the seed alone, and the gradients of each."""

    @property
    def samples(self) -> int:
        """Samples of one step, over all processes."""

    def begin(self) -> None:
        """Get ready to train; called once, when the parameters that train are chosen."""

    def batch(self, step: int) -> Any:
        """Return this process's share of step `step`, prepared."""

    def batches(self, first: int, last: int) -> Iterator[Any]:
        """Yield the batches of steps `first` to `last`, without the last."""

    def gradients(self, batch: Any, step: int) -> float:
        """Add the gradient of the loss over all processes' samples to the parameters; return the loss."""

    def examine(self) -> dict[str, float]:
        """Return "loss" on the held-back samples, and for each trained tower the mean cosine to the teacher there."""


@dataclass
class Trainer:
    """Everything one run of training needs; `run` changes the values of `parameters` in place."""

    bundle: Bundle
    parameters: dict[str, nn.Parameter]
    lesson: Lesson
    schedule: Schedule
    ranks: Ranks
    progress: Progress
    pace: Pace = field(default_factory=Pace)
    label: str = "distilling"

    def run(self, state: State) -> State:
        """Train from `state` to the end. Raises UsageError when the loss stops being a number."""
        with _only_trainable(self.bundle.model, self.parameters), deterministic(self.bundle.device):
            self.lesson.begin()
            # A nearly perfect student has gradients of rounding size; a smaller eps would blow them up into full steps.
            groups = parameter_groups(self.bundle.model, self.parameters, self.schedule.weight_decay)
            optimizer = torch.optim.AdamW(groups, lr=USUAL_RATE, betas=(0.9, 0.98), eps=1e-6)
            average = {n: p.detach().clone() for n, p in self.parameters.items()} if self.schedule.ema else {}
            state.restore(self.parameters, optimizer, average, self.pace.tensors())
            if not state.steps:
                state.steps = self.ranks.agree(self._affordable_steps())
            self._steps(state, optimizer, average)
            with torch.no_grad():
                for name, value in average.items():
                    self.parameters[name].copy_(value)
        return state

    def _steps(self, state: State, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> None:
        self.progress.start(self.label, state.steps)
        self.progress.advance(state.step)
        saved = started = time.monotonic()
        try:
            for batch in self.lesson.batches(state.step, state.steps):
                before = time.monotonic()
                self.pace.before(state.step, state.steps)
                loss = self.lesson.gradients(batch, state.step)
                if not math.isfinite(loss):
                    raise UsageError(
                        f"the loss is {loss} at step {state.step + 1} of {state.steps}",
                        hint=f"lower the learning_rate (now {self.schedule.peak(state.steps):g}), or set amp: false",
                    )
                for group in optimizer.param_groups:
                    group["lr"] = self.schedule.rate(state.step, state.steps)
                if self.schedule.clip:
                    nn.utils.clip_grad_norm_(self.parameters.values(), self.schedule.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                for name, value in average.items():
                    # Early on the average is short, so that it forgets where it started.
                    decay = min(self.schedule.ema, (1 + state.step) / (10 + state.step))
                    value.lerp_(self.parameters[name].detach(), 1 - decay)
                self.pace.after(state.step, state.steps)
                state.step += 1
                state.losses.append(loss)
                now = time.monotonic()
                state.seconds += now - before
                rate = self.lesson.samples * (state.step - state.resumed_at) / (now - started)
                self.progress.advance(1, f"loss {loss:.4f}, {rate:.0f} samples/s")
                due = now - saved >= 60 * self.schedule.save_minutes or state.step == state.steps
                if due and self.ranks.main:
                    state.save(self.parameters, optimizer, average, self.pace.tensors())
                    saved = time.monotonic()
        finally:
            self.progress.finish()

    def _affordable_steps(self) -> int:
        """Return the steps to make: as many as planned, fewer where the time limit asks for it (measured, then fixed)."""
        if self.schedule.seconds is None:
            assert self.schedule.steps is not None, "either steps or seconds are given"
            return self.schedule.steps
        started = warm = time.monotonic()
        self.pace.before(0, 1)  # the slowest step
        for timed in range(TIMED_STEPS):
            self.lesson.gradients(self.lesson.batch(0), step=0)
            for parameter in self.parameters.values():
                parameter.grad = None
            if timed == 0:
                warm = time.monotonic()
        now = time.monotonic()
        left = self.schedule.seconds - (now - started)
        affordable = int(left / max(1e-6, (now - warm) / (TIMED_STEPS - 1)))
        return max(1, affordable if self.schedule.steps is None else min(self.schedule.steps, affordable))


def parameter_groups(
    model: nn.Module, parameters: dict[str, nn.Parameter], weight_decay: float
) -> list[dict[str, object]]:
    """Return AdamW's groups: decay pulls at the weights of products only, not at norms, biases, positions and tables."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables |= {id(module.master) for module in model.modules() if isinstance(module, QuantizedEmbedding)}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in parameters.items():
        decayed = parameter.ndim >= 2 and name.endswith("weight") and id(parameter) not in tables
        groups[decayed].append(parameter)
    return [{"params": groups[1], "weight_decay": weight_decay}, {"params": groups[0], "weight_decay": 0.0}]


@contextmanager
def _only_trainable(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to `parameters` only; afterwards everything is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in parameters.values()}
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Ask CUDA for repeatable kernels, as far as it has them; a CPU computes repeatably anyway."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
