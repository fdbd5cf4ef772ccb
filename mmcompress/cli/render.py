"""How results look in a terminal. stdout is data: a table, or one JSON document; stderr is talk and progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

WIDTH = 140
"""Of tables that do not go to a terminal: wide enough not to break them."""
COLOURS = {"good": "green", "note": "yellow", "bad": "bold red"}


def out() -> Console:
    """Return the console for data."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def err() -> Console:
    """Return the console for talk."""
    return Console(file=sys.stderr, stderr=True, highlight=False)


class Terminal:
    """Talk and progress for a person, on stderr: a bar on a terminal; with `verbose` also one line per stage, for logs."""

    def __init__(self, quiet: bool = False, verbose: int = 0) -> None:
        self._console = err()
        self._quiet, self._verbose = quiet, verbose
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def start(self, label: str, total: int | None) -> None:
        """Begin a stage."""
        if self._verbose:
            self.say(label)
        if self._quiet or not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(label, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=steps, note=note)

    def finish(self) -> None:
        """End the stage."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        """Print one line of talk."""
        if not self._quiet:
            self._console.print(line, markup=False, soft_wrap=True)

    def next_step(self, command: str) -> None:
        """Suggest the next command."""
        if not self._quiet:
            self._console.print(f"next: {command}", markup=False, style="dim", soft_wrap=True)


def document(content: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(content, indent=1, ensure_ascii=False, default=str))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1) -> None:
    """Print a table and an empty line on stdout; the first `left` columns are words, the others numbers."""
    console = out()
    console.print(title, markup=False, style="bold")
    made = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    console.print(made)
    console.print()


def findings(items: Sequence[dict[str, str]]) -> None:
    """Print a verdict, worst first as it comes, and an empty line on stdout."""
    console = out()
    for item in items:
        console.print(f"[{COLOURS[item['level']]}]{item['level']:>4}[/] ", end="")
        console.print(item["text"], markup=False, soft_wrap=True)
    if items:
        console.print()


def line(text: str) -> None:
    """Print one line on stdout, never broken: what it names is there to be copied."""
    out().print(text, markup=False, soft_wrap=True)


def parameters(params: dict[str, Any]) -> str:
    """Return a pass's parameters as they are written in --set: "ratio=0.3, units=heads,neurons"."""
    return ", ".join(
        f"{key}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for key, value in params.items()
    )


def mebibytes(count: float) -> str:
    """Return bytes as MiB with one decimal."""
    return f"{count / 2**20:,.1f}"


def interval(estimate: Any, digits: int = 3) -> str:
    """Return an estimate as "0.431 [0.412, 0.450]"."""
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
