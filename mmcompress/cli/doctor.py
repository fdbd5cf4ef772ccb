"""`mmc doctor`: what this machine can run, what is missing and how to get it."""

from __future__ import annotations

import click

from mmcompress.cli import options

MARKS = {"ok": "ok", "missing": "missing", "problem": "PROBLEM"}


@click.command("doctor")
@options.talk_options
def command(as_json: bool, quiet: bool, verbose: int) -> None:
    """Show runtimes, devices and versions, what is missing and the command that gets it. Exit 4 on a problem."""
    from mmcompress.cli import render
    from mmcompress.errors import MissingError
    from mmcompress.jobs.doctor import examine

    found = examine()
    if as_json:
        render.document(found)
    else:
        machine = found["machine"]
        rows = [[key.replace("_", " "), _short(value)] for key, value in machine.items() if value not in (None, [], {})]
        render.table("Machine", ["what", "found"], rows, left=2)
        render.table(
            "Parts",
            ["part", "state", "version", "used for", "what to do"],
            [
                [
                    p["part"],
                    MARKS[p["state"]],
                    p["version"],
                    p["used_for"],
                    _what_to_do(p),
                ]
                for p in found["parts"]
            ],
            left=5,
        )
    problems = [part for part in found["parts"] if part["state"] == "problem"]
    if problems:
        raise MissingError(f"{problems[0]['part']}: {problems[0]['reason']}", hint=problems[0]["get"])


def _what_to_do(part: dict[str, str]) -> str:
    """Nothing, how to get it, or why what is installed cannot be used here."""
    if part["state"] == "ok":
        return ""
    return part["reason"] if part["state"] == "missing" and part["version"] else part["get"]


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
