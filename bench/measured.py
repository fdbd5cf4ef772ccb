"""The "Measured" part of README.md, made from bench/results/*.json: no number is typed in."""

from __future__ import annotations

from typing import Any

from bench.cells import MIB, interval, machine, points, read
from bench.measured_answers import mini_vlm, smolvlm_edge, vlm_edge, whisper_edge
from bench.measured_pruning import prune_table
from bench.measured_recovery import recovered, torch_pruning
from bench.measured_sparse import sparse_weights
from bench.measured_tokens import token_edge, token_table

BEGIN = "<!-- measured -->"
END = "<!-- end measured -->"


def section() -> str:
    """Return the part of README.md from marker to marker."""
    parts = [
        table()
        for table in (
            edge,
            nncf,
            against_random,
            prune_table,
            recovered,
            torch_pruning,
            peers,
            low_rank,
            sparse_weights,
            memory,
            streaming,
            mini_vlm,
            vlm_edge,
            token_table,
            token_edge,
            smolvlm_edge,
            whisper_edge,
            demo_model,
        )
    ]
    return "\n\n".join([BEGIN, *(part for part in parts if part), END])


def edge() -> str:
    """The main claim on the real dual encoder."""
    found = read("edge")
    if not found:
        return ""
    latency, accuracy, size = found["latency_ms"]["batch 1"], found["accuracy"], found["bytes"]
    speed = found["speedups"]["batch 1"]
    lines = [
        f"**DINOv2-S + MiniLM, vision tower, batch 1, {machine(found)}** (`{found['command']}`)",
        "",
        "| tower | runner | p50 ms | times faster than fp32 onnxruntime [95%] | R@1 [95%] | points against the original [95%] |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in latency.items():
        side, runner = name.split(" ")
        score = accuracy[side]["image_to_text_r1"]
        ratio = speed[f"{name} against original onnxruntime"]
        difference = score.get("difference")
        lines.append(
            f"| {side} | {runner} | {row['p50_ms']['value']:.2f} | ×{interval(ratio, 2)} | {interval(score)} | "
            f"{points(difference) if difference else ''} |"
        )
    cold = found["speedups"]["batch 1, cold"]
    large = found["speedups"]["batch 8"]
    compared = {name: ratio for name, ratio in speed.items() if "against original onnxruntime" not in name}
    lines += [
        "",
        f"n = {accuracy['original']['image_to_text_r1']['n']} drawings of a vendor never trained on, retrieval among all "
        f"their captions. Weights: {size['original'] / MIB:.1f} → {size['edge'] / MIB:.1f} MiB "
        f"(÷{size['original'] / size['edge']:.1f}); the int8 step alone {size['int8'] / MIB:.1f} MiB. "
        + ". ".join(f"{name[0].upper()}{name[1:]}: ×{interval(ratio, 2)}" for name, ratio in compared.items())
        + f". Batch 8, {_best(large)}: ×{interval(large[_best(large)], 2)}. Single calls with cold caches, {_best(cold)}: "
        f"×{interval(cold[_best(cold)], 2)}. R@1 of our int8 vision tower against NNCF's, both with float texts: "
        f"{points(found['int8 vision against nncf']['image_to_text_r1'])} points image → text, "
        f"{points(found['int8 vision against nncf']['text_to_image_r1'])} text → image; the same nearest text as fp32 for "
        f"{interval(accuracy['int8 vision']['top1'])} against {interval(accuracy['nncf']['top1'])} of the drawings, cosine to "
        f"fp32 {interval(accuracy['int8 vision']['image_cosine'], 4)} against {interval(accuracy['nncf']['image_cosine'], 4)}.",
    ]
    return "\n".join(lines)


def nncf() -> str:
    """Our int8 beside NNCF's over several draws of calibration samples."""
    found = read("nncf")
    if not found:
        return ""
    original = found["accuracy"].pop("original")
    lines = [
        f"**Our int8 vision tower beside NNCF's**, OpenVINO, {machine(found)} (`{found['command']}`)",
        "",
        "| calibrated on | R@1 image → text | R@1 text → image | same nearest text as fp32 | cosine to fp32 |",
        "|---|---|---|---|---|",
        f"| fp32 | {interval(original['image_to_text_r1'])} | {interval(original['text_to_image_r1'])} | | |",
    ]
    for name, row in found["accuracy"].items():
        cells = [interval(row[key]) for key in ("image_to_text_r1", "text_to_image_r1", "top1")]
        lines.append(f"| {name} | {' | '.join(cells)} | {interval(row['image_cosine'], 4)} |")
    lines.append("")
    for batch, ratios in found["times_as_fast"].items():
        lines += [f"- {batch}, {name}: ×{interval(ratio, 2)} as fast" for name, ratio in ratios.items()]
    return "\n".join(lines)


def against_random() -> str:
    """Selections beside random ones."""
    found = read("against_random")
    if not found:
        return ""
    lines = [
        f"**Against random selection, same model** (`{found['command']}`)",
        "",
        "| | R@1 image → text [95%] |",
        "|---|---|",
    ]
    lines.append(f"| original | {interval(found['original']['image_to_text_r1'])} |")
    for contest, outcome in found["contests"].items():
        lines += [
            f"| {contest}: {name} | {interval(row['image_to_text_r1'])} |" for name, row in outcome["rows"].items()
        ]
    lines.append("")
    for contest, outcome in found["contests"].items():
        for score, findings in outcome["findings"].items():
            lines += [f"- {contest}, {score}: {f['text']}" for f in findings if "image_to_text_r1" in f["text"]]
    return "\n".join(lines)


def peers() -> str:
    """Every quantizer that installs, on one tower."""
    found = read("peers")
    if not found:
        return ""
    lines = [
        f"**Quantizers side by side** (the dual encoder's vision tower, batch 8, {machine(found)}; `{found['command']}`)",
        "",
        "| tool, scheme | R@1 image → text, points | cosine to fp32 | MiB | seconds, MiB to quantize | "
        "fastest engine, times as fast as fp32 in onnxruntime |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in found["sides"].items():
        if name == "fp32":
            continue
        score = side["accuracy"]
        lanes = {key: row for key, row in found["latency"]["batch 8"].items() if key.rpartition(", ")[0] == name}
        best = max(lanes, key=lambda key: lanes[key]["times_as_fast"]["value"])
        lines.append(
            f"| {name} | {points(score['image_to_text_r1']['difference'])} | {interval(score['image_cosine'], 4)} | "
            f"{side['bytes'] / MIB:.1f} | {side['seconds']:.0f} s, {side['memory_mib']} | "
            f"{best.rpartition(', ')[2]} ×{interval(lanes[best]['times_as_fast'], 2)} |"
        )
    return "\n".join(lines)


LOW_RANK_MODELS = {
    "dual-encoder": "DINOv2-S + MiniLM, both towers",
    "whisper": "Whisper tiny.en, encoder and decoder",
    "mini-vlm": "The mini-VLM's language model",
}


def low_rank() -> str:
    """Linears in two factors, beside random directions and beside pruning."""
    return "\n\n".join(_factorized(name, found) for name, found in read("low_rank").get("models", {}).items())


def _factorized(name: str, found: dict[str, Any]) -> str:
    metric = next(iter(found["original"]))
    shares = {ratio: f"{float(ratio):.0%} of the parameters" for ratio in found["ratios"]}
    lines = [
        f"**Linears in two factors: {LOW_RANK_MODELS[name]}** (`{found['command']}`): {found['task']} {metric}, before "
        f"{interval(found['original'][metric])}, n = {found['n']}; points lost, paired [95%]",
        "",
        f"| what stays, less | {' | '.join(shares.values())} |",
        "|---" * (len(shares) + 1) + "|",
    ]
    ways = list(dict.fromkeys(way for rows in found["ratios"].values() for way in rows))
    for way in ways:
        cells = [_lost(rows[way][metric]) if way in rows else "" for rows in found["ratios"].values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines.append("")
    for ratio, rows in found["ratios"].items():
        own = rows["svd-llm"]
        rivals = [way for way in ways if f"against {way}" in own]
        ahead = [f"{points(own[f'against {rival}'][metric])} points beside {rival}" for rival in rivals]
        lines.append(f"- {shares[ratio]} less, {own['layers']} layers in two: svd-llm {' and '.join(ahead)}")
    return "\n".join(lines)


def _lost(row: dict[str, Any]) -> str:
    return f"{row['value']:.3f}, {points(row['lost'])}"


def memory() -> str:
    """Peak memory and the start of the command line."""
    found = read("memory")
    if not found:
        return ""
    lines = [
        f"**Memory**, a {found['model_mib']:,} MiB model (`{found['command']}`): peak above an interpreter with torch and "
        "transformers imported, in models",
        "",
        "| pass | peak |",
        "|---|---|",
        *(f"| {name} | {row['above_interpreter_in_models']:.2f} |" for name, row in found["passes"].items()),
        "",
        f"`mmc --help`: median {sorted(found['help_seconds'])[len(found['help_seconds']) // 2]:.2f} s of "
        f"{len(found['help_seconds'])} starts.",
    ]
    return "\n".join(lines)


def streaming() -> str:
    """Models that are never in memory as a whole."""
    found = read("streaming")
    if not found:
        return ""
    lines = [
        f"**Weights rounded layer by layer** (`mmc quantize --scheme W8A16` without data; Qwen2.5-VL's sizes, random weights, "
        f"{machine(found)}; `{found['command']}`)",
        "",
        "| parameters | on disk | largest shard | peak above the interpreter | in shards | seconds | loading the result, seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["models"].values():
        above = row["quantize_peak_mib"] - row["interpreter_mib"]
        lines.append(
            f"| {row['parameters'] / 1e9:.2f} billion | {row['bytes'] / 2**30:.1f} → {row['bytes_quantized'] / 2**30:.1f} GiB | "
            f"{row['largest_shard_mib']:,} MiB | {above:,} MiB | {row['above_interpreter_in_shards']:.2f} | "
            f"{row['quantize_seconds']:.0f} | {row['load_quantized_seconds']:.0f} |"
        )
    calibrated = read("streaming_data")
    if calibrated:
        said = [
            f"{row['parameters'] / 1e9:.2f} billion parameters, {row['scheme']}, {row['samples']} samples: "
            f"{row['quantize_seconds']:.0f} s, peak {row['quantize_peak_mib'] / 1024:.1f} GiB, {row['bytes'] / 2**30:.1f} → "
            f"{row['bytes_quantized'] / 2**30:.1f} GiB"
            for row in calibrated["models"].values()
        ]
        lines += [
            "",
            f"Fitted to samples, while other programs took {calibrated['machine']['taken_cores']:.1f} cores: {'; '.join(said)} "
            f"(`{calibrated['command']}`).",
        ]
    return "\n".join(lines)


def demo_model() -> str:
    """What the demo's CLIP can do before compression."""
    found = read("demo_model")
    if not found:
        return ""
    parts = [
        f"{name} {row['value']:.3f} [{row['interval95'][0]:.3f}, {row['interval95'][1]:.3f}]"
        for name, row in found["image_to_text"].items()
        if name in ("R@1", "R@5")
    ]
    return f"**The demo's CLIP** before compression, image → text, n = {found['n']}: {', '.join(parts)} (`{found['command']}`)."


def _best(speedups: dict[str, Any]) -> str:
    return next(name for name in speedups if name.startswith("best: "))
