"""How 8-bit weights are best multiplied on a CPU: the language model of SmolVLM's shape (SmolLM2-135M), one token and a prompt.

Each side is the same model, exported as another graph: fp32; int8 weights that are unpacked in every call (target openvino), or
multiplied in blocks beside inputs rounded to 8 bits (target cpu); weights and inputs in 8 bits, each token on a grid of its own.
All are timed in one interleaved run per engine, for one token after 256 and for a prompt of 256. What the rounding
costs is said by the cosine of the logits that follow real texts with those of fp32, in the same engine.

    python -m bench.eight_bits [--rounds 15] [--work FOLDER]      writes bench/results/eight_bits.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnxscript import ir

from bench import assets
from bench.answer_sides import RUNNERS, parser, workplace, write
from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.data import open_data
from mmcompress.export.graph import simplify
from mmcompress.export.onnx import DEFAULT_OPSETS
from mmcompress.export.trace import trace, traced
from mmcompress.measure.latency import compare, interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.runner import Arrays, Runner
from mmcompress.measure.runners import open_runner
from mmcompress.parts import BATCH, PAST, TOKENS
from mmcompress.passes.base import Context
from mmcompress.passes.quantize import Quantize

PART, LENGTH, TEXTS = "language", 256, 6
FIXED: dict[str, Any] = {"towers": ("language",), "sensitivity_samples": 0}
SIDES: dict[str, dict[str, Any]] = {
    "fp32": {"scheme": "W16A16"},
    "W8A16, unpacked": {"scheme": "W8A16", "target": "openvino"},
    "W8A16": {"scheme": "W8A16"},
    "W8A8, by token": {"scheme": "W8A8", "activations": "dynamic"},
}


def exported(work: Path, name: str, parameters: dict[str, Any]) -> Path:
    """The graph of a side; what is in `work` already is not made again."""
    path = work / f"{name.replace(', ', '-')}.onnx"
    if not path.exists():
        bundle = checkpoint.load(assets.smolvlm())
        made = Quantize(**parameters, **FIXED)
        made.apply(bundle, made.plan(bundle, Context()))
        model = trace(traced(bundle, PART, "float32"), DEFAULT_OPSETS["float32"]).model
        simplify(model)
        ir.save(model, path)
    return path


def inputs_of(bundle: Bundle) -> dict[str, Arrays]:
    """Inputs of the part by what is timed."""
    example = traced(bundle, PART, "float32").example
    sizes = {"token": {TOKENS: 1, PAST: LENGTH}, "prompt": {TOKENS: LENGTH, PAST: 0}}
    return {
        name: {key: value.numpy() for key, value in example({BATCH: 1, **each}).items()} for name, each in sizes.items()
    }


def texts_of(bundle: Bundle, like: Arrays) -> list[Arrays]:
    """Inputs of the part for what real texts begin with."""
    embed = bundle.model.get_input_embeddings()
    made = []
    for sample in open_data(str(assets.passages("test"))).take(TEXTS):
        ids = bundle.prepare(PART, bundle.items(PART, sample)[:1])["input_ids"][:, :LENGTH]
        given = {key: value for key, value in like.items() if key.startswith("past_")}
        count = ids.shape[1]
        given["inputs_embeds"] = embed(ids).detach().numpy()
        given["attention_mask"] = np.ones((1, count), np.int64)
        given["position_ids"] = np.arange(count)[None]
        made.append(given)
    return made


def likeness(runner: Runner, texts: list[Arrays], wanted: list[np.ndarray]) -> float:
    """The mean cosine of logits with those `wanted`."""
    found = [runner.run(text)["logits"][0] for text in texts]
    pairs = zip(found, wanted, strict=True)
    return float(np.mean([one @ other / np.linalg.norm(one) / np.linalg.norm(other) for one, other in pairs]))


def main() -> None:
    """Export, time, write bench/results/eight_bits.json and print the summary."""
    given = parser(__doc__, rounds=15).parse_args()
    rows: list[dict[str, Any]] = []
    with workplace(given) as work:
        graphs = {name: exported(work, name, parameters) for name, parameters in SIDES.items()}
        bundle = checkpoint.load(assets.smolvlm())
        timed = inputs_of(bundle)
        texts = texts_of(bundle, timed["prompt"])
        for engine in RUNNERS:
            runners = {name: open_runner(engine, path, given.threads) for name, path in graphs.items()}
            wanted = [runners["fp32"].run(text)["logits"][0] for text in texts]
            cosines = {name: likeness(runner, texts, wanted) for name, runner in runners.items()}
            for what, inputs in timed.items():
                steps = {name: runner.bind(inputs) for name, runner in runners.items()}
                taken = interleaved(steps, rounds=given.rounds)
                for name, samples in taken.items():
                    row = {"runner": engine, "what": what, "side": name, "p50_ms": samples.summary().p50_ms.to_json()}
                    row |= {
                        "times_as_fast": compare(taken["fp32"], samples).to_json(),
                        "cosine": round(cosines[name], 6),
                    }
                    rows.append(row)
                    print(json.dumps(row), flush=True)
            for runner in runners.values():
                runner.close()
        result = {"latency": rows, "bytes": {name: path.stat().st_size for name, path in graphs.items()}}
    write(
        "eight_bits",
        given,
        {},
        {"machine": machine_facts(given.threads), "parameters": SIDES, "length": LENGTH, "texts": TEXTS, **result},
    )


if __name__ == "__main__":
    main()
