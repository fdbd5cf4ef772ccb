"""What quantizing and pruning do to the mini-VLM: answers by slice, speed by stage and size, each side exported.

The fp32 original, W8A8 alone, and the whole recipe `vlm-cpu` answer the held-out questions of `bench.vqa_data` (n and intervals,
paired with the original's) and are timed stage by stage in one interleaved run.

    python -m bench.vlm_edge [--rounds 30] [--questions 600] [--work FOLDER]      writes bench/results/vlm_edge.json
"""

from __future__ import annotations

from dataclasses import replace

from bench import assets
from bench.answer_sides import measured, parser, workplace, write
from bench.edge import RECIPES
from mmcompress import recipe
from mmcompress.data import open_data


def main() -> None:
    """Build, measure, write bench/results/vlm_edge.json and print the summary."""
    options = parser(__doc__, rounds=30)
    options.add_argument("--questions", type=int, default=600)
    chosen = options.parse_args()
    heldout = str(assets.vqa("heldout"))
    data = [f"data.calibration={assets.vqa('training')}", f"data.evaluation={heldout}"]
    whole = recipe.read(RECIPES / "vlm-cpu.yaml", data)
    recipes = {"int8": replace(whole, steps=whole.steps[-1:]), "pruned and int8": whole}
    asked = open_data(heldout).subset(chosen.questions, 0)
    stages = ("vision", "prompt", "token", "answer")
    with workplace(chosen) as work:
        result = measured(work, chosen, assets.mini_vlm(), recipes, asked, "vqa", stages)
    write("vlm_edge", chosen, recipes, result)


if __name__ == "__main__":
    main()
