"""Painting a picture's patches by the tokens they are in, and pages of such paintings: see `token_pictures`.

Shapes: N patches, rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmcompress.errors import UsageError

TILE = 224
"""Pixels of each picture's longer side."""
TILES = 12
"""The most pictures on a page; of more blocks, some are left out."""
COLUMNS = 4
GAP, TITLE = 8, 20
ASKED = 100
"""Letters of a question that are shown."""
GONE = 0.15
"""Brightness of patches that are in no token."""
LINE = (255, 255, 255)

Pixels = NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """The tokens at one place of the model."""

    title: str
    token_of: NDArray[np.int64]
    """(N,): the token each patch is in, -1 for none."""
    grid: tuple[int, int]
    """Rows and columns of patches."""


def grid_of(patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of square patches. Raises UsageError where they fill no rectangle of this shape."""
    height, width = size
    rows = max(1, round((patches * height / width) ** 0.5))
    if patches % rows:
        raise UsageError(
            f"{patches} patches do not fill a picture of {width} x {height} pixels",
            hint="draw a model of square patches",
        )
    return rows, patches // rows


def pixels_of(values: Tensor) -> Pixels:
    """Return the first picture or tile as (height, width, 3) of 0 to 1, as the model is given it: its range is what there is."""
    picture = values.detach().float().cpu().reshape(-1, *values.shape[-3:])[0]
    if picture.shape[0] != 3:
        raise UsageError(
            f"the model is given patches of {tuple(values.shape)} instead of a picture, so none can be drawn",
            hint="draw another model",
        )
    low, high = picture.min(), picture.max()
    return ((picture - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).double().numpy()


def page_of(pixels: Pixels, views: Sequence[View], asked: str = "") -> Image.Image:
    """Return the picture and the views, row by row, with what was `asked` above them."""
    rows, columns = views[0].grid
    tiles = [(f"{rows * columns} patches", painted(pixels, np.arange(rows * columns), views[0].grid))]
    tiles += [(view.title, painted(pixels, view.token_of, view.grid)) for view in views]
    width, height = tiles[0][1].size
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    above = TITLE if asked else 0
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + TITLE + GAP) + GAP + above), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    pen.text((GAP, GAP), asked, fill="black", font=font)
    for index, (title, tile) in enumerate(tiles):
        left = GAP + index % columns * (width + GAP)
        top = above + GAP + index // columns * (height + TITLE + GAP)
        pen.text((left, top), title, fill="black", font=font)
        page.paste(tile, (left, top + TITLE))
    return page


def painted(pixels: Pixels, token_of: NDArray[np.int64], grid: tuple[int, int]) -> Image.Image:
    """Return the picture with the patches of each token in one colour."""
    rows, columns = grid
    side = max(2, TILE // max(grid))
    large = Image.fromarray((pixels * 255).astype(np.uint8)).resize(
        (columns * side, rows * side), Image.Resampling.BICUBIC
    )
    made = np.asarray(large, np.float64).reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).copy()
    patches = made.reshape(rows * columns, side, side, 3)
    members = np.bincount(token_of[token_of >= 0], minlength=1)
    for token in np.flatnonzero(members > 1):
        patches[token_of == token] = patches[token_of == token].mean(axis=(0, 1, 2))
    patches[token_of < 0] *= GONE
    merged = ((token_of >= 0) & (members[token_of] > 1)).reshape(grid)
    where = token_of.reshape(grid)
    cells = patches.reshape(rows, columns, side, side, 3)
    # A line on the side of every merged patch where the next one belongs to another token.
    for across in (False, True):
        now, then = (where[:, :-1], where[:, 1:]) if across else (where[:-1], where[1:])
        either = merged[:, :-1] | merged[:, 1:] if across else merged[:-1] | merged[1:]
        for row, column in np.argwhere((now != then) & either):
            if across:
                cells[row, column, :, -1] = LINE
            else:
                cells[row, column, -1] = LINE
    whole = cells.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
    return Image.fromarray(whole.round().clip(0, 255).astype(np.uint8))
