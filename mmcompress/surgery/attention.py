"""Getting attention keys and weights out of transformers' attention modules, without touching their code.

transformers looks up the attention function by a name in the module's config. `give_keys` gives attention modules a config of their
own with our name in it; they then return their keys, averaged over heads, where attention weights would be; after `give_scores`,
how much each token is looked at. They still compute scaled dot products in one kernel. The tower's config stays as it is: masks are
made as before, other towers that share it are not concerned, nothing of it is saved, and `set_attn_implementation` on the model
changes the other modules only.

With ``output_attentions=True`` these modules report the keys or scores.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
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
ASKED_BY_ONE, ASKED_BY_SOME = "mmc_asked_by_one", "mmc_asked_by_some"


def attend_and_give_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return scaled dot-product attention (B, N, H, D) and the keys averaged over heads (B, N, D)."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, key.mean(dim=1)


def attend_and_give_class_scores(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return attention (B, N, H, D) and the weights the first token, a class token, gives to all, averaged over heads (B, N)."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    mask = None if attention_mask is None else attention_mask[:, :, :1]  # transformers may give a row for each query
    return output, _weights(query[:, :, :1], key, mask, kwargs).squeeze(2).mean(dim=1)


def attend_and_give_scores(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return attention (B, N, H, D) and the weight each token is given, averaged over queries and heads (B, N)."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    given = _weights(query, key, attention_mask, kwargs).mean(dim=1)  # (B, N, N)
    if attention_mask is None:
        return output, given.mean(dim=1)
    asking = 1 - _hidden(attention_mask[:, :, :1]).to(given.dtype)[:, 0]  # (B, 1, N): padding asks nothing
    return output, (asking @ given)[:, 0] / asking.sum(dim=-1)


def attend_and_give_asked_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    asking: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return attention (B, N, H, D) and the weights one query gives to all keys, averaged over heads (B, S).

    `asking`: (B, N), 1 at that query and 0 elsewhere. Heads may share keys.
    """
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    row = asking[:, None].float()  # (B, 1, N)
    seen = (row @ _seen(query, key, attention_mask).float()) > 0.5  # (B, 1, S)
    asked = (row[:, None] @ query.float()).unflatten(1, (key.shape[1], -1))  # (B, key heads, queries of each, 1, D)
    logits = asked @ key.float()[:, :, None].mT * _scale(query, kwargs)
    weights = logits.masked_fill(~seen[:, None, None], PADDING_BIAS).softmax(dim=-1)
    return output, weights.mean(dim=(1, 2))[:, 0]


def attend_and_give_asked_by_some(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    asking: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return attention (B, N, H, D) and the weights queries give to all keys, averaged over heads and by shares (B, S).

    `asking`: (B, N), the share of each query. Heads may share keys. One head at a time: all at once they are as large as a
    prompt's attention in full.
    """
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    hidden, row = ~_seen(query, key, attention_mask), asking[:, None].float()
    heads, each = query.shape[1], query.shape[1] // key.shape[1]
    total = torch.zeros((), device=query.device)
    for head in range(heads):
        logits = query[:, head].float() @ key[:, head // each].float().mT * _scale(query, kwargs)  # (B, N, S)
        total = total + row @ logits.masked_fill(hidden, PADDING_BIAS).softmax(dim=-1)
    return output, total[:, 0] / heads


def _seen(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Return which keys each query may look at, (B or 1, N, S); without a mask those before it and itself."""
    if mask is not None:
        return visible(mask)[:, 0]
    tokens, past = query.shape[2], key.shape[2] - query.shape[2]
    rows, columns = torch.arange(tokens, device=key.device), torch.arange(past + tokens, device=key.device)
    return (columns[None, :] <= rows[:, None] + past)[None]


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    return float(kwargs.get("scaling") or query.shape[-1] ** -0.5)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Return softmax weights (B, H, rows, N) in float32. `mask`: (B, 1, 1 or rows, N), true or added to logits."""
    logits = query.float() @ key.float().mT * _scale(query, kwargs)
    if mask is not None:
        logits = logits.masked_fill(_hidden(mask), PADDING_BIAS) if mask.dtype == torch.bool else logits + mask.float()
    return logits.softmax(dim=-1)


def _hidden(mask: Tensor) -> Tensor:
    """Return where padding is; any other bias, of a token's size, is far above."""
    return ~mask if mask.dtype == torch.bool else mask <= PADDING_BIAS


for name, attend in {
    KEYS: attend_and_give_keys,
    CLASS_SCORES: attend_and_give_class_scores,
    SCORES: attend_and_give_scores,
    ASKED_BY_ONE: attend_and_give_asked_by_one,
    ASKED_BY_SOME: attend_and_give_asked_by_some,
}.items():
    AttentionInterface.register(name, attend)
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
