"""The claim about speech, measured on the real Whisper tiny.en: speed by stage, word error rate and size of `whisper-cpu`.

The fp32 original, the recipe (states merged, int8 weights in the decoder), its second step alone and int8 throughout are exported,
answer the 200 test sentences of `bench.speech` (n and interval of the word accuracy, paired with the original's), and are timed
stage by stage in one interleaved run, each in onnxruntime and in OpenVINO, there also in bfloat16: what listens, the prompt, one
further token, a whole answer. The claim is about encoder and decoder. Half a minute full of speech has less to merge than a
sentence and the silence behind it: the original and the recipe also hear the sentences joined to recordings of up to 29 seconds,
and so, in torch, do checkpoints that keep other shares of the states.
Why the recipe does not prune: 30% of the encoder's and 15% of the decoder's MACs are pruned too, distilled for two epochs and
rounded to int8; the word accuracy after each step is that of torch.

    python -m bench.whisper_edge [--rounds 50] [--work FOLDER]      writes bench/results/whisper_edge.json
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench import assets
from bench.answer_sides import answers, build, compressed, measured, parser, workplace, write
from bench.edge import RECIPES
from mmcompress import checkpoint, manifest, passes, recipe
from mmcompress.data import Dataset, open_data
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.passes.base import Context

INT8: list[dict[str, Any]] = [{"quantize": {"scheme": "W8A8", "target": "openvino"}}]
FULL = ("original", "merged, int8 decoder")
"""Sides that also hear recordings full of speech."""
KEEPS = (0.6, 0.5, 0.4)
STAGES = ("audio", "prompt", "token", "answer")
PRUNED: list[dict[str, Any]] = [
    {"prune": {"ratios": {"audio": 0.3, "decoder": 0.15}, "units": ["heads", "neurons"], "budget": "macs"}},
    {
        "distill": {
            "epochs": 2,
            "batch_size": 8,
            "learning_rate": 1e-4,
            "cross_entropy": 0.5,
            "towers": ["audio", "decoder"],
        }
    },
]


def kept_shares(data: Dataset) -> dict[str, Evaluation]:
    """Judge Whisper in torch as it is and with each of `KEEPS` of its states, paired with the original."""
    found = {"original": evaluate(checkpoint.load(assets.whisper_tiny()), data, ["transcription"], batch=8)}
    for keep in KEEPS:
        bundle = checkpoint.load(assets.whisper_tiny())
        made = passes.build("merge-tokens", {"keep": keep, "schedule": "decreasing"})
        made.apply(bundle, made.plan(bundle, Context()))
        found[f"keep {keep:g}"] = evaluate(bundle, data, ["transcription"], batch=8, reference=found["original"])
    return found


def main() -> None:
    """Build, measure, write bench/results/whisper_edge.json and print the summary."""
    chosen = parser(__doc__, rounds=50).parse_args()
    train, test = str(assets.speech("train")), str(assets.speech("test"))
    own = recipe.read(RECIPES / "whisper-cpu.yaml", [f"data.calibration={train}", f"data.evaluation={test}"])
    # Their losses are what is to be shown, so no gate holds them back.
    alone = own.to_dict()["steps"][1:]
    others = {"int8 decoder": alone, "int8": INT8, "pruned and int8": PRUNED + INT8}
    recipes = {FULL[1]: own} | {
        name: replace(own, steps=recipe.parse({"steps": steps}).steps, gates=recipe.Gates())
        for name, steps in others.items()
    }
    pruned = recipes.pop("pruned and int8")
    with workplace(chosen) as work:
        folder = compressed(work, assets.whisper_tiny(), "pruned and int8", pruned)
        made = manifest.read(folder)
        assert made, f"{folder} is an output of mmc compress"
        steps = [
            {"step": row["stage"], "control": row.get("control", False)} | row["metrics"]["transcription.word_accuracy"]
            for row in made.measured["stages"]
        ]
        result = measured(work, chosen, assets.whisper_tiny(), recipes, open_data(test), "transcription", STAGES)
        sides = {name: side for name, side in build(work, assets.whisper_tiny(), recipes).items() if name in FULL}
        long = open_data(str(assets.full_recordings()))
        full = answers(sides, long, "transcription", chosen.threads)
        kept = kept_shares(long)
    result |= {
        "full recordings": {name: found.to_json() for name, found in full.items()},
        "full recordings in torch": {name: found.to_json() for name, found in kept.items()},
        "pruning": steps,
    }
    write("whisper_edge", chosen, recipes | {"pruned": pruned}, result)


if __name__ == "__main__":
    main()
