"""The budget of `factorize`: which layers there are, what each rank saves, and which ranks pay for what has to go.

A layer (out, in) costs out * in as it is, and k (out + in) at rank k; its bias stays. So the first step saves little, from the
matrix to the largest rank that pays. From there each `multiple` of ranks saves as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.allocation import Chunk, spend
from mmcompress.ops.low_rank import largest_paying_rank
from mmcompress.passes.prune_budget import Pool, share
from mmcompress.views import Tower


@dataclass(frozen=True)
class Layer:
    """A Linear that may become two, and the ranks it may have then."""

    tower: str
    path: str
    shape: tuple[int, int]
    """(out, in)."""
    ranks: tuple[int, ...]
    """Ascending; none where two factors would not be smaller."""

    @property
    def costs(self) -> tuple[int, ...]:
        """What the layer has left at each step down: as it is, at the largest rank, …, at the smallest."""
        return (self.shape[0] * self.shape[1], *(rank * sum(self.shape) for rank in reversed(self.ranks)))

    def chunks(self, losses: Tensor) -> list[Chunk]:
        """Return the steps down, the largest rank first, each with what it loses (r,) and saves."""
        left = (min(self.shape), *reversed(self.ranks))
        steps = zip(left, left[1:], self.costs, self.costs[1:], strict=False)
        # What is lost at rank k is the sum from k on; at full rank nothing is.
        lost = [*losses.double().flip(0).cumsum(0).flip(0).tolist(), 0.0]
        return [Chunk(lost[to] - lost[come], was - now, come - to) for come, to, was, now in steps]


def list_layers(
    bundle: Bundle, towers: Sequence[Tower], kinds: Sequence[str], min_keep: float, multiple: int
) -> list[Layer]:
    """Return the Linears of the towers' attentions and feed-forwards, in the order of their blocks.

    Not those that share their weight with another, or whose owner reads it without calling them.
    """
    holders: dict[int, int] = {}
    for _, parameter in bundle.model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found = []
    for tower in towers:
        for path in layer_paths(tower, kinds):
            linear = bundle.module(path)
            assert isinstance(linear, nn.Linear), f"{path} was not checked to be a Linear"
            if path in tower.uncalled or holders[id(linear.weight)] > 1:
                continue
            shape = (linear.out_features, linear.in_features)
            least = -(-share(min_keep, min(shape)) // multiple) * multiple
            ranks = tuple(range(least, largest_paying_rank(shape, multiple) + 1, multiple))
            found.append(Layer(tower.name, path, shape, ranks))
    return found


def layer_paths(tower: Tower, kinds: Sequence[str]) -> list[str]:
    """Return the paths of the Linears of the tower's attentions and feed-forwards."""
    paths: list[str] = []
    for block in tower.blocks:
        if "attention" in kinds:
            for attention in (block.attention, block.cross):
                paths += (*attention.writers, attention.reader) if attention else ()
        if "mlp" in kinds and block.mlp:
            paths += (*block.mlp.writers, block.mlp.reader)
    return list(dict.fromkeys(paths))


def require_possible(family: str, pool: Pool, layers: Sequence[Layer]) -> None:
    """Raise UsageError when the smallest ranks of the pool's layers do not save what has to go, naming what would."""
    mine = [layer for layer in layers if layer.tower in pool.towers]
    most = sum(layer.costs[0] - layer.costs[-1] for layer in mine)
    if pool.remove <= most:
        return
    largest = math.floor(most * 1000 / pool.total) / 1000
    hint = f"use target >= {pool.total - most:,}" if pool.asked.startswith("target") else f"use ratio <= {largest:g}"
    raise UsageError(
        f"{family} has {len(mine)} Linears in the blocks of {' and '.join(pool.towers)}; {pool.asked} of "
        f"{pool.total:,} parameters would remove {pool.remove:,}, and at most {most:,} can go at the smallest ranks",
        hint=f"{hint}, a smaller min_keep or multiple, or more layers",
    )


def choose_ranks(pool: Pool, layers: Sequence[Layer], losses: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of each of the pool's layers that is to have two factors, by path: least is lost within the budget."""
    mine = [layer for layer in layers if layer.tower in pool.towers]
    gone = spend([layer.chunks(losses[layer.path]) for layer in mine], pool.remove)
    return {layer.path: layer.ranks[-steps] for layer, steps in zip(mine, gone, strict=True) if steps}
