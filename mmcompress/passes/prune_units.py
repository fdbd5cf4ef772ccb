"""What `prune` can remove: units, what belongs to each, and what each costs, as exact integers.

A unit is an attention head (a key-value group with its query heads, where there are fewer key than query heads), a channel of all
heads of an attention, an MLP neuron, one of the experts a router chooses from, or a block. An expert takes no MACs with it but
those of its row of the router: each token goes through as many as before. A block's cross-attention is a group of its own. Costs
are counted, not estimated: parameters from shapes; multiply-accumulates from shapes and from the number of tokens seen at each
Linear in one forward pass of the family's example inputs, so that a shortened token stream is priced as it is. MACs are those of
Linears, convolutions and attention products at batch 1. Cross-attention makes keys and values of all S tokens of the encoder, and
counts them; the encoder itself counts apart.

Shape alphabet: N tokens, S tokens of the encoder a decoder looks at, C channels, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.surgery.counting import counting, macs_within
from mmcompress.surgery.experts import stacked_shape
from mmcompress.surgery.linears import spread
from mmcompress.surgery.watch import evaluating, watch_inputs
from mmcompress.views import Attention, Block, Experts, Mlp, Tower

Kind = Literal["heads", "head-dims", "neurons", "experts", "blocks"]


@dataclass(frozen=True)
class Costs:
    """Parameters and multiply-accumulates."""

    parameters: int
    macs: int

    def of(self, measure: str) -> int:
        """Return one of the two by name."""
        return self.macs if measure == "macs" else self.parameters


@dataclass(frozen=True)
class Group:
    """The units of one kind in one block, all of equal cost; a block is a group of one unit."""

    tower: str
    block: int
    kind: Kind
    units: int
    cost: Costs
    """Of one unit."""
    writers: tuple[str, ...] = ()
    """Linears whose rows are cut with a unit; for experts the parameters that hold them; empty for blocks."""
    reader: str = ""
    """Linear whose columns are cut with a unit; for experts, the path of their router; for a block, that of the block."""
    width: int = 1
    """Columns of the reader per unit: side by side, of head channels one in each head."""
    part: str = ""
    """"cross" for cross-attention."""
    sections: int = 1
    """How many layers' rows a writer holds one after the other: 3 where q, k and v are fused."""
    least: int = 1
    """How many units stay in any case: as many experts as a token goes through."""
    nanoseconds: int = 0
    """What one unit takes, where it was timed (`prune_times`)."""

    def price(self, measure: str) -> int:
        """Return what one unit costs, in parameters, macs or nanoseconds."""
        return self.nanoseconds if measure == "nanoseconds" else self.cost.of(measure)

    @property
    def key(self) -> str:
        """How decisions name this group: "vision.3", "decoder.3.cross"."""
        return f"{self.tower}.{self.block}.{self.part}".rstrip(".")


def list_groups(
    bundle: Bundle, towers: Sequence[Tower], kinds: Iterable[str], protect: Iterable[int], tokens: dict[str, int]
) -> list[Group]:
    """Return the groups of `kinds` in `towers`, vision first, then by block; `protect`ed block indices are left out."""
    groups: list[Group] = []
    kinds = set(kinds)
    for tower in towers:
        untouched = {index % len(tower.blocks) for index in protect if -len(tower.blocks) <= index < len(tower.blocks)}
        for block in tower.blocks:
            if block.index in untouched:
                continue
            if "heads" in kinds:
                if not block.attention.why_whole:
                    groups.append(_heads(bundle, tower, block, block.attention, tokens))
                if block.cross and not block.cross.why_whole:
                    groups.append(_heads(bundle, tower, block, block.cross, tokens, "cross"))
            if "head-dims" in kinds:
                if not block.attention.why_rigid:
                    groups.append(_head_dims(bundle, tower, block, block.attention, tokens))
                if block.cross and not block.cross.why_rigid:
                    groups.append(_head_dims(bundle, tower, block, block.cross, tokens, "cross"))
            if "neurons" in kinds and block.mlp:
                groups.append(_neurons(bundle, tower, block, block.mlp, tokens))
            if "experts" in kinds and block.experts:
                groups.append(_experts(bundle, tower, block, block.experts, tokens))
            if "blocks" in kinds and block.index not in tower.needed:
                cost = Costs(_numel(bundle.module(block.path)), _block_macs(bundle, block, tokens))
                groups.append(Group(tower.name, block.index, "blocks", 1, cost, reader=block.path))
    return groups


