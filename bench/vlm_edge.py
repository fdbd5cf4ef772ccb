"""What quantizing and pruning do to the mini-VLM: answers by slice, speed by stage and size, each side exported.

The fp32 original, W8A8, and W8A8 after a fifth of the language model's parameters are pruned answer the held-out questions of
`bench.vqa_data` (n and intervals, paired with the original's) and are timed stage by stage in one interleaved run.

    python -m bench.vlm_edge [--rounds 30] [--questions 600] [--work FOLDER]      writes bench/results/vlm_edge.json
"""

from __future__ import annotations

from bench import assets
from bench.answer_sides import parser, report
from mmcompress import recipe
from mmcompress.data import open_data

INT8 = {"quantize": {"scheme": "W8A8", "target": "openvino", "sensitivity_samples": 8}}
STEPS = {
    "int8": [INT8],
    "pruned and int8": [{"prune": {"ratio": 0.2, "towers": ["language"]}}, INT8],
}


def main() -> None:
    """Build, measure, write bench/results/vlm_edge.json and print the summary."""
    options = parser(__doc__, rounds=30)
    options.add_argument("--questions", type=int, default=600)
    chosen = options.parse_args()
    data = [f"data.calibration={assets.vqa('training')}"]
    recipes = {
        name: recipe.parse({"steps": steps, "data": {"num_samples": 32, "batch_size": 8}}, data)
        for name, steps in STEPS.items()
    }
    asked = open_data(str(assets.vqa("heldout"))).subset(chosen.questions, 0)
    report("vlm_edge", chosen, assets.mini_vlm(), recipes, asked, "vqa", ("vision", "prompt", "token", "answer"))


if __name__ == "__main__":
    main()
