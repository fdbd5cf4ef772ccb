"""A language model that is given fewer layers of a video than its vision encoder makes.

`bind` gives the module that joins both models methods of its own: those that make image tokens hand on fewer of a video, and those
that say where tokens stand say it of fewer. What a layer left is made of is said by tables (see `ops.frames`): the mean of its
members, or one of them. Its place in time is made of theirs in the same way. A picture, which is one layer, goes through as it is.

A `Stage` adds to the mean what a small network makes of three neighbours in time, for each token by itself. Its last layer begins
as zeros, so untrained it is the mean. Source: STE, arXiv 2501.16786. This is our derivation from that paper's abstract, which names
stackable convolutions over time whose reach and ratio can be set: here a depthwise one of three taps and a step of two, GELU, and a
projection; a step of four or eight is two or three stages.

Shape alphabet: T layers, M layers left, N tokens of a layer, C channels, K further levels (deepstack), R layers of several videos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from mmcompress.ops.frames import BEFORE, FIRST, SECOND, halves, mean_over_time, moves, one_hot, picks, taken

Method = Literal["mean", "first", "random"]
ATTRIBUTE = "frame_merging"
STAGES = "frame_stages"


class Named(Protocol):
    """What has to be known of the module that joins both models; `views.Film` says what each name stands for."""

    @property
    def makers(self) -> tuple[str, ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def levels(self) -> int: ...
    @property
    def tokens(self) -> str: ...
    @property
    def deeper(self) -> str: ...
    @property
    def placing(self) -> str: ...
    @property
    def numbering(self) -> str: ...
    @property
    def grids(self) -> str: ...


@dataclass(frozen=True)
class FrameMerging:
    """How layers of a video become fewer."""

    stride: int
    """How many become one."""
    method: Method = "mean"
    drawn: tuple[int, ...] = ()
    """The places in a group that "random" keeps."""

    def tables(self, layers: int) -> list[Tensor]:
        """Return tables (M, 3), one behind the other, for a video of so many layers."""
        if self.method != "mean":
            return [picks(layers, self.stride, self.drawn or (0,))]
        made: list[Tensor] = []
        for _ in range(self.stride.bit_length() - 1):
            made.append(halves(layers))
            layers = len(made[-1])
        return made

    def left(self, layers: int) -> int:
        """Return M for T layers."""
        return -(-layers // self.stride)

    def times(self, times: Tensor) -> Tensor:
        """Return when the layers left (M,) are, of the `times` (T,) of all."""
        times = times.double()
        for table in self.tables(len(times)):
            times = mean_over_time(times, table)
        return times


class Stage(nn.Module):
    """Half of the layers of a video: means, and what a convolution over time adds to them."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        taps = torch.zeros(3, channels * levels)
        # What stays is in the mean; the convolution begins with what moves.
        taps[BEFORE], taps[SECOND] = -1, 1
        self.taps = nn.Parameter(taps)
        self.bias = nn.Parameter(torch.zeros(channels * levels))
        self.mixes = nn.ModuleList(nn.Linear(channels, channels) for _ in range(levels))
        for mix in cast(list[nn.Linear], list(self.mixes)):
            nn.init.zeros_(mix.weight)
            nn.init.zeros_(mix.bias)

    def forward(self, before: Tensor, first: Tensor, second: Tensor, moving: Tensor) -> Tensor:
        """Return (M, N, (1 + K) * C) of three as large. `moving`: (M, 1, 1), 0 where a layer goes through as it is."""
        parts = zip(self.taps, (before, first, second), strict=True)
        looked = nn.functional.gelu(sum((tap * part for tap, part in parts), self.bias))
        pieces = looked.chunk(len(self.mixes), dim=-1)
        added = torch.cat([mix(piece) for mix, piece in zip(self.mixes, pieces, strict=True)], dim=-1)
        made: Tensor = (first + second) / 2 + moving.to(added.dtype) * added
        return made


def new_stages(film: Named, stride: int) -> nn.ModuleList:
    """Return untrained stages that leave one of `stride` layers."""
    return nn.ModuleList(Stage(film.channels, film.levels) for _ in range(stride.bit_length() - 1))


def bind(joint: nn.Module, film: Named, how: FrameMerging, stages: nn.ModuleList | None = None) -> None:
    """Make the module `joint`, whose methods `film` names, hand on fewer layers of a video; `stages`, if there are any, join it."""
    setattr(joint, ATTRIBUTE, (how, film))
    if stages is not None:
        joint.add_module(STAGES, stages)
    for name, bound in (*((maker, _make) for maker in film.makers), (film.numbering, _number), (film.placing, _place)):
        if name:
            setattr(joint, name, MethodType(_named(bound, name, type(joint)), joint))


