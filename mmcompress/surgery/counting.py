"""Counting multiply-accumulates while a model runs, without multiplying anything.

torch's FlopCounterMode does the dispatching. Deliberate differences: it knows no CPU flash attention, no matrix-vector,
grouped and no int8 product and silently counts them as zero, so they are added here; and the fused path of
nn.MultiheadAttention is switched off while counting, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mmcompress.surgery.float_codes import codes_unread
from mmcompress.surgery.quantized_base import weights_unread
from mmcompress.surgery.watch import meter

Shape = Sequence[int]


def macs_within(modules: Sequence[torch.nn.Module], call: Callable[[], Any]) -> int:
    """Count one run of `call`, but only what happens inside calls of `modules` or of what they contain."""
    with counting() as counter, meter(modules, counter.get_total_flops) as spent:
        call()
    return spent() // 2


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Yield a counter of what runs inside, two FLOPs for a MAC. Weights need no values; integers are not unpacked."""
    counter = FlopCounterMode(display=False, custom_mapping=_MISSING_RULES)
    with torch.no_grad(), weights_unread(), codes_unread(), _no_fused_attention(), NothingMultiplied(), counter:
        yield counter


class NothingMultiplied(TorchDispatchMode):
    """Products and convolutions give zeros of the right shape: counting them takes no time, and weights need no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in flop_registry and func.overloadpacket not in _MISSING_RULES:
            return func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten._grouped_mm:
            # What gives its shape on meta tensors takes bfloat16 alone (torch 2.13).
            rows, weights = args[:2]
            return rows.new_zeros(len(rows), weights.shape[-1])
        first = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))

        def without_values(value: Any) -> Any:
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        def zeros(value: Any) -> Any:
            return torch.zeros_like(value, device=first.device) if isinstance(value, torch.Tensor) else value

        return tree_map(zeros, func(*tree_map(without_values, args), **tree_map(without_values, kwargs)))


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


def _grouped_product(first: Shape, second: Shape, *rest: Any, **options: Any) -> int:
    """first: (N,C) sorted by group, second: (E,C,M): each row meets its own group's (C,M)."""
    return 2 * math.prod(first) * second[-1]


_MISSING_RULES: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable: _attention,
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _add_matrix_vector,
    torch.ops.aten.dot: _dot,
    torch.ops.aten._grouped_mm: _grouped_product,
    torch.ops.aten._int_mm: _product,
    torch.ops.aten._weight_int8pack_mm: _packed_product,
}
