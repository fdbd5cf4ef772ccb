"""The training loop: gradients of a whole batch from pieces of it, AdamW, a cosine schedule, and state that survives a kill.

A loss over all pairs of a batch does not fall apart into losses of its pieces. So gradients go in two halves (GradCache, Gao et al.
2021, section 3): embeddings of all pieces and all processes first, the loss and its gradient at those embeddings next, and that
gradient through one piece after the other last. Two pieces of b, or two processes with b, then give what 2b gives at once.

The model stays in evaluation mode: no dropout, so that both halves agree, and a compressed model is tuned as it will run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops import losses
from mmcompress.passes.distill_data import Feeder, Micro, Rows
from mmcompress.passes.distill_objective import Embeddings, Objective
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_state import State
from mmcompress.passes.distill_targets import Targets
from mmcompress.progress import Progress

PLAIN_ATTENTION = 256
"""Tokens up to which bfloat16 on a CPU computes attention as plain matrix products: torch 2.13's fused kernel has a slow
backward there (a quarter of the whole step at 65 tokens), but more tokens would take too much memory."""
TIMED_STEPS = 3
"""Gradients computed to learn the speed where a time limit decides the number of steps; the first only warms up."""


@dataclass(frozen=True)
class Schedule:
    """How many steps, and how large each is."""

    steps: int
    learning_rate: float
    weight_decay: float
    warmup: float
    clip: float
    ema: float
    save_minutes: float
    seconds: float | None = None
    """Time left for training; fewer steps are made where `steps` would take longer."""

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` of `steps`: a linear rise over the warm-up share, then half a cosine."""
        rise = min(1.0, (step + 1) / max(1, round(self.warmup * steps)))
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


class Student(nn.Module):
    """The towers that train, as one module with one forward, which data parallelism needs."""

    def __init__(self, bundle: Bundle, half: bool) -> None:
        super().__init__()
        self.model = bundle.model
        self._family = bundle.family
        self._half = half
        self._tokens = {tower.name: tower.stream.tokens for tower in bundle.towers() if tower.stream}

    def forward(self, inputs: dict[str, dict[str, Tensor]]) -> Embeddings:
        """Return float32 embeddings (B, C) of each tower in `inputs`."""
        device = next(self.model.parameters()).device.type
        made = {}
        for name, given in inputs.items():
            tokens = self._tokens.get(name) or next(iter(given.values())).shape[1]
            plain = self._half and device == "cpu" and tokens <= PLAIN_ATTENTION
            kernel = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
            with torch.autocast(device, torch.bfloat16, enabled=self._half), kernel:
                made[name] = self._family.encode(self.model, name, given).float()
        return made