def _named(bound: Callable[..., Any], name: str, of: type[nn.Module]) -> Callable[..., Any]:
    """Return `bound` with the signature of the class's method: transformers looks there for what it may pass on."""

    @wraps(getattr(of, name))
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return bound(name, self, *args, **kwargs)

    return called


def merging_of(joint: nn.Module) -> FrameMerging | None:
    """Return how videos lose layers, None where they do not."""
    found: tuple[FrameMerging, Named] | None = getattr(joint, ATTRIBUTE, None)
    return None if found is None else found[0]


def stages_of(joint: nn.Module) -> Sequence[Stage]:
    """Return what adds to the means, stage by stage; nothing where nothing does."""
    return cast(Sequence[Stage], list(getattr(joint, STAGES, ())))


def merged(joint: nn.Module, rows: Tensor) -> Tensor:
    """Return the layers left (M, N, C) of a video's `rows` (T, N, C)."""
    how, stages = merging_of(joint), stages_of(joint)
    for number, table in enumerate(how.tables(len(rows)) if how else ()):
        if stages:
            rows = stages[number](*taken(rows, table), moves(table)[:, None, None].to(rows.device))
        else:
            rows = mean_over_time(rows, table)
    return rows


def multiplied(joint: nn.Module, rows: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Return what `merged` does of several videos in one row (R, N, C), by matmuls with `tables` (3, M, R) of `tables_for`."""
    stages = stages_of(joint)
    for number, table in enumerate(tables):
        flat = rows.flatten(1)
        if stages:
            three = [(table[at] @ flat).unflatten(1, rows.shape[1:]) for at in (BEFORE, FIRST, SECOND)]
            moving = 1 - (table[BEFORE] * table[SECOND]).sum(-1)
            rows = stages[number](*three, moving[:, None, None])
        else:
            rows = ((table[FIRST] + table[SECOND]) / 2 @ flat).unflatten(1, rows.shape[1:])
    return rows


def tables_for(how: FrameMerging, layers: Sequence[int]) -> list[Tensor]:
    """Return for each stage a table (3, M, R) for pictures and videos of so many `layers`."""
    made = []
    for tables in zip(*(how.tables(count) for count in layers), strict=True):
        made.append(one_hot(tables, layers))
        layers = [len(table) for table in tables]
    return made


def hand_on(joint: nn.Module, made: Any, grids: Tensor | None) -> Any:
    """Return what a maker gave out with fewer layers of each video.

    `grids`: (pictures, 3), layers, rows and columns of each picture or video; None: all are pictures.
    A still picture's tokens stay the same tensor, unless there are stages: then they are in the graph of these, with no effect.
    """
    found: tuple[FrameMerging, Named] | None = getattr(joint, ATTRIBUTE, None)
    if found is None:
        return made
    film, learns = found[1], bool(stages_of(joint))
    deeper = getattr(made, film.deeper, None) or [] if film.deeper else []
    levels = [list(level) for level in (getattr(made, film.tokens), *deeper)]
    counts = [1] * len(levels[0]) if grids is None else grids[:, 0].tolist()
    for number, count in enumerate(counts):
        if count == 1 and not learns:
            continue
        rows = torch.cat([level[number] for level in levels], dim=-1).unflatten(0, (count, -1))
        for level, part in zip(levels, merged(joint, rows).flatten(0, 1).chunk(len(levels), dim=-1), strict=True):
            level[number] = part
    setattr(made, film.tokens, levels[0])
    if deeper:
        setattr(made, film.deeper, levels[1:])
    return made


def _make(name: str, self: Any, *args: Any, **kwargs: Any) -> Any:
    grids = next((value for key, value in kwargs.items() if key.endswith("grid_thw")), args[1] if args[1:] else None)
    return hand_on(self, getattr(type(self), name)(self, *args, **kwargs), grids)


def _number(name: str, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Number a prompt in which each layer of a video stands by itself: it has fewer."""
    how, film = getattr(self, ATTRIBUTE)
    grids = kwargs.get(film.grids)
    if grids is not None:
        left = [how.left(count) for count in grids[:, 0].tolist()]
        kwargs[film.grids] = torch.cat([grids.new_tensor(left)[:, None], grids[:, 1:]], dim=1)
    return getattr(type(self), name)(self, *args, **kwargs)


def _place(name: str, self: Any, start: int, grid: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the places (3, M * N) of a video's tokens: times of the layers left, rounded down as the model's own are."""
    how, _ = getattr(self, ATTRIBUTE)
    made: Tensor = getattr(type(self), name)(self, start, grid, *args, **kwargs)
    layers = int(grid[0])
    if layers == 1:
        return made
    apart = made.unflatten(1, (layers, -1))  # (3, T, N)
    left = apart[:, : how.left(layers)].clone()
    left[0] = how.times(apart[0, :, 0]).floor().to(left.dtype)[:, None]
    return left.flatten(1)
