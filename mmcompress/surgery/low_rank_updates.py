"""LoRA (Hu et al. 2021, arXiv 2106.09685, section 4): a Linear learns an update of low rank, which its weight takes up at the end.

    W' = W + B A        A (r, in) begins at random, B (out, r) at zero, so nothing changes before the first step

Where zeros are kept, the update has none of them: W' is 0 where W is, in every forward.

Only A and B train, so gradients and the optimizer's moments take r (in + out) numbers in place of in * out. There is no scale
alpha / r: it does what the learning rate does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Update(nn.Module):
    """Adds B A to a weight (out, in), with `keep_zeros` not to its zeros."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator, keep_zeros: bool = False) -> None:
        super().__init__()
        out, width = weight.shape
        start = torch.randn(rank, width, generator=generator) / math.sqrt(width)
        self.a = nn.Parameter(start.to(weight.device, weight.dtype))
        self.b = nn.Parameter(weight.new_zeros(out, rank))
        self.keep_zeros = keep_zeros

    def forward(self, weight: Tensor) -> Tensor:
        """Return W + B A."""
        update = self.b @ self.a
        return weight + (update.masked_fill(weight == 0, 0) if self.keep_zeros else update)


@contextmanager
def low_rank_updates(
    model: nn.Module, paths: Sequence[str], rank: int, seed: int, keep_zeros: bool = False
) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the A and B of the Linears `paths`, by name. Afterwards their weights are plain parameters again, updates included."""
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    modules = [model.get_submodule(path) for path in paths]
    for path, module in zip(paths, modules, strict=True):
        weight = module.weight
        assert isinstance(weight, nn.Parameter), f"{path} has no weight"
        update = Update(weight.detach(), rank, generator, keep_zeros)
        parametrize.register_parametrization(module, "weight", update)
        parameters |= {f"{path}.lora_a": update.a, f"{path}.lora_b": update.b}
    try:
        yield parameters
    finally:
        for module in modules:
            parametrize.remove_parametrizations(module, "weight")
