"""What of README's "Measured" part is about pruning: training after it, and torch-pruning beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.cells import interval, machine, points, read

SUBJECTS = {
    "dual-encoder": "the dual encoder, half of what can be pruned of both towers",
    "demo-clip": "the demo's CLIP, half of what can be pruned of both towers",
    "whisper": "Whisper tiny.en, 30% of what can be pruned",
    "mini-vlm": "the mini-VLM's language model, 20% of what can be pruned",
}
METRICS = {
    "dual-encoder": ("image_to_text_r1", "text_to_image_r1"),
    "demo-clip": ("image_to_text_r1", "text_to_image_r1"),
    "whisper": ("word_accuracy",),
    "mini-vlm": ("accuracy",),
}


def recovered() -> str:
    """What training wins back of what pruning cost, for each way to choose."""
    found = read("recovered")
    if not found:
        return ""
    parts = [f"**Pruned and trained** ({machine(found)}; `{found['command']}`)"]
    for subject, title in SUBJECTS.items():
        if subject not in found:
            continue
        metrics, rows = METRICS[subject], found[subject]
        original = rows["original"]
        before = " and ".join(f"{metric.replace('_', ' ')} {interval(original[metric])}" for metric in metrics)
        compared = any("against_each_tower" in row for row in rows.values())
        lines = [
            f"{title[0].upper()}{title[1:]}: {before}, n = {original[metrics[0]]['n']}",
            "",
            "| chosen | parameters left | as cut, points | steps of training | trained, points |"
            + (" over each tower by itself, points |" if compared else ""),
            "|---|---|---|---|---|" + ("---|" if compared else ""),
        ]
        for way, row in rows.items():
            if way != "original":
                lines.append(
                    f"| {way} | {_left(row)} | {_as_cut(row, metrics)} | {_steps(row)} | {_lost(row['steps'][-1], metrics)} |"
                    + (f" {_over(row, metrics)} |" if compared else "")
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _left(row: dict[str, Any]) -> str:
    towers = ", ".join(f"{name} {100 * share:.0f}%" for name, share in row["left"].items())
    return f"{row['parameters'] / 1e6:.1f} M ({towers})"


def _as_cut(row: dict[str, Any], metrics: Sequence[str]) -> str:
    first = row["steps"][0]
    return _lost(first, metrics) if first["pass"] == "prune" else ""


def _steps(row: dict[str, Any]) -> str:
    counts = [step["trained_steps"] for step in row["steps"] if step["trained_steps"]]
    loss = row["steps"][-1]["loss"]
    undone = bool(loss) and loss["after"] == loss["before"]
    return " + ".join(map(str, counts)) + (", undone: the loss had risen" if undone else "")


def _lost(step: dict[str, Any], metrics: Sequence[str]) -> str:
    return " and ".join(points(step[metric]["difference"]) for metric in metrics)


def _over(row: dict[str, Any], metrics: Sequence[str]) -> str:
    found = row.get("against_each_tower")
    if not found:
        return ""
    mean = f"; mean {points(found['mean of these'])}" if "mean of these" in found else ""
    return " and ".join(points(found[metric]) for metric in metrics) + mean


def torch_pruning() -> str:
    """Ours beside torch-pruning at as many parameters."""
    found = read("torch_pruning")
    if not found:
        return ""
    lines = [
        f"**Beside torch-pruning** (the dual encoder's vision tower, heads and neurons, {machine(found)}; `{found['command']}`): "
        f"R@1 image → text {interval(found['original']['image_to_text_r1'])} before",
        "",
        "| | parameters | as cut | trained | ours is better by, points | onnxruntime, batch 8 | OpenVINO, batch 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        times = [
            found["latency"]["batch 8"][f"{name}, {engine}"]["times_as_fast"] for engine in ("onnxruntime", "openvino")
        ]
        more = row["trained"].get("ours_more")
        # The reference is ours, so the difference is theirs less ours.
        better = points({key: -more["image_to_text_r1"][other] for key, other in SWAPPED}) if more else ""
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.1f} M | {interval(row['cut']['image_to_text_r1'])} | "
            f"{interval(row['trained']['image_to_text_r1'])} | {better} | "
            + " | ".join(f"×{interval(t, 2)}" for t in times)
            + " |"
        )
    return "\n".join(lines)


SWAPPED = (("value", "value"), ("low", "high"), ("high", "low"))
