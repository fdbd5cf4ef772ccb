"""`mmc inspect`: what a model is made of, and which passes apply to it."""

from __future__ import annotations

from typing import Any

import click

from mmcompress.cli import options


@click.command("inspect")
@options.model_argument
@options.pickle_option
@options.talk_options
def command(model: str, allow_pickle: bool, as_json: bool, quiet: bool, verbose: int) -> None:
    """Show towers, parameters, MACs, tokens, bytes, and which passes apply, with the reason where one does not."""
    from mmcompress.cli import render
    from mmcompress.jobs.inspect import inspect

    found = inspect(model, allow_pickle=allow_pickle)
    if as_json:
        render.document(found)
        return
    render.table(
        f"{found['model']}: {found['class']} ({found['family']}), {found['parameters']:,} parameters, "
        f"{render.mebibytes(found['bytes'])} MiB in memory, stored as {found['dtype']}",
        ["tower", "blocks", "heads", "head dim", "neurons", "tokens", "readout", "parameters", "MMACs"],
        [
            [
                t["name"], t["blocks"], t["heads"], t["head_dim"], t["neurons"], t["tokens"] or "-", t["readout"] or "-",
                _parameters(t), f"{t['macs'] / 1e6:,.0f}",
            ]
            for t in found["towers"]
        ],
    )  # fmt: skip
    render.table(
        "Passes",
        ["pass", "tower", "applies", "why not"],
        [[p["pass"], p["tower"], "yes" if p["applies"] else "no", p["reason"]] for p in found["passes"]],
        left=4,
    )
    for record in found["history"]:
        render.line(f"already done: {record['pass']} {render.parameters(record['params'])}")
    for tower in found["towers"]:
        if tower["experts"]:
            render.line(
                f"{tower['name']}: a token goes through {tower['experts_per_token']} of a block's {tower['experts']} experts"
            )
    render.Terminal(quiet).next_step(f"mmc prune {model} -o OUT --ratio 0.3 --data DATA --eval-data HELD-OUT")


def _parameters(tower: dict[str, Any]) -> str:
    """ "300", or "300, 200 a token" where a token goes through some of them only."""
    whole, idle = tower["parameters"], tower["parameters_idle_per_token"]
    return f"{whole:,}, {whole - idle:,} a token" if idle else f"{whole:,}"
