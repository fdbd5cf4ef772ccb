"""The "Measured" part of README.md, made from bench/results/*.json: no number is typed in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN = "<!-- measured -->"
END = "<!-- end measured -->"
MIB = 2**20


def section() -> str:
    """Return the part of README.md from marker to marker."""
    parts = [
        table()
        for table in (
            edge,
            nncf,
            against_random,
            memory,
            streaming,
            mini_vlm,
            vlm_edge,
            smolvlm_edge,
            whisper_edge,
            demo_model,
        )
    ]
    return "\n\n".join([BEGIN, *(part for part in parts if part), END])


def edge() -> str:
    """The main claim on the real dual encoder."""
    found = _read("edge")
    if not found:
        return ""
    latency, accuracy, size = found["latency_ms"]["batch 1"], found["accuracy"], found["bytes"]
    speed = found["speedups"]["batch 1"]
    lines = [
        f"**DINOv2-S + MiniLM, vision tower, batch 1, {_machine(found)}** (`{found['command']}`)",
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
            f"| {side} | {runner} | {row['p50_ms']['value']:.2f} | ×{_interval(ratio, 2)} | {_interval(score)} | "
            f"{_points(difference) if difference else ''} |"
        )
    cold = found["speedups"]["batch 1, cold"]
    large = found["speedups"]["batch 8"]
    compared = {name: ratio for name, ratio in speed.items() if "against original onnxruntime" not in name}
    lines += [
        "",
        f"n = {accuracy['original']['image_to_text_r1']['n']} drawings of a vendor never trained on, retrieval among all "
        f"their captions. Weights: {size['original'] / MIB:.1f} → {size['edge'] / MIB:.1f} MiB "
        f"(÷{size['original'] / size['edge']:.1f}); the int8 step alone {size['int8'] / MIB:.1f} MiB. "
        + ". ".join(f"{name[0].upper()}{name[1:]}: ×{_interval(ratio, 2)}" for name, ratio in compared.items())
        + f". Batch 8, {_best(large)}: ×{_interval(large[_best(large)], 2)}. Single calls with cold caches, {_best(cold)}: "
        f"×{_interval(cold[_best(cold)], 2)}. R@1 of our int8 vision tower against NNCF's, both with float texts: "
        f"{_points(found['int8 vision against nncf']['image_to_text_r1'])} points image → text, "
        f"{_points(found['int8 vision against nncf']['text_to_image_r1'])} text → image; the same nearest text as fp32 for "
        f"{_interval(accuracy['int8 vision']['top1'])} against {_interval(accuracy['nncf']['top1'])} of the drawings, cosine to "
        f"fp32 {_interval(accuracy['int8 vision']['image_cosine'], 4)} against {_interval(accuracy['nncf']['image_cosine'], 4)}.",
    ]
    return "\n".join(lines)


def nncf() -> str:
    """Our int8 beside NNCF's over several draws of calibration samples."""
    found = _read("nncf")
    if not found:
        return ""
    original = found["accuracy"].pop("original")
    lines = [
        f"**Our int8 vision tower beside NNCF's**, OpenVINO, {_machine(found)} (`{found['command']}`)",
        "",
        "| calibrated on | R@1 image → text | R@1 text → image | same nearest text as fp32 | cosine to fp32 |",
        "|---|---|---|---|---|",
        f"| fp32 | {_interval(original['image_to_text_r1'])} | {_interval(original['text_to_image_r1'])} | | |",
    ]
    for name, row in found["accuracy"].items():
        cells = [_interval(row[key]) for key in ("image_to_text_r1", "text_to_image_r1", "top1")]
        lines.append(f"| {name} | {' | '.join(cells)} | {_interval(row['image_cosine'], 4)} |")
    lines.append("")
    for batch, ratios in found["times_as_fast"].items():
        lines += [f"- {batch}, {name}: ×{_interval(ratio, 2)} as fast" for name, ratio in ratios.items()]
    return "\n".join(lines)


def against_random() -> str:
    """Selections beside random ones."""
    found = _read("against_random")
    if not found:
        return ""
    lines = [
        f"**Against random selection, same model** (`{found['command']}`)",
        "",
        "| | R@1 image → text [95%] |",
        "|---|---|",
    ]
    lines.append(f"| original | {_interval(found['original']['image_to_text_r1'])} |")
    for contest, outcome in found["contests"].items():
        lines += [
            f"| {contest}: {name} | {_interval(row['image_to_text_r1'])} |" for name, row in outcome["rows"].items()
        ]
    lines.append("")
    for contest, outcome in found["contests"].items():
        for score, findings in outcome["findings"].items():
            lines += [f"- {contest}, {score}: {f['text']}" for f in findings if "image_to_text_r1" in f["text"]]
    return "\n".join(lines)


