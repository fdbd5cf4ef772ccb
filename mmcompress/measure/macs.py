"""Multiply-accumulates counted while the model runs, not estimated from its configuration.

Convention: one MAC is one multiply with its add, so MACs = FLOPs / 2. Matrix products and convolutions count,
attention's two products included (in full: a causal or padded position costs what any other does); softmax, norms,
activations, lookups and biases do not. A linear layer (B,N,C) -> (B,N,M) counts B*N*C*M.

How the counting works is told in `surgery.counting`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mmcompress.surgery.counting import counting


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
    mode (train or eval) it is in.
    """
    with counting() as counter:
        _call(module, inputs)
    counts = counter.get_flop_counts()
    by_op = {str(op).removeprefix("aten."): flops // 2 for op, flops in counts.get("Global", {}).items()}
    root = type(module).__name__
    by_module = {"": sum(by_op.values())}
    for name, ops in counts.items():
        if name.startswith(f"{root}."):
            by_module[name.removeprefix(f"{root}.")] = sum(ops.values()) // 2
    return MacCount(by_module[""], by_op, by_module)


def _call(module: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, torch.Tensor):
        return module(inputs)
    return module(*inputs)
