"""A command that runs one pass: a recipe of one step (and of the training after it), with the pass's parameters as options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mmcompress import passes
from mmcompress.cli import options
from mmcompress.errors import UsageError
from mmcompress.recipe import Recipe, Step, parse


def single_pass(
    command: str, pass_name: str, examples: str, explains: bool = False, recovers: bool = False, repeats: bool = False
) -> click.Command:
    """Return the click command `command` for the pass `pass_name`; `examples` end its help.

    `explains`: it makes tokens fewer, and can draw which; `recovers`: training may follow; `repeats`: both by turns.
    """
    schema = passes.schema(pass_name)
    explain = options.explain_option if explains else lambda function: function
    recover = options.recover_option if recovers else lambda function: function
    rounds = options.rounds_option if repeats else lambda function: function
    default_towers = next((known.default for known in schema.parameters if known.name == "towers"), ())

    @click.command(
        command,
        help=schema.summary,
        epilog=f"\b\nExamples:\n{examples}",
        context_settings={"max_content_width": 110},
    )
    @options.model_argument
    @options.output_option()
    @options.pass_options(schema)
    @recover
    @rounds
    @options.data_options([parameter.name for parameter in schema.parameters])
    @options.device_option
    @explain
    @options.run_options
    @options.talk_options
    def run(model: str, output: Path, **given: Any) -> None:
        step = Step(pass_name, options.given(schema, given))
        minutes = given.pop("recover", None)
        towers = step.params.get("towers") or default_towers
        steps = [step, *([_recovery(towers, minutes)] if minutes else [])]
        if (turns := given.pop("rounds", 1)) > 1:
            steps = _by_turns(steps, turns)
        recipe = recipe_of(steps, given)
        from mmcompress.cli.compress import run_recipe

        drawn = {key: given[key] for key in ("explain", "prompt") if explains}
        run_recipe(model, recipe, output, **drawn, **{key: given[key] for key in RUN_KEYS})

    return run


RUN_KEYS = ("dry_run", "resume", "allow_pickle", "as_json", "quiet", "verbose")


def _recovery(towers: Sequence[str], minutes: float) -> Step:
    """Return the training that follows a step which changes `towers`; all, where it names none."""
    return Step("distill", {"max_minutes": minutes, **({"towers": towers} if towers else {})})


def _by_turns(steps: Sequence[Step], rounds: int) -> list[Step]:
    """Return a cut and the training after it, so many times, with their parts of the ratio and of the time."""
    if len(steps) < 2:
        raise UsageError("--rounds trains between cuts, and --recover does not say how long", hint="add --recover 10m")
    from mmcompress.passes.prune import Prune
    from mmcompress.passes.prune_rounds import of_each_round

    cut, training = steps
    whole = passes.build(cut.name, cut.params)
    assert isinstance(whole, Prune), f"{cut.name} cannot be done by turns"
    minutes = training.params["max_minutes"] / rounds
    turn = [Step(cut.name, {**cut.params, **of_each_round(whole, rounds)})]
    return [*turn, Step(training.name, {**training.params, "max_minutes": minutes})] * rounds


def recipe_of(steps: Sequence[Step], given: dict[str, Any]) -> Recipe:
    """Return the recipe of these steps that the command's options describe."""
    data = {
        "calibration": given["data"] or "",
        "evaluation": given["eval_data"] or "",
        **({"num_samples": given["num_samples"]} if given.get("num_samples") else {}),
        **({"batch_size": given["batch_size"]} if given.get("batch_size") else {}),
    }
    document = {
        "steps": [{step.name: step.params} for step in steps],
        "device": given["device"],
        "data": data,
        **({"seed": given["seed"]} if given.get("seed") is not None else {}),
        **({"control": given["control"]} if given["control"] is not None else {}),
    }
    return parse(document, given["overrides"])
