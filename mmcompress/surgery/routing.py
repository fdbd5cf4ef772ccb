"""Routers of experts: what they decide while a model runs, and how that is computed in a graph of fixed products.

transformers runs experts by sorting tokens by expert, or by reading the chosen weights for each token: shapes that depend on data,
or a copy of the weights for each token of a prompt. In a graph every expert computes for every token instead, and what was not
chosen is left out of the sum. That costs E / K times the experts' MACs, of a prompt and of each token alike.

Shape alphabet: T tokens, C channels, E experts, K experts that a token goes through, I neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mmcompress.surgery.watch import Watch

EVERY = "mmc_every_expert"


def every_expert(experts: Any, states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return what `experts` make of states (T, C), given the indices and weights (T, K) of those chosen: (T, C).

    A function for transformers, of experts (E, 2 * I, C) and (E, C, I) without biases. Side by side they are two plain products:
    OpenVINO (2026.4) compiles none of matrices with stacks of them.
    """
    chosen = indices[..., None] == torch.arange(experts.num_experts, device=indices.device)
    shares = (chosen * weights[..., None]).sum(1)  # (T, E)
    made = states @ experts.gate_up_proj.flatten(0, 1).t()
    inner = experts._apply_gate(made.unflatten(-1, (experts.num_experts, -1)))  # (T, E, I)
    # Not multiplied by 0 alone: what an expert makes of another's token may overflow.
    weighted = torch.where(shares[..., None] > 0, inner * shares[..., None].to(inner.dtype), 0)
    return weighted.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)


ALL_EXPERTS_FUNCTIONS.register(EVERY, every_expert)


@contextmanager
def through_every_expert(config: Any) -> Iterator[None]:
    """While it is open, models of `config` run every expert for every token."""
    before = config._experts_implementation
    config._experts_implementation = EVERY
    try:
        yield
    finally:
        config._experts_implementation = before


@contextmanager
def watch_routing(routers: Mapping[str, nn.Module], record: Callable[[str, Tensor, Tensor], None]) -> Iterator[Watch]:
    """Call `record(name, weights (T, K), indices (T, K))` for the tokens that count, each time a router has chosen."""
    watch = Watch()

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            _, weights, indices = output
            # Routers are given the tokens of all samples in one row.
            if watch.mask is not None and watch.mask.numel() == len(weights):
                counts = watch.mask.flatten().bool()
                weights, indices = weights[counts], indices[counts]
            record(name, weights.detach(), indices)

        return after

    handles = [router.register_forward_hook(hook(name)) for name, router in routers.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
