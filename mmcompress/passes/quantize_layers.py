"""Which layers of a tower can be quantized at all, in how large groups, and what a tower takes."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.grouped import group_size_for
from mmcompress.surgery.experts import common_group, stacks_of
from mmcompress.surgery.float_codes import BLOCK, OUTPUTS, fits
from mmcompress.surgery.quantized import can_quantize
from mmcompress.views import Tower

SMALL_TABLE = 0.01
"""Embedding tables below this share of a tower's bytes stay float: they save nothing and cost a multiplication."""


def candidates(
    bundle: Bundle, tower: Tower, embeddings: bool, keep_float: Sequence[str], experts: bool = True
) -> list[str]:
    """Return the paths of the layers of `tower` to be quantized: those that can be, but the ones named by the patterns.

    The experts of a block are one layer.
    """
    mixtures = mixtures_of(tower) if experts else set()
    total = sum(p.nbytes for name, p in bundle.model.named_parameters() if tower.owns(name))
    tables = {table for table, _ in tower.tied}
    found = []
    for path, module in bundle.model.named_modules():
        if not tower.owns(path) or path in tower.uncalled or not (can_quantize(module) or path in mixtures):
            continue
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in keep_float):
            continue
        small = isinstance(module, nn.Embedding) and module.weight.nbytes < SMALL_TABLE * total
        if isinstance(module, nn.Embedding) and (not embeddings or (small and path not in tables)):
            continue
        found.append(path)
    return whole_ties(found, tower)


def mixtures_of(tower: Tower) -> set[str]:
    """Return the paths of what holds the experts of the tower's blocks."""
    return {block.experts.holder for block in tower.blocks if block.experts}


def weights_of(layer: nn.Module) -> list[Tensor]:
    """Return the parameters of a layer that become integers."""
    return stacks_of(layer) or [layer.get_parameter("weight")]


def _of_all_words(tower: Tower) -> set[str]:
    """Return what has more than 4 bits: Linears that share a table's weight, and the product before such a one.

    That product stands behind the last norm of a stream that was turned (`narrow`, `rotate`). It holds the norm's gains, on its
    diagonal, beside much smaller ones, and every word's logit is made of what it gives out.
    """
    tied = {linear for _, linear in tower.tied}
    last = tower.residual if tower.residual and tied & set(tower.residual.readers) else None
    return tied | ({f"{last.norm}.1"} if last else set())


def group_sizes(bundle: Bundle, tower: Tower, paths: Sequence[str], wanted: int) -> dict[str, int]:
    """Return the size of groups for those of `paths` that may have 4 bits: Linears of their own weight, evenly cut, and experts."""
    linears = {path: bundle.module(path) for path in paths if path not in _of_all_words(tower)}
    sizes = {
        path: group_size_for(module.in_features, wanted)
        for path, module in linears.items()
        if isinstance(module, nn.Linear)
    }
    sizes |= {path: common_group(stacks_of(bundle.module(path)), wanted) for path in mixtures_of(tower) & set(paths)}
    return {path: size for path, size in sizes.items() if size}


def float_blocks(bundle: Bundle, tower: Tower, paths: Sequence[str], size: int) -> dict[str, int]:
    """Return `size` for those of `paths` that may have 4-bit floats in blocks of it: Linears of their own weight, evenly cut."""
    linears = {path: bundle.module(path) for path in paths if path not in _of_all_words(tower)}
    return {
        path: size
        for path, module in linears.items()
        if isinstance(module, nn.Linear) and module.in_features % size == 0
    }


def float_codable(bundle: Bundle, tower: Tower, paths: Sequence[str]) -> list[str]:
    """Return those of `paths` that may have weights of 4-bit floats. Raises UsageError where none may."""
    modules = {path: bundle.module(path) for path in paths if path not in _of_all_words(tower)}
    found = [path for path, module in modules.items() if isinstance(module, nn.Linear) and fits(module)]
    if not found:
        raise UsageError(
            f"no Linear of the {tower.name} tower has inputs in multiples of {BLOCK} and outputs in multiples of {OUTPUTS}, "
            "as bitsandbytes' kernels want them",
            hint=f"use scheme W4A16, or leave it alone with --{tower.name}-scheme W16A16",
        )
    return found


def by_token(bundle: Bundle, tower: Tower, paths: Sequence[str], weights: str) -> list[str]:
    """Return those of `paths` whose inputs can be rounded token by token, or be 8-bit floats: Linears.

    One that shares its weight with an embedding table has that table's integers, and so no floats.
    """
    tied = {linear for _, linear in tower.tied} if weights == "float8" else set()
    return [path for path in paths if isinstance(bundle.module(path), nn.Linear) and path not in tied]


def told(sizes: Mapping[str, int], eight_bit: Sequence[str]) -> str:
    """Return which layers take 4 bits and which 8, for a person."""
    counts = Counter(sizes.values()).most_common()
    groups = ", ".join(f"{count} in groups of {size}" for size, count in counts)
    others = f"; 8 bits: {', '.join(eight_bit[:3])}{f' and {len(eight_bit) - 3} more' if len(eight_bit) > 3 else ''}"
    return f"{len(sizes)} layers take 4 bits ({groups or 'none can'}){others if eight_bit else ''}"


def whole_ties(paths: Sequence[str], tower: Tower) -> list[str]:
    """Return `paths` without the layers that share their weight with one that is not among them."""
    halves = {path for pair in tower.tied if not set(pair) <= set(paths) for path in pair}
    return [path for path in paths if path not in halves]


def weighed(modules: Iterable[nn.Module]) -> int:
    """Return what layers take together, what they share once."""
    tensors = {id(value): value for module in modules for value in module.state_dict(keep_vars=True).values()}
    return sum(value.nbytes for value in tensors.values())


def bytes_of(bundle: Bundle, tower: Tower) -> int:
    """Return what a tower's tensors take, shared ones once."""
    state = bundle.model.state_dict(keep_vars=True)
    return sum(value.nbytes for value in {id(v): v for name, v in state.items() if tower.owns(name)}.values())
