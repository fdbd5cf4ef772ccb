"""What 4-bit weights cost and bring a real language model of 30 blocks, SmolLM2-135M inside a model of SmolVLM's shape.

Perplexity of what presidents went on to say (n and interval, paired with the original's) of checkpoints in torch: the language
model's weights in 8 bits, and in 4 bits rounded in three ways and in larger groups. The fp32 original, 8 bits and 4 bits are also
exported, and their stages timed in one interleaved run.

    python -m bench.four_bits [--samples 100] [--rounds 10] [--work FOLDER]      writes bench/results/four_bits.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import assets
from bench.answer_sides import Side, compressed, parser, timings, workplace, write
from mmcompress import checkpoint
from mmcompress.data import open_data
from mmcompress.evaluate.evaluation import evaluate
from mmcompress.export.onnx import export_onnx
from mmcompress.recipe import Recipe, parse

BATCH = 8
FIXED = {"towers": ["language"], "sensitivity_samples": 0}
WAYS: dict[str, dict[str, Any]] = {
    "8 bits": {"scheme": "W8A16"},
    "4 bits, nearest": {"scheme": "W4A16", "rounding": "nearest"},
    "4 bits, hqq": {"scheme": "W4A16", "rounding": "hqq"},
    "4 bits, gptq": {"scheme": "W4A16", "rounding": "gptq"},
    "4 bits, gptq, groups of 64": {"scheme": "W4A16", "rounding": "gptq", "group_size": 64},
}
TIMED = ("8 bits", "4 bits, hqq")


def recipe_of(parameters: dict[str, Any]) -> Recipe:
    """The recipe of one way, calibrated on the speeches that are for that."""
    data = {"calibration": str(assets.passages("calibration")), "num_samples": 30, "batch_size": BATCH}
    return parse({"steps": [{"quantize": {**FIXED, **parameters}}], "data": data})


def main() -> None:
    """Build, measure, write bench/results/four_bits.json and print the summary."""
    options = parser(__doc__, rounds=10)
    options.add_argument("--samples", type=int, default=100)
    given = options.parse_args()
    recipes = {name: recipe_of(parameters) for name, parameters in WAYS.items()}
    model, data = assets.smolvlm(), open_data(str(assets.passages("test"))).subset(given.samples, 0)
    with workplace(given) as work:
        checkpoints: dict[str, Path] = {"original": model}
        found: dict[str, Any] = {}
        for name, made in ({"original": None} | recipes).items():
            if made is not None:
                checkpoints[name] = compressed(work, model, name, made)
            loaded = checkpoint.load(checkpoints[name])
            found[name] = evaluate(loaded, data, ["perplexity"], batch=BATCH, reference=found.get("original"))
            print(name, *(finding.text for finding in found[name].findings), sep=": ", flush=True)
        sides = {
            name: Side(checkpoints[name], work / f"{name.replace(' ', '-')}-onnx") for name in ("original", *TIMED)
        }
        for side in sides.values():
            if not side.exported.exists():
                export_onnx(checkpoint.load(side.checkpoint), side.exported, batches=(1, 2))
        result = {
            "accuracy": {name: each.to_json() for name, each in found.items()},
            "checkpoint_bytes": {
                name: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                for name, folder in checkpoints.items()
            },
            **timings(sides, ("prompt", "token"), given.rounds, given.threads),
        }
    write("four_bits", given, recipes, result)
    print(json.dumps({key: result[key] for key in ("latency", "bytes", "checkpoint_bytes")}, indent=1))


if __name__ == "__main__":
    main()
