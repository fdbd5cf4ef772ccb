"""Progress as a protocol: the library reports, whoever calls decides how it looks (a bar, a log line, nothing)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Receives what a long run is doing. Implementations must be cheap; they are called once per batch."""

    def start(self, label: str, total: int | None) -> None:
        """A stage named `label` begins; `total` steps are expected (None: unknown)."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """`steps` more are done; `note` is a short current value such as ``loss 0.31``."""

    def finish(self) -> None:
        """The current stage ended, normally or not."""

    def say(self, line: str) -> None:
        """One line of talk for a person."""


class Silent:
    """The default outside the command line: says nothing."""

    def start(self, label: str, total: int | None) -> None:
        return None

    def advance(self, steps: int = 1, note: str = "") -> None:
        return None

    def finish(self) -> None:
        return None

    def say(self, line: str) -> None:
        return None


def track(items: Iterable[Item], progress: Progress, label: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items`, reporting one step after each."""
    progress.start(label, total)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.finish()
