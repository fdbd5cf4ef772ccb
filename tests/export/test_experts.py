"""Experts in a graph, in both forms: what they compute, what they hold, what that costs, and who can run it."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mmcompress.errors import UsageError
from mmcompress.export.onnx import experts_for, through_chosen
from mmcompress.export.rounding import rounds, unrounded
from mmcompress.manifest import Record
from mmcompress.measure.onnx_graph import rounded_blocks
from mmcompress.measure.onnx_recount import onnx_macs
from mmcompress.measure.runners import open_runner
from tests import tiny
from tests.mixtures import dequantized, exported, mixture, quantized

MODEL = "qwen3_vl_moe"
KINDS: dict[str, dict[str, Any]] = {
    "float": {},
    "8 bits": {"scheme": "W8A16"},
    "8 bits, floats in": {"scheme": "W8A16", "target": "openvino"},
    "4 bits": {"scheme": "W4A16"},
    "4 bits by rows": {"scheme": "W4A16", "size": 48},
    "8 bits, no blocks": {"scheme": "W8A16", "neurons": 24},
}


@cache
def graph_of(kind: str, chosen: bool) -> onnx.ModelProto:
    """The graph of a kind, which nobody changes."""
    return exported(sides(kind)[0], chosen)


def sides(kind: str) -> tuple[Any, Any]:
    """The mixture to be exported, and one in floats that computes what it should."""
    settings = dict(KINDS[kind])
    block = mixture(neurons=settings.pop("neurons", 48))
    if not settings:
        return block, block
    made = quantized(block, **settings)
    return made, dequantized(block, made)


def ran(graph: onnx.ModelProto, place: Path, x: np.ndarray, runner: str = "onnxruntime") -> np.ndarray:
    onnx.save(graph, place / "graph.onnx")
    found: np.ndarray = open_runner(runner, place / "graph.onnx", 1).run({"x": x})["y"]
    return found


def states(batch: int, tokens: int) -> np.ndarray:
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(2)).numpy()


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        *((kind, True) for kind in KINDS),
        *((kind, False) for kind in KINDS if kind not in ("float", "8 bits, no blocks")),
    ],
)
def test_graphs_compute_what_torch_does(kind: str, chosen: bool, tmp_path: Path) -> None:
    """Exactly where inputs stay floats; a runtime that rounds them in blocks is within what that costs."""
    _, wanted = sides(kind)
    graph = graph_of(kind, chosen)
    names = {node.op_type for node in graph.graph.node}
    assert ("QMoE" in names) == (chosen and kind != "float")
    assert ("MoE" in names) == (chosen and kind == "float")
    assert ("TopK" in names) != chosen  # the operator does what the router would
    for x in (states(1, 1), states(2, 7)):
        with torch.no_grad():
            expected = wanted(torch.from_numpy(x)).numpy()
        plain = unrounded(graph) if rounds(graph) else graph
        np.testing.assert_allclose(ran(plain, tmp_path, x), expected, rtol=0, atol=2e-6)
        assert np.linalg.norm(ran(graph, tmp_path, x) - expected) < 0.05 * np.linalg.norm(expected)
    rounding = kind in ("8 bits", "4 bits", "4 bits by rows")
    assert rounds(graph) == rounding == (rounded_blocks(graph) > 0)


@pytest.mark.parametrize("kind", ["8 bits, floats in", "4 bits"])
def test_openvino_runs_every_expert(kind: str, tmp_path: Path) -> None:
    _, wanted = sides(kind)
    x = states(2, 7)
    with torch.no_grad():
        expected = wanted(torch.from_numpy(x)).numpy()
    found = ran(graph_of(kind, False), tmp_path, x, "openvino")
    assert np.linalg.norm(found - expected) < (1e-5 if "floats" in kind else 0.05) * np.linalg.norm(expected)
    with pytest.raises(UsageError, match="openvino cannot load") as caught:
        ran(graph_of(kind, True), tmp_path, x, "openvino")
    assert caught.value.hint == "export it with --experts every"


def test_inputs_rounded_in_torch_are_those_that_onnxruntime_rounds(tmp_path: Path) -> None:
    block = quantized(mixture(), "W4A8")
    x = states(2, 7)
    with torch.no_grad():
        expected = block(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ran(exported(block, True), tmp_path, x), expected, rtol=0, atol=2e-6)


def test_integers_are_stored_once_and_macs_are_those_of_the_chosen(tmp_path: Path) -> None:
    """32 channels, 48 neurons, 4 experts, 2 chosen: 4 * (96 * 32 + 32 * 48) weights, a token meets half of them."""
    weights = 4 * (96 * 32 + 32 * 48)
    macs = {}
    for kind, size in (("4 bits", weights // 2), ("8 bits", weights)):
        for chosen in (True, False):
            graph = graph_of(kind, chosen)
            held = [onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer]
            codes = sum(array.nbytes for array in held if array.dtype == np.uint8)
            # Zero points of 4 bits: 3 groups of 16 in a row of 48, 2 in one of 32.
            points = (4 * (96 * 1 + 32 * 2) if chosen else 4 * 96 + 32 * 6) if kind == "4 bits" else 0
            assert codes == size + points
            onnx.save(graph, tmp_path / "graph.onnx")
            counted = onnx_macs(tmp_path / "graph.onnx", {"x": (2, 7, 32)})
            assert not counted.uncounted
            macs[chosen] = counted.total
        assert macs[True] == 14 * (2 * (96 * 32 + 32 * 48) + 4 * 32)
        assert macs[False] == 14 * (4 * (96 * 32 + 32 * 48) + 4 * 32)


def test_other_gates_than_silu_compute_in_every_expert() -> None:
    block = mixture()
    block.experts.act_fn = nn.GELU()
    names = {node.op_type for node in exported(block, chosen=True).graph.node}
    assert "MoE" not in names
    assert "TopK" in names


def test_which_form_is_taken() -> None:
    bundle = tiny.bundle(MODEL)
    assert through_chosen(bundle, "auto", "float32")
    assert not through_chosen(bundle, "every", "float32")
    assert not through_chosen(bundle, "auto", "float16")
    for target, wanted in (("cpu", True), ("openvino", False), ("cuda", False)):
        there = dataclasses.replace(bundle, history=[Record("quantize", {"target": target}, {}, {}, 0.0)])
        assert through_chosen(there, "auto", "float32") == wanted
        assert through_chosen(there, "chosen", "float32")
    with pytest.raises(UsageError, match="takes float32 alone") as caught:
        through_chosen(bundle, "chosen", "float16")
    assert caught.value.hint
    with pytest.raises(UsageError, match="clip models have none"):
        through_chosen(tiny.bundle("clip"), "chosen", "float32")
    assert experts_for(["torch", "onnxruntime"]) == "auto"
    assert experts_for(["onnxruntime", "openvino"]) == "every"
