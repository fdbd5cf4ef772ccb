"""`mmc check`: the gate for continuous integration."""

from __future__ import annotations

from pathlib import Path

import click

from mmcompress.cli import options


class Share(click.ParamType):
    """A share, as 0.05 or 5%."""

    name = "share"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            self.fail(f"'{value}' is neither a share such as 0.05 nor a percentage such as 5%", param, ctx)


@click.command(
    "check",
    epilog="\b\nExamples:\n  mmc check OUT --baseline main/OUT --max-drop 0.5\n"
    "  mmc check bench.json --baseline main/bench.json --max-slowdown 10% --junit check.xml\n"
    "  mmc check now.npz --baseline before.npz --markdown summary.md",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--baseline", required=True, type=click.Path(path_type=Path), help="What RUN must not be worse than; the same kind."
)
@click.option(
    "--max-drop",
    type=float,
    default=0.0,
    show_default=True,
    metavar="POINTS",
    help="Accuracy (hundredths) that may be lost; a loss within its paired interval never fails.",
)
@click.option(
    "--max-slowdown",
    type=Share(),
    default="5%",
    show_default=True,
    metavar="SHARE",
    help="Slowdown that is accepted; one within its interval never fails.",
)
@click.option(
    "--max-growth", type=Share(), default="1%", show_default=True, metavar="SHARE", help="Growth of the files."
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML here, replacing an older one.")
@click.option(
    "--markdown",
    type=click.Path(path_type=Path),
    help="Write a table here, replacing an older one; also appended to $GITHUB_STEP_SUMMARY where that is set.",
)
@options.talk_options
def command(
    run: Path,
    baseline: Path,
    max_drop: float,
    max_slowdown: float,
    max_growth: float,
    junit: Path | None,
    markdown: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Compare RUN with a baseline; exit 3 when it lost accuracy, became slower or grew by more than is accepted.

    Both are outputs of mmc compress, .npz files of mmc eval --save, or JSON files of mmc bench --save. What the baseline
    has and RUN lacks is an error (exit 2), not a pass.
    """
    from mmcompress.cli import render
    from mmcompress.errors import GateFailed
    from mmcompress.jobs.check import Limits, check
    from mmcompress.jobs.check_reports import write_junit, write_markdown

    found = check(run, baseline, Limits(max_drop, max_slowdown, max_growth))
    if junit is not None:
        write_junit(found, junit)
    if markdown is not None:
        write_markdown(found, markdown)
    if not as_json:
        render.table(
            f"{found.run} against {found.baseline}",
            ["", "what", "measured"],
            [["pass" if case.passed else "FAIL", case.kind, case.text] for case in found.cases],
            left=3,
        )
    if found.failed:
        more = f" (and {len(found.failed) - 1} more)" if len(found.failed) > 1 else ""
        raise GateFailed(
            f"{found.failed[0].kind}: {found.failed[0].text}{more}",
            hint="--max-drop, --max-slowdown and --max-growth say what is accepted",
            document=found.to_json(),
        )
    if as_json:
        render.document(found.to_json())
