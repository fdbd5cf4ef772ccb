"""Getting attention keys and weights out of transformers' attention modules, without touching their code.

transformers looks up the attention function by a name in the module's config. `give_keys` gives attention modules a config of their
own with our name in it; they then return their keys, averaged over heads, where attention weights would be; after `give_scores`,
how much each token is looked at. They still compute scaled dot products in one kernel. The tower's config stays as it is: masks are
made as before, other towers that share it are not concerned, nothing of it is saved, and `set_attn_implementation` on the model
changes the other modules only.

With ``output_attentions=True`` these modules report the keys or scores.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmcompress.errors import UsageError
from mmcompress.ops.masks import visible
from mmcompress.ops.merging import PADDING_BIAS

KEYS, CLASS_SCORES, SCORES = "mmc_keys", "mmc_class_scores", "mmc_scores"
ASKED_BY_ONE, ASKED_BY_SOME, WEIGHTS = "mmc_asked_by_one", "mmc_asked_by_some", "mmc_weights"


Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Looked:
    """What an attention computes with."""

    query: Tensor
    """(B, H, N, D)"""
    key: Tensor
    """(B, heads of keys, S, D); as many heads as queries have, or fewer that several share."""
    mask: Tensor | None
    scale: float
    asking: Tensor | None
    """(B, N): what the caller says of its queries."""


def giving(evidence: Callable[[Looked], Tensor]) -> Attend:
    """Return an attention function for transformers that gives (B, N, H, D) and, where weights would be, the `evidence`."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        asking: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        # transformers (5.23) takes a module that does not say so for a causal one, and some encoders do not.
        kwargs.setdefault("is_causal", getattr(module, "is_causal", False))
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        scale = float(kwargs.get("scaling") or query.shape[-1] ** -0.5)
        return output, evidence(Looked(query, key, attention_mask, scale, asking))

    return attend


def keys_of(looked: Looked) -> Tensor:
    """Return the keys averaged over heads (B, S, D)."""
    return looked.key.mean(dim=1)


def class_scores(looked: Looked) -> Tensor:
    """Return the weights the first token, a class token, gives to all, averaged over heads (B, S)."""
    mask = None if looked.mask is None else looked.mask[:, :, :1]  # transformers may give a row for each query
    return _weights(looked.query[:, :, :1], looked.key, mask, looked.scale).squeeze(2).mean(dim=1)


def scores(looked: Looked) -> Tensor:
    """Return the weight each token is given, averaged over queries and heads (B, S)."""
    given = _weights(looked.query, looked.key, looked.mask, looked.scale).mean(dim=1)  # (B, N, S)
    if looked.mask is None:
        return given.mean(dim=1)
    asking = 1 - _hidden(looked.mask[:, :, :1]).to(given.dtype)[:, 0]  # (B, 1, N): padding asks nothing
    return (asking @ given)[:, 0] / asking.sum(dim=-1)


def scores_by_one(looked: Looked) -> Tensor:
    """Return the weights one query gives to all keys, averaged over heads (B, S); `asking` is 1 at it and 0 elsewhere."""
    assert looked.asking is not None, "give_asked says that it has to be given"
    row, key = looked.asking[:, None].float(), looked.key.float()  # (B, 1, N)
    seen = (row @ _seen(looked).float()) > 0.5  # (B, 1, S)
    asked = (row[:, None] @ looked.query.float()).unflatten(
        1, (key.shape[1], -1)
    )  # (B, key heads, queries of each, 1, D)
    logits = asked @ key[:, :, None].mT * looked.scale
    weights = logits.masked_fill(~seen[:, None, None], PADDING_BIAS).softmax(dim=-1)
    return weights.mean(dim=(1, 2))[:, 0]