@dataclass
class Trainer:
    """Everything one run of training needs; `run` changes the values of `parameters` in place."""

    bundle: Bundle
    parameters: dict[str, nn.Parameter]
    feeder: Feeder
    objective: Objective
    targets: Targets
    schedule: Schedule
    ranks: Ranks
    progress: Progress
    half: bool = False
    """Compute the towers in bfloat16; weights and losses stay in float32."""
    _student: nn.Module = field(init=False)

    def run(self, state: State) -> State:
        """Train from `state` to the end. Raises UsageError when the loss stops being a number."""
        with _only_trainable(self.bundle.model, self.parameters), deterministic(self.bundle.device):
            self._student = self.ranks.wrap(Student(self.bundle, self.half))
            # A nearly perfect student has gradients of rounding size; a smaller eps would blow them up into full steps.
            groups = parameter_groups(self.bundle.model, self.parameters, self.schedule.weight_decay)
            optimizer = torch.optim.AdamW(groups, lr=self.schedule.learning_rate, betas=(0.9, 0.98), eps=1e-6)
            average = {n: p.detach().clone() for n, p in self.parameters.items()} if self.schedule.ema else {}
            state.restore(self.parameters, optimizer, average)
            if not state.steps:
                state.steps = self.ranks.agree(self._affordable_steps())
            self._steps(state, optimizer, average)
            with torch.no_grad():
                for name, value in average.items():
                    self.parameters[name].copy_(value)
        return state

    def _steps(self, state: State, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> None:
        self.progress.start("distilling", state.steps)
        self.progress.advance(state.step)
        saved = started = time.monotonic()
        try:
            for rows, micros in self.feeder.batches(state.step, state.steps):
                before = time.monotonic()
                loss = self.gradients(rows, micros, state.step)
                if not math.isfinite(loss):
                    raise UsageError(
                        f"the loss is {loss} at step {state.step + 1} of {state.steps}",
                        hint=f"lower distill.learning_rate (now {self.schedule.learning_rate:g}), or set amp: false",
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
                state.step += 1
                state.losses.append(loss)
                now = time.monotonic()
                state.seconds += now - before
                rate = self.feeder.samples * (state.step - state.resumed_at) / (now - started)
                self.progress.advance(1, f"loss {loss:.4f}, {rate:.0f} samples/s")
                due = now - saved >= 60 * self.schedule.save_minutes or state.step == state.steps
                if due and self.ranks.main:
                    state.save(self.parameters, optimizer, average)
                    saved = time.monotonic()
        finally:
            self.progress.finish()

    def gradients(self, rows: Rows, micros: list[Micro], step: int) -> float:
        """Add the gradient of the loss over all processes' samples to the parameters; return the loss."""
        whole = len(micros) == 1
        teacher: dict[str, list[Tensor]] = {}
        made: list[Embeddings] = []
        device = self.bundle.device
        devices = [device.index or 0] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.set_grad_enabled(whole):
            # Whatever draws random numbers in a forward draws the same in both halves, and after a resume.
            torch.manual_seed(self.feeder.seed + step)
            run = self._student if whole else getattr(self._student, "module", self._student)
            for micro in micros:
                made.append(run(micro.inputs))
                if micro.live is not None and self.targets.live is not None:
                    teacher.setdefault("vision", []).append(self._live(self.targets.live, micro.live))
            joined = {name: torch.cat([part[name] for part in made]) for name in made[0]}
            leaves = {name: value.detach().requires_grad_() for name, value in joined.items()}
            with torch.enable_grad():
                loss = self._loss(rows, leaves, {name: torch.cat(parts) for name, parts in teacher.items()})
                at = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            # Data parallelism averages what must be summed here: each process holds the gradient of its own rows only.
            slopes = {name: value * self.ranks.world for name, value in zip(leaves, at, strict=True)}
            if whole:
                _backward(joined, slopes)
                return float(loss.detach())
            torch.manual_seed(self.feeder.seed + step)
            size = self.feeder.batch_size
            for number, micro in enumerate(micros):
                part = {name: value[number * size : (number + 1) * size] for name, value in slopes.items()}
                with torch.enable_grad(), self.ranks.alone(self._student, last=number == len(micros) - 1):
                    _backward(self._student(micro.inputs), part)
        return float(loss.detach())

    def _loss(self, rows: Rows, own: Embeddings, live: Embeddings) -> Tensor:
        """Return the loss over all processes' rows, with gradient at this process's embeddings `own` only."""
        student = {name: self.ranks.gather(value) for name, value in own.items()} | self.targets.student(rows)
        teacher = self.targets.kept(rows) | {name: self.ranks.gather(value) for name, value in live.items()}
        return self.objective(student, teacher, same_rows(rows, self.bundle.device, self.objective.paired))

    def _live(self, teacher: Bundle, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), torch.autocast(self.bundle.device.type, torch.bfloat16, enabled=self.half):
            return teacher.encode("vision", inputs).float()

    def _affordable_steps(self) -> int:
        """Return the steps to make: as many as planned, fewer where the time limit asks for it (measured, then fixed)."""
        if self.schedule.seconds is None:
            return self.schedule.steps
        started = warm = time.monotonic()
        for timed in range(TIMED_STEPS):
            self.gradients(*self.feeder.batch(0), step=0)
            for parameter in self.parameters.values():
                parameter.grad = None
            if timed == 0:
                warm = time.monotonic()
        now = time.monotonic()
        left = self.schedule.seconds - (now - started)
        return max(1, min(self.schedule.steps, int(left / max(1e-6, (now - warm) / (TIMED_STEPS - 1)))))


def parameter_groups(
    model: nn.Module, parameters: dict[str, nn.Parameter], weight_decay: float
) -> list[dict[str, object]]:
    """Return AdamW's groups: decay pulls at the weights of products only, not at norms, biases, positions and tables."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in parameters.items():
        decayed = parameter.ndim >= 2 and name.endswith("weight") and id(parameter) not in tables
        groups[decayed].append(parameter)
    return [{"params": groups[1], "weight_decay": weight_decay}, {"params": groups[0], "weight_decay": 0.0}]


def same_rows(rows: Rows, device: torch.device, paired: bool) -> Tensor | None:
    """Return which pairs of a paired batch are no negatives of each other: one caption or one sample behind both."""
    if not paired:
        return None
    return losses.duplicates(*(torch.from_numpy(ids).to(device) for ids in (rows.texts, rows.images)))


def _backward(embeddings: Embeddings, slopes: Embeddings) -> None:
    torch.autograd.backward([embeddings[name] for name in slopes], list(slopes.values()))


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