def memory() -> str:
    """Peak memory and the start of the command line."""
    found = _read("memory")
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
    found = _read("streaming")
    if not found:
        return ""
    lines = [
        f"**Weights rounded layer by layer** (`mmc quantize --scheme W8A16` without data; Qwen2.5-VL's sizes, random weights, "
        f"{_machine(found)}; `{found['command']}`)",
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
    return "\n".join(lines)


def mini_vlm() -> str:
    """What the small vision-language model can do before compression."""
    found = _read("mini_vlm")
    if not found:
        return ""
    naming = found["drawings"]["naming"]
    lines = [
        "**The mini-VLM** (`bench/build_mini_vlm.py`: nine blocks of DINOv2-S, a connector and a small Llama trained on drawings "
        "and rendered scenes) before compression, exact answers to held-out questions:",
        "",
        "| questions | n | right [95%] | always the commonest answer |",
        "|---|---|---|---|",
        _slice("naming, a vendor never trained on", naming),
    ]
    wanted = ("category", "colour", "counting", "position", "reading", "after earlier turns")
    lines += [_slice(name, found["slices"][name]) for name in wanted]
    return "\n".join(lines)


def _slice(name: str, row: dict[str, Any]) -> str:
    low, high = row["interval95"]
    return f"| {name} | {row['n']:,} | {row['value']:.3f} [{low:.3f}, {high:.3f}] | {row['majority']:.3f} |"


def vlm_edge() -> str:
    """The mini-VLM quantized and pruned."""
    return _answering("vlm_edge", "The mini-VLM compressed", "vqa", "accuracy", "right answers")


def whisper_edge() -> str:
    """Whisper compressed."""
    return _answering("whisper_edge", "Whisper tiny.en compressed", "transcription", "word_accuracy", "word accuracy")


def _answering(file: str, title: str, task: str, metric: str, called: str) -> str:
    """Sides that answer: what they answer, how fast each stage is in its best runner, how large they are; then the slices."""
    found = _read(file)
    if not found:
        return ""
    stages = list(dict.fromkeys(row["stage"] for row in found["latency"]))
    lines = [
        f"**{title}**, exported; each stage in its faster runner, onnxruntime or OpenVINO, and how many times faster that is than "
        f"fp32 onnxruntime; {_machine(found)} (`{found['command']}`)",
        "",
        f"| | {called} [95%] | points against the original | same answer | MiB | {' | '.join(f'{stage} ms' for stage in stages)} |",
        "|---" * (5 + len(stages)) + "|",
    ]
    for side, judged in found["accuracy"].items():
        score = judged["results"][task][metric]
        same = judged["results"].get("answer-agreement", {}).get("identical")
        cells = [
            side,
            _interval(score),
            _points(score["difference"]) if "difference" in score else "",
            f"{same['value']:.3f}" if same else "",
            f"{found['bytes'][side.removesuffix(' in bf16')] / MIB:.1f}",
        ]
        cells += [_fastest(found, side, stage) for stage in stages]
        lines.append(f"| {' | '.join(cells)} |")
    sliced = [name for name, judged in found["accuracy"].items() if judged["slices"]]
    if sliced:
        names = [row["slice"] for row in found["accuracy"][sliced[0]]["slices"] if row["metric"] == metric]
        lines += ["", f"| {called} by slice | n | {' | '.join(sliced)} |", "|---" * (2 + len(sliced)) + "|"]
        for name in names:
            rows = [
                next(
                    row for row in found["accuracy"][side]["slices"] if (row["slice"], row["metric"]) == (name, metric)
                )
                for side in sliced
            ]
            values = " | ".join(f"{row['value']:.3f}" for row in rows)
            lines.append(f"| {name} | {rows[0]['n']} | {values} |")
    return "\n".join(lines)


def smolvlm_edge() -> str:
    """A real language model of 30 blocks: its perplexity, and where it was exported what it answers, how fast, how large it is."""
    found = _read("smolvlm_edge")
    if not found:
        return ""
    stages = list(dict.fromkeys(row["stage"] for row in found["latency"]))
    lines = [
        "**SmolLM2-135M as the language model of a SmolVLM** (`bench/smolvlm.py`: random eyes, only its language is judged), "
        f"compressed; perplexity of what presidents went on to say; stages as above; {_machine(found)} (`{found['command']}`)",
        "",
        "| | perplexity [95%] | times the original's [95%] | MiB | answers as torch does | "
        f"{' | '.join(f'{stage} ms' for stage in stages)} |",
        "|---" * (5 + len(stages)) + "|",
    ]
    for side, judged in found["accuracy"].items():
        score = judged["results"]["perplexity"]["answer_log_likelihood"]
        said = found["answers"].get(side)
        cells = [
            side,
            _perplexity(score, 1),
            f"×{_perplexity(score['difference'], 3)}" if "difference" in score else "",
            f"{found['checkpoint_bytes'][side] / MIB:.0f}",
            f"{min(said['equal to torch'].values())} of {said['n']}" if said else "",
            *(_fastest(found, side, stage) for stage in stages if said),
            *("" for _ in stages if not said),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    n = found["accuracy"]["original"]["results"]["perplexity"]["answer_log_likelihood"]["n"]
    return "\n".join([*lines, "", f"n = {n} speeches. MiB are the checkpoint's, whose float weights are float16."])


def _perplexity(likelihood: dict[str, Any], digits: int) -> str:
    value, low, high = (math.exp(-likelihood[key]) for key in ("value", "high", "low"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _fastest(found: dict[str, Any], side: str, stage: str) -> str:
    rows = [row for row in found["latency"] if (row["side"], row["stage"]) == (side, stage)]
    best = min(rows, key=lambda row: row["p50_ms"]["value"])
    return f"{best['p50_ms']['value']:.1f}, ×{_interval(best['times_as_fast'], 2)}"


def demo_model() -> str:
    """What the demo's CLIP can do before compression."""
    found = _read("demo_model")
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


def _read(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _machine(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['threads']} threads of {machine['cpu']}"


def _interval(estimate: dict[str, Any], digits: int = 3) -> str:
    return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def _points(difference: dict[str, Any]) -> str:
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
