"""CrossGET's cross tokens: a learned vector in a block that merges says what the other tower of a dual encoder cares about.

Before the block's attention the class token (the mean where there is none) plus that vector goes along with the tokens. It looks at
them and none looks at it, so a tower computes what it would without it, but for the choice of what is merged: its key is what
tokens matter by. Behind the attention it is gone.

Source: CrossGET, arXiv 2305.17455, section 3.2. Deliberate difference: there the other tokens look at it too, and the model is
trained with it.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NAME = "cross_token"


def add_cross_token(block: nn.Module, width: int, dtype: torch.dtype) -> None:
    """Give `block` the vector, zeros of `width` channels: so far the guide is the class token itself, or the mean."""
    block.register_parameter(NAME, nn.Parameter(torch.zeros(width, dtype=dtype)))


def cross_vector(block: nn.Module) -> nn.Parameter | None:
    """Return the vector (C,) of a block that has one."""
    return getattr(block, NAME, None)


def cross_token(block: nn.Module, tokens: Tensor, sizes: Tensor | None, protected: int) -> Tensor | None:
    """Return the cross token (B, 1, C) of a block before `tokens` (B, N, C), with gradient to its vector alone; None without one.

    `sizes`: (B, N), of which 0 is padding; None: all 1. `protected`: how many tokens lead; the first is the class token.
    """
    vector = cross_vector(block)
    if vector is None:
        return None
    base = tokens[:, :1]
    if not protected:
        weights = torch.ones_like(tokens[..., 0]) if sizes is None else sizes.to(tokens.dtype)
        base = (weights / weights.sum(dim=-1, keepdim=True))[:, None, :] @ tokens
    return base.detach() + vector.to(tokens.dtype)
