"""Long texts through MiniLM's six blocks, the text tower of the DINOv2-S dual encoder: what coarse runs of tokens cost and bring.

Two pieces of each State of the Union address, 510 tokens each, from its beginning and from right behind: the embedding of the first
(the mean of its states, as MiniLM was trained) has to be nearest to that of the second among those of all addresses (n, and
intervals paired with the original's; random runs in three draws). Towers are exported and timed in one interleaved run, one text of
512 tokens at a time, in onnxruntime and OpenVINO.

    python -m bench.long_texts [--keep 0.5 …] [--rounds 30]      writes bench/results/long_texts.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import assets
from bench.cells import write_result
from bench.packages import ADDRESSES, unpacked
from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.latency import compare, interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.runners import open_runner
from mmcompress.ops.statistics import paired_difference, proportion
from mmcompress.passes.base import Context
from mmcompress.recipe import Step

RESULT = assets.RESULTS / "long_texts.json"
TOKENS = 512
SEEDS = 3
BATCH = 16
RUNNERS = ("onnxruntime", "openvino")


def pieces(bundle: Bundle) -> tuple[Tensor, Tensor]:
    """Return the ids (S, 512) of two neighbouring pieces of each speech that is long enough, by year."""
    tokenizer = bundle.processor.tokenizer
    first, second = [], []
    for file in sorted(unpacked(ADDRESSES, r"package/data/.*\.json").glob("package/data/*.json")):
        text = json.loads(file.read_text(encoding="utf-8"))["text"]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        inside = TOKENS - 2
        if len(ids) >= 2 * inside:
            for found, begin in ((first, 0), (second, inside)):
                found.append([tokenizer.cls_token_id, *ids[begin : begin + inside], tokenizer.sep_token_id])
    return torch.tensor(first), torch.tensor(second)


@torch.inference_mode()
def hits(bundle: Bundle, first: Tensor, second: Tensor) -> np.ndarray[Any, Any]:
    """Return 1.0 for each speech (S,) whose second piece is nearest to its first."""
    bundle.model.eval()

    def embedded(ids: Tensor) -> Tensor:
        tower = bundle.module(bundle.tower("text").path)
        rows = [tower(input_ids=part).last_hidden_state.mean(dim=1) for part in ids.split(BATCH)]
        return torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1)

    nearest = (embedded(first) @ embedded(second).mT).argmax(dim=-1)
    return (nearest == torch.arange(len(first))).double().numpy()


def coarsened(keep: float, method: str, seed: int = 0, run: int = 16) -> Bundle:
    """The dual encoder whose text tower coarsens."""
    bundle = checkpoint.load(assets.dual_encoder())
    (stage,) = pipeline.stages((Step("coarsen-tokens", {"keep": keep, "method": method, "run": run}),))
    pipeline.run_stage(bundle, stage, Context(seed=seed))
    return bundle


def timed(sides: dict[str, Path], ids: Tensor, rounds: int) -> dict[str, Any]:
    """Return milliseconds of one text in each engine, and how many times as fast a side is as the first in the same engine."""
    inputs = {"input_ids": ids[:1].numpy(), "attention_mask": np.ones((1, TOKENS), np.int64)}
    opened = {
        (side, runner): open_runner(runner, path, threads=2) for side, path in sides.items() for runner in RUNNERS
    }
    samples = interleaved({" ".join(key): one.bind(inputs) for key, one in opened.items()}, rounds=rounds)
    first = next(iter(sides))
    found: dict[str, Any] = {
        side: {
            runner: {
                "p50_ms": samples[f"{side} {runner}"].summary().p50_ms.to_json(),
                "times_as_fast": compare(samples[f"{first} {runner}"], samples[f"{side} {runner}"]).to_json(),
            }
            for runner in RUNNERS
        }
        for side in sides
    }
    for one in opened.values():
        one.close()
    return found


def main() -> None:
    """Measure, write the document, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, action="append")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    original = checkpoint.load(assets.dual_encoder())
    first, second = pieces(original)
    plain = hits(original, first, second)
    rows: dict[str, Any] = {"original": {"r1": proportion(plain).to_json()}}
    with tempfile.TemporaryDirectory() as work:
        sides = {"original": Path(work) / "original"}
        export_onnx(original, sides["original"], towers=("text",), batches=(1,))
        for keep in options.keep or (0.75, 0.5, 0.25):
            random = [hits(coarsened(keep, "random", seed), first, second) for seed in range(SEEDS)]
            model = coarsened(keep, "vcc")
            ours = hits(model, first, second)
            drawn = np.mean(random, axis=0)
            rows[f"vcc {keep:g}"] = {
                "r1": proportion(ours).to_json(),
                "difference": paired_difference(plain, ours).to_json(),
                "against random": paired_difference(drawn, ours).to_json(),
            }
            rows[f"random {keep:g}"] = {
                "r1": float(drawn.mean()),
                "difference": paired_difference(plain, drawn).to_json(),
            }
            print(keep, json.dumps(rows[f"vcc {keep:g}"]), json.dumps(rows[f"random {keep:g}"]), flush=True)
            sides[f"vcc {keep:g}"] = Path(work) / f"vcc-{keep:g}"
            export_onnx(model, sides[f"vcc {keep:g}"], towers=("text",), batches=(1,))
        files = {side: next(path.rglob("text*.onnx")) for side, path in sides.items()}
        timings = timed(files, first, options.rounds) if options.rounds else {}
    document = {
        "command": "python -m bench.long_texts",
        "n": len(first),
        "tokens": TOKENS,
        "machine": machine_facts(),
        "rows": rows,
        "timings": timings,
    }
    write_result(RESULT, document)
    print(json.dumps(timings, indent=1))


if __name__ == "__main__":
    main()
