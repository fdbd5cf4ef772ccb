"""What it saves that a token goes through the experts chosen for it alone: one mixture of Qwen3-VL-MoE's kind, random weights.

The same block (router and experts) is exported in two forms: every expert computes for every token, in plain products, or tokens
go through their experts alone, by onnxruntime's MoE and QMoE. Both are timed in one interleaved run, for one token and for a
prompt, in float32 and with weights of 8 and 4 bits. Each call is given other tokens: else one token's few experts would stay in
the cache. Nothing is said of accuracy, which random weights have none of; how far a side's output is from torch's in float32 is
noted.

    python -m bench.experts [--rounds 30] [--work FOLDER]      writes bench/results/experts.json
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxscript import ir
from torch import nn
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from bench.answer_sides import parser, workplace, write
from mmcompress.export.graph import simplify
from mmcompress.export.onnx import DEFAULT_OPSETS
from mmcompress.export.trace import quiet, to_onnx
from mmcompress.measure.latency import compare, interleaved
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.runner import Step
from mmcompress.measure.runners import open_runner
from mmcompress.passes.base import Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.surgery.routing import as_exported, chosen_alone

SHAPE = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4}
TIMED = {"token": 1, "prompt": 128}
TURNS = 32
"""How many tokens, or prompts, are computed before the first comes again."""
SCHEMES = {"fp32": "", "W8A16": "W8A16", "W4A16": "W4A16"}
FORMS = {"every": False, "chosen": True}


def block() -> nn.Module:
    """A mixture whose outputs are of the size of its inputs."""
    torch.manual_seed(0)
    made: nn.Module = Qwen3VLMoeTextSparseMoeBlock(Qwen3VLMoeTextConfig(**SHAPE))
    made.experts.config._experts_implementation = "eager"  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return made.eval()


def quantized(mixture: nn.Module, scheme: str) -> nn.Module:
    """The mixture with experts of integers, as `mmc quantize` makes them."""
    made = copy.deepcopy(mixture)
    if scheme:
        plan = Plan({"layers": {"experts": scheme}, "groups": {"experts": 32}})
        made.experts = Quantize(scheme=scheme).maker.made(made.get_submodule("experts"), "experts", plan)
    return made


def export(mixture: nn.Module, chosen: bool, path: Path) -> Path:
    """Write the graph of a mixture that takes "x" (batch, tokens, C)."""
    router, experts = mixture.get_submodule("gate"), mixture.get_submodule("experts")
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    inputs = (torch.zeros(3, 5, SHAPE["hidden_size"]),)
    with quiet(), torch.no_grad(), chosen_alone(chosen), as_exported(experts.config, {router: experts}):
        program = torch.export.export(mixture, inputs, dynamic_shapes=dynamic, strict=False)
        model = to_onnx(program, ["x"], ["y"], DEFAULT_OPSETS["float32"])
    simplify(model)
    ir.save(model, path)
    return path


def in_turn(steps: Sequence[Step]) -> Step:
    """A step that is another one of `steps` each time."""
    rest = itertools.cycle(steps)
    return lambda: next(rest)()


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    """The difference as a share of what was wanted."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def main() -> None:
    """Export, time, write bench/results/experts.json and print the summary."""
    given = parser(__doc__, rounds=30).parse_args()
    mixture = block()
    rows: list[dict[str, Any]] = []
    with workplace(given) as work:
        graphs = {
            f"{name}, {form}": export(quantized(mixture, scheme), chosen, work / f"{name}-{form}.onnx")
            for name, scheme in SCHEMES.items()
            for form, chosen in FORMS.items()
        }
        runners = {name: open_runner("onnxruntime", path, given.threads) for name, path in graphs.items()}
        for what, tokens in TIMED.items():
            x = torch.randn(TURNS, 1, tokens, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                wanted = mixture(x[0]).numpy()
            steps = {name: in_turn([each.bind({"x": one.numpy()}) for one in x]) for name, each in runners.items()}
            taken = interleaved(steps, rounds=given.rounds)
            for name, samples in taken.items():
                scheme = name.partition(",")[0]
                row = {"what": what, "side": name, "p50_ms": samples.summary().p50_ms.to_json()}
                row["against_every"] = compare(taken[f"{scheme}, every"], samples).to_json()
                row["against_fp32_every"] = compare(taken["fp32, every"], samples).to_json()
                row["against_fp32_chosen"] = compare(taken["fp32, chosen"], samples).to_json()
                row["off"] = round(off(runners[name].run({"x": x[0].numpy()})["y"], wanted), 7)
                rows.append(row)
                print(json.dumps(row), flush=True)
        result = {"latency": rows, "bytes": {name: path.stat().st_size for name, path in graphs.items()}}
    write("experts", given, {}, {"machine": machine_facts(given.threads), "shape": SHAPE, "tokens": TIMED, **result})


if __name__ == "__main__":
    main()
