"""The tables of README's "Measured" part about models that answer."""

from __future__ import annotations

import math
from typing import Any

from bench.cells import MIB, interval, machine, points, read


def mini_vlm() -> str:
    """What the small vision-language model can do before compression."""
    found = read("mini_vlm")
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
    """Whisper compressed, and what pruning would have cost."""
    table = _answering("whisper_edge", "Whisper tiny.en compressed", "transcription", "word_accuracy", "word accuracy")
    steps = read("whisper_edge").get("pruning", [])
    if not steps:
        return table
    table += _full("full recordings", "Recordings full of speech, up to 29 seconds")
    table += _full("full recordings in torch", "The same in torch, by the share of states that is kept")
    said = "; ".join(f"{row['step']} {interval(row)}" for row in steps)
    return f"{table}\n\nThe recipe does not prune: word accuracy of the checkpoint after each step, n = {steps[0]['n']}: {said}."


def _full(key: str, title: str) -> str:
    """What is heard in recordings full of speech."""
    scores = {
        side: judged["results"]["transcription"]["word_accuracy"]
        for side, judged in read("whisper_edge").get(key, {}).items()
    }
    if not scores:
        return ""
    heard = [
        f"{side} {interval(score)}" + (f", {points(score['difference'])} points" if "difference" in score else "")
        for side, score in scores.items()
    ]
    return f"\n\n{title} (n = {next(iter(scores.values()))['n']}): {'; '.join(heard)}."


def _answering(file: str, title: str, task: str, metric: str, called: str) -> str:
    """Sides that answer: what they answer, how fast each stage is in its best runner, how large they are; then the slices."""
    found = read(file)
    if not found:
        return ""
    stages = list(dict.fromkeys(row["stage"] for row in found["latency"]))
    lines = [
        f"**{title}**, exported; each stage in its faster runner, onnxruntime or OpenVINO, and how many times faster that is than "
        f"fp32 onnxruntime; {machine(found)} (`{found['command']}`)",
        "",
        f"| | {called} [95%] | points against the original | same answer | MiB | {' | '.join(f'{stage} ms' for stage in stages)} |",
        "|---" * (5 + len(stages)) + "|",
    ]
    for side, judged in found["accuracy"].items():
        score = judged["results"][task][metric]
        same = judged["results"].get("answer-agreement", {}).get("identical")
        cells = [
            side,
            interval(score),
            points(score["difference"]) if "difference" in score else "",
            f"{same['value']:.3f}" if same else "",
            f"{found['bytes'][side.removesuffix(' in bf16')] / MIB:.1f}",
        ]
        cells += [_fastest(found, side, stage) for stage in stages]
        lines.append(f"| {' | '.join(cells)} |")
    sliced = [name for name, judged in found["accuracy"].items() if judged["slices"]]
    names = (
        [row["slice"] for row in found["accuracy"][sliced[0]]["slices"] if row["metric"] == metric] if sliced else []
    )
    if names:
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
    found = read("smolvlm_edge")
    if not found:
        return ""
    stages = list(dict.fromkeys(row["stage"] for row in found["latency"]))
    lines = [
        "**SmolLM2-135M as the language model of a SmolVLM** (`bench/smolvlm.py`: random eyes, only its language is judged), "
        f"compressed; perplexity of what presidents went on to say; stages as above; {machine(found)} (`{found['command']}`)",
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
            _same(said) if said else "",
            *(_fastest(found, side, stage) for stage in stages if said),
            *("" for _ in stages if not said),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    n = found["accuracy"]["original"]["results"]["perplexity"]["answer_log_likelihood"]["n"]
    return "\n".join([*lines, "", f"n = {n} speeches. MiB are the checkpoint's, whose float weights are float16."])


def _same(said: dict[str, Any]) -> str:
    """How many answers engines give as torch does in batches, and how many torch itself gives when it is asked one by one."""
    equal = dict(said["equal to torch"])
    alone = equal.pop("torch, one by one", None)
    return f"{min(equal.values())} of {said['n']}" + ("" if alone is None else f" (torch, one by one: {alone})")


def _perplexity(likelihood: dict[str, Any], digits: int) -> str:
    value, low, high = (math.exp(-likelihood[key]) for key in ("value", "high", "low"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _fastest(found: dict[str, Any], side: str, stage: str) -> str:
    rows = [row for row in found["latency"] if (row["side"], row["stage"]) == (side, stage)]
    best = min(rows, key=lambda row: row["p50_ms"]["value"])
    return f"{best['p50_ms']['value']:.1f}, ×{interval(best['times_as_fast'], 2)}"
