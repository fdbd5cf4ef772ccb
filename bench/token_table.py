"""Every way to have fewer tokens, at several shares, on three real models: accuracy against random tokens, work, speed.

- `encoder`: patches merged block by block in the DINOv2-S + MiniLM dual encoder; R@1 on the held-out vendor's drawings.
- `connector`: fewer image tokens for the mini-VLM's language model; held-out questions, by slice.
- `layers`: image tokens that leave the mini-VLM's language model on their way through its blocks; the same questions.
- `early`: the same, all of them after its first block.
- `skipping`: there they leave its feed-forwards alone, and its caches once the prompt has been read.
- `audio`: states merged block by block in Whisper tiny.en; words of recordings full of speech.

Each method is applied to the checkpoint, whose own weights are not trained (a selector learns from the training pictures), and
judged in torch, paired with the original (n and intervals) and with
random selections of as many tokens (several seeds). MACs are counted anew. Parts are exported and timed in one interleaved run
per share: in onnxruntime and OpenVINO, each beside the original in the same engine.

    python -m bench.token_table encoder [--samples 0] [--keep 0.5 …] [--method tome …] [--rounds 30] [--timed 0.5 …]

writes bench/results/token_table.json; rows it holds already for the same samples are not measured again, nor is what was refused.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from bench import assets
from bench.cells import read, write_result
from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, open_data
from mmcompress.errors import GateFailed, UsageError
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.evaluate.tasks import TASKS
from mmcompress.evaluate.verdict import random_findings
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.bench import Settings, bench
from mmcompress.measure.cost import cost_of
from mmcompress.measure.latency import compare
from mmcompress.measure.machine import machine_facts
from mmcompress.passes.base import Context
from mmcompress.recipe import Step
from mmcompress.surgery import prompt_flow, reducing, reduction

KIND = "group="
"""What slices that are shown begin with."""
MOST_KINDS = 6
"""They are shown where there are so few."""
RESULT = assets.RESULTS / "token_table.json"
RANDOM = "random"
SEEDS = 3
OWN: dict[str, dict[str, Any]] = {
    "evit": {"first": 3, "every": 3},
    "crossget-learned": {"method": "crossget", "guide": "learned"},
    "clusters-counted": {"method": "clusters", "positions": "counted"},
}
"""What a method has of its own: EViT drops in the fourth, seventh and tenth of twelve blocks; or what a name stands for."""
MERGING = (*get_args(reduction.Method), RANDOM)


@dataclass(frozen=True)
class Contest:
    """What is reduced in which model, and how that is judged."""

    model: Callable[[], Path]
    name: str
    """Of the pass."""
    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    task: str
    data: Callable[[], Dataset]
    samples: int
    """How many of them by default; 0: all."""
    tower: str
    """Whose MACs become fewer."""
    stages: tuple[str, ...]
    """What is timed."""
    batches: tuple[int, ...] = (1,)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the pass, where they are not the usual ones."""
    training: Callable[[], Dataset] | None = None
    """What a method learns from that has to."""


CONTESTS = {
    "encoder": Contest(
        assets.dual_encoder, "merge-tokens", (*MERGING, "crossget-learned"), (0.75, 0.5, 0.25),
        "retrieval", lambda: open_data("demo:test"), 0, "vision", ("vision",), (1, 8),
        training=lambda: open_data("demo:train"),
    ),
    "connector": Contest(
        assets.mini_vlm, "reduce-visual-tokens", (*get_args(reducing.Method), "clusters-counted"), (0.75, 0.5, 0.25, 0.1),
        "vqa", lambda: open_data(str(assets.vqa("heldout"))), 200, "language", ("vision", "prompt", "answer"),
        training=lambda: open_data(str(assets.vqa("training"))),
    ),
    "layers": Contest(
        assets.mini_vlm, "drop-visual-tokens", get_args(prompt_flow.Method), (0.75, 0.5, 0.25, 0.1),
        "vqa", lambda: open_data(str(assets.vqa("heldout"))), 200, "language", ("vision", "prompt", "token", "answer"),
    ),
    "early": Contest(
        assets.mini_vlm, "drop-visual-tokens", get_args(prompt_flow.Method), (0.5, 0.25),
        "vqa", lambda: open_data(str(assets.vqa("heldout"))), 200, "language", ("vision", "prompt", "token", "answer"),
        options={"after": (1,)},
    ),
    "skipping": Contest(
        assets.mini_vlm, "drop-visual-tokens", get_args(prompt_flow.Method), (0.5, 0.25),
        "vqa", lambda: open_data(str(assets.vqa("heldout"))), 200, "language", ("vision", "prompt", "token", "answer"),
        options={"after": (1,), "place": "mlp"},
    ),
    "audio": Contest(
        assets.whisper_tiny, "merge-tokens", MERGING, (0.75, 0.5, 0.4),
        "transcription", lambda: open_data(str(assets.full_recordings())), 0, "audio",
        ("audio", "token", "answer"), options={"schedule": "decreasing"},
    ),
}  # fmt: skip


