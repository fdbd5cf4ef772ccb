"""4-bit weights fitted to samples: what scales (AWQ), clipped ranges, GPTQ, AdaRound and balanced modalities (MBQ) keep of two real
models; beside them what equalized ranges do, which need no samples.

How probable the right answers are to a language model, per token, with n and intervals, paired sample by sample with the original's
and with those of rounding to nearest. SmolLM2-135M inside a model of SmolVLM's shape goes on with what presidents said, without
pictures. The mini-VLM's language model answers held-out questions about drawings; what its vision tower makes of them is made once.
Then its vision tower is rounded too (`mini_vlm, vision too`), which texts alone cannot calibrate: it is rounded to nearest then.
`greedy` is the share of answers of which each token is the most probable one, `seconds` what rounding the language model takes.

    python -m bench.fitted_weights [--samples 64] [--questions 300] [--only smollm2]      writes bench/results/fitted_weights.json

`--way` and `--group` measure some of the rows, and leave the others as they are known.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmcompress
from bench import assets
from bench.cells import read, write_result
from bench.four_bits import BATCH, FIXED
from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, batches, open_data
from mmcompress.ops.losses import token_log_likelihoods
from mmcompress.ops.statistics import bootstrap, paired_difference
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize

RESULT = assets.RESULTS / "fitted_weights.json"
AWQ: dict[str, Any] = {"rounding": "nearest", "scaling": "awq"}
WAYS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest"},
    "hqq": {"rounding": "hqq"},
    "gptq": {"rounding": "gptq"},
    "adaround": {"rounding": "adaround"},
    "equalize": {"rounding": "nearest", "scaling": "equalize"},
    "awq": AWQ,
    "awq, clip": {**AWQ, "clip": True},
    "awq, clip, gptq": {"rounding": "gptq", "scaling": "awq", "clip": True},
}
RIVALS = {"adaround": "gptq", "equalize": "hqq"}
"""What else there is that needs samples, or none; compared where both are measured."""
SHOWN: dict[str, dict[str, Any]] = {
    "awq, clip, balanced": {**WAYS["awq, clip"], "balance": "modality"},
    "awq, clip, text tokens only": {**WAYS["awq, clip"], "balance": "text"},
    "gptq, balanced": {**WAYS["gptq"], "balance": "modality"},
    "gptq, text tokens only": {**WAYS["gptq"], "balance": "text"},
    "awq, clip, gptq, balanced": {**WAYS["awq, clip, gptq"], "balance": "modality"},
    "awq, clip, texts alone": WAYS["awq, clip"],
    "gptq, texts alone": WAYS["gptq"],
    "awq, clip, gptq, texts alone": WAYS["awq, clip, gptq"],
}
"""For a model that is shown pictures. "texts alone": calibrated on the same questions without their pictures."""
VISION_TOO = "mini_vlm, vision too"
TEXT_ONLY = (", text tokens only", ", texts alone")
GROUPS = {"groups of 32": 32, "rows": 0}


@dataclass(frozen=True)
class Read:
    """What a model found of each of N right answers."""

    log: np.ndarray
    """(N,) mean ln p of a token."""
    greedy: np.ndarray
    """(N,) whether each token is the most probable one."""


def prepared(bundle: Bundle, data: Dataset) -> Iterator[dict[str, Tensor]]:
    """The language model's inputs, pictures already as the tokens it is given."""
    for samples in batches(data, BATCH):
        inputs = bundle.prepare("language", [bundle.items("language", sample)[0] for sample in samples])
        images = {name: value for name, value in inputs.items() if name.startswith("pixel")}
        if images:
            width = bundle.model.config.text_config.hidden_size
            rows = bundle.encode("vision", images)
            inputs = {name: value for name, value in inputs.items() if name not in images}
            inputs["image_tokens"] = rows.unflatten(1, (-1, width))
        yield inputs


@torch.inference_mode()
def led(bundle: Bundle, asked: list[dict[str, Tensor]]) -> Read:
    """Lead a model through the right answers."""
    logs, greedy = [], []
    for inputs in asked:
        tokens = bundle.forced.next_tokens(bundle.model, inputs)
        roots = bundle.encode("language", inputs).unflatten(1, (tokens.shape[1], -1))
        said = tokens >= 0
        each = torch.zeros(tokens.shape, dtype=torch.float64)
        each[said] = token_log_likelihoods(roots[said], tokens[said]).double()
        logs.append(each.sum(1) / said.sum(1))
        greedy.append(((roots.argmax(2) == tokens) | ~said).all(1))
    return Read(torch.cat(logs).numpy(), torch.cat(greedy).double().numpy())


