"""What rotating a model before it is quantized (`mmc rotate`, QuaRot's stages without products of their own) keeps of real models.

Language models: how probable the right answers are to them, per token (see `bench.fitted_weights`), of SmolLM2-135M inside a model
of SmolVLM's shape and of the mini-VLM, in several schemes; the eyes of the dual encoder (DINOv2-S) and of the demo's CLIP: the
cosine of their embeddings with fp32's, also for several strengths of smoothing. Each with and without the rotation, paired by
sample.

    python -m bench.rotated [--samples 64] [--questions 300] [--pictures 500] [--only smollm2]    writes bench/results/rotated.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import mmcompress
from bench import assets
from bench.cells import read, write_result
from bench.fitted_weights import BATCH, led, prepared, rounded
from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, open_data
from mmcompress.demo import CLIP
from mmcompress.ops.statistics import bootstrap, paired_difference
from mmcompress.passes.base import Context
from mmcompress.passes.narrow_fit import look
from mmcompress.passes.narrow_units import stream_of
from mmcompress.passes.rotate import Rotate

RESULT = assets.RESULTS / "rotated.json"
GROUPS, ROWS = "groups of 32", "rows"
LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A16, nearest, groups of 32": (GROUPS, {}),
    "W4A16, gptq, groups of 32": (GROUPS, {"rounding": "gptq"}),
    "W4A16, nearest, rows": (ROWS, {}),
    "W4A16, gptq, rows": (ROWS, {"rounding": "gptq"}),
    "W4A8, nearest, groups of 32": (GROUPS, {"scheme": "W4A8"}),
    "NVFP4": (GROUPS, {"scheme": "NVFP4", "target": "openvino"}),
    "MXFP4": (GROUPS, {"scheme": "MXFP4", "target": "openvino"}),
    "W8A8, not smoothed": (ROWS, {"scheme": "W8A8", "smooth": 0.0}),
    "W8A8": (ROWS, {"scheme": "W8A8", "sensitivity_samples": 16, "min_cosine": -1.0}),
}
EYES = {
    **{name: way for name, way in LANGUAGE.items() if name.startswith(("W8A8", "W4A16, nearest"))},
    "W8A8, smoothed by 0.5": (ROWS, {"scheme": "W8A8", "smooth": 0.5}),
    "W8A8, smoothed by 0.75": (ROWS, {"scheme": "W8A8", "smooth": 0.75}),
}
Score = Callable[[Bundle], np.ndarray]


def compared(
    original: Bundle,
    tower: str,
    ways: dict[str, tuple[str, dict[str, Any]]],
    score: Score,
    known: Dataset,
    samples: int,
) -> Iterator[dict[str, Any]]:
    """Round a tower in every way, turned and not; each beside the original, and one beside the other."""
    turned = copy.deepcopy(original)
    turn = Rotate(towers=(tower,))
    turn.check(turned)
    plan = turn.plan(turned, Context())
    turn.apply(turned, plan)
    context = Context(data=known, num_samples=samples, batch_size=BATCH)
    whole = score(original)
    rows: dict[str, Any] = {
        "original": {"score": bootstrap(whole).to_json()},
        "turned, fp32": {"against_original": paired_difference(whole, score(turned)).to_json()},
        "energy_of_four_channels": concentrated(original, tower, known),
        "largest": {"before": plan.facts["largest"], "now": turn.fit(turned, Context())["largest_now"]},
    }
    for name, (group, parameters) in ways.items():
        found = []
        for begin in (original, turned):
            bundle = copy.deepcopy(begin)
            rounded(bundle, tower, group, parameters, context)
            found.append(score(bundle))
        plain, better = found
        rows[name] = {
            "against_original": paired_difference(whole, plain).to_json(),
            "turned_against_original": paired_difference(whole, better).to_json(),
            "turned_against_plain": paired_difference(plain, better).to_json(),
        }
        print(name, json.dumps(rows[name]), flush=True)
        yield rows


def concentrated(bundle: Bundle, tower: str, known: Dataset) -> dict[str, float]:
    """Return which share of the energy behind a norm four channels have, before its gains and after: the median over norms."""
    stream = stream_of(bundle.tower(tower))
    moments = look(bundle, stream, Context(data=known, num_samples=8, batch_size=4)).of
    shares: dict[str, list[float]] = {"before gains": [], "after": []}
    for norm, moment in moments.items():
        energy = moment.diagonal().double()
        few = energy.argsort(descending=True)[:4]
        gained = energy * bundle.module(norm).get_parameter("weight").detach().double().square()
        for name, each in (("before gains", energy), ("after", gained)):
            shares[name].append(float(each[few].sum() / each.sum()))
    return {name: statistics.median(each) for name, each in shares.items()}


def likelihood(asked: Dataset) -> Score:
    """How probable the right answers are to a language model: mean ln p of a token (N,)."""

    def score(bundle: Bundle) -> np.ndarray:
        # What eyes see goes through a connector that may have been turned.
        with torch.inference_mode():
            return led(bundle, list(prepared(bundle, asked))).log

    return score


def likeness(original: Bundle, pictures: Dataset) -> Score:
    """The cosines (N,) of a vision tower's embeddings with the original's."""
    items = [original.items("vision", sample)[0] for sample in pictures]

    def rows(bundle: Bundle) -> torch.Tensor:
        made = [torch.from_numpy(bundle.embed("vision", items[at : at + 32])) for at in range(0, len(items), 32)]
        return torch.nn.functional.normalize(torch.cat(made).double(), dim=-1)

    whole = rows(original)
    return lambda bundle: (rows(bundle) * whole).sum(-1).numpy()


def write(given: argparse.Namespace, name: str, rows: dict[str, Any]) -> None:
    """Write what is known of one model beside what is known of the others."""
    document = read(RESULT.stem)
    sizes = f"--samples {given.samples} --questions {given.questions} --pictures {given.pictures}"
    document |= {"command": f"python -m bench.rotated {sizes}", "calibrated_on": given.calibrated_on}
    document["versions"] = {"mmc": mmcompress.__version__, "torch": torch.__version__}
    write_result(RESULT, document | {name: rows})


def main() -> None:
    """Turn, round, measure, write bench/results/rotated.json."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--samples", type=int, default=64, help="passages")
    options.add_argument("--questions", type=int, default=300)
    options.add_argument("--pictures", type=int, default=500)
    options.add_argument("--calibrated-on", type=int, default=128)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument(
        "--only", choices=("smollm2", "mini_vlm", "dual_encoder", "clip"), help="leave the others as they are"
    )
    given = options.parse_args()
    torch.set_num_threads(given.threads)

    def wanted(name: str) -> bool:
        return given.only in (None, name)

    pictures, known = open_data("demo:test").subset(given.pictures, 0), open_data("demo:train")
    for name, model in (("clip", CLIP), ("dual_encoder", assets.dual_encoder())):
        if wanted(name):
            eyes = checkpoint.load(model)
            for rows in compared(eyes, "vision", EYES, likeness(eyes, pictures), known, given.calibrated_on):
                write(given, name, rows)
    if wanted("mini_vlm"):
        questions = open_data(str(assets.vqa("heldout"))).subset(given.questions, 0)
        known, model = open_data(str(assets.vqa("training"))), checkpoint.load(assets.mini_vlm())
        for rows in compared(model, "language", LANGUAGE, likelihood(questions), known, given.calibrated_on):
            write(given, "mini_vlm", rows)
    if wanted("smollm2"):
        passages, known = (open_data(str(assets.passages(split))) for split in ("test", "calibration"))
        model = checkpoint.load(assets.smolvlm())
        asked = likelihood(passages.subset(given.samples, 0))
        for rows in compared(model, "language", LANGUAGE, asked, known, 30):
            write(given, "smollm2", rows)


if __name__ == "__main__":
    main()
