"""What compression does to a real language model of 30 blocks, SmolLM2-135M inside a model of SmolVLM's shape.

Perplexity of what presidents went on to say (n and interval, paired with the original's), of checkpoints in torch: int8 weights,
int8 throughout, a tenth and a fifth of the language model's heads and neurons pruned without retraining. The fp32 original, int8
throughout, and a tenth pruned before that are also exported: whether both engines answer word for word as each checkpoint does, to
texts alone and about pictures, their bytes, and the time of each stage in one interleaved run. Eyes and connector are random (see
`bench.smolvlm`), so nothing here says how good answers about pictures are.

    python -m bench.smolvlm_edge [--rounds 10] [--work FOLDER]      writes bench/results/smolvlm_edge.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import assets
from bench.answer_sides import RUNNERS, Side, build, compressed, parser, timings, workplace, write
from mmcompress import checkpoint
from mmcompress.data import Sample, open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.export.artifact import open_artifact
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.recipe import Recipe, parse

BATCH = 8
ALONE_IN_TORCH = "torch, one by one"
# What random eyes make of a picture is not worth the time of measuring which of their layers is the most sensitive.
INT8 = [
    {"quantize": {"scheme": "W8A8", "target": "openvino", "towers": ["language"], "sensitivity_samples": 4}},
    {"quantize": {"scheme": "W8A8", "target": "openvino", "towers": ["vision"], "sensitivity_samples": 0}},
]
ALONE = {
    "int8 weights": [{"quantize": {"scheme": "W8A16"}}],
    "pruned 10%": [{"prune": {"ratio": 0.1, "towers": ["language"]}}],
    "pruned 20%": [{"prune": {"ratio": 0.2, "towers": ["language"]}}],
}
EXPORTED = {"int8": INT8, "pruned 10% and int8": [*ALONE["pruned 10%"], *INT8]}


def recipe_of(steps: list[dict[str, Any]]) -> Recipe:
    """The recipe of some steps, calibrated on all speeches that are for that, a quarter of them with a picture."""
    data = {"calibration": str(assets.passages("calibration")), "num_samples": 30, "batch_size": BATCH}
    return parse({"steps": steps, "data": data})


def perplexities(checkpoints: dict[str, Path]) -> dict[str, Evaluation]:
    """Judge checkpoints in torch by the test speeches, the original first, the others paired with it."""
    data = open_data(str(assets.passages("test")))
    found: dict[str, Evaluation] = {}
    for name, folder in checkpoints.items():
        found[name] = evaluate(
            checkpoint.load(folder), data, ["perplexity"], batch=BATCH, reference=found.get("original")
        )
    return found


def parity(side: Side, samples: list[Sample], threads: int) -> tuple[list[str], dict[str, int]]:
    """What a checkpoint answers in torch, and to how many samples each engine answers the same, word for word.

    And torch itself, asked one by one: rounded to a coarse grid, the last digit of a sum decides now and then.
    """
    parts = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    bundle = checkpoint.load(side.checkpoint)
    want = [text for part in parts for text in bundle.generate(part)]
    equal = {
        ALONE_IN_TORCH: sum(bundle.generate([sample])[0] == text for sample, text in zip(samples, want, strict=True))
    }
    for runner in RUNNERS:
        answerer = artifact_answerer(open_artifact(side.exported), runner, threads=threads)
        got = [text for part in parts for text in answerer.generate(part)]
        answerer.close()
        equal[runner] = sum(one == other for one, other in zip(got, want, strict=True))
    return want, equal


def main() -> None:
    """Build, measure, write bench/results/smolvlm_edge.json and print the summary."""
    options = parser(__doc__, rounds=10).parse_args()
    model = assets.smolvlm()
    alone = {name: recipe_of(steps) for name, steps in ALONE.items()}
    exported = {name: recipe_of(steps) for name, steps in EXPORTED.items()}
    samples = list(open_data(str(assets.passages("asked"))))
    with workplace(options) as work:
        sides = build(work, model, exported)
        checkpoints = {name: side.checkpoint for name, side in sides.items()}
        checkpoints |= {name: compressed(work, model, name, made) for name, made in alone.items()}
        accuracy = perplexities(checkpoints)
        said = {name: parity(side, samples, options.threads) for name, side in sides.items()}
        result = {
            "accuracy": {name: found.to_json() for name, found in accuracy.items()},
            "answers": {
                name: {
                    "n": len(samples),
                    "with picture": sum(sample.picture is not None for sample in samples),
                    "equal to torch": equal,
                    "equal to the original": sum(a == b for a, b in zip(texts, said["original"][0], strict=True)),
                }
                for name, (texts, equal) in said.items()
            },
            "checkpoint_bytes": {
                name: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
                for name, folder in checkpoints.items()
            },
            **timings(sides, ("vision", "prompt", "token", "answer"), options.rounds, options.threads),
        }
    write("smolvlm_edge", options, alone | exported, result)
    print(json.dumps({key: result[key] for key in ("latency", "answers")}, indent=1))
    for name, found in accuracy.items():
        print(name, *(finding.text for finding in found.findings), sep=": ")


if __name__ == "__main__":
    main()
