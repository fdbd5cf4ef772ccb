"""An nn.Linear as two thinner ones, which are plain nn.Linear children: what quantizes, trains or exports Linears finds them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcompress.surgery.quantized_base import unread

DOWN, UP = "down", "up"


class LowRankLinear(nn.Module):
    """nn.Linear of rank k; inputs (..., in) -> (..., k) -> (..., out). The bias is that of the second factor."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        """Take the place of `linear`, its dtype, device and flags; the factors are empty, the bias is its own."""
        super().__init__()
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        weight = linear.weight
        self.down = nn.Linear(self.in_features, rank, bias=False, device="meta", dtype=weight.dtype)
        self.up = nn.Linear(rank, self.out_features, bias=False, device="meta", dtype=weight.dtype)
        for factor in (self.down, self.up):
            made = torch.zeros(factor.weight.shape, dtype=weight.dtype, device=weight.device)
            factor.weight = nn.Parameter(made, requires_grad=weight.requires_grad)
        if linear.bias is not None:
            self.up.bias = linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.up(self.down(x))
        return made

    @property
    def weight(self) -> Tensor:
        """The product of the factors (out, in). Not a parameter; models ask layers for its dtype, and fill it before loading."""
        shape = torch.Size((self.out_features, self.in_features))
        empty = unread(shape, self.up.weight)
        return self.up.weight @ self.down.weight if empty is None else empty

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second factor."""
        return self.up.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def factor_paths(path: str) -> tuple[str, str]:
    """Return where the factors of the layer at `path` lie once it has two: that which reads its input, that which writes."""
    return f"{path}.{DOWN}", f"{path}.{UP}"


def layer_of(path: str) -> str:
    """Return the path of the layer whose factor lies at `path`; `path` itself where it is no factor's."""
    owner, _, name = path.rpartition(".")
    return owner if name in (DOWN, UP) else path
