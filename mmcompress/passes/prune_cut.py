"""Cutting for `prune`: structure only, on real or meta tensors, through views taken just before.

Beside the weights, transformers keeps integers that must follow: head counts and widths (named by the views) and, when blocks go,
each block's place in the stack, which key-value caches are indexed by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.passes.prune_units import head_rows, kept_rows
from mmcompress.surgery.linears import in_every_head, keep_columns, keep_rows, selected, spread
from mmcompress.views import Attention, Experts, Mlp, Numbering, Tower

PLACES = ("layer_idx", "layer_index", "layer_id")


def cut_heads(bundle: Bundle, attention: Attention, kept: Sequence[int]) -> None:
    """Keep the heads `kept` (key-value groups, where heads share keys): rows of q, k, v, columns of the output Linear."""
    units = torch.tensor(kept)
    for path, rows in kept_rows(attention, units).items():
        keep_rows(_linear(bundle, path), rows)
    keep_columns(_linear(bundle, attention.reader), spread(units, head_rows(attention)[0]))
    for name in attention.per_head:
        path, _, own = name.rpartition(".")
        setattr(bundle.module(path), own, selected(bundle.model.get_parameter(name), 1, units))
    heads = len(kept) * attention.heads // attention.kv_heads
    write_counts(bundle, attention, heads, len(kept), attention.head_dim)


def cut_dims(bundle: Bundle, attention: Attention, kept: Sequence[int]) -> None:
    """Keep the channels `kept` of every head of an attention: rows of q, k, v, columns of the output Linear."""
    units = torch.tensor(kept)
    for path, heads in zip(attention.writers, (attention.heads, attention.kv_heads, attention.kv_heads), strict=True):
        keep_rows(_linear(bundle, path), in_every_head(units, heads, attention.head_dim))
    keep_columns(_linear(bundle, attention.reader), in_every_head(units, attention.heads, attention.head_dim))
    write_counts(bundle, attention, attention.heads, attention.kv_heads, len(kept))


def write_counts(bundle: Bundle, attention: Attention, heads: int, kv_heads: int, head_dim: int) -> None:
    """Let what an attention keeps beside its weights follow; the factor of its logits as if it was made with that width."""
    counts = {"heads": heads, "kv_heads": kv_heads, "width": heads * head_dim, "head_dim": head_dim}
    for path, attribute, what in attention.bookkeeping:
        module = bundle.module(path)
        if what == "scale":
            now = getattr(module, attribute) / attention.head_dim**-0.5
            setattr(module, attribute, now * head_dim**-0.5)
        else:
            setattr(module, attribute, counts[what])


def cut_neurons(bundle: Bundle, mlp: Mlp, kept: Sequence[int]) -> None:
    """Keep the hidden neurons `kept`: rows of the up (and gate) Linear, columns of the down Linear."""
    units = torch.tensor(kept)
    for path in mlp.writers:
        keep_rows(_linear(bundle, path), units)
    keep_columns(_linear(bundle, mlp.reader), units)


def cut_experts(bundle: Bundle, experts: Experts, kept: Sequence[int]) -> None:
    """Keep the experts `kept`: their slices of the parameters that hold all of them, and their rows of the router."""
    units = torch.tensor(kept)
    for name in (*experts.stacked, f"{experts.router}.weight"):
        path, _, own = name.rpartition(".")
        setattr(bundle.module(path), own, selected(bundle.model.get_parameter(name), 0, units))
    for path, attribute in experts.bookkeeping:
        setattr(bundle.module(path), attribute, len(kept))


def cut_blocks(bundle: Bundle, tower: Tower, kept: Sequence[int]) -> None:
    """Keep the blocks `kept` of a tower, in order, and renumber what counts them."""
    blocks = list(bundle.module(tower.blocks_path).children())
    bundle.replace(tower.blocks_path, nn.ModuleList(blocks[index] for index in kept))
    for place, index in enumerate(kept):
        for module in blocks[index].modules():
            for attribute in PLACES:
                if getattr(module, attribute, None) == index:
                    setattr(module, attribute, place)
    config = attrgetter(tower.config)(bundle.model.config) if tower.config else bundle.model.config
    setattr(config, tower.depth_key, len(kept))  # read while computing too: for hidden states, for caches
    for path, attribute, numbering in tower.numbered:
        owner = attrgetter(path)(bundle.model) if path else bundle.model
        found = getattr(owner, attribute)
        if found is not None:
            setattr(owner, attribute, renumbered(found, numbering, kept, len(blocks)))


def renumbered(value: Any, numbering: Numbering, kept: Sequence[int], depth: int) -> Any:
    """Return `value`, which counts the blocks of a stack `depth` deep, as it counts the blocks `kept`; see `Numbering`.

    Indices of blocks that go are left out of a list. A place in the stack stays behind the blocks that stay before it.
    """
    if numbering == "each":
        return [value[index] for index in kept]
    if numbering == "block":
        return [kept.index(index) for index in value if index in kept]
    if isinstance(value, Sequence):
        return [renumbered(one, numbering, kept, depth) for one in value]
    if value < 0:
        # Counted from the end, -1 being behind the last block: as many from the end as are kept behind the place.
        return -1 - sum(index >= depth + 1 + value for index in kept)
    return sum(index < value for index in kept)


def set_parameters(bundle: Bundle, tensors: Mapping[str, Tensor]) -> None:
    """Put values into parameters of the same shape, by name."""
    for name, tensor in tensors.items():
        parameter = bundle.model.get_parameter(name)
        assert parameter.shape == tensor.shape, f"{name} is {tuple(parameter.shape)}, not {tuple(tensor.shape)}"
        with torch.no_grad():
            parameter.copy_(tensor)


def _linear(bundle: Bundle, path: str) -> nn.Linear:
    module = bundle.module(path)
    assert isinstance(module, nn.Linear), f"{path} was not checked to be a Linear"
    return module
