"""Exceptions a user can act on: what was given, what was expected, what to do next.

Each class carries the exit code of the command line: 0 ok, 1 our bug, 2 usage, 3 gate, 4 missing, 5 memory, 130 interrupted.
Everything that is not an `MmcError` is our own bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MmcError(Exception):
    """An error with a one-line message and a hint that says what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", document: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.document = document
        """What was measured before it failed; `--json` prints it together with the error."""


class UsageError(MmcError):
    """Bad usage, recipe or input (exit code 2)."""

    exit_code = 2


class NotExportable(UsageError):
    """What the checkpoint can do and no exported graph of it: a model, a picture, a setting of generation."""


class GateFailed(MmcError):
    """A gate of a recipe or of `mmc check` failed (exit code 3)."""

    exit_code = 3


class MissingError(MmcError):
    """A dependency, runtime or device is missing (exit code 4)."""

    exit_code = 4


class OutOfMemory(MmcError):
    """Memory or disk ran out (exit code 5)."""

    exit_code = 5


def closest(word: str, known: Iterable[str]) -> str:
    """Return the hint ``did you mean 'x'?`` for a mistyped word, or the list of what is known."""
    known = sorted(known)
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{found[0]}'?" if found else "known: " + ", ".join(known)
