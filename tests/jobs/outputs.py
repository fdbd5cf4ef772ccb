"""Finished runs as `mmc compress` leaves them, made without a model: mmc.json and the evaluations beside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from mmcompress.evaluate import Evaluation, Facts, Speed, evaluate, verdict
from mmcompress.evaluate.store import write_evaluation
from mmcompress.manifest import Manifest, Record, Source
from mmcompress.ops.statistics import Estimate
from tests.evaluate.worlds import Seeing, world

STEPS = ("prune", "merge-tokens", "distill", "quantize")
MACS = (4_000_000_000, 2_900_000_000, 2_100_000_000, 2_100_000_000, 2_100_000_000)
BYTES = (48_000_000, 36_000_000, 36_000_000, 36_000_000, 9_600_000)
NOISE = (0.0, 3.0, 3.4, 2.2, 2.3)
RANDOM = {"prune": 4.5, "merge-tokens": 4.2}


@cache
def seen(noise: float, n: int = 150) -> Evaluation:
    """An evaluation that gets worse with `noise`, compared with the one without."""
    reference = seen(0.0, n) if noise else None
    return evaluate(
        Seeing(noise), world(n), tasks=["retrieval", *(["agreement"] if noise else [])], reference=reference
    )


def output(
    directory: Path, *, source: str = "clip", noise: float = 2.3, ratio: float = 2.4, size: int = 9_600_000
) -> Path:
    """Write a run whose result sees with `noise`, is `ratio` times as fast and `size` bytes large."""
    reports = directory / "reports"
    reports.mkdir(parents=True)
    (directory / "recipe.yaml").write_text("seed: 0\nsteps:\n- prune: {ratio: 0.3}\n")
    noises = (*NOISE[:-1], noise)
    rows: list[dict[str, Any]] = []
    for index, stage in enumerate(("original", *STEPS)):
        found = seen(noises[index])
        write_evaluation(found, reports / f"{index:02d}-{stage}.npz")
        rows.append({"stage": stage, **cost(index, size), "metrics": headlines(found)})
        if stage in RANDOM:
            control = seen(RANDOM[stage])
            write_evaluation(control, reports / f"{index:02d}-{stage}-random.npz")
            rows.append({"stage": f"{stage} (random)", "metrics": headlines(control), "control": True})
    before, after = seen(0.0), seen(noise)
    faster = Estimate(ratio, ratio * 0.97, ratio * 1.03, 60)
    facts = Facts(after, before, speeds=[Speed("vision, batch 1, 2 threads, openvino", faster)],
                  bytes_before=BYTES[0], bytes_after=size, random_expected=False)  # fmt: skip
    speeds = [
        {"tower": "vision", "runner": runner, "batch": 1, "threads": 2, "before_ms": 21.4, "after_ms": 21.4 / ratio,
         "ratio": faster.to_json(), "against": "the original"}
        for runner in ("onnxruntime", "openvino", "best of each: openvino against openvino")
    ]  # fmt: skip
    manifest = Manifest(
        source=Source(source, sha256="ab" * 32, bytes=BYTES[0]),
        family="clip",
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        seed=0,
        records=tuple(record(name) for name in STEPS),
        measured={
            "verdict": [finding.to_json() for finding in verdict(facts)],
            "stages": rows,
            "speeds": speeds,
            "gates": [{"name": "size", "passed": True, "measured": 0.2, "limit": 0.3,
                       "text": "size is 0.200 of the original's; at most 0.3 is asked for"}],
            "metrics": {
                f"{task}.{metric}": {"original": str(before.estimates[task][metric]), "compressed": str(estimate)}
                for task, by_metric in after.estimates.items()
                for metric, estimate in by_metric.items()
                if task in before.estimates
            },
            "bytes": {"original": BYTES[0], "compressed": size},
            "machine": {"cpu": "A Processor", "cores": 2, "versions": {"onnxruntime": "1.32"}, "busy": None},
        },
        plain_transformers=False,
        why="60 tensors are stored differently; load with mmcompress.load",
        mmc="0.1.0",
    )  # fmt: skip
    manifest.write(directory)
    return directory


def cost(index: int, size: int) -> dict[str, Any]:
    """The cost row of a stage: 80% of the work in the vision tower."""
    held = size if index == len(STEPS) else BYTES[index]
    towers = {
        name: {
            "parameters": int(share * BYTES[index] / 4),
            "bytes": int(share * held),
            "macs": int(share * MACS[index]),
        }
        for name, share in (("vision", 0.8), ("text", 0.2))
    }
    return {"parameters": BYTES[index] // 4, "bytes": held, "towers": towers}


def headlines(found: Evaluation) -> dict[str, Any]:
    return {
        f"{task}.{metric}": estimate.to_json()
        for task, by_metric in found.estimates.items()
        for metric, estimate in by_metric.items()
    }


def record(name: str) -> Record:
    plan: dict[str, Any] = {}
    if name == "quantize":
        groups = {"patch_embedding": 0.0021, "blocks.0.attention": 0.0004, "blocks.0.mlp": 0.0007, "projection": 0.0001}
        plan = {
            "towers": {"vision": {"scheme": "W8A8", "cosine": 0.9931, "sensitivity": groups, "kept_float": ["patch"]}}
        }
    return Record(name, {"ratio": 0.3} if name == "prune" else {}, plan, seconds=12.5)
