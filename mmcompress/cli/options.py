"""Options that mean the same in every command, and options made from a pass's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click

from mmcompress.passes.schema import Parameter, Schema

F = TypeVar("F", bound=Callable[..., Any])

TYPES: dict[str, type] = {"int": int, "float": float}


def model_argument(function: F) -> F:
    """A model: directory, hub id or an mmc output."""
    return click.argument("model", metavar="MODEL")(function)


def output_option(required: bool = True) -> Callable[[F], F]:
    """Where the result goes; never overwritten."""
    return click.option(
        "-o", "--output", required=required, type=click.Path(path_type=Path), help="Where to write; must not exist yet."
    )


def talk_options(function: F) -> F:
    """--json, -q, -v: what goes to stdout and how much is said on stderr."""
    function = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(function)
    function = click.option("-q", "--quiet", is_flag=True, help="No progress and no talk on stderr.")(function)
    return click.option("-v", "--verbose", count=True, help="A line for each stage; -vv also tracebacks.")(function)


def pickle_option(function: F) -> F:
    """--allow-pickle, for commands that read a checkpoint's weights."""
    return click.option("--allow-pickle", is_flag=True, help="Read pickled weights (weights_only=True).")(function)


def tower_option(function: F) -> F:
    """--tower, for commands that can leave towers out."""
    return click.option("--tower", "towers", multiple=True, help="Only this tower; repeatable.  [default: all]")(
        function
    )


def device_option(function: F) -> F:
    """--device, with cpu as the default."""
    return click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")(function)


def data_options(taken: Sequence[str] = ()) -> Callable[[F], F]:
    """--data for what passes look at, --eval-data for what is only measured; `taken` are names a pass has of its own."""
    made = {
        "data": click.option(
            "--data", help="Data that passes look at: a folder with metadata.jsonl, tar shards, demo:train."
        ),
        "eval_data": click.option(
            "--eval-data", help="Data that is only measured. Without it nothing is said about accuracy."
        ),
        "num_samples": click.option(
            "--num-samples", type=click.IntRange(1), help="Samples calibration looks at.  [default: 128]"
        ),
        "batch_size": click.option("--batch-size", type=click.IntRange(1), help="Samples at a time.  [default: 16]"),
        "seed": click.option("--seed", type=click.IntRange(0), help="Same seed, same artifact.  [default: 0]"),
    }

    def decorate(function: F) -> F:
        for name in reversed(made):
            function = function if name in taken else made[name](function)
        return function

    return decorate


def explain_option(function: F) -> F:
    """The pictures whose patches are drawn, and what is asked about them."""
    function = click.option(
        "--prompt", default="", help="With --explain: the question that the model is asked about it."
    )(function)
    return click.option(
        "--explain",
        multiple=True,
        type=click.Path(path_type=Path),
        help="An image: draw which of its patches become one token or go, in OUT/reports; repeatable.",
    )(function)


class Duration(click.ParamType[float]):
    """Minutes, written as 90s, 10m or 1.5h."""

    name = "duration"
    units: ClassVar[dict[str, float]] = {"s": 1 / 60, "m": 1.0, "h": 60.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the minutes that `value` says."""
        try:
            minutes = float(value[:-1]) * self.units[value[-1:]]
        except (KeyError, ValueError):
            minutes = 0.0
        if not 0 < minutes < math.inf:
            self.fail(f"'{value}' is no time; expected a number and its unit, such as 90s, 10m or 1h", param, ctx)
        return minutes


def recover_option(function: F) -> F:
    """--recover, for what costs accuracy that training wins back."""
    return click.option(
        "--recover",
        type=Duration(),
        metavar="TIME",
        help="Then train towards the original for so long, such as 10m: a step `distill` of that time, for the same towers.",
    )(function)


def rounds_option(function: F) -> F:
    """--rounds, for what is better cut a little at a time."""
    return click.option(
        "--rounds",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Cut and train by turns so many times: each round takes the same share of what is left, and its part of --recover.",
    )(function)


def run_options(function: F) -> F:
    """--dry-run, --resume, --set, --no-control, --allow-pickle."""
    function = click.option("--dry-run", is_flag=True, help="Print what would be done, its time, memory and disk.")(
        function
    )
    function = click.option("--resume", is_flag=True, help="Go on with the interrupted run of this output.")(function)
    function = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value, such as prune.ratio=0.4."
    )(function)
    function = click.option(
        "--control/--no-control", default=None, help="Compare with random selection at the same ratio.  [default: on]"
    )(function)
    return pickle_option(function)


def pass_options(schema: Schema) -> Callable[[F], F]:
    """Give a command one option per parameter of a pass; those not given keep the pass's own default."""

    def decorate(function: F) -> F:
        for parameter in reversed(schema.parameters):
            function = _option(parameter)(function)
        return function

    return decorate


def given(schema: Schema, options: dict[str, Any]) -> dict[str, Any]:
    """Take the pass's parameters that were really given out of a command's keyword arguments."""
    params = {}
    for parameter in schema.parameters:
        value = options.pop(_dest(parameter), None)
        if value is not None and value != ():
            params[parameter.name] = value
    return params


def _dest(parameter: Parameter) -> str:
    return f"pass_{parameter.name}"


def _option(parameter: Parameter) -> Callable[[F], F]:
    flag = "--" + parameter.name.replace("_", "-")
    shown = "none" if parameter.default is None else parameter.default
    if isinstance(shown, tuple | list):
        shown = ",".join(map(str, shown)) or "none"
    text = f"{parameter.help}  [default: {shown if shown != {} and shown != '' else 'none'}]"
    names = [_dest(parameter), flag]
    if parameter.kind == "bool":
        names[1] = f"{flag}/--no-{parameter.name.replace('_', '-')}"
        return click.option(*names, default=None, help=text)
    if parameter.choices:
        return click.option(*names, type=click.Choice(parameter.choices), help=text)
    metavar = {"int": "N", "float": "X", "str": "TEXT"}.get(parameter.kind, "A,B,…")
    return click.option(*names, type=TYPES.get(parameter.kind, str), metavar=metavar, help=text)
