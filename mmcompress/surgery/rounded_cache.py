"""A language model whose cache of keys and values holds integers: 8-bit codes, and one scale for each token of each head.

`round_cache` puts a hook before each attention. It lets the cache that the attention is given hold its keys and values that way,
and where none is given has them rounded all the same. So every token looks at rounded keys and values, itself and the prompt
included, and an answer does not depend on whether there is a cache. What is multiplied are floats again: codes times scales, made
anew in each step. Gradients pass straight through the rounding of new tokens.

Shapes: B batch, H heads of keys, T new tokens, P past tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from mmcompress.errors import UsageError
from mmcompress.ops.token_rounding import TOKEN_INT8, in_steps
from mmcompress.surgery.cache_lengths import CACHE, change_held, growing
from mmcompress.surgery.token_operators import floats, integers

ATTRIBUTE = "rounded_cache"

_UNROUNDED: ContextVar[bool] = ContextVar("unrounded", default=False)


@contextmanager
def codes_unrounded() -> Iterator[None]:
    """While active, codes are floats that were not rounded: for comparing all else strictly (see `export.rounding`)."""
    token = _UNROUNDED.set(True)
    try:
        yield
    finally:
        _UNROUNDED.reset(token)


def round_cache(attentions: Iterable[nn.Module]) -> None:
    """Let attentions round keys and values, and what caches hold of them. They are called with the cache as transformers' are."""
    for attention in attentions:
        setattr(attention, ATTRIBUTE, True)
        attention.register_forward_pre_hook(_give_rounded, with_kwargs=True)


def rounds_cache(attention: nn.Module) -> bool:
    """Whether `round_cache` was given this attention."""
    return getattr(attention, ATTRIBUTE, False)


class RoundedLayer(DynamicLayer):
    """What a cache holds of one block: `keys` and `values` are codes (B, H, P, D), with a scale (B, H, P, 1) for each.

    Of a block that sees a window of tokens as well it holds all; masks hide the others.
    """

    held_names = ("keys", "key_scale", "values", "value_scale")
    keys: Any
    values: Any
    key_scale: Any = None
    value_scale: Any = None

    def __init__(self, *held: Tensor) -> None:
        """Begin empty, or with tensors in the order of `held_names`."""
        super().__init__()
        if held:
            self.keys, self.key_scale, self.values, self.value_scale = held
            self.dtype, self.device, self.is_initialized = self.key_scale.dtype, self.keys.device, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.key_scale = _codes(key_states[..., :0, :])
        self.values, self.value_scale = _codes(value_states[..., :0, :])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, T, D); return all (B, H, P + T, D) as the floats that are kept of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_scale, keys = _grown(self.keys, self.key_scale, key_states)
        self.values, self.value_scale, values = _grown(self.values, self.value_scale, value_states)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized:
            left = self.keys.shape[-2]
            change_held(self, lambda held: held[..., :left, :])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.get_seq_length() > 0:
            change_held(self, lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:
            change_held(self, lambda held: held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.get_seq_length() > 0:
            change_held(self, lambda held: held[indices, ...])

    def offload(self) -> None:
        if self.is_initialized:
            change_held(self, lambda held: held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            change_held(self, lambda held: held.to(self.device, non_blocking=True))

    def reset(self) -> None:
        super().reset()
        self.key_scale = self.value_scale = None


class _Unkept:
    """Takes a cache's place where there is none."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return RoundedLayer().update(key_states, value_states)


class _Passed(torch.autograd.Function):
    """`rounded` with the gradient of `x`."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient, None


def _give_rounded(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before an attention, have the cache it is given hold codes of its block. Raises UsageError where it holds something else."""
    cache = kwargs.get(CACHE)
    if cache is None:
        return args, {**kwargs, CACHE: _Unkept()}
    index: Any = attention.layer_idx
    while len(cache.layers) <= index:
        cache.layers.append(RoundedLayer())
    layer = cache.layers[index]
    if not isinstance(layer, RoundedLayer):
        if growing(layer, "rounding keys and values").is_initialized:
            raise UsageError(
                f"a cache holds floats of {layer.get_seq_length()} tokens, and this model keeps integers",
                hint="start over with the prompt: the cache is another model's",
            )
        cache.layers[index] = RoundedLayer()
    return args, kwargs


def _codes(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is kept of keys or values (B, H, T, D): codes and scales."""
    steps, scale = in_steps(states, TOKEN_INT8)
    return steps.to(states.dtype) if _UNROUNDED.get() else integers(steps), scale


def _grown(codes: Tensor, scale: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and scales with those of new `states` (B, H, T, D) behind, and the floats they stand for."""
    new, steps = _codes(states)
    grown, scales = torch.cat([codes, new], dim=-2), torch.cat([scale, steps], dim=-2)
    if torch.is_grad_enabled() and states.requires_grad:
        return grown, scales, torch.cat([codes * scale, _Passed.apply(states, new * steps)], dim=-2)
    # torch multiplies integers as they lie, which is one pass less.
    return grown, scales, (floats(grown, scales) if torch.compiler.is_exporting() else grown) * scales
