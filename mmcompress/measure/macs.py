"""Multiply-accumulates counted while the model runs, not estimated from its configuration.

Convention: one MAC is one multiply with its add, so MACs = FLOPs / 2. Matrix products and convolutions count,
attention's two products included (in full: a causal or padded position costs what any other does); softmax, norms,
activations, lookups and biases do not. A linear layer (B,N,C) -> (B,N,M) counts B*N*C*M.

torch's FlopCounterMode does the dispatching. Deliberate differences: it knows no CPU flash attention, no matrix-vector
and no int8 product and silently counts them as zero, so they are added here; and the fused path of
nn.MultiheadAttention is switched off while counting, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mmcompress.surgery.watch import meter

Shape = Sequence[int]


@dataclass(frozen=True)
class MacCount:
    """MACs of one call: in total, per operator, per submodule (dotted name; "" is everything).

    `uncounted` lists operators that do multiply matrices but have no rule, with how often they occur: then `total` is a
    lower bound, and whoever shows it must say so.
    """

    total: int
    by_op: dict[str, int] = field(default_factory=dict)
    by_module: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"total": self.total, "by_op": self.by_op, "uncounted": self.uncounted}


def macs(module: Callable[..., Any], inputs: Any) -> MacCount:
    """Count one call of `module` on `inputs`: a mapping of keywords, a sequence of positions, or one tensor.

    Nothing but shapes matters, so meta tensors and meta modules do. The module is run once, without gradients, in the
    mode (train or eval) it is in; see `NothingMultiplied`.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_MISSING_RULES)
    with torch.no_grad(), _no_fused_attention(), NothingMultiplied(), counter:
        _call(module, inputs)
    counts = counter.get_flop_counts()
    by_op = {str(op).removeprefix("aten."): flops // 2 for op, flops in counts.get("Global", {}).items()}
    root = type(module).__name__
    by_module = {"": sum(by_op.values())}
    for name, ops in counts.items():
        if name.startswith(f"{root}."):
            by_module[name.removeprefix(f"{root}.")] = sum(ops.values()) // 2
    return MacCount(by_module[""], by_op, by_module)


def macs_within(modules: Sequence[torch.nn.Module], call: Callable[[], Any]) -> int:
    """Count one run of `call`, but only what happens inside calls of `modules`, which must not contain each other."""
    counter = FlopCounterMode(display=False, custom_mapping=_MISSING_RULES)
    with (
        torch.no_grad(),
        _no_fused_attention(),
        NothingMultiplied(),
        counter,
        meter(modules, counter.get_total_flops) as spent,
    ):
        call()
    return spent() // 2


class NothingMultiplied(TorchDispatchMode):
    """Products and convolutions give zeros of the right shape: counting them takes no time, and weights need no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in flop_registry and func.overloadpacket not in _MISSING_RULES:
            return func(*args, **kwargs)
        first = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))

        def without_values(value: Any) -> Any:
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        def zeros(value: Any) -> Any:
            return torch.zeros_like(value, device=first.device) if isinstance(value, torch.Tensor) else value

        return tree_map(zeros, func(*tree_map(without_values, args), **tree_map(without_values, kwargs)))


def _call(module: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, torch.Tensor):
        return module(inputs)
    return module(*inputs)


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# Rules get shapes in place of tensors and return FLOPs, two per MAC.


def _attention(query: Shape, key: Shape, value: Shape, *rest: Any, **options: Any) -> int:
    """query: (B,H,N,D), key: (B,Hk,S,D), value: (B,Hk,S,Dv)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _matrix_vector(matrix: Shape, vector: Shape, *rest: Any, **options: Any) -> int:
    return 2 * math.prod(matrix)


def _add_matrix_vector(added: Shape, matrix: Shape, vector: Shape, *rest: Any, **options: Any) -> int:
    return 2 * math.prod(matrix)


def _dot(first: Shape, second: Shape, *rest: Any, **options: Any) -> int:
    return 2 * math.prod(first)


def _product(first: Shape, second: Shape, *rest: Any, **options: Any) -> int:
    """first: (N,C), second: (C,M)."""
    return 2 * math.prod(first) * second[-1]


def _packed_product(first: Shape, second: Shape, *rest: Any, **options: Any) -> int:
    """first: (N,C), second: (M,C), one row of weights per output."""
    return 2 * math.prod(first) * second[0]


_MISSING_RULES: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable: _attention,
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _add_matrix_vector,
    torch.ops.aten.dot: _dot,
    torch.ops.aten._int_mm: _product,
    torch.ops.aten._weight_int8pack_mm: _packed_product,
}
