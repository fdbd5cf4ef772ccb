"""Where tokens stand in a prompt whose pictures have lost some of theirs.

A picture of N tokens of which M are left goes on taking N positions: what is left stands where it was, and the words behind it
where they were. Then a language model that was never trained with fewer tokens knows where in the picture each of them belongs.

Shapes: B batch, T tokens of a prompt, R pictures or tiles in all of its rows, N positions of one, M tokens of it that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stand_apart(positions: Tensor, image: Tensor, places: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Return positions (B, T), and how much further (B, 1) a token behind the prompt stands than it counts.

    `positions`: (B, T), where tokens stand one behind the other. `image`: (B, T) booleans, a picture's tokens. `places`: (R, M), of
    the pictures in the order of rows, where in it each token was. `room`: N.
    """
    kept, number = places.shape[1], image.long().cumsum(dim=-1)
    before = number - image.long()
    missing = room - kept
    rows = number[:, -1:]
    among_all = (rows.cumsum(dim=0) - rows + before).clamp(max=places.numel() - 1)  # (B, T)
    inside = places.flatten()[among_all].to(before.dtype) - before % kept
    further = before // kept * missing + torch.where(image, inside, 0)
    return positions + further, rows // kept * missing


def evenly_placed(pictures: int, kept: int, room: int) -> Tensor:
    """Return places (R, M) of tokens at equal distances: where nobody says which they were."""
    places = ((torch.arange(kept) + 0.5) * room / kept).long()
    return places.expand(pictures, -1)
