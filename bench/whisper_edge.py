"""The claim about speech, measured on the real Whisper tiny.en: speed by stage, word error rate and size of `whisper-cpu`.

The fp32 original, the recipe (int8), and the recipe after pruning and a short distillation are exported, answer the 200 test
sentences of `bench.speech` (n and interval of the word error rate, paired with the original's), and are timed stage by stage in one
interleaved run, each in onnxruntime and in OpenVINO, there also in bfloat16: what listens, the prompt, one further token, a whole
answer. The claim is about whole answers.

    python -m bench.whisper_edge [--rounds 50] [--work FOLDER]      writes bench/results/whisper_edge.json
"""

from __future__ import annotations

from dataclasses import replace

from bench import assets
from bench.answer_sides import parser, report
from bench.edge import RECIPES
from mmcompress import recipe
from mmcompress.data import open_data

PRUNED = [
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
    int8 = recipe.read(RECIPES / "whisper-cpu.yaml", [f"data.calibration={train}", f"data.evaluation={test}"])
    # Its loss is what is to be shown, so no gate holds it back.
    pruned = replace(int8, steps=recipe.parse({"steps": PRUNED}).steps + int8.steps, gates=recipe.Gates())
    recipes = {"int8": int8, "pruned and int8": pruned}
    stages = ("audio", "prompt", "token", "answer")
    report("whisper_edge", chosen, assets.whisper_tiny(), recipes, open_data(test), "transcription", stages)


if __name__ == "__main__":
    main()
