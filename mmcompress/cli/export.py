"""`mmc export`: files for other runtimes, one per tower, each checked against torch; and checkpoints in other tools' layouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmcompress.cli import export_layout, options
from mmcompress.errors import UsageError

if TYPE_CHECKING:
    from mmcompress.export.artifact import Artifact
    from mmcompress.export.onnx import Experts
    from mmcompress.export.tensorrt import EngineReport, Profile

PRECISIONS = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16",
              "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # fmt: skip


@click.command(
    "export",
    epilog="\b\nExamples:\n  mmc export MODEL -o MODEL-onnx\n  mmc export OUT -o OUT-trt --to tensorrt --batch 1:8:32\n"
    "  mmc export OUT-onnx -o OUT-rtx --to tensorrt --api tensorrt_rtx --capability SM89\n"
    "  mmc export QUANTIZED -o OUT-packed --to compressed-tensors",
)
@options.model_argument
@options.output_option()
@click.option(
    "--to",
    type=click.Choice(("onnx", "tensorrt", *export_layout.NAMES)),
    default="onnx",
    show_default=True,
    help="What to write: graphs, or a quantized checkpoint in a layout of other tools.",
)
@options.tower_option
@click.option(
    "--precision",
    type=click.Choice(tuple(PRECISIONS)),
    help="Of weights and arithmetic; integers stay integers.  [default: float32 for onnx, float16 for tensorrt, else as stored]",
)
@click.option("--opset", type=click.IntRange(1), help="ONNX opset.  [default: the oldest that can say it]")
@click.option(
    "--experts",
    type=click.Choice(("auto", "chosen", "every")),
    default="auto",
    show_default=True,
    help="onnx, of a mixture: a token goes through the experts chosen for it alone, by operators that onnxruntime alone has, or "
    "through every one, which takes as many times longer and runs anywhere. auto: chosen in float32, but where a model was "
    "quantized for another target than cpu.",
)
@click.option(
    "--check-batches",
    default="1,2,7",
    show_default=True,
    metavar="A,B,…",
    help="Batch sizes at which the result is compared with torch.",
)
@click.option(
    "--batch",
    default="1:8:32",
    show_default=True,
    metavar="MIN:OPT:MAX",
    help="tensorrt: batch sizes the engine takes, and the one it is tuned for.",
)
@click.option("--tokens", metavar="MIN:OPT:MAX", help="tensorrt: lengths of texts.  [default: 1:16:the model's limit]")
@click.option(
    "--api",
    type=click.Choice(("auto", "tensorrt", "tensorrt_rtx")),
    default="auto",
    show_default=True,
    help="tensorrt: which library builds; the RTX one needs no GPU.",
)
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    metavar="SMxx",
    help="tensorrt_rtx: a GPU generation it must run on, such as SM89; repeatable.",
)
@click.option(
    "--workspace",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    metavar="MIB",
    help="tensorrt: memory the build may use on the device.",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    help="tensorrt: read and written back; makes the next build fast.",
)
@options.talk_options
def command(
    model: str,
    output: Path,
    to: str,
    towers: tuple[str, ...],
    precision: str | None,
    opset: int | None,
    experts: Experts,
    check_batches: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **building: Any,
) -> None:
    """Write ONNX or TensorRT files, one per tower, checked against torch at every corner of their shapes.

    MODEL is a checkpoint, or for tensorrt also a directory that mmc export wrote. Exit 3 when a file does not compute
    or hold what the model does.

    With compressed-tensors, gptq or awq, write the quantized checkpoint MODEL in that layout, the same integers in it; what is
    written beside it says who loads it. gptq and awq hold the 4-bit Linears of W4A16, compressed-tensors those of W8A16
    and W8A8 too.
    """
    batches = numbers(check_batches, "--check-batches", ",")
    stored = PRECISIONS[precision] if precision else None
    from mmcompress.cli import render
    from mmcompress.staging import refuse_existing

    refuse_existing(output)
    terminal = render.Terminal(quiet, verbose)
    if to in export_layout.NAMES:
        others = {"--tower": bool(towers), "--opset": opset is not None, "--experts": experts != "auto"}
        if any(others.values()):
            option = next(name for name, given in others.items() if given)
            raise UsageError(
                f"{option} does not concern --to {to}, which writes a whole checkpoint",
                hint="leave it out",
            )
        export_layout.run(model, output, to, stored, terminal, as_json)
        return
    if to == "onnx":
        from mmcompress import checkpoint
        from mmcompress.export.onnx import export_onnx

        made = export_onnx(
            checkpoint.load(model),
            output,
            towers=towers or None,
            precision=stored or "float32",
            opset=opset,
            batches=batches,
            experts=experts,
            progress=terminal,
        )
        artifact, engines = made.artifact, None
    else:
        from mmcompress.jobs.export import export_engines

        for option, given in (("--opset", opset is not None), ("--experts", experts != "auto")):
            if given:
                raise UsageError(f"{option} concerns --to onnx", hint="leave it out, or export to onnx first")
        engines = export_engines(
            model, output, towers=towers, precision=stored, batches=batches, progress=terminal,
            **{**building, "batch": profile(building["batch"], "--batch"),
               "tokens": profile(building["tokens"], "--tokens") if building["tokens"] else None},
        )  # fmt: skip
        artifact = engines.artifact
    if as_json:
        render.document(document(artifact, engines))
        return
    show(artifact, engines)
    # What was exported is the best guess at what a user compares with.
    following = (
        f"mmc bench {artifact.directory} --device cuda" if engines else f"mmc bench {model} {artifact.directory}"
    )
    terminal.next_step(following)


def numbers(text: str, option: str, separator: str) -> tuple[int, ...]:
    """Read whole numbers of at least 1. Raises UsageError naming the option."""
    try:
        found = tuple(int(part) for part in text.split(separator))
    except ValueError:
        raise UsageError(
            f"{option} is '{text}'; expected numbers with '{separator}' between", hint="see --help"
        ) from None
    if min(found) < 1:
        raise UsageError(f"{option} is '{text}'; expected numbers of at least 1", hint="see --help")
    return found


def profile(text: str, option: str) -> Profile:
    """Read MIN:OPT:MAX, or one number for all three. Raises UsageError."""
    from mmcompress.export.tensorrt import Profile

    found = numbers(text, option, ":")
    if len(found) not in (1, 3):
        raise UsageError(f"{option} is '{text}'; expected MIN:OPT:MAX", hint="such as 1:8:32, or one number")
    return Profile(*found) if len(found) == 3 else Profile(found[0], found[0], found[0])


def document(artifact: Artifact, engines: EngineReport | None) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    from dataclasses import asdict

    return {
        "output": str(artifact.directory),
        "precision": artifact.precision,
        "opset": artifact.opset,
        "components": [asdict(component) for component in artifact.components],
        "engines": [asdict(engine) for engine in engines.engines] if engines else [],
        "builder": {"api": engines.api, "version": engines.version} if engines else {},
    }


def show(artifact: Artifact, engines: EngineReport | None) -> None:
    """Print what was written, and how close it is to torch at every shape."""
    from mmcompress.cli import render

    render.table(
        f"ONNX, {artifact.precision}, opset {artifact.opset}",
        ["tower", "file", "MiB", "integer MiB", "integer matrices", "nodes", "most frequent"],
        [
            [
                c.name,
                c.file,
                render.mebibytes(c.bytes),
                render.mebibytes(sum(c.weights.get(kind, 0) for kind in ("INT8", "UINT8"))),
                c.quantized,
                sum(c.nodes.values()),
                ", ".join(f"{name} {count}" for name, count in sorted(c.nodes.items(), key=lambda i: -i[1])[:4]),
            ]
            for c in artifact.components
        ],
        left=2,
    )
    render.table(
        "Compared with torch",
        ["tower", "batch", "tokens", "compared", "largest difference", "relative", "cosine"],
        [
            [
                c.name, row["batch"], row["tokens"] or "-", "as it runs" if row["rounding"] else "without rounding",
                f"{row['max_abs']:.2e}", f"{row['relative']:.2e}", f"{row['cosine']:.6f}",
            ]
            for c in artifact.components
            for row in c.parity
        ],
    )  # fmt: skip
    if engines is None:
        return
    render.table(
        f"Engines, {engines.api} {engines.version}",
        ["tower", "file", "MiB", "layers", "seconds", "shapes (least, usual, most)"],
        [
            [
                e.name, e.file, render.mebibytes(e.bytes), e.layers, f"{e.seconds:.1f}", _shapes(e.profiles),
            ]
            for e in engines.engines
        ],
        left=2,
    )  # fmt: skip


def _shapes(profiles: dict[str, dict[str, list[int]]]) -> str:
    """Each input with its least, usual and largest shape."""
    return "; ".join(
        f"{name} " + " ".join("x".join(map(str, shape)) for shape in shapes.values())
        for name, shapes in profiles.items()
    )
