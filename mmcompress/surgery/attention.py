"""Getting the attention keys out of transformers' attention modules, without touching their code.

transformers looks up the attention function by a name in the module's config. `give_keys` gives attention modules a config of their
own with our name in it; they then return their keys, averaged over heads, where attention weights would be. The tower's config
stays as it is: masks are made as before, other towers that share it are not concerned, nothing of it is saved, and
`set_attn_implementation` on the model changes the other modules only.

With ``output_attentions=True`` these modules report the keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmcompress.errors import UsageError

KEYS = "mmc_keys"


def attend_and_give_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return scaled dot-product attention (B, N, H, D) and the keys averaged over heads (B, N, D)."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, key.mean(dim=1)


AttentionInterface.register(KEYS, attend_and_give_keys)
# A name without a mask function makes transformers (5.x) leave out every mask, silently.
AttentionMaskInterface.register(KEYS, sdpa_mask)


def give_keys(attentions: Iterable[nn.Module]) -> None:
    """Make each attention module return (output, keys (B, N, D)).

    Raises UsageError for a module that does not choose its attention function by its config.
    """
    copies: dict[int, Any] = {}
    for attention in attentions:
        config = getattr(attention, "config", None)
        if not hasattr(config, "_attn_implementation"):
            raise UsageError(
                f"{type(attention).__name__} computes attention by itself and does not give its keys",
                hint="use method random, which needs no keys",
            )
        if id(config) not in copies:
            copies[id(config)] = copy.deepcopy(config)
            copies[id(config)]._attn_implementation = KEYS
        attention.config = copies[id(config)]
