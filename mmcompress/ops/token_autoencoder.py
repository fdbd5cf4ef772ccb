"""Which tokens of a picture the others can stand in for: an autoencoder that drops tokens and makes them up again.

Source: "When Less is Enough", arXiv 2503.16660, whose code is not public. Of the tokens F a selector S makes a logit each, of which
a mask M of 0s and 1s is drawn; a reconstructor R gets F where M is 1 and one shared learned vector E where it is 0:

    Z    = F * M + E * (1 - M)
    loss = |R(Z) - F| + max(mean(M), p)

The second term asks for few tokens; its floor p, the share that will be kept, stops it from asking for none. Both networks and E
are trained, no label is needed, and R is thrown away afterwards.

M is drawn from a Gumbel softmax over "keep" and "drop" (Jang et al. 2017, arXiv 1611.01144; Maddison et al. 2017, arXiv
1611.00712). The difference of two Gumbel variables is a logistic one, so one logit l and one noise term g are enough: M is 1 where
sigmoid((l + g) / t) is above a half, and backwards it counts as that sigmoid (straight through).

Deliberate differences:

- F is divided by the root of its mean square over the picture, and the norm by the root of how many numbers it is of. The first
  term is then 1 for a picture that is lost altogether, whatever the model, and balances the second one without a weight.
- Both terms are taken picture by picture and then averaged: each keeps its own share, as it will when M tokens are kept of each.

Shapes: R pictures, N tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.ops.ranks import TINY

EDGE = 1e-6
"""How far uniform noise stays from 0 and 1, where its logarithms are infinite."""


def normalised(tokens: Tensor) -> Tensor:
    """Return the tokens (R, N, C) of each picture divided by the root of their mean square, at least in float32."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return tokens / (tokens.square().mean(dim=(1, 2), keepdim=True) + TINY).sqrt()


def logistic_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return differences of two independent Gumbel variables, on the CPU: alike on every device."""
    uniform = torch.rand(shape, generator=generator).clamp(EDGE, 1 - EDGE)
    return uniform.log() - (-uniform).log1p()


def drawn_mask(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Return 0s and 1s (R, N), 1 for a token that is kept, with the gradient of the soft choice. `logits`, `noise`: (R, N)."""
    soft = ((logits + noise) / temperature).sigmoid()
    hard = (soft > 0.5).to(soft.dtype)
    # In this order the value is exactly hard: soft - soft is 0, where hard + soft - soft may be rounded.
    return hard + (soft - soft.detach())


def masked(features: Tensor, mask: Tensor, shared: Tensor) -> Tensor:
    """Return Z: `features` (R, N, C) where `mask` (R, N) is 1, the `shared` vector (C,) where it is 0."""
    kept = mask[:, :, None]
    return features * kept + shared * (1 - kept)


def reconstruction_error(reconstructed: Tensor, features: Tensor) -> Tensor:
    """Return (R,): the root of the mean square of what is wrong with each picture; both (R, N, C)."""
    # At 0 a root has no gradient.
    return ((reconstructed - features).square().mean(dim=(1, 2)) + TINY).sqrt()


def share_above(mask: Tensor, floor: float) -> Tensor:
    """Return (R,): the share of tokens kept of each picture, `floor` where it is less; `mask`: (R, N)."""
    return mask.mean(dim=1).clamp(min=floor)


def autoencoding_loss(reconstructed: Tensor, features: Tensor, mask: Tensor, floor: float) -> Tensor:
    """Return the scalar that training makes small. Both tokens (R, N, C), normalised; `mask`: (R, N); `floor`: p."""
    return (reconstruction_error(reconstructed, features) + share_above(mask, floor)).mean()
