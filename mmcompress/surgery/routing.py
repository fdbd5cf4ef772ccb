"""Routers of experts: what they decide while a model runs, and how that is computed in a graph of fixed products.

transformers runs experts by sorting tokens by expert, or by reading the chosen weights for each token: shapes that depend on data,
or a copy of the weights for each token of a prompt. A graph has one of two other forms.

* Every expert computes for every token, and what was not chosen is left out of the sum: plain products, which all runtimes have.
  That costs E / K times the experts' MACs, of a prompt and of each token alike.
* onnxruntime's MoE, or QMoE of integers, sends each token through its experts alone. It is given the router's logits and does what
  the router would: the softmax over all, cut to the K largest, which sum to 1 again. Gates are SiLU, and floats float32 on CPUs.

Shape alphabet: T tokens, C channels, E experts, K experts that a token goes through, I neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mmcompress.surgery.watch import Watch

EVERY, CHOSEN = "mmc_every_expert", "mmc_chosen_experts"
"""transformers' names of the two."""

_CHOSEN_ALONE: ContextVar[bool] = ContextVar("chosen_alone", default=False)


def shares_of(indices: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return (T, E): each expert's weight for each token, 0 where it was not chosen."""
    chosen = indices[..., None] == torch.arange(count, device=indices.device)
    return (chosen * weights[..., None]).sum(1)


def gated(experts: Any, made: Tensor) -> Tensor:
    """Return act(gate) * up (…, I) of both side by side (…, 2 * I), as transformers' experts do."""
    gate, up = made.chunk(2, dim=-1)
    inner: Tensor = experts.act_fn(gate) * up
    return inner


def only_chosen(inner: Tensor, shares: Tensor) -> Tensor:
    """Return what experts make (T, E, I) times their shares (T, E).

    Not multiplied by 0 alone: what an expert makes of another's token may overflow.
    """
    return torch.where(shares[..., None] > 0, inner * shares[..., None].to(inner.dtype), 0)


def every_expert(experts: Any, states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return what `experts` make of states (T, C), given the indices and weights (T, K) of those chosen: (T, C).

    A function for transformers, of experts (E, 2 * I, C) and (E, C, I) without biases. Side by side they are two plain products:
    OpenVINO (2026.4) compiles none of matrices with stacks of them.
    """
    made = states @ experts.gate_up_proj.flatten(0, 1).t()
    inner = gated(experts, made.unflatten(-1, (experts.num_experts, -1)))  # (T, E, I)
    weighted = only_chosen(inner, shares_of(indices, weights, experts.num_experts))
    return weighted.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)


def chosen_experts(experts: Any, states: Tensor, indices: Tensor, logits: Tensor) -> Tensor:
    """Return what `every_expert` does, given the router's logits (T, E) in the place of weights; only while exporting.

    The operator wants the rows of gates and of what is gated in turn: `export.experts` puts them so when the graph is there.
    """
    return moe("MoE", (states, logits, experts.gate_up_proj, None, experts.down_proj, None), top=indices.shape[1])


def moe(operator: str, inputs: Sequence[Tensor | None], *, top: int, **attributes: int) -> Tensor:
    """Return a node of onnxruntime's MoE or QMoE, whose first input are the states (T, C); nothing is computed."""
    states = inputs[0]
    assert states is not None, "there are states"
    made: Tensor = torch.onnx.ops.symbolic(
        f"com.microsoft::{operator}",
        inputs,
        attrs={
            "k": top,
            "normalize_routing_weights": 1,
            # act(gate) * up with act(x) = x sigmoid(alpha x), and beta added to up.
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            **attributes,
        },
        dtype=states.dtype,
        shape=states.shape,
        version=1,
    )
    return made


ALL_EXPERTS_FUNCTIONS.register(EVERY, every_expert)
ALL_EXPERTS_FUNCTIONS.register(CHOSEN, chosen_experts)


@contextmanager
def chosen_alone(wanted: bool) -> Iterator[None]:
    """While it is open, `as_exported` lets tokens go through the experts chosen for them alone, where onnxruntime can say these."""
    token = _CHOSEN_ALONE.set(wanted)
    try:
        yield
    finally:
        _CHOSEN_ALONE.reset(token)


@contextmanager
def as_exported(config: Any, mixtures: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """While it is open, models of `config` run experts in the form they have in a graph. `mixtures`: router -> its experts."""
    alone = _CHOSEN_ALONE.get() and all(_is_silu(experts.act_fn) for experts in mixtures.values())
    handles = [router.register_forward_hook(_hand_logits_on) for router in mixtures] if alone else []
    try:
        with _implementation(config, CHOSEN if alone else EVERY):
            yield
    finally:
        for handle in handles:
            handle.remove()


def through_every_expert(config: Any) -> AbstractContextManager[None]:
    """While it is open, models of `config` run every expert for every token."""
    return _implementation(config, EVERY)


@contextmanager
def _implementation(config: Any, name: str) -> Iterator[None]:
    before = config._experts_implementation
    config._experts_implementation = name
    try:
        yield
    finally:
        config._experts_implementation = before


def _hand_logits_on(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> Any:
    logits, _, indices = output
    return logits, logits, indices


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU | SiLUActivation)


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
