"""The tables and the curves of README's "Measured" part about fewer tokens, from bench/results/token_table.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cells import RESULTS, interval, machine, points, read
from bench.token_table import CONTESTS, KIND, RANDOM
from mmcompress.jobs.report_curves import Curve, curves
from mmcompress.ops.statistics import Estimate

METRICS = {"retrieval": "image_to_text_r1", "vqa": "accuracy", "transcription": "word_accuracy"}
TITLES = {
    "encoder": "Patches merged in the DINOv2-S + MiniLM dual encoder (65 tokens), R@1 image → text",
    "connector": "Fewer of a picture's 256 tokens for the mini-VLM's language model, right answers",
    "layers": "Image tokens that leave the mini-VLM's language model on its way (256 tokens), right answers",
    "early": "Image tokens that leave the mini-VLM's language model after the first of its blocks (256 tokens), right answers",
    "skipping": "Image tokens that skip the feed-forwards of the mini-VLM's language model after its first block, right answers",
    "audio": "States merged in Whisper tiny.en, word accuracy of recordings full of speech",
}
SLICED = 0.25
"""The share at which slices are shown."""
MARKS = {"WORSE": "¹", "no better": "²"}
"""Behind what is worse than random, or not told apart from it, by how that finding begins."""


def token_table() -> str:
    """Return every contest: a table of methods by shares, the curves, what was timed."""
    found = read("token_table")
    parts = [_contest(name, found[name]) for name in CONTESTS if name in found]
    if not parts:
        return ""
    note = (
        "¹ worse than random selection at the same share, ² not better (95%, paired, mean of three draws). Multiply-adds are "
        "those of random selection; pool behind the connector keeps the largest grid within the share, and evit merges in blocks "
        "3, 6 and 9."
    )
    return "\n\n".join(["**Fewer tokens, without training**, by method and by the share that is kept", *parts, note])


def _contest(name: str, document: dict[str, Any]) -> str:
    rows, metric = document["rows"], _metric(name)
    original = rows["original"]
    keeps = sorted({_keep(row) for row in rows if row != "original"}, reverse=True)
    lines = [
        f"{TITLES[name]}: {interval(_score(original, name))} with all tokens; n = {document['n']} (`{document['command']}`)",
        "",
        "| points against all tokens [95%] | " + " | ".join(f"keep {keep:g}" for keep in keeps) + " |",
        "|---" * (1 + len(keeps)) + "|",
        "| multiply-adds left (random) | "
        + " | ".join(f"{_row(rows, RANDOM, keep)['macs'] / original['macs']:.2f}" for keep in keeps)
        + " |",
    ]
    for method in dict.fromkeys(row.split(" ")[0] for row in rows if row != "original"):
        cells = []
        for keep in keeps:
            row = _row(rows, method, keep)
            if not row:
                cells.append("")
                continue
            said = next((one["text"] for one in row.get("against random", []) if metric in one["text"]), "")
            mark = next((mark for begins, mark in MARKS.items() if said.startswith(begins)), "")
            cells.append(points(_score(row, name)["difference"]) + mark)
        lines.append(f"| {method}{' (first of three draws)' if method == RANDOM else ''} | {' | '.join(cells)} |")
    lines += _slices(rows, keeps)
    lines += ["", f"![{TITLES[name]}](bench/results/token_curves_{name}.svg)"]
    for keep, timing in document["timings"].items():
        lines += ["", *_timed(keep, timing)]
    return "\n".join(lines)


def _slices(rows: dict[str, Any], keeps: list[float]) -> list[str]:
    """Return right answers by kind of question at one share, where questions have kinds: averages hide what is lost."""
    kinds = [name for name in rows["original"]["accuracy"]["slices"] if name.startswith(KIND)]
    if SLICED not in keeps or not kinds:
        return []
    sides = {"all tokens": rows["original"]}
    for method in dict.fromkeys(row.split(" ")[0] for row in rows if row != "original"):
        if found := _row(rows, method, SLICED):
            sides[method] = found
    sizes = {name: rows["original"]["accuracy"]["slices"][name][1] for name in kinds}
    heads = (f"{name.removeprefix(KIND)} (n = {sizes[name]})" for name in kinds)
    lines = [
        "",
        f"| right answers by kind of question, keep {SLICED:g} | {' | '.join(heads)} |",
        "|---" * (1 + len(kinds)) + "|",
    ]
    for side, row in sides.items():
        cells = (
            f"{row['accuracy']['slices'][name][0]:.2f}" if name in row["accuracy"]["slices"] else "" for name in kinds
        )
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return lines


def _timed(keep: str, timing: dict[str, Any]) -> list[str]:
    heads = [(row["stage"], row["batch"], row["runner"]) for row in timing["sides"]["original"]]
    lines = [
        f"keep {keep}, exported: times as fast as with all tokens in the same engine [95%]; {machine(timing)}",
        "",
        "| | " + " | ".join(f"{stage}, batch {batch}, {runner}" for stage, batch, runner in heads) + " |",
        "|---" * (1 + len(heads)) + "|",
        "| all tokens, ms | "
        + " | ".join(f"{row['p50_ms']['value']:.2f}" for row in timing["sides"]["original"])
        + " |",
    ]
    for side, measured in timing["sides"].items():
        if side != "original":
            lines.append(
                f"| {side} | " + " | ".join(f"×{interval(row['times_as_fast'], 2)}" for row in measured) + " |"
            )
    return lines


def token_edge() -> str:
    """Return what a short training wins back, and how much faster the exported files are."""
    found = read("token_edge")
    return "\n\n".join(
        part(found[name])
        for name, part in (("vision", _trained_vision), ("answers", _trained_answers))
        if name in found
    )


def _trained_vision(found: dict[str, Any]) -> str:
    heads = [(row["runner"], row["batch"]) for row in found["sides"]["original"]]
    lines = [
        "**Half of the token work in the DINOv2-S + MiniLM dual encoder** (recipe `dual-encoder-tokens`; pruned too: "
        "`dual-encoder-small`), vision tower, quantized for OpenVINO; ms and "
        f"how many times faster than fp32 onnxruntime [95%]; {machine(found)} (`{found['command']}`)",
        "",
        "| | R@1 image → text [95%] | points | "
        + " | ".join(f"{runner}, batch {batch}" for runner, batch in heads)
        + " |",
        "|---" * (3 + len(heads)) + "|",
    ]
    for side, rows in found["sides"].items():
        score = found["accuracy"].get(side, {}).get("image_to_text_r1")
        cells = [interval(score), points(score["difference"]) if "difference" in score else ""] if score else ["", ""]
        by_head = {(row["runner"], row["batch"]): row for row in rows}
        cells += [
            f"{row['p50_ms']['value']:.2f}, ×{interval(row['against fp32 onnxruntime'], 2)}" if row else ""
            for row in (by_head.get(head) for head in heads)
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    last = list(found["sides"])[-2]
    ours = [row for row in found["sides"][last] if row["runner"] == "openvino"]
    said = "; ".join(f"batch {row['batch']} ×{interval(row['against nncf'], 2)}" for row in ours)
    n = found["accuracy"]["original"]["image_to_text_r1"]["n"]
    return "\n".join(
        [
            *lines,
            "",
            f"n = {n} drawings of a vendor never trained on. {last.capitalize()} against NNCF's int8 of the original, "
            f"OpenVINO: {said}.",
        ]
    )


def _trained_answers(found: dict[str, Any]) -> str:
    heads = [
        (row["stage"], row["runner"])
        for row in found["sides"]["original"]
        if row["stage"] in ("vision", "prompt", "token")
    ]
    lines = [
        "**A quarter and a tenth of a picture's tokens for the mini-VLM**, untrained (recipe `vlm-tokens`), exported; ms and how "
        "many times faster "
        f"than with all tokens in the same engine [95%]; {machine(found)} (`{found['command']}`)",
        "",
        "| | right answers [95%] | points | " + " | ".join(f"{stage}, {runner}" for stage, runner in heads) + " |",
        "|---" * (3 + len(heads)) + "|",
    ]
    for side, rows in found["sides"].items():
        score = found["accuracy"][side]["results"]["vqa"]["accuracy"]
        by_head = {(row["stage"], row["runner"]): row for row in rows}
        cells = [interval(score), points(score["difference"]) if "difference" in score else ""]
        cells += [
            f"{by_head[head]['p50_ms']['value']:.2f}, ×{interval(by_head[head]['times_as_fast'], 2)}" for head in heads
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    sides = list(found["accuracy"])
    slices = {
        side: {row["slice"]: row for row in found["accuracy"][side]["slices"] if row["metric"] == "accuracy"}
        for side in sides
    }
    lines += ["", "| right answers by slice | n | " + " | ".join(sides) + " |", "|---" * (2 + len(sides)) + "|"]
    for name, row in slices[sides[0]].items():
        lines.append(
            f"| {name} | {row['n']} | " + " | ".join(f"{slices[side][name]['value']:.3f}" for side in sides) + " |"
        )
    return "\n".join(lines)


def drawings() -> dict[Path, str]:
    """Return the curves of every contest as standing SVG files."""
    made = {}
    for name, document in read("token_table").items():
        whole = Estimate.from_json(_score(document["rows"]["original"], name))
        methods: dict[str, dict[float, Estimate]] = {}
        for row in document["rows"]:
            if row != "original" and not row.endswith(("seed 1", "seed 2")):
                methods.setdefault(row.split(" ")[0], {1.0: whole})[_keep(row)] = Estimate.from_json(
                    _score(document["rows"][row], name)
                )
        found = [Curve(method, scores) for method, scores in methods.items()]
        figure = curves(TITLES[name], _metric(name), sorted(found, key=lambda curve: curve.method == RANDOM))
        made[RESULTS / f"token_curves_{name}.svg"] = standing(figure)
    return made


def standing(figure: str) -> str:
    """Return the drawing of a figure of the report as an SVG file that needs no page around it."""
    drawing = figure[figure.index("<svg") : figure.index("</svg>") + len("</svg>")]
    style = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" fill="#333"'
    white = '<rect width="100%" height="100%" fill="white"/>'
    opened = drawing.index(">") + 1
    drawn = drawing[:opened].replace("<svg", style) + white + drawing[opened:].replace('class="axis"', 'stroke="#ccc"')
    return drawn + "\n"


def _metric(name: str) -> str:
    return METRICS[CONTESTS[name].task]


def _score(row: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = row["accuracy"]["results"][CONTESTS[name].task][_metric(name)]
    return found


def _keep(row: str) -> float:
    return float(row.split(" ")[1].rstrip(","))


def _row(rows: dict[str, Any], method: str, keep: float) -> dict[str, Any]:
    found: dict[str, Any] = rows.get(f"{method} {keep:g}") or rows.get(f"{method} {keep:g}, seed 0") or {}
    return found
