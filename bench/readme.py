"""Writes every command's --help and the measured results into README.md, so that the page never says what the program does not.

    python -m bench.readme            write it
    python -m bench.readme --check    exit 1 when README.md is out of date, writing nothing

The width is pinned: the same text comes out on every terminal.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import click

from bench import measured
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
    return _with_measured(_with_commands(document))


def _with_measured(document: str) -> str:
    if measured.BEGIN not in document and measured.END not in document:
        return document
    before, found, rest = document.partition(measured.BEGIN)
    _, ended, after = rest.partition(measured.END)
    if not found or not ended:
        sys.exit(f"README.md must hold {measured.BEGIN} before {measured.END}")
    return before + measured.section() + after


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


def main() -> None:
    """Write README.md, or check it."""
    parser = argparse.ArgumentParser(description="Write every command's --help into README.md.")
    parser.add_argument("--check", action="store_true", help="exit 1 when README.md is out of date")
    checking = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if not checking:
        README.write_text(new, encoding="utf-8")
        return
    if old != new:
        changes = difflib.unified_diff(
            old.splitlines(), new.splitlines(), "README.md", "what it should be", lineterm=""
        )
        sys.exit("\n".join([*changes, "README.md is out of date: make readme"]))


if __name__ == "__main__":
    main()
