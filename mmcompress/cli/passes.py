"""`mmc passes`: what can be done to a model."""

from __future__ import annotations

from typing import Any

import click

from mmcompress import passes
from mmcompress.cli import options


@click.command("passes")
@click.argument("name", required=False)
@options.talk_options
def command(name: str | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """List the passes, or show one with its parameters and sources."""
    from mmcompress.cli import render

    if name is None:
        schemas = {known: passes.schema(known) for known in passes.PASSES}
        if as_json:
            render.document({known: schema.summary for known, schema in schemas.items()})
        else:
            render.table("Passes", ["pass", "what it does"], [[k, s.summary] for k, s in schemas.items()], left=2)
            render.Terminal(quiet).next_step("mmc passes prune")
        return
    schema = passes.schema(name)
    rows: list[dict[str, Any]] = [
        {
            "parameter": p.name,
            "type": "|".join(p.choices) or p.kind,
            "default": p.default,
            "meaning": p.help,
        }
        for p in schema.parameters
    ]
    if as_json:
        render.document({"pass": name, "description": schema.description, "parameters": rows})
        return
    render.out().print(schema.description, markup=False)
    render.table(f"Parameters of {name}", list(rows[0]), [list(row.values()) for row in rows], left=4)
