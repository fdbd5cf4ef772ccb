"""A small transformer over a picture's tokens: what scores them for a connector, and what makes lost ones up while it learns.

It works at a width of its own, whatever that of the tokens: a Linear leads in, another leads out. Tokens know their places by a
table, which begins as sines of row and column, so that neighbours are alike, and noise, so that they can be told apart. Plain
Linears throughout, so that what is done to other layers can be done to these.

Shapes: R pictures, N tokens, C channels, W width, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_WIDTH = 16
WIDER = 4
"""How many times as wide a feed-forward is inside."""
HARDLY = 0.1
"""How large the first outputs are: no opinion yet."""
LONGEST_WAVE = 100.0
"""Of the sines of places, over two pi: longer than any grid's side."""


class TokenTransformer(nn.Module):
    """Pre-norm blocks between two Linears: (R, N, C) to (R, N, outputs)."""

    def __init__(self, channels: int, outputs: int, width: int, layers: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.enter = nn.Linear(channels, width)
        self.places = nn.Parameter(sines_of_places(grid, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens`: (R, N, C), of any dtype."""
        states = self.enter(tokens.to(self.places.dtype)) + self.places
        for block in self.blocks:
            states = block(states)
        made: Tensor = self.leave(self.norm(states))
        return made

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Give the parameters the values they have before training, from the generator of the CPU alone."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # Inputs of size 1 give outputs of size 1.
                drawn = torch.randn(module.weight.shape, generator=generator) * module.in_features**-0.5
                module.weight.copy_(drawn)
                module.bias.zero_()
        self.leave.weight.mul_(HARDLY)
        # By the sines alone, neighbours are too much alike for one of them to be kept and the other not.
        self.places.add_(torch.randn(self.places.shape, generator=generator))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_before_attention, self.norm_before_feeding = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, WIDER * width), nn.Linear(WIDER * width, width)

    def forward(self, states: Tensor) -> Tensor:
        looked = self.norm_before_attention(states)
        parts = (make(looked) for make in (self.queries, self.keys, self.values))
        heads = (part.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for part in parts)  # (R, H, N, D)
        states = states + self.mix(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return states + self.down(functional.gelu(self.up(self.norm_before_feeding(states))))


def sines_of_places(grid: tuple[int, int], width: int) -> Tensor:
    """Return (N, W): sines and cosines of each place's row in one half, of its column in the other. `grid`: rows, columns."""
    waves = width // 4
    lengths = LONGEST_WAVE ** (torch.arange(waves) / waves)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.cat([side.flatten()[:, None] / lengths for side in (rows, columns)], dim=1)  # (N, W / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