def compared(
    model: Path,
    ways: dict[str, dict[str, Any]],
    groups: Sequence[str],
    asked: Dataset,
    known: Dataset,
    samples: int,
    vision: bool = False,
) -> Iterator[dict[str, Any]]:
    """Round the model's language tower in every way, and its `vision` tower; each beside the original, and beside nearest."""
    original = checkpoint.load(model)
    with torch.inference_mode():
        inputs = list(prepared(original, asked))
    reads = {"original": led(original, inputs)}
    rows: dict[str, Any] = {"original": {"log_likelihood": bootstrap(reads["original"].log).to_json()}}
    for group in groups:
        for way, parameters in ways.items():
            name, bundle = f"{way}, {group}", copy.deepcopy(original)
            alone = way.endswith(", texts alone")
            shown = without_pictures(known, samples) if alone else known
            context = Context(data=shown, num_samples=samples, batch_size=BATCH)
            if vision:
                own = WAYS["nearest"] if alone else {k: v for k, v in parameters.items() if k != "balance"}
                rounded(bundle, "vision", group, own, context)
            started = time.perf_counter()
            plan = rounded(bundle, "language", group, parameters, context)
            seconds = time.perf_counter() - started
            with torch.inference_mode():
                reads[name] = led(bundle, list(prepared(bundle, asked)) if vision else inputs)
            rows[name] = {
                "log_likelihood": bootstrap(reads[name].log).to_json(),
                "against_original": paired(reads["original"], reads[name]),
                "against_nearest": paired(reads[f"nearest, {group}"], reads[name]),
                "calibrated_on": samples,
                "seconds": round(seconds, 1),
                "scaled": len(plan.decisions.get("scaled", {})),
                "folded": len(plan.decisions.get("folds", {})),
                "image_tokens_count": plan.decisions["towers"]["language"].get("image_tokens_count", {}),
            }
            rival = RIVALS.get(way, "")
            if f"{rival}, {group}" in reads:
                rows[name][f"against_{rival}"] = paired(reads[f"{rival}, {group}"], reads[name])
            for ending in TEXT_ONLY:
                mixed = name.replace(ending, "")
                if mixed != name and mixed in reads:
                    rows[name]["against_mixed"] = paired(reads[mixed], reads[name])
            print(name, json.dumps(rows[name]), flush=True)
            yield rows


def rounded(bundle: Bundle, tower: str, group: str, parameters: dict[str, Any], context: Context) -> Plan:
    """Round one tower in place."""
    given = {**FIXED, "towers": (tower,), "scheme": "W4A16", "group_size": GROUPS[group], **parameters}
    made = Quantize(**given)
    made.check(bundle)
    plan = made.plan(bundle, context)
    made.apply(bundle, plan)
    return plan


def without_pictures(data: Dataset, count: int) -> Dataset:
    """Return the samples that calibration would draw, as texts."""
    chosen = data.subset(count, 0)
    return Dataset(Memory([replace(sample, picture=None) for sample in chosen]), f"{data.name}, texts alone")


def paired(before: Read, after: Read) -> dict[str, Any]:
    """What changed, sample by sample, with intervals."""
    return {
        "log_likelihood": paired_difference(before.log, after.log).to_json(),
        "greedy": paired_difference(before.greedy, after.greedy).to_json(),
    }


def main() -> None:
    """Make, measure, write bench/results/fitted_weights.json."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--samples", type=int, default=64, help="passages")
    options.add_argument("--questions", type=int, default=300)
    options.add_argument("--calibrated-on", type=int, default=64, help="questions")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument(
        "--only", choices=("smollm2", "mini_vlm", VISION_TOO), help="leave the others as they are known"
    )
    options.add_argument("--way", action="append", choices=WAYS | SHOWN, help="beside nearest; repeatable")
    options.add_argument("--group", action="append", choices=GROUPS, help="repeatable")
    given = options.parse_args()
    groups = given.group or list(GROUPS)

    def asked_for(ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {way: ways[way] for way in ways if not given.way or way in ("nearest", *given.way)}

    torch.set_num_threads(given.threads)
    if given.only in (None, "smollm2"):
        passages = open_data(str(assets.passages("test"))).subset(given.samples, 0)
        known = open_data(str(assets.passages("calibration")))
        for rows in compared(assets.smolvlm(), asked_for(WAYS), groups, passages, known, 30):
            write(given, "smollm2", rows)
    for name in ("mini_vlm", VISION_TOO):
        if given.only not in (None, name):
            continue
        questions = open_data(str(assets.vqa("heldout"))).subset(given.questions, 0)
        known, vision = open_data(str(assets.vqa("training"))), name == VISION_TOO
        ways = asked_for(WAYS | SHOWN)
        for rows in compared(assets.mini_vlm(), ways, groups, questions, known, given.calibrated_on, vision):
            write(given, name, rows)


def write(given: argparse.Namespace, name: str, rows: dict[str, Any]) -> None:
    """Write what is known of a model; what is known of the other stays, and of rows that were not asked for."""
    document = read(RESULT.stem)
    if given.way or given.group:
        rows = document.get(name, {}) | rows
    else:
        document["command"] = f"python -m bench.fitted_weights --samples {given.samples} --questions {given.questions}"
    document["versions"] = {"mmc": mmcompress.__version__, "torch": torch.__version__}
    write_result(RESULT, document | {name: rows})


if __name__ == "__main__":
    main()
