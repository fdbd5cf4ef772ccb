"""The settings of a distillation with everything decided that data and model decide, and which parameters train."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Json
from mmcompress.passes.base import Context
from mmcompress.passes.distill_ranks import Ranks, world_size
from mmcompress.passes.distill_train import Lesson
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.low_rank_updates import low_rank_updates
from mmcompress.surgery.master_weights import holders
from mmcompress.surgery.quantized_base import Quantized

if TYPE_CHECKING:
    from mmcompress.data import Dataset
    from mmcompress.passes.distill import Distill

INTEGERS = "quantized-weights"
"""The value of `train` with which weights stored as integers train too."""
UPDATES = "lora"
"""The value of `train` with which Linears learn updates of low rank."""


@dataclass(frozen=True)
class Job(ABC):
    """What models that embed and models that answer have in common."""

    settings: Distill
    data: Dataset
    towers: tuple[str, ...]
    """Those that train."""
    teacher: Callable[[], Bundle]
    seed: int
    batch_size: int

    @property
    @abstractmethod
    def size(self) -> int:
        """How many training samples one epoch has."""

    @property
    @abstractmethod
    def held_back(self) -> int:
        """Samples that do not train; 0 where the data is so small that all serve for both."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the data."""
        return ()

    @abstractmethod
    def lesson(
        self, bundle: Bundle, teacher: Bundle, ranks: Ranks, folder: Path | None, context: Context, half: bool
    ) -> Lesson:
        """Return what the steps learn from. Raises UsageError for losses that data, student and teacher do not allow."""

    @property
    def samples_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.settings.accumulate * world_size()

    @property
    def steps(self) -> int | None:
        """How many steps to make at most; None: as many as there is time for."""
        if self.settings.steps is not None:
            return self.settings.steps
        rounds = self.settings.rounds
        return None if rounds is None else math.ceil(rounds * self.size / self.samples_per_step)

    def decisions(self, bundle: Bundle) -> dict[str, Json]:
        """Return what to record of all this."""
        layers = self.integer_layers(bundle).values()
        return {
            "steps": self.steps,
            "samples_per_step": self.samples_per_step,
            "samples": self.size,
            "held_back": self.held_back,
            "towers": list(self.towers),
            "trained_parameters": self._numbers(bundle) + sum(layer.weight_shape.numel() for layer in layers),
        }

    def _numbers(self, bundle: Bundle) -> int:
        if self.settings.train == UPDATES:
            linears = updatable(bundle, self.towers).values()
            return self.settings.rank * sum(linear.in_features + linear.out_features for linear in linears)
        return sum(each.numel() for each in trainable(bundle, self.towers, self.settings.train).values())

    @contextmanager
    def parameters(self, bundle: Bundle) -> Iterator[dict[str, nn.Parameter]]:
        """Yield what trains, by name; the student is as it was afterwards, but for values."""
        if self.settings.train != UPDATES:
            yield reached(bundle, self.towers, trainable(bundle, self.towers, self.settings.train))
            return
        paths = list(updatable(bundle, self.towers))
        with low_rank_updates(bundle.model, paths, self.settings.rank, self.seed, is_sparse(bundle)) as updates:
            yield reached(bundle, self.towers, updates)

    def integer_layers(self, bundle: Bundle) -> dict[str, Quantized]:
        """Return the layers whose integers train, by path. Raises UsageError where some should, and none can."""
        return integer_layers(bundle, self.towers) if self.settings.train == INTEGERS else {}


def trainable(bundle: Bundle, towers: tuple[str, ...], train: str) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name. Raises UsageError when there are none.

    Integer weights are buffers, so a quantized layer contributes its bias at most, unless it holds a master weight. What the
    model holds constant (the positions of Whisper's encoder are sines) stays so.
    """
    chosen = [bundle.tower(name) for name in towers]
    found = {
        name: parameter
        for name, parameter in bundle.model.named_parameters()
        if parameter.is_floating_point()
        and parameter.requires_grad
        and any(tower.owns(name) for tower in chosen)
        and (train != "norms-and-biases" or parameter.ndim == 1)
        and (train != "projection" or any(name.startswith(head + ".") for tower in chosen for head in tower.heads))
    }
    if not found and train != INTEGERS:
        raise UsageError(
            f"nothing can train: distill.train is '{train}' and the towers are {', '.join(towers) or 'none'}",
            hint=f"distill before quantizing, or use train: {INTEGERS}" if train == "all" else "use train: all",
        )
    return found


def is_sparse(bundle: Bundle) -> bool:
    """Whether zeros among the weights were made on purpose, and have to stay zeros."""
    return any(record.name == "sparsify" for record in bundle.history)


def updatable(bundle: Bundle, towers: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the Linears in the blocks of `towers` that hold floats, by path. Raises UsageError when there are none."""
    found: dict[str, nn.Linear] = {}
    for tower in (bundle.tower(name) for name in towers):
        for block in tower.blocks:
            for part in (block.attention, block.cross, block.mlp):
                for path in (*part.writers, part.reader) if part else ():
                    module = bundle.module(path)
                    if isinstance(module, nn.Linear) and not is_float_coded(module):
                        found[path] = module
    if not found:
        raise UsageError(
            f"distill.train is '{UPDATES}', and no Linear in the blocks of {' and '.join(towers)} holds floats",
            hint=f"distill before quantizing, or use train: {INTEGERS}",
        )
    return found


def integer_layers(bundle: Bundle, towers: Sequence[str]) -> dict[str, Quantized]:
    """Return the layers of `towers` that store weights of their own on a grid, by path.

    Raises UsageError where there are none, or layers that have no grid.
    """
    chosen = [bundle.tower(name) for name in towers]
    for path, module in bundle.model.named_modules():
        if is_float_coded(module) and any(tower.owns(path) for tower in chosen):
            raise UsageError(
                f"distill.train is '{INTEGERS}', and {path} is bitsandbytes' (NF4, FP4): its codes and their scales are made "
                "together, so they have no fixed grid to train on",
                hint="quantize with W4A16 instead, or name the other towers in distill.towers",
            )
    found = {path: layer for path, layer in holders(bundle.model).items() if any(each.owns(path) for each in chosen)}
    if not found:
        raise UsageError(
            f"distill.train is '{INTEGERS}', but no layer of {' or '.join(towers)} is quantized",
            hint="quantize first, or use train: all",
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