def reduced(contest: Contest, method: str, keep: float, seed: int = 0) -> Bundle:
    """The contest's model with fewer tokens."""
    bundle = checkpoint.load(contest.model())
    step = Step(contest.name, {"method": method, "keep": keep, **contest.options, **OWN.get(method, {})})
    (stage,) = pipeline.stages((step,))
    pipeline.run_stage(bundle, stage, Context(data=contest.training() if contest.training else None, seed=seed))
    return bundle


def row(
    contest: Contest, bundle: Bundle, data: Dataset, reference: Evaluation | None
) -> tuple[dict[str, Any], Evaluation]:
    """What one model scores, and what it costs."""
    found = evaluate(bundle, data, [contest.task], batch=16, reference=reference)
    document = found.to_json()
    names = [name for name in TASKS[contest.task].headlines if name in document["results"][contest.task]]
    kinds = {
        row["slice"]: [row["value"], row["n"]]
        for row in document["slices"]
        if row["metric"] == names[0] and row["slice"].startswith(KIND)
    }
    accuracy = {
        "results": {contest.task: {name: document["results"][contest.task][name] for name in names}},
        "slices": kinds if len(kinds) <= MOST_KINDS else {},
    }
    return {"accuracy": accuracy, "macs": cost_of(bundle).towers[contest.tower].macs}, found


def rows_of(
    contest: Contest, keep: float, methods: list[str], data: Dataset, original: Evaluation
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what each method scores at one share, or why it refuses; random ones first: the others are set beside them."""
    controls = []
    for seed in range(SEEDS):
        made, found = row(contest, reduced(contest, RANDOM, keep, seed), data, original)
        controls.append(found)
        yield f"{RANDOM} {keep:g}, seed {seed}", made
    for method in methods:
        if method == RANDOM:
            continue
        try:
            bundle = reduced(contest, method, keep)
        except UsageError as refused:
            yield f"{method} {keep:g}", {"refused": str(refused)}
            continue
        made, found = row(contest, bundle, data, original)
        made["against random"] = [finding.to_json() for finding in random_findings(controls, found)]
        yield f"{method} {keep:g}", made


def timed(contest: Contest, methods: list[str], keep: float, rounds: int) -> dict[str, Any]:
    """Export the original and every method at one share, and time them."""
    with tempfile.TemporaryDirectory() as work:
        sides = {"original": Path(work) / "original"}
        export_onnx(checkpoint.load(contest.model()), sides["original"], batches=(1,))
        for method in methods:
            try:
                export_onnx(reduced(contest, method, keep), Path(work) / method, batches=(1,))
            except (UsageError, GateFailed) as refused:
                print(f"{method} {keep:g}: {refused}", flush=True)
                continue
            sides[method] = Path(work) / method
        return timed_sides(sides, contest.stages, contest.batches, rounds)


def timed_sides(
    sides: dict[str, Path], stages: tuple[str, ...], batches: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Milliseconds of each stage of exported models, and how many times as fast it is as the first one's in the same engine."""
    names = {str(path): name for name, path in sides.items()}
    first = next(iter(sides.values()))
    found: dict[str, Any] = {}
    for batch in batches:
        settings = Settings(precisions=("fp32",), towers=stages, threads=2, rounds=rounds, batch=batch, memory=False)
        measured = bench(list(names), settings)
        taken = [row.timing for row in measured.rows]
        base = {(each.tower, each.runner): each.samples for each in taken if each.side == first.name}
        for each in taken:
            found.setdefault(names[str(first.with_name(each.side))], []).append(
                {
                    "stage": each.tower,
                    "runner": each.runner,
                    "batch": batch,
                    "p50_ms": each.latency.p50_ms.to_json(),
                    "times_as_fast": compare(base[each.tower, each.runner], each.samples).to_json(),
                }
            )
    return {"machine": measured.machine, "sides": found}


def main() -> None:
    """Measure what is missing, write the document, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", choices=CONTESTS)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--keep", type=float, action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--timed", type=float, action="append", help="shares whose exported parts are timed")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    contest = CONTESTS[options.contest]
    samples = contest.samples if options.samples is None else options.samples
    data = contest.data()
    data = data.subset(samples, 0) if samples else data
    whole = read(RESULT.stem)
    document = whole.get(options.contest, {})
    if document.get("n") != len(data):
        document = {
            "command": f"python -m bench.token_table {options.contest}" + (f" --samples {samples}" if samples else ""),
            "n": len(data),
            "machine": machine_facts(),
            "rows": {},
            "timings": {},
        }
    whole[options.contest] = document
    methods = options.method or list(contest.methods)
    document.setdefault("refused", {})
    document["rows"]["original"], original = row(contest, checkpoint.load(contest.model()), data, None)
    for keep in options.keep or contest.keeps:
        settled = {**document["rows"], **document["refused"]}
        if all(f"{method} {keep:g}" in settled for method in methods if method != RANDOM):
            continue
        for name, made in rows_of(contest, keep, methods, data, original):
            document["refused" if "refused" in made else "rows"][name] = made
            write_result(RESULT, whole)
            print(
                name, json.dumps(made["accuracy"]["results"][contest.task] if "accuracy" in made else made), flush=True
            )
    for keep in options.timed or ():
        document["timings"][f"{keep:g}"] = timed(contest, methods, keep, options.rounds)
        write_result(RESULT, whole)
    print(json.dumps(document["timings"], indent=1))


if __name__ == "__main__":
    main()
