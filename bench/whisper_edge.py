"""The claim about speech, measured on the real Whisper tiny.en: speed by stage, word error rate and size of `whisper-cpu`.

The fp32 original, the int8 step alone and the whole recipe are exported, answer the 200 test sentences of `bench.speech` (n and
interval of the word error rate, paired with the original's), and are timed stage by stage in one interleaved run, each in
onnxruntime and in OpenVINO: what listens, the prompt, one further token, a whole answer. The claim is about whole answers.

    python -m bench.whisper_edge [--rounds 50] [--work FOLDER]      writes bench/results/whisper_edge.json
"""

from __future__ import annotations

from dataclasses import replace

from bench import assets
from bench.answer_sides import parser, report
from bench.edge import RECIPES
from mmcompress import recipe
from mmcompress.data import open_data


def main() -> None:
    """Build, measure, write bench/results/whisper_edge.json and print the summary."""
    options = parser(__doc__, rounds=50)
    options.add_argument("--set", dest="overrides", action="append", default=[])
    chosen = options.parse_args()
    train, test = str(assets.speech("train")), str(assets.speech("test"))
    data = [f"data.calibration={train}", f"data.evaluation={test}"]
    whole = recipe.read(RECIPES / "whisper-cpu.yaml", [*data, *chosen.overrides])
    recipes = {"int8": replace(whole, steps=whole.steps[-1:]), "edge": whole}
    stages = ("audio", "prompt", "token", "answer")
    report("whisper_edge", chosen, assets.whisper_tiny(), recipes, open_data(test), "transcription", stages)


if __name__ == "__main__":
    main()
