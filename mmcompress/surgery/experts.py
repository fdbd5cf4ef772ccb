"""Experts of a mixture whose weights are stored as integers: two stacks of matrices, each held like one Linear of many rows.

    gate_up     (E * 2 * I, C): of each expert the I rows of its gate, then those of what is gated
    down        (E * C, I)

So a stack has the integers, scales and zero points that a Linear of its rows has, and all that is known of those (rounding,
training, layouts) holds for it. Weights alone are integers, or each token's inputs are rounded in blocks too (W4A8): no one grid
suits the inputs of experts that see few tokens each, and a runtime's product of experts has none.

In torch each expert that was chosen becomes floats while it computes. Exported, a layer is one QMoE, which sends each token through
its experts alone, or two products side by side of all experts (see `surgery.routing`).

Shape alphabet: T tokens, C channels, E experts, K experts that a token goes through, I neurons of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcompress.ops.grouped import group_size_for
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear
from mmcompress.surgery.quantized_base import Quantized
from mmcompress.surgery.rounding_operators import FLOAT_INPUTS, ROUNDED_INPUTS
from mmcompress.surgery.routing import CHOSEN, EVERY, gated, moe, only_chosen, shares_of
from mmcompress.surgery.token_operators import block_of

Stack = PackedLinear | QuantizedLinear
NAMES = {"gate_up_proj": "gate_up", "down_proj": "down"}
"""The parameter of a stack -> what holds its integers. Not the same name: transformers (5.24) turns what begins with it."""


class QuantizedExperts(nn.Module):
    """What takes the place of transformers' experts: states (T, C), indices and weights (T, K) of those chosen -> (T, C)."""

    gate_up: Stack
    down: Stack

    def __init__(self, experts: Any, made: Callable[[nn.Linear], Stack]) -> None:
        """Let `made` round each stack of `experts`, given as a Linear; on meta tensors everything stays meta."""
        super().__init__()
        stacks = {name: experts.get_parameter(name) for name in NAMES}
        assert not experts.has_bias, "experts with biases have no view"
        assert not experts.is_transposed, "stored (experts, outputs, inputs)"
        self.config, self.num_experts, self.act_fn = experts.config, experts.num_experts, experts.act_fn
        for name, weight in stacks.items():
            setattr(self, NAMES[name], made(_as_linear(weight)))
        # A QMoE has blocks of one size for both.
        whole = math.gcd(_group(self.gate_up), _group(self.down))
        self.gate_up.block = self.down.block = block_of(whole)

    def shape_of(self, name: str) -> torch.Size:
        """Return the shape (E, rows, columns) of what the stack was, by the name of its parameter."""
        stack: Stack = getattr(self, NAMES[name])
        return torch.Size((self.num_experts, stack.out_features // self.num_experts, stack.in_features))

    def floats(self, name: str) -> Tensor:
        """Return what a stack (E, rows, columns) stands for, by the name of its parameter."""
        stack: Stack = getattr(self, NAMES[name])
        return stack.weight.unflatten(0, (self.num_experts, -1))

    def linears(self) -> Iterator[tuple[str, Stack]]:
        """Yield each expert's three Linears, which share the stacks' memory, by the names they have where experts are modules."""
        neurons, width = self.down.in_features, self.gate_up.in_features
        for expert in range(self.num_experts):
            first = 2 * neurons * expert
            yield f"{expert}.gate_proj", _some_rows(self.gate_up, slice(first, first + neurons))
            yield f"{expert}.up_proj", _some_rows(self.gate_up, slice(first + neurons, first + 2 * neurons))
            yield f"{expert}.down_proj", _some_rows(self.down, slice(width * expert, width * (expert + 1)))

    def forward(self, states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        how = self.config._experts_implementation
        if how == CHOSEN:
            return self._chosen_alone(states, indices.shape[1], logits=weights)
        if how == EVERY:
            return self._every(states, indices, weights)
        made = torch.zeros_like(states)
        for expert in indices.unique().tolist():
            tokens, places = torch.where(indices == expert)
            inner = gated(self, self._of(self.gate_up, expert, states[tokens]))
            own = self._of(self.down, expert, inner) * weights[tokens, places, None]
            made = made.index_add(0, tokens, own.to(made.dtype))
        return made

    def _of(self, stack: Stack, expert: int, x: Tensor) -> Tensor:
        """Return the product with one expert's rows of a stack."""
        rows = stack.out_features // self.num_experts
        return stack.product_of_rows(x, expert * rows, (expert + 1) * rows)

    def _every(self, states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        shares = shares_of(indices, weights, self.num_experts)
        inner = gated(self, self.gate_up(states).unflatten(-1, (self.num_experts, -1)))
        return self._side_by_side(only_chosen(inner, shares).flatten(1))

    def _side_by_side(self, x: Tensor) -> Tensor:
        """Return x (T, E * I) times the stack `down` (E, C, I), whose experts' outputs are added up."""
        down, sides = self.down, (self.num_experts, -1)
        if torch.compiler.is_exporting():
            if isinstance(down, PackedLinear) or down.in_blocks:
                return _stacked_product(x, down, self.num_experts)
            matrix = torch.ops.mmcompress.int8_matrix(down.weight_int8, down.weight_scale)  # (I, E * C)
            return x @ matrix.unflatten(1, sides).transpose(0, 1).flatten(0, 1)
        if down.tokens is not None:
            x = down.rounded_input(x.unflatten(-1, sides)).flatten(1)
        return functional.linear(x, down.weight.unflatten(0, sides).transpose(0, 1).flatten(1))

    def _chosen_alone(self, states: Tensor, top: int, logits: Tensor) -> Tensor:
        gate_up, down = self.gate_up, self.down
        if isinstance(gate_up, PackedLinear) and isinstance(down, PackedLinear):
            points: tuple[Tensor, ...] = (gate_up.weight_zero_point, down.weight_zero_point)
            blocks, codes = gate_up.block, (gate_up.weight_int4, down.weight_int4)
        else:
            assert isinstance(gate_up, QuantizedLinear), "both stacks have one scheme"
            assert isinstance(down, QuantizedLinear), "both stacks have one scheme"
            # Without blocks inputs stay floats, see `export.experts`.
            points, blocks = (), gate_up.block if gate_up.in_blocks else 0
            codes = (gate_up.weight_int8, down.weight_int8)
        rounds = ROUNDED_INPUTS if gate_up.rounds_inputs and blocks else FLOAT_INPUTS
        scales = (gate_up.weight_scale, down.weight_scale)
        attributes = {"expert_weight_bits": 4 if points else 8, "weights_prepacked": 0, "accuracy_level": rounds}
        return moe(
            "QMoE",
            (states, logits, codes[0], scales[0], None, codes[1], scales[1], None, None, None, None, *points),
            top=top,
            **attributes,
            **({"block_size": blocks} if blocks else {}),
        )

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts"


def _as_linear(weight: Tensor) -> nn.Linear:
    """Return a stack (E, rows, columns) as a Linear of all its rows."""
    linear = nn.Linear(weight.shape[2], weight.shape[0] * weight.shape[1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().flatten(0, 1), requires_grad=False)
    return linear


def _some_rows(stack: Stack, rows: slice) -> Stack:
    """Return a layer of some rows of a stack, which share its memory."""
    linear = nn.Linear(stack.in_features, rows.stop - rows.start, bias=False, device="meta")
    made: Stack
    if isinstance(stack, PackedLinear):
        made = PackedLinear(linear, stack.group_size, rounds_inputs=stack.rounds_inputs)
        made.symmetric = stack.symmetric
    else:
        made = QuantizedLinear(linear, None, stack.levels)
        made.rounds_inputs = stack.rounds_inputs
    for name, buffer in stack.named_buffers():
        setattr(made, name, buffer[rows])
    made.block, made.tokens, made.of_experts = stack.block, stack.tokens, True
    return made


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Return the quantized layers of a model by path; of experts, the Linears of each."""
    found: dict[str, Quantized] = {}
    within: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            within = tuple(f"{path}.{name}" for name in NAMES.values())
            found |= {f"{path}.{name}": linear for name, linear in module.linears()}
        elif isinstance(module, Quantized) and path not in within:
            found[path] = module
    return found


def stacks_of(module: nn.Module) -> list[Tensor]:
    """Return the stacks (E, rows, columns) of experts in floats; none of another module."""
    held = module._parameters
    return [held[name] for name in NAMES] if held.keys() >= NAMES.keys() else []  # type: ignore[misc]


def common_group(stacks: Sequence[Tensor], wanted: int) -> int:
    """Return the size of groups for all of `stacks`: `wanted`, or the largest that divides both their columns; 0 where none does.

    `wanted` 0 makes one group of each row, which is said by the longer one's size.
    """
    columns = [stack.shape[-1] for stack in stacks]
    size = group_size_for(math.gcd(*columns), wanted)
    return size if wanted or not size else max(columns)


def own_group(columns: int, size: int) -> int:
    """Return the size of the groups of one stack, where `common_group` gave `size`."""
    return size if columns % size == 0 else columns


def _group(stack: Stack) -> int:
    """Return how many columns of a stack share a scale."""
    return stack.group_size if isinstance(stack, PackedLinear) else stack.in_features


def _stacked_product(x: Tensor, stack: Stack, count: int) -> Tensor:
    """Return x (T, E * I) times a stack (E, C, I) as MatMulNBits; only while exporting, where nothing is computed.

    What is stored expert by expert is put side by side when the graph is there: `export.experts`.
    """
    bits = 4 if isinstance(stack, PackedLinear) else 8
    if isinstance(stack, PackedLinear):
        held = [stack.weight_int4, stack.weight_scale, stack.weight_zero_point]
    else:
        held = [stack.weight_int8, stack.weight_scale]
    rows = stack.out_features // count
    made: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (x, *held),
        attrs={
            "K": count * stack.in_features,
            "N": rows,
            "bits": bits,
            "block_size": stack.block,
            "accuracy_level": ROUNDED_INPUTS if stack.rounds_inputs else FLOAT_INPUTS,
        },
        dtype=x.dtype,
        shape=(len(x), rows),
        version=1,
    )
    return made


def stacked_shape(model: nn.Module, name: str) -> torch.Size:
    """Return the shape (E, rows, columns) of a stack, a parameter or the integers in its place, by the parameter's name."""
    path, _, own = name.rpartition(".")
    holder = model.get_submodule(path)
    return holder.shape_of(own) if isinstance(holder, QuantizedExperts) else holder.get_parameter(own).shape
