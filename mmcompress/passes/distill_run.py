"""One run of distillation: from settings, model and data to facts. `Distill` holds the settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Json
from mmcompress.passes.base import Context
from mmcompress.passes.distill_data import Corpus, Feeder, Rows, read_corpus
from mmcompress.passes.distill_objective import Objective
from mmcompress.passes.distill_ranks import Ranks, world_size
from mmcompress.passes.distill_state import State
from mmcompress.passes.distill_targets import Table, Targets, digest, embed_once, item_of, of_tower
from mmcompress.passes.distill_train import Schedule, Trainer, same_rows

if TYPE_CHECKING:
    from mmcompress.passes.distill import Distill

CURVE_POINTS = 20


@dataclass(frozen=True)
class Job:
    """The settings with everything decided that data and model decide."""

    settings: Distill
    corpus: Corpus
    towers: tuple[str, ...]
    """Those that train."""
    teacher: Callable[[], Bundle]
    seed: int

    @property
    def samples_per_step(self) -> int:
        """Over all processes."""
        return self.settings.batch_size * self.settings.accumulate * world_size()

    @property
    def steps(self) -> int:
        if self.settings.steps is not None:
            return self.settings.steps
        return math.ceil(self.settings.epochs * self.corpus.size / self.samples_per_step)

    @property
    def held_back(self) -> int:
        """Samples that do not train; 0 where the data is so small that all serve for both."""
        rows = "images" if len(self.corpus.train.images) else "texts"
        train, held = getattr(self.corpus.train, rows), getattr(self.corpus.held, rows)
        return 0 if np.isin(held, train).any() else len(held)

    def decisions(self, bundle: Bundle) -> dict[str, Json]:
        """Return what to record of all this."""
        parameters = trainable(bundle, self.towers, self.settings.train)
        return {
            "steps": self.steps,
            "samples_per_step": self.samples_per_step,
            "samples": self.corpus.size,
            "held_back": self.held_back,
            "paired": self.corpus.paired,
            "towers": list(self.towers),
            "trained_parameters": sum(parameter.numel() for parameter in parameters.values()),
        }


def read_job(settings: Distill, bundle: Bundle, context: Context) -> Job:
    """Look at the data. Raises UsageError without data or teacher, and when the data lacks what a named tower needs."""
    data = context.require_data("distill")
    if context.teacher is None:
        raise UsageError(
            f"distill has no teacher{f' at {settings.teacher}' if settings.teacher else ''}",
            hint="give --teacher CHECKPOINT: the model before compression, or a better one of the same family",
        )
    seed = context.seed if settings.seed is None else settings.seed
    corpus = read_corpus(data, settings.pairing, seed)
    present = {tower.name: len(of_tower(corpus.train, tower.name)) > 0 for tower in bundle.towers()}
    for name in settings.towers:
        if not present.get(name, True):
            raise UsageError(
                f"distill.towers names '{name}', but the data has no {'images' if name == 'vision' else 'texts'}",
                hint="leave the tower out, or add them to the data",
            )
    towers = tuple(name for name in present if (name in settings.towers if settings.towers else present[name]))
    return Job(settings, corpus, towers, context.teacher, seed)


def trainable(bundle: Bundle, towers: tuple[str, ...], train: str) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name. Raises UsageError when there are none.

    Integer weights are buffers, so a quantized layer contributes its bias at most.
    """
    chosen = [bundle.tower(name) for name in towers]
    found = {
        name: parameter
        for name, parameter in bundle.model.named_parameters()
        if parameter.is_floating_point()
        and any(tower.owns(name) for tower in chosen)
        and (train != "norms-and-biases" or parameter.ndim == 1)
        and (train != "projection" or any(name.startswith(head + ".") for tower in chosen for head in tower.heads))
    }
    if not found:
        raise UsageError(
            f"nothing can train: distill.train is '{train}' and the towers are {', '.join(towers) or 'none'}",
            hint="distill before quantizing" if train == "all" else "use train: all",
        )
    return found


