"""What bound modules of one model tell each other during a forward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Self


class Ledger(threading.local):
    """Where bound modules leave what a later one needs. Threads have their own; copies start empty."""

    put_back = False
    """Whether tokens that became fewer get a row in every place again; see `putting_back`."""

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
