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
from mmcompress.ops.merging import PADDING_BIAS

KEYS, CLASS_SCORES, SCORES = "mmc_keys", "mmc_class_scores", "mmc_scores"


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


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Return softmax weights (B, H, rows, N) in float32. `mask`: (B, 1, 1 or rows, N), true or added to logits."""
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    logits = query.float() @ key.float().mT * scale
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
