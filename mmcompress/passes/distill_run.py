"""One run of distillation: from settings, model and data to facts. `Distill` holds the settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from mmcompress.bundle import Bundle, DualEncoder
from mmcompress.errors import UsageError
from mmcompress.manifest import Json
from mmcompress.passes.base import Context
from mmcompress.passes.distill_answers import read_answers
from mmcompress.passes.distill_job import Job, is_sparse
from mmcompress.passes.distill_pace import Annealing, Pace
from mmcompress.passes.distill_pairs import read_pairs
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_state import State
from mmcompress.passes.distill_targets import digest
from mmcompress.passes.distill_train import Schedule, Trainer
from mmcompress.surgery.kept_zeros import zeros_kept
from mmcompress.surgery.ledger import annealing
from mmcompress.surgery.master_weights import Masters
from mmcompress.surgery.reduction import TokenLedger, drops, ledger_of

if TYPE_CHECKING:
    from mmcompress.passes.distill import Distill

CURVE_POINTS = 20


def read_job(settings: Distill, bundle: Bundle, context: Context) -> Job:
    """Look at the data. Raises UsageError without data or teacher, and when the data lacks what is asked for."""
    data = context.require_data("distill")
    if context.teacher is None:
        raise UsageError(
            f"distill has no teacher{f' at {settings.teacher}' if settings.teacher else ''}",
            hint="give --teacher CHECKPOINT: the model before compression, or a better one of the same family",
        )
    read = read_pairs if isinstance(bundle.family, DualEncoder) else read_answers
    return read(settings, bundle, data, context, context.teacher)


def distill(settings: Distill, bundle: Bundle, context: Context) -> dict[str, Json]:
    """Train `bundle` in place; return facts. See `Distill.fit`."""

    @contextmanager
    def annealed(job: Job, ranks: Ranks) -> Iterator[Pace]:
        with annealing(merging_ledgers(bundle, job.towers)) as to:
            yield Annealing(settings.anneal, to)

    pace = annealed if settings.anneal else at_its_own_pace
    return train(settings, bundle, context, "distill", asdict(settings), pace)[0]


@contextmanager
def at_its_own_pace(job: Job, ranks: Ranks) -> Iterator[Pace]:
    """Yield a pace at which nothing changes but the weights."""
    yield Pace()


def train(
    settings: Distill,
    bundle: Bundle,
    context: Context,
    what: Literal["distill", "search"],
    identity: dict[str, Any],
    pace: Callable[[Job, Ranks], AbstractContextManager[Pace]],
) -> tuple[dict[str, Json], dict[str, nn.Parameter]]:
    """Train `bundle` in place; return facts, and the parameters that trained, by name.

    what: names the folder of the state to continue from; identity: the settings that state belongs to; pace: opens what changes
    beside the weights, and closes it before the result is examined. A search may end with a higher loss: what it cuts costs. Where
    distillation does, the weights from before are put back.
    """
    started = time.monotonic()
    home = bundle.device
    job = read_job(settings, bundle, context)
    ranks = Ranks.join(home)
    folder = context.workdir / what if context.workdir else None
    with full_precision(bundle.model):
        bundle.model.to(ranks.device(home)).eval()
        teacher = job.teacher()
        teacher.model.to(bundle.device).eval()
        half = settings.amp and has_bfloat16(bundle.device)
        # How often state is written changes no result, and may be changed between attempts.
        identity = {**identity, "save_minutes": None}
        run = digest(identity, job.seed, ranks.world, job.data.fingerprint(), teacher, bundle)
        lesson = job.lesson(bundle, teacher, ranks, folder, context, half)
        masters = Masters.of(job.integer_layers(bundle), teacher.model)
        del teacher  # where everything it says is kept, its memory is free from here on
        state = State.open(folder, run)
        if ranks.agree(state.step) != state.step:
            raise UsageError(
                f"process {ranks.rank} found the training state of step {state.step}, process 0 another",
                hint="give all processes the same work folder, on a disk they share",
            )
        before = lesson.examine()
        schedule = Schedule(
            steps=job.steps, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
            warmup=settings.warmup, clip=settings.clip, ema=settings.ema, save_minutes=settings.save_minutes,
            seconds=settings.max_minutes and settings.max_minutes * 60 - (time.monotonic() - started),
        )  # fmt: skip
        undone: dict[str, Json] = {}
        undo = what == "distill" and not settings.keep_worse
        with (
            masters.training(),
            job.parameters(bundle) as parameters,
            zeros_kept(bundle.model, parameters if is_sparse(bundle) else {}) as zeros,
        ):
            begun = {name: parameter.detach().clone() for name, parameter in parameters.items()} if undo else {}
            with pace(job, ranks) as kept:
                trainer = Trainer(bundle, parameters, lesson, schedule, ranks, context.progress, kept, f"{what}ing")
                state = trainer.run(state)
            after = lesson.examine()
            worse = ranks.agree(int(after["loss"] > before["loss"]))
            if worse and what == "distill":
                context.progress.say(remark(before["loss"], after["loss"], schedule.peak(state.steps), undo))
            if worse and undo:
                undone = {"undone": {"loss": round(after["loss"], 6)}}
                after = dict(before)
                with torch.no_grad():
                    for name, value in begun.items():
                        parameters[name].copy_(value)
        bundle.model.to(home)
    facts = job.decisions(bundle) | undone
    if masters.count:
        facts["quantized_weights"] = {
            "count": masters.count,
            "from_teacher": round(masters.given / masters.count, 4),
            "changed": round(masters.changed / masters.count, 4),
        }
    if zeros:
        facts["zeros_kept"] = zeros
    facts |= {
        "trained_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "steps": state.steps,
        "samples_seen": state.steps * lesson.samples,
        "processes": ranks.world,
        "precision": "bf16" if half else "fp32",
        "loss": {"before": round(before.pop("loss"), 6), "after": round(after.pop("loss"), 6)},
        "cosine": {name: {"before": round(before[name], 6), "after": round(after[name], 6)} for name in before},
        "seconds_per_step": round(state.seconds / max(1, state.step), 4),
        "curve": curve(state.losses),
    }
    return facts, parameters


def remark(before: float, after: float, rate: float, undone: bool) -> str:
    """Say that training made the student worse, and what would help."""
    kept = "the weights from before are back" if undone else "kept as asked"
    return (
        f"distill raised the loss on held-back samples from {before:.4g} to {after:.4g}, {kept}; "
        f"lower distill.learning_rate (now {rate:g}), or make more steps"
    )


def merging_ledgers(bundle: Bundle, towers: Sequence[str]) -> list[TokenLedger]:
    """Return what the blocks of the towers that merge tokens share. Raises UsageError where there is nothing to anneal."""
    blocks = {name: [bundle.module(block.path) for block in bundle.tower(name).blocks] for name in towers}
    found = [ledgers for name in towers if (ledgers := [own for block in blocks[name] if (own := ledger_of(block))])]
    if not found:
        raise UsageError(
            f"distill.anneal is for a student that merges tokens; {' and '.join(towers)} of this one do not",
            hint="leave anneal out, or merge-tokens first",
        )
    if any(drops(block) for name in towers for block in blocks[name]):
        raise UsageError(
            "distill.anneal cannot bring back tokens that are dropped at fixed places (method random)",
            hint="leave anneal out",
        )
    return [ledgers[0] for ledgers in found]


def curve(losses: list[float]) -> list[list[float]]:
    """Return at most 20 points (last step, mean loss since the former point)."""
    parts = np.array_split(np.array(losses), min(CURVE_POINTS, max(1, len(losses))))
    ends = np.cumsum([len(part) for part in parts])
    return [[int(end), round(float(part.mean()), 6)] for end, part in zip(ends, parts, strict=True) if len(part)]


def has_bfloat16(device: torch.device) -> bool:
    """Return whether `device` multiplies bfloat16 in hardware; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Hold a half-precision model in float32 while it trains: steps smaller than a half's rounding would be lost."""
    before = {name: value.dtype for name, value in _state(model).items() if value.is_floating_point()}
    if all(dtype == torch.float32 for dtype in before.values()):
        yield
        return
    model.float()
    try:
        yield
    finally:
        for name, value in _state(model).items():
            if name in before:
                value.data = value.data.to(before[name])


def _state(model: nn.Module) -> dict[str, Any]:
    return model.state_dict(keep_vars=True)
