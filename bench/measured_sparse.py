"""What README.md says of sparse weights, made from bench/results/sparse.json."""

from __future__ import annotations

from typing import Any

from bench.cells import MIB, interval, machine, points, read

WORDS = {"image_to_text_r1": "R@1 image → text", "text_to_image_r1": "R@1 text → image", "accuracy": "right answers"}


def sparse_weights() -> str:
    """Zeros: what they cost, and that nothing is faster or smaller for them."""
    found = read("sparse")
    if not found:
        return ""
    parts = [f"**Sparse weights** (`mmc sparsify`, no training; {machine(found)}; `{found['command']}`)"]
    parts += [_accuracy(given) for given in found.get("accuracy", {}).values()]
    if "speed" in found:
        parts.append(_speed(found["speed"]))
    if "size" in found:
        parts.append(_size(found["size"]))
    return "\n\n".join(parts)


def _accuracy(given: dict[str, Any]) -> str:
    metrics = list(given["original"])
    headings = [f"{WORDS[metric]} | points against the original [95%]" for metric in metrics]
    original = [f"{interval(given['original'][metric])} | " for metric in metrics]
    lines = [
        f"{given['model']}, {' and '.join(given['towers'])}, {given['pattern']} zero, n = {given['n']}:",
        "",
        f"| method | {' | '.join(headings)} |",
        "|---" * (1 + 2 * len(metrics)) + "|",
        f"| original | {' | '.join(original)} |",
    ]
    for method, row in given["rows"].items():
        cells = [f"{interval(row[metric])} | {points(row['difference'][metric])}" for metric in metrics]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines.append("")
    for method, row in given["rows"].items():
        lines += [f"- {method}: {text}" for text in row.get("against random", ())]
    against = given["rows"]["sparsegpt"]["against wanda"]
    shown = "; ".join(f"{WORDS[metric]} {points(value)}" for metric, value in against.items())
    return "\n".join([*lines, f"- sparsegpt against wanda, points: {shown}"])


def _speed(found: dict[str, Any]) -> str:
    lines = [
        "Times as fast as dense, vision tower, half of each row zero, batch 1:",
        "",
        "| engine | × [95%] |",
        "|---|---|",
    ]
    lines += [f"| {each['runner']}, float32 | {interval(each['ratio'], 2)} |" for each in found["float32"]]
    for name, each in found["int8"].items():
        if not name.startswith("dense"):
            option = f"`CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE` {name.rpartition(' ')[2]}"
            lines.append(f"| openvino, W8A8, {option} | {interval(each['times_as_fast_as_dense'], 2)} |")
    return "\n".join(lines)


def _size(found: dict[str, Any]) -> str:
    lines = ["| safetensors | MiB | gzipped |", "|---|---|---|"]
    for name, each in found.items():
        lines.append(f"| {name} | {each['bytes'] / MIB:.1f} | {each['gzip'] / MIB:.1f} |")
    return "\n".join(lines)
