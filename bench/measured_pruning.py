"""The tables and the curves of README's "Measured" part about pruning, from bench/results/prune_table.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cells import RESULTS, interval, points, read
from bench.measured_tokens import METRICS, standing
from bench.prune_table import CONTESTS, DEFAULT, RANDOM, SEEDS
from mmcompress.jobs.report_curves import Curve, curves
from mmcompress.ops.statistics import Estimate

TITLES = {
    "encoder": "Heads and neurons of the DINOv2-S + MiniLM dual encoder, R@1 image → text",
    "heads": "Heads alone of the DINOv2-S + MiniLM dual encoder, R@1 image → text",
    "speech": "Heads and neurons of Whisper tiny.en, word accuracy",
    "answers": "Heads and neurons of the mini-VLM, right answers",
    "words": "Heads and neurons of the mini-VLM's language model, right answers",
}
LEFT = "share of the parameters that is left"
MARKS = {"WORSE": "¹", "no better": "²"}
"""Behind what is worse than random, or not told apart from it, by how that finding begins."""
BETTER, WORSE = "↑", "↓"
"""Behind what is better or worse than the default."""


def prune_table() -> str:
    """Return every contest: a table of methods by ratios, and the curves."""
    found = read("prune_table")
    parts = [_contest(name, found[name]) for name in CONTESTS if _ratios(found.get(name, {}).get("rows", {}))]
    if not parts:
        return ""
    note = (
        f"Ratios are shares of all parameters of the towers, embeddings counted in. ¹ worse than random units at the same ratio, "
        f"² not better (95%, paired, mean of {SEEDS} draws); {BETTER} better and {WORSE} worse than `{DEFAULT}` "
        "shared out by the knapsack (95%, paired). What stays was refitted by least squares in every row, random ones too. "
        "`-even`: the same share of every group; `-evolutionary`: searched; `-contrastive` and `-signed` differentiate the "
        "contrastive loss."
    )
    return "\n\n".join(["**Pruned without training**, by score and allocation", *parts, note])


def _contest(name: str, document: dict[str, Any]) -> str:
    rows, metric = document["rows"], METRICS[CONTESTS[name].task]
    ratios = _ratios(rows)
    lines = [
        f"{TITLES[name]}: {interval(rows['original']['scores'][metric])} as it was; n = {document['n']}, scores and repairs from "
        f"{document['calibrated_on']} samples (`{document['command']}`)",
        "",
        "| points against the original [95%] | " + " | ".join(f"ratio {ratio:g}" for ratio in ratios) + " |",
        "|---" * (1 + len(ratios)) + "|",
    ]
    for method in _methods(rows):
        cells = []
        for ratio in ratios:
            if method == RANDOM:
                cells.append(points(_random(rows, metric, ratio, "difference")))
                continue
            made = rows.get(f"{method} {ratio:g}")
            if not made:
                cells.append("")
                continue
            said = made.get("against random", "")
            mark = next((mark for begins, mark in MARKS.items() if said.startswith(begins)), "")
            cells.append(points(made["scores"][metric]["difference"]) + mark + _beside_default(made))
        drawn = f" (mean of {SEEDS} draws [lowest, highest])" if method == RANDOM else ""
        lines.append(f"| {method}{drawn} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"![{TITLES[name]}](bench/results/prune_curves_{name}.svg)"] if _drawn(ratios) else lines
    )


def _drawn(ratios: list[float]) -> bool:
    """Whether there are curves to look at: of one ratio a table says all."""
    return len(ratios) > 1


def _beside_default(made: dict[str, Any]) -> str:
    difference = made.get("against default")
    if not difference or difference["low"] <= 0 <= difference["high"]:
        return ""
    return BETTER if difference["value"] > 0 else WORSE


def drawings() -> dict[Path, str]:
    """Return the curves of every contest as standing SVG files."""
    made = {}
    for name, document in read("prune_table").items():
        rows, metric = document["rows"], METRICS[CONTESTS[name].task]
        if not _drawn(_ratios(rows)):
            continue
        found = []
        for method in _methods(rows):
            scores = {1.0: _estimate(rows["original"], metric)}
            for ratio in _ratios(rows):
                if method == RANDOM:
                    scores[1 - ratio] = Estimate.from_json(_random(rows, metric, ratio))
                elif row := rows.get(f"{method} {ratio:g}"):
                    scores[1 - ratio] = _estimate(row, metric)
            found.append(Curve(method, scores))
        figure = curves(TITLES[name], metric, sorted(found, key=lambda curve: curve.method == RANDOM), LEFT)
        made[RESULTS / f"prune_curves_{name}.svg"] = standing(figure)
    return made


def _estimate(row: dict[str, Any], metric: str) -> Estimate:
    return Estimate.from_json(row["scores"][metric])


def _methods(rows: dict[str, Any]) -> list[str]:
    """The methods that were measured, in the order of the contest's."""
    return list(dict.fromkeys(row.split(" ")[0] for row in rows if row != "original"))


def _ratios(rows: dict[str, Any]) -> list[float]:
    """The ratios at which the default and every random draw were measured: what all else is set beside."""
    found = {float(row.split(" ")[1].rstrip(",")) for row in rows if row != "original"}
    needed = (f"{DEFAULT} {{0:g}}", *(f"{RANDOM} {{0:g}}, seed {seed}" for seed in range(SEEDS)))
    return sorted(ratio for ratio in found if all(name.format(ratio) in rows for name in needed))


def _random(rows: dict[str, Any], metric: str, ratio: float, key: str = "") -> dict[str, Any]:
    """The mean of the draws, the lowest and the highest: units are few, and draws differ by more than samples do."""
    drawn = [rows[f"{RANDOM} {ratio:g}, seed {seed}"]["scores"][metric] for seed in range(SEEDS)]
    values = [(each[key] if key else each)["value"] for each in drawn]
    return {"value": sum(values) / SEEDS, "low": min(values), "high": max(values), "n": drawn[0]["n"]}