def reached(bundle: Bundle, towers: tuple[str, ...], parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return those of `parameters` that the towers' embeddings depend on; a mask token or a second pooler is left out."""
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        total = torch.stack([bundle.encode(name, bundle.example_inputs(name)).sum() for name in towers]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for name, parameter in parameters.items():
        parameter.requires_grad_(flags[name])
    return {
        name: parameter
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        if gradient is not None
    }


def distill(settings: Distill, bundle: Bundle, context: Context) -> dict[str, Json]:
    """Train `bundle` in place; return facts. See `Distill.fit`."""
    started = time.monotonic()
    home = bundle.device
    job = read_job(settings, bundle, context)
    ranks = Ranks.join(home)
    corpus, towers = job.corpus, job.towers
    folder = context.workdir / "distill" if context.workdir else None
    with full_precision(bundle.model):
        bundle.model.to(ranks.device(home)).eval()
        teacher = job.teacher()
        teacher.model.to(bundle.device).eval()
        live = teacher if teacher_is_live(settings) and "vision" in towers else None
        feeder = Feeder(
            corpus=corpus, student=bundle, towers=towers, batch_size=settings.batch_size, accumulate=settings.accumulate,
            seed=job.seed, rank=ranks.rank, world=ranks.world, augment=settings.augment, live=live,
        )  # fmt: skip
        objective = make_objective(settings, bundle, teacher, corpus)
        # How often state is written changes no result, and may be changed between attempts.
        identity = {**asdict(settings), "save_minutes": None}
        run = digest(identity, job.seed, ranks.world, corpus.data.fingerprint(), teacher, bundle)
        targets = make_targets(job, bundle, teacher, objective, live, folder, ranks, context)
        del teacher, live  # where everything the teacher says is kept, its memory is free from here on
        state = State.open(folder, run)
        if ranks.agree(state.step) != state.step:
            raise UsageError(
                f"process {ranks.rank} found the training state of step {state.step}, process 0 another",
                hint="give all processes the same work folder, on a disk they share",
            )
        half = settings.amp and has_bfloat16(bundle.device)
        before = examine(bundle, towers, corpus, objective, targets, settings.batch_size)
        schedule = Schedule(
            steps=job.steps, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
            warmup=settings.warmup, clip=settings.clip, ema=settings.ema, save_minutes=settings.save_minutes,
            seconds=settings.max_minutes and settings.max_minutes * 60 - (time.monotonic() - started),
        )  # fmt: skip
        parameters = reached(bundle, towers, trainable(bundle, towers, settings.train))
        trainer = Trainer(bundle, parameters, feeder, objective, targets, schedule, ranks, context.progress, half=half)
        state = trainer.run(state)
        after = examine(bundle, towers, corpus, objective, targets, settings.batch_size)
        bundle.model.to(home)
    return {
        **job.decisions(bundle),
        "trained_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "steps": state.steps,
        "samples_seen": state.steps * feeder.samples,
        "processes": ranks.world,
        "precision": "bf16" if half else "fp32",
        "loss": {"before": before.pop("loss"), "after": after.pop("loss")},
        "cosine": {name: {"before": before[name], "after": after[name]} for name in before},
        "seconds_per_step": round(state.seconds / max(1, state.step), 4),
        "curve": curve(state.losses),
    }


def teacher_is_live(settings: Distill) -> bool:
    """Whether the teacher runs in every step."""
    return settings.augment if settings.cache_teacher is None else not settings.cache_teacher


def make_objective(settings: Distill, bundle: Bundle, teacher: Bundle, corpus: Corpus) -> Objective:
    """Return the losses with defaults filled in. Raises UsageError for one that the data or the widths do not allow."""
    for name in ("interactive", "logit"):
        if getattr(settings, name) and not corpus.paired:
            raise UsageError(
                f"distill.{name} is {getattr(settings, name)}, but the data is not paired",
                hint="use affinity, which needs no pairs, or give every sample an image and a text",
            )
    both = len(corpus.train.images) > 0 and len(corpus.train.texts) > 0
    if settings.affinity and not both:
        raise UsageError(
            f"distill.affinity is {settings.affinity}, but the data has one modality only", hint="set affinity to 0"
        )
    (student_scale, student_bias), (scale, bias) = (
        [float(value.detach()) for value in model.dual.similarity(model.model)] for model in (bundle, teacher)
    )
    objective = Objective(
        feature=settings.feature,
        interactive=float(corpus.paired) if settings.interactive is None else settings.interactive,
        relational=settings.relational,
        logit=settings.logit,
        affinity=float(both and not corpus.paired) if settings.affinity is None else settings.affinity,
        temperature=settings.temperature,
        paired=corpus.paired,
        student=(student_scale, student_bias),
        teacher=(scale, bias),
    )
    if not objective.active:
        raise UsageError("no loss of distill has a weight for this data", hint="set feature or relational above 0")
    own, other = _width(bundle), _width(teacher)
    if objective.compares_spaces and own != other:
        raise UsageError(
            f"the student's vectors have {own} channels, the teacher's {other}",
            hint="set feature, interactive and affinity to 0: relational and logit compare similarities only",
        )
    return objective


def make_targets(
    job: Job, bundle: Bundle, teacher: Bundle, objective: Objective, live: Bundle | None,
    folder: Path | None, ranks: Ranks, context: Context,
) -> Targets:  # fmt: skip
    """Compute what stays the same all through the run: the teacher's vectors, and those of frozen student towers."""
    corpus, held, size = job.corpus, job.corpus.held, job.settings.batch_size
    used = corpus.used(job.steps * job.samples_per_step, job.seed)
    plain = Rows(held.images if live else used.images, used.texts)
    present = [tower.name for tower in bundle.towers() if len(of_tower(used, tower.name))]
    frozen = [name for name in present if name not in job.towers and objective.needs_frozen_student]

    def table(model: Bundle, tower: str, label: str) -> Table:
        rows = of_tower(plain, tower)
        identity = digest(model, corpus.data.fingerprint(), rows, tower, size)
        return embed_once(
            model, tower, rows, item_of(corpus, tower), batch_size=size,
            folder=folder / f"{tower}-{identity}" if folder else None,
            ranks=ranks, progress=context.progress, label=f"{label}, {tower}",
        )  # fmt: skip

    return Targets(
        teacher={
            name: table(teacher, name, "teacher")
            for name in present
            if objective.needs_both_towers or name in job.towers
        },
        frozen={name: table(bundle, name, "frozen tower") for name in frozen},
        live=live,
    )


@torch.no_grad()
def examine(
    bundle: Bundle, towers: tuple[str, ...], corpus: Corpus, objective: Objective, targets: Targets, batch_size: int
) -> dict[str, float]:
    """Return the loss on the held-back samples, and for each trained tower the mean cosine to the teacher there."""
    rows = corpus.held
    student = targets.student(rows)
    for name in towers:
        numbers = of_tower(rows, name)
        parts = [
            bundle.encode(
                name, bundle.prepare(name, [item_of(corpus, name)(int(row)) for row in numbers[at : at + batch_size]])
            )
            for at in range(0, len(numbers), batch_size)
        ]
        student[name] = torch.cat(parts).float()
    teacher = targets.kept(rows, plain=True)
    found = {"loss": float(objective(student, teacher, same_rows(rows, bundle.device, corpus.paired)))}
    for name in towers:
        if student[name].shape == teacher[name].shape:
            found[name] = float(nn.functional.cosine_similarity(student[name], teacher[name]).mean())
    return {name: round(value, 6) for name, value in found.items()}


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


@torch.no_grad()
def _width(bundle: Bundle) -> int:
    tower = bundle.towers()[0].name
    return bundle.encode(tower, bundle.example_inputs(tower)).shape[-1]
