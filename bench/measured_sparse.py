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
    parts += [_accuracy(name, given) for name, given in found.get("accuracy", {}).items()]
    if "speed" in found:
        parts.append(_speed(found["speed"]))
    if "size" in found:
        parts.append(_size(found["size"]))
    return "\n\n".join(parts)


def _accuracy(name: str, given: dict[str, Any]) -> str:
    metrics = list(given["original"])
    headings = [f"{WORDS[metric]} | points against the original [95%]" for metric in metrics]
    original = [f"{interval(given['original'][metric])} | " for metric in metrics]
    lines = [
        f"{name}, {' and '.join(given['towers'])}, n = {given['n']}:",
        "",
        f"| zeros | method | {' | '.join(headings)} |",
        "|---" * (2 + 2 * len(metrics)) + "|",
        f"| none | | {' | '.join(original)} |",
    ]
    for pattern, rows in given.items():
        if not isinstance(rows, dict) or "sparsegpt" not in rows:
            continue
        for method, row in rows.items():
            cells = [f"{interval(row[metric])} | {points(row['difference'][metric])}" for metric in metrics]
            lines.append(f"| {pattern} | {method} | {' | '.join(cells)} |")
    lines.append("")
    for pattern, rows in given.items():
        for method, row in rows.items() if isinstance(rows, dict) and "sparsegpt" in rows else ():
            beside = " (updated)" if method == "sparsegpt" else ""
            lines += [f"- {pattern}, {method}: {text}{beside}" for text in row.get("against random", ())]
        if isinstance(rows, dict) and "sparsegpt" in rows:
            against = rows["sparsegpt"]["against wanda"]
            shown = "; ".join(f"{WORDS[metric]} {points(value)}" for metric, value in against.items())
            lines.append(f"- {pattern}, sparsegpt against wanda, points: {shown}")
    return "\n".join(lines)


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