def scores_by_some(looked: Looked) -> Tensor:
    """Return the weights queries give to all keys, averaged over heads and by the shares `asking` (B, S).

    One head at a time: all at once they are as large as a prompt's attention in full.
    """
    assert looked.asking is not None, "give_asked says that it has to be given"
    hidden, row, key = ~_seen(looked), looked.asking[:, None].float(), looked.key.float()
    heads, each = looked.query.shape[1], looked.query.shape[1] // key.shape[1]
    given = []
    for head in range(heads):
        logits = looked.query[:, head].float() @ key[:, head // each].mT * looked.scale  # (B, N, S)
        given.append(row @ logits.masked_fill(hidden, PADDING_BIAS).softmax(dim=-1))
    # Side by side, not added one by one: OpenVINO (2026.4) makes one kernel of such a sum, and runs out of registers at 6 heads.
    return torch.cat(given, dim=1).mean(dim=1)


def _seen(looked: Looked) -> Tensor:
    """Return which keys each query may look at, (B or 1, N, S); without a mask those before it and itself."""
    if looked.mask is not None:
        return visible(looked.mask)[:, 0]
    tokens, past = looked.query.shape[2], looked.key.shape[2] - looked.query.shape[2]
    rows, columns = (torch.arange(count, device=looked.key.device) for count in (tokens, past + tokens))
    return (columns[None, :] <= rows[:, None] + past)[None]


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax weights (B, H, rows, S) in float32. `mask`: (B, 1, 1 or rows, S), true or added to logits."""
    logits = query.float() @ key.float().mT * scale
    if mask is not None:
        logits = logits.masked_fill(_hidden(mask), PADDING_BIAS) if mask.dtype == torch.bool else logits + mask.float()
    return logits.softmax(dim=-1)


def _hidden(mask: Tensor) -> Tensor:
    """Return where padding is; any other bias, of a token's size, is far above."""
    return ~mask if mask.dtype == torch.bool else mask <= PADDING_BIAS


for name, evidence in {
    KEYS: keys_of,
    CLASS_SCORES: class_scores,
    SCORES: scores,
    ASKED_BY_ONE: scores_by_one,
    ASKED_BY_SOME: scores_by_some,
}.items():
    AttentionInterface.register(name, giving(evidence))
    # A name without a mask function makes transformers (5.x) leave out every mask, silently.
    AttentionMaskInterface.register(name, sdpa_mask)


def give_keys(attentions: Iterable[nn.Module]) -> None:
    """Make each attention module return (output, keys (B, N, D)).

    Raises UsageError for a module that does not choose its attention function by its config.
    """
    _attend_by(KEYS, attentions)


def give_scores(attention: nn.Module, class_token: bool) -> None:
    """Make an attention module return (output, scores (B, N)): how much the class token looks at each, or all tokens do.

    Raises UsageError for a module that does not choose its attention function by its config.
    """
    _attend_by(CLASS_SCORES if class_token else SCORES, [attention])


def give_asked(attention: nn.Module, one: bool) -> None:
    """Make an attention module, to be called with ``asking=`` (B, N), return (output, scores (B, S)).

    Scores are how much each key is looked at by the queries asking: by `one`, or by some, each with its share. Raises UsageError
    for a module that does not choose its attention function by its config.
    """
    _attend_by(ASKED_BY_ONE if one else ASKED_BY_SOME, [attention])


@contextlib.contextmanager
def telling_weights(attentions: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While it is open, each call of `attentions` adds its weights (B, H, N, S) to a list; outputs have gradients to them.

    Raises UsageError for a module that does not choose its attention function by its config.
    """
    with _telling(WEIGHTS, attentions) as found:
        yield found


@contextlib.contextmanager
def telling_scores(attention: nn.Module, class_token: bool) -> Iterator[list[Tensor]]:
    """While it is open, each call of `attention` adds its scores (B, N), those of `give_scores`, to a list.

    Raises UsageError for a module that does not choose its attention function by its config.
    """
    with _telling(CLASS_SCORES if class_token else SCORES, [attention]) as found:
        yield found


@contextlib.contextmanager
def _telling(name: str, attentions: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    before = [getattr(attention, "config", None) for attention in attentions]
    found: list[Tensor] = []
    _attend_by(name, attentions)
    hooks = [attention.register_forward_hook(lambda _, __, made: found.append(made[1])) for attention in attentions]
    try:
        yield found
    finally:
        for attention, config, hook in zip(attentions, before, hooks, strict=True):
            attention.config = config  # type: ignore[assignment]
            hook.remove()


def _attend_by_weights(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend step by step: (B, N, H, D) and the weights (B, H, N, S), of which the first is a function."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    if attention_mask is None and kwargs.get("is_causal", getattr(module, "is_causal", False)):
        attention_mask = _seen(Looked(query, key, None, 1.0, None))[:, None]  # (1, 1, N, S)
    weights = _weights(query, key, attention_mask, scaling or query.shape[-1] ** -0.5)
    if torch.is_grad_enabled() and not weights.requires_grad:
        weights.requires_grad_()  # parameters need no gradient of their own
    return (weights.to(value.dtype) @ value).transpose(1, 2), weights


AttentionInterface.register(WEIGHTS, _attend_by_weights)
AttentionMaskInterface.register(WEIGHTS, sdpa_mask)


def _attend_by(name: str, attentions: Iterable[nn.Module]) -> None:
    copies: dict[int, Any] = {}
    for attention in attentions:
        config = getattr(attention, "config", None)
        if not hasattr(config, "_attn_implementation"):
            raise UsageError(
                f"{type(attention).__name__} computes attention by itself and gives neither keys nor weights",
                hint="use a method that needs none, such as random",
            )
        if id(config) not in copies:
            copies[id(config)] = copy.deepcopy(config)
            copies[id(config)]._attn_implementation = name
        attention.config = copies[id(config)]