def _heads(
    bundle: Bundle, tower: Tower, block: Block, attention: Attention, tokens: dict[str, int], part: str = ""
) -> Group:
    rows, fused = head_rows(attention), len(attention.writers) == 1
    queries, keys = _looked_at(attention, tokens)
    columns = rows[0] * _linear(bundle, attention.reader).out_features
    parameters, macs = columns, queries * columns
    for path, height, seen in zip(attention.writers * (3 if fused else 1), rows, (queries, keys, keys), strict=True):
        linear = _linear(bundle, path)
        macs += seen * height * linear.in_features
        parameters += height * (linear.in_features + (linear.bias is not None))
    parameters += sum(bundle.model.get_parameter(name).shape[0] for name in attention.per_head)
    window = attention.window or keys
    macs += attention_macs(queries, window, attention.heads // attention.kv_heads, attention.head_dim)
    return Group(
        tower.name,
        block.index,
        "heads",
        attention.kv_heads,
        Costs(parameters, macs),
        attention.writers,
        attention.reader,
        rows[0],
        part,
        3 if fused else 1,
    )


def _head_dims(
    bundle: Bundle, tower: Tower, block: Block, attention: Attention, tokens: dict[str, int], part: str = ""
) -> Group:
    assert attention.heads == attention.kv_heads, f"{attention.path} shares keys, and has no word that it is rigid"
    queries, keys = _looked_at(attention, tokens)
    columns = attention.heads * _linear(bundle, attention.reader).out_features
    parameters, macs = columns, queries * columns
    for path, seen in zip(attention.writers, (queries, keys, keys), strict=True):
        linear = _linear(bundle, path)
        parameters += attention.heads * (linear.in_features + (linear.bias is not None))
        macs += seen * attention.heads * linear.in_features
    macs += attention_macs(queries, attention.window or keys, attention.heads, 1)
    cost = Costs(parameters, macs)
    paths = (attention.writers, attention.reader, attention.heads)
    return Group(tower.name, block.index, "head-dims", attention.head_dim, cost, *paths, part)


def _neurons(bundle: Bundle, tower: Tower, block: Block, mlp: Mlp, tokens: dict[str, int]) -> Group:
    reader = _linear(bundle, mlp.reader)
    inputs = [_linear(bundle, path) for path in mlp.writers]
    weights = sum(linear.in_features for linear in inputs) + reader.out_features
    biases = sum(linear.bias is not None for linear in inputs)
    cost = Costs(weights + biases, tokens[mlp.reader] * weights)
    return Group(tower.name, block.index, "neurons", mlp.neurons, cost, mlp.writers, mlp.reader)


def _experts(bundle: Bundle, tower: Tower, block: Block, experts: Experts, tokens: dict[str, int]) -> Group:
    row = _router_row(bundle, experts)
    cost = Costs(row + _expert_weights(bundle, experts), tokens[experts.path] * row)
    return Group(
        tower.name,
        block.index,
        "experts",
        experts.experts,
        cost,
        experts.stacked,
        experts.router,
        least=experts.top,
    )


def _router_row(bundle: Bundle, experts: Experts) -> int:
    return bundle.model.get_parameter(f"{experts.router}.weight").shape[1]


def _expert_weights(bundle: Bundle, experts: Experts) -> int:
    """Return how many weights one expert has."""
    return sum(stacked_shape(bundle.model, name)[1:].numel() for name in experts.stacked)


def attention_macs(queries: int, keys: float, heads: int, head_dim: int) -> int:
    """Return the MACs of QK' and AV."""
    return round(2 * queries * keys * heads * head_dim)


def _looked_at(attention: Attention, tokens: dict[str, int]) -> tuple[int, int]:
    """Return how many queries and how many keys there are: (N, N), or (N, S) in cross-attention."""
    queries = tokens[attention.reader]
    return queries, tokens.get(attention.writers[-1], queries)


def _block_macs(bundle: Bundle, block: Block, tokens: dict[str, int]) -> int:
    def linears(paths: Sequence[str], seen: int) -> int:
        return seen * sum(_linear(bundle, path).weight.numel() for path in paths)

    total = linears((*block.mlp.writers, block.mlp.reader), tokens[block.mlp.reader]) if block.mlp else 0
    if block.experts:
        mixed, row = block.experts, _router_row(bundle, block.experts)
        total += tokens[mixed.path] * (mixed.experts * row + mixed.top * _expert_weights(bundle, mixed))
    for attention in (block.attention, block.cross):
        if attention:
            queries, keys = _looked_at(attention, tokens)
            total += linears((attention.writers[0], attention.reader), queries) + linears(attention.writers[1:], keys)
            total += attention_macs(queries, attention.window or keys, attention.heads, attention.head_dim)
    return total


def count_tokens(bundle: Bundle, tower: Tower) -> dict[str, int]:
    """Return N at every reader of `tower`, by the reader's path, in one forward pass of its example inputs.

    Beside them, N at mixtures of experts, by their path, and the S tokens that the values of cross-attention are made of, by the
    path of the value Linear.
    """
    readers = [path for block in tower.blocks for path in (block.attention.reader, _feeding(block))]
    readers += [path for block in tower.blocks if block.cross for path in (block.cross.reader, block.cross.writers[-1])]
    seen: dict[str, int] = {}

    def record(name: str, states: Tensor) -> None:
        seen[name] = len(states)

    with evaluating(bundle.model), counting(), watch_inputs({p: bundle.module(p) for p in readers}, record):
        bundle.encode(tower.name, bundle.example_inputs(tower.name, 1))
    return seen


def _feeding(block: Block) -> str:
    """Return the path of what is given a block's tokens once, behind its attention."""
    return block.mlp.reader if block.mlp else block.feeding.path


def count_costs(bundle: Bundle, tower: Tower) -> Costs:
    """Return a recount of the tower: its parameters, and its own MACs in one forward pass of its example inputs.

    What an encoder does that a decoder looks at is not the decoder's.
    """
    own = [bundle.module(path) for path in tower.roots]
    inputs = bundle.example_inputs(tower.name, 1)
    with evaluating(bundle.model):
        macs = macs_within(own, lambda: bundle.encode(tower.name, inputs))
    parameters = sum(p.numel() for name, p in bundle.model.named_parameters() if tower.owns(name))
    return Costs(parameters, macs)


def head_rows(attention: Attention) -> tuple[int, ...]:
    """Return how many rows of each writer belong to one unit: query rows cover a whole key-value group."""
    return (attention.heads // attention.kv_heads * attention.head_dim, attention.head_dim, attention.head_dim)


def kept_rows(attention: Attention, units: Tensor) -> dict[str, Tensor]:
    """Return the rows of each writer that belong to the heads (or key-value groups) `units` (U,)."""
    rows = [spread(units, height) for height in head_rows(attention)]
    if len(attention.writers) == 3:
        return dict(zip(attention.writers, rows, strict=True))
    # Fused: the queries' rows, then those of keys and of values.
    width = attention.heads * attention.head_dim
    return {attention.writers[0]: torch.cat([part + place * width for place, part in enumerate(rows)])}


def write_ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as "0-3,7,9-10": recorded plans stay readable and small."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_ranges(text: str) -> list[int]:
    """Return the indices `write_ranges` wrote."""
    indices: list[int] = []
    for run in text.split(",") if text else []:
        first, _, last = run.partition("-")
        indices.extend(range(int(first), int(last or first) + 1))
    return indices


def _linear(bundle: Bundle, path: str) -> nn.Linear:
    module = bundle.module(path)
    assert isinstance(module, nn.Linear), f"{path} was not checked to be a Linear"
    return module


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
