"""What training integers wins back of what 4 bits cost: the dual encoder's text tower, beside training its biases and norms alone.

The tower is rounded to the nearest, then learns the original's embeddings of half of the distinct texts of the training drawings;
drawings never trained on are found by the other half of the texts, whose vision tower stays float. R@1 is the mean of both
directions; every difference is paired, drawing by drawing.

    python -m bench.trained_integers [--epochs 10] [--threads 2]      writes bench/results/trained_integers.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmcompress
from bench import assets
from bench.cells import write_result
from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample, batches, open_data
from mmcompress.measure.machine import machine_facts
from mmcompress.ops.statistics import bootstrap, paired_difference
from mmcompress.passes.base import Context
from mmcompress.passes.distill import Distill
from mmcompress.passes.quantize import Quantize

RESULT = assets.RESULTS / "trained_integers.json"
GROUPS = {"groups of 32": 32, "rows": 0}
WAYS = {"all": 1e-4, "quantized-weights": 5e-5}
"""Values of distill.train, and the learning rates they were given; neither was searched."""
BATCH = 64


def first(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return (N,) how often, of both directions, the right one of N comes first; both (N, C)."""
    one, other = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (pictures, texts))
    scores = one @ other.T
    right = np.diagonal(scores)
    found: np.ndarray = ((scores >= right[:, None]).sum(1) == 1) / 2 + ((scores >= right).sum(0) == 1) / 2
    return found


def halves() -> tuple[Dataset, list[Sample]]:
    """Return every second text of the training drawings, and the held-out drawings whose texts are not among them."""
    distinct = sorted({text for sample in open_data(str(assets.training_pairs())) for text in sample.texts})
    learnt = distinct[::2]
    known = Dataset(Memory([Sample(f"{index:05d}", (text,)) for index, text in enumerate(learnt)]), "texts")
    return known, [sample for sample in open_data("demo:test") if sample.texts[0] not in set(learnt)]


def embedded(bundle: Bundle, tower: str, samples: list[Sample]) -> np.ndarray:
    """Return the embeddings (N, C)."""
    parts = [bundle.embed(tower, [bundle.items(tower, each)[0] for each in some]) for some in batches(samples, BATCH)]
    return np.concatenate(parts)


def main() -> None:
    """Round, train, measure, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=float, default=10.0)
    options.add_argument("--threads", type=int, default=2)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    model = assets.dual_encoder()
    original = checkpoint.load(model)
    known, asked = halves()
    pictures = embedded(original, "vision", asked)
    whole = first(pictures, embedded(original, "text", asked))
    document: dict[str, Any] = {
        "command": f"python -m bench.trained_integers --epochs {given.epochs:g}",
        "machine": machine_facts(given.threads),
        "versions": {"mmc": mmcompress.__version__, "torch": torch.__version__},
        "texts": len(known),
        "float": {"r1": bootstrap(whole).to_json()},
    }
    for groups, size in GROUPS.items():
        reached: dict[str, np.ndarray] = {}
        for way in ("rounded", *WAYS):
            bundle = checkpoint.load(model)
            made = Quantize(scheme="W4A16", group_size=size, sensitivity_samples=0, towers=("text",))
            made.apply(bundle, made.plan(bundle, Context()))
            facts: dict[str, Any] = {}
            if way in WAYS:
                facts = trained(bundle, model, known, way, given.epochs)
            reached[way] = first(pictures, embedded(bundle, "text", asked))
            row = {"r1": bootstrap(reached[way]).to_json(), **facts}
            row["against_float"] = paired_difference(whole, reached[way]).to_json()
            row["against_rounded"] = paired_difference(reached["rounded"], reached[way]).to_json()
            if way == "quantized-weights":
                row["against_all"] = paired_difference(reached["all"], reached[way]).to_json()
            document[f"{way}, {groups}"] = row
            print(f"{way}, {groups}", json.dumps(row), flush=True)
            write_result(RESULT, document)


def trained(bundle: Bundle, model: Path, known: Dataset, way: str, epochs: float) -> dict[str, Any]:
    """Train the text tower towards the original; return what to report."""
    job = Distill(epochs=epochs, batch_size=BATCH, learning_rate=WAYS[way], train=way, towers=("text",), warmup=0.2)  # type: ignore[arg-type]
    facts = job.fit(bundle, Context(data=known, teacher=lambda: checkpoint.load(model)))
    return {name: facts[name] for name in ("steps", "trained_parameters", "quantized_weights") if name in facts}


if __name__ == "__main__":
    main()
