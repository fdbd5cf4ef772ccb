"""What bound modules of one model tell each other during a forward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from torch import Tensor


class Ledger(threading.local):
    """Where bound modules leave what a later one needs. Threads have their own; copies start empty."""

    put_back = False
    """Whether tokens that became fewer get a row in every place again; see `putting_back`."""

    watched: list[Tensor | None] | None = None
    """While it is a list, every bound module appends what went where in it; see `watching`."""

    progress = 1.0
    """How much of an annealing is over; see `annealing`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


@contextlib.contextmanager
def putting_back(ledger: Ledger | None) -> Iterator[None]:
    """While it is open, the modules of `ledger` give a row for every original token, to be compared with other models."""
    if ledger is None:
        yield
        return
    before, ledger.put_back = ledger.put_back, True
    try:
        yield
    finally:
        ledger.put_back = before


@contextlib.contextmanager
def annealing(ledgers: Sequence[Ledger]) -> Iterator[Callable[[float], None]]:
    """Yield what sets how much of an annealing is over, 0 to 1: the blocks of `ledgers` then merge as `ops.schedule.annealed` says.

    Afterwards they merge as many tokens as they were bound to.
    """

    def to(progress: float) -> None:
        for ledger in ledgers:
            ledger.progress = progress

    try:
        yield to
    finally:
        to(1.0)


@contextlib.contextmanager
def watching(ledger: Ledger) -> Iterator[list[Tensor | None]]:
    """While it is open, what the modules of `ledger` do with their tokens is gathered, module by module.

    An assignment (B, M, N) or (M, N): which of N tokens went into which of M; None where all went on as they were.
    """
    before, ledger.watched = ledger.watched, []
    try:
        yield ledger.watched
    finally:
        ledger.watched = before
