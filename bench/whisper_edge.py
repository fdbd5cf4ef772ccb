"""The claim about speech, measured on the real Whisper tiny.en: speed by stage, word error rate and size of `whisper-cpu`.

The fp32 original, the recipe (states merged, int8 weights in the decoder), its second step alone and int8 throughout are exported,
answer the 200 test sentences of `bench.speech` (n and interval of the word accuracy, paired with the original's), and are timed
stage by stage in one interleaved run, each in onnxruntime and in OpenVINO, there also in bfloat16: what listens, the prompt, one
further token, a whole answer. The claim is about encoder and decoder. Half a minute full of speech has less to merge than a
sentence and the silence behind it: the original and the recipe also hear the sentences joined to recordings of up to 29 seconds.
Why the recipe does not prune: 30% of the encoder's and 15% of the decoder's MACs are pruned too, distilled for two epochs and
rounded to int8; the word accuracy after each step is that of torch.

    python -m bench.whisper_edge [--rounds 50] [--work FOLDER]      writes bench/results/whisper_edge.json
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import assets
from bench.answer_sides import answers, build, compressed, measured, parser, workplace, write
from bench.edge import RECIPES
from bench.speech import joined
from mmcompress import manifest, recipe
from mmcompress.data import open_data

INT8: list[dict[str, Any]] = [{"quantize": {"scheme": "W8A8", "target": "openvino"}}]
FULL = ("original", "merged, int8 decoder")
"""Sides that also hear recordings full of speech."""
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
        full = answers(sides, open_data(str(joined(Path(test), work / "joined"))), "transcription", chosen.threads)
    result |= {"full recordings": {name: found.to_json() for name, found in full.items()}, "pruning": steps}
    write("whisper_edge", chosen, recipes | {"pruned": pruned}, result)


if __name__ == "__main__":
    main()
