"""`mmc`: a group whose commands are imported when they run, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import importlib
import json
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from mmcompress import __version__
from mmcompress.errors import MissingError, MmcError, OutOfMemory, UsageError, closest

# name -> one line for `mmc --help`; the command itself is `command` in mmcompress/cli/<name>.py
COMMANDS: dict[str, str] = {
    "inspect": "Show towers, parameters, MACs, tokens, bytes, and which passes apply.",
    "prune": "Remove heads, MLP neurons or blocks; one budget across the towers.",
    "search": "Remove heads, MLP neurons and blocks while training towards the original (UPop, UVC).",
    "trim": "Remove the words of a text tower that the data's texts do not use.",
    "factorize": "Replace Linears by products of two thinner ones (low rank); one budget across the towers.",
    "narrow": "Give a tower's residual stream fewer channels; smaller weights everywhere.",
    "rotate": "Turn layers' weights so that no channel stands out when they are rounded; computes the same.",
    "sparsify": "Set weights to zero, each for itself or 2:4; neither smaller nor faster by itself.",
    "merge": "Merge tokens inside a tower; stored in the checkpoint.",
    "coarsen": "Let an encoder compute with runs of a long text's tokens as one; stored in the checkpoint.",
    "reduce": "Give a language model fewer tokens of each picture; stored in the checkpoint.",
    "drop": "Let image tokens leave a language model on their way through it; stored in the checkpoint.",
    "frames": "Give a language model fewer layers of a video; stored in the checkpoint.",
    "quantize": "Store weights in 8 or 4 bits, and compute in 8, per tower.",
    "distill": "Recover accuracy by training towards the original.",
    "compress": "Run a recipe: passes in order, gates at the end, resumable.",
    "export": "Write ONNX or TensorRT files per tower, checked for parity.",
    "bench": "Measure latency, throughput, memory and size, side by side.",
    "generate": "Answer in text what is heard, seen or asked.",
    "eval": "Measure accuracy with intervals, paired against the original.",
    "check": "The CI gate: compare a run with a baseline; exit 3 when it is worse.",
    "report": "Write one self-contained HTML page about one or more runs.",
    "demo": "The whole job on a small CLIP that comes with mmc, offline.",
    "doctor": "Show what this machine can run, what is missing and how to get it.",
    "passes": "List the passes and their parameters.",
}

RESUMABLE = {
    "compress",
    "prune",
    "search",
    "trim",
    "factorize",
    "narrow",
    "rotate",
    "sparsify",
    "merge",
    "coarsen",
    "reduce",
    "drop",
    "frames",
    "quantize",
    "distill",
}


class Commands(click.Group):
    """Imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mmcompress.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise UsageError(f"there is no command '{args[0]}'", hint=closest(args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nEvery command has --help and --json. Start with: mmc demo\n"
    'Completion: eval "$(_MMC_COMPLETE=bash_source mmc)"  (or zsh_source, fish_source)',
)
@click.version_option(__version__, prog_name="mmc")
def cli() -> None:
    """Make multimodal transformers smaller and faster, and prove what it cost."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `mmc` and exit: 0 ok, 1 our bug, 2 usage, 3 gate, 4 missing, 5 memory, 130 interrupted."""
    arguments = [normalise(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        cli.main(args=arguments, prog_name="mmc", standalone_mode=False)
        sys.exit(0)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.Abort:
        fail("interrupted", resume_hint(arguments), 130, arguments)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        inside = f"{context.info_name} " if context and context.info_name != "mmc" else ""
        fail(error.format_message(), f"see mmc {inside}--help", 2, arguments)
    except KeyboardInterrupt:
        fail("interrupted", resume_hint(arguments), 130, arguments)
    except BrokenPipeError:
        sys.exit(0)
    except MmcError as error:
        fail(error.message, error.hint, error.exit_code, arguments, error.document)
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        known = translate(error)
        if known is None:
            raise
        fail(known.message, known.hint, known.exit_code, arguments)


def normalise(word: str) -> str:
    """Accept `--num_samples` for `--num-samples`; values after '=' stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def resume_hint(arguments: Sequence[str]) -> str:
    """Return how to go on after an interruption, for the commands that can."""
    if not set(arguments[:1]) & RESUMABLE:
        return "nothing was left behind"
    return "repeat the command with --resume to go on"


def translate(error: BaseException) -> MmcError | None:
    """Return what running out of memory or disk is called for a person; None when it is neither (then it is our bug)."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return OutOfMemory("out of memory", hint="use a smaller --batch-size or --num-samples, or a machine with more")
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in text:
        return OutOfMemory("the disk is full; nothing was left behind under -o", hint="free some space and repeat")
    if isinstance(error, PermissionError):
        return UsageError(f"no permission: {error.filename}", hint="choose another place")
    if isinstance(error, ImportError) and not (error.name or "").startswith("mmcompress"):
        return MissingError(text, hint="mmc doctor lists what is missing")
    return None


def fail(message: str, hint: str, code: int, arguments: Sequence[str], measured: dict[str, Any] | None = None) -> None:
    """Say what went wrong on the last lines of stderr (and as a document with --json), then exit."""
    if "--json" in arguments:
        print(json.dumps({"error": message, "hint": hint, "exit_code": code, **(measured or {})}))
    if sum(word.count("v") for word in arguments if re.fullmatch("-v+", word)) + arguments.count("--verbose") > 1:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
