"""Writes what README.md says of the program: every command's --help, the passes and families, the measured results.

    python -m bench.readme            write it
    python -m bench.readme --check    exit 1 when README.md is out of date, writing nothing

The width is pinned: the same text comes out on every terminal.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path

import click

from bench import matrix, measured, measured_pruning, measured_tokens
from mmcompress.cli.__main__ import COMMANDS, cli

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- commands -->"
END = "<!-- end -->"
WIDTH = 110


def helps() -> dict[str, str]:
    """Return the help text of `mmc` and of every command, by what one types."""
    with _context(cli, "mmc", None) as root:
        found = {"mmc": _text(root)}
        for name in COMMANDS:
            command = cli.get_command(root, name)
            assert command is not None, name
            with _context(command, name, root) as context:
                found[f"mmc {name}"] = _text(context)
    return found


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, info_name=name, parent=parent, **settings)


def _text(context: click.Context) -> str:
    return "\n".join(line.rstrip() for line in context.get_help().splitlines())


def section() -> str:
    """Return the part of README.md from marker to marker."""
    parts = [BEGIN]
    for typed, text in helps().items():
        parts.append(f"<details><summary><code>{typed} --help</code></summary>\n\n```\n{text}\n```\n\n</details>")
    return "\n\n".join([*parts, END])


def updated(document: str) -> str:
    """Return the README with its made parts made anew."""
    document = _with_commands(document)
    for part in (matrix, measured):
        document = _with_part(document, part.BEGIN, part.END, part.section)
    return document


def _with_part(document: str, begin: str, end: str, made: Callable[[], str]) -> str:
    """Replace what is between two markers, where they are."""
    if begin not in document and end not in document:
        return document
    before, found, rest = document.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        sys.exit(f"README.md must hold {begin} before {end}")
    return before + made() + after


def _with_commands(document: str) -> str:
    """Replace the section, or add it at the end where there are no markers."""
    if document.count(BEGIN) > 1 or document.count(BEGIN) != document.count(END):
        sys.exit(f"README.md must hold {BEGIN} and {END} once each, or neither")
    if BEGIN not in document:
        return f"{document.rstrip()}\n\n## Commands\n\n{section()}\n"
    before, _, rest = document.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"README.md has {END} before {BEGIN}")
    return before + section() + after


def _drawings() -> dict[Path, str]:
    return measured_tokens.drawings() | measured_pruning.drawings()


def main() -> None:
    """Write README.md, or check it."""
    parser = argparse.ArgumentParser(description="Write every command's --help into README.md.")
    parser.add_argument("--check", action="store_true", help="exit 1 when README.md is out of date")
    checking = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if not checking:
        README.write_text(new, encoding="utf-8")
        for path, drawing in _drawings().items():
            path.write_text(drawing, encoding="utf-8")
        return
    if old != new:
        changes = difflib.unified_diff(
            old.splitlines(), new.splitlines(), "README.md", "what it should be", lineterm=""
        )
        sys.exit("\n".join([*changes, "README.md is out of date: make readme"]))
    for path, drawing in _drawings().items():
        if not path.exists() or path.read_text(encoding="utf-8") != drawing:
            sys.exit(f"{path.name} is out of date: make readme")


if __name__ == "__main__":
    main()
