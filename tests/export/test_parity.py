"""A graph that computes something else must not pass, and the report must point at the right place."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from mmcompress.errors import GateFailed
from mmcompress.export.onnx import export_onnx
from mmcompress.export.parity import TOLERANCES, Tolerance, _chosen_alike, _worst, check_parity, compare, corners
from mmcompress.export.rounding import graph_grids, unrounded
from mmcompress.export.running import open_graph, run_torch
from mmcompress.export.trace import traced
from mmcompress.passes import build
from mmcompress.passes.base import Context
from tests import tiny

PROJECTOR = "model.multi_modal_projector.linear_1/MatMul"


def edited(source: Path, target: Path, name: str, factor: float) -> Path:
    """Copy a graph with one initialiser scaled."""
    graph = onnx.load(source)
    (tensor,) = [tensor for tensor in graph.graph.initializer if tensor.name == name]
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array((array * factor).astype(array.dtype), name))
    onnx.save(graph, target)
    return target


def initializer_of(path: Path, node: str, position: int) -> str:
    return str(next(n for n in onnx.load(path).graph.node if n.name == node).input[position])


def test_differences_by_hand():
    want = np.array([[3.0, 4.0], [0.0, 2.0]])
    row = compare(want, np.array([[3.0, 4.0], [2.0, 0.0]]), "x")
    assert (row.batch, row.tokens, row.max_abs, row.relative, row.cosine) == (2, 0, 2.0, 0.5, 0.0)


def test_nan_is_never_within_tolerance():
    row = compare(np.ones((1, 2)), np.array([[np.nan, 1.0]]), "x")
    assert not Tolerance(float("inf"), -1).holds(row)


def test_a_wrong_weight_is_found_in_its_block(clip, clip_export, tmp_path):
    path = clip_export.artifact.path("vision")
    bias = initializer_of(path, "vision_model.encoder.layers.1.mlp.fc2/Add", 1)
    broken = edited(path, tmp_path / "vision.onnx", bias, 1.05)
    with pytest.raises(
        GateFailed, match=r"vision part differs .* batch 1.* first in vision_model\.encoder\.layers\.1$"
    ):
        check_parity(traced(clip, "vision", "float32"), broken, precision="float32")


def test_where_float32_itself_errs_more_than_the_limit_its_own_error_is_the_measure(
    clip, clip_export, tmp_path, monkeypatch
):
    path = clip_export.artifact.path("vision")
    module = traced(clip, "vision", "float32")
    monkeypatch.setitem(TOLERANCES, "float32", Tolerance(relative=1e-12, cosine=0.99999))
    rows = check_parity(module, path, precision="float32")
    assert 1e-12 < max(row.relative for row in rows) < 1e-5
    bias = initializer_of(path, "vision_model.encoder.layers.1.mlp.fc2/Add", 1)
    with pytest.raises(GateFailed, match="vision part differs"):
        check_parity(module, edited(path, tmp_path / "vision.onnx", bias, 1.0001), precision="float32")


def test_where_rows_are_chosen_a_few_may_be_others(tmp_path, monkeypatch):
    """Of eight rows two, wherever the others then stand; and never a weight that is wrong, which changes them all."""
    limit = TOLERANCES["float32"]
    want = np.random.default_rng(0).normal(size=(2, 8, 16))
    other = want.copy()
    other[1, 2:4] = -want[1, 2:4]
    assert _chosen_alike([want], [other], limit)
    assert _chosen_alike([want], [np.roll(other, 1, axis=1)], limit)
    other[1, 4] *= -1
    assert not _chosen_alike([want], [other], limit)
    assert not _chosen_alike([want], [want * 1.001], limit)
    # Each row of one is there in the other, but not the other way round.
    assert not _chosen_alike([want], [want[:, [0, 0, 0, 1, 1, 1, 2, 2]]], limit)
    for value in (np.nan, np.inf):
        other = want.copy()
        other[0, :1, 0] = value
        assert not _chosen_alike([want], [other], limit)
    rounded = want + np.random.default_rng(1).normal(size=want.shape) * 0.05
    assert _chosen_alike([want], [rounded], TOLERANCES["quantized"])
    assert not _chosen_alike([want], [rounded[::-1]], TOLERANCES["quantized"])

    bundle = tiny.bundle("llava_clip")
    made = build("reduce-visual-tokens", {"keep": 0.5})
    made.apply(bundle, made.plan(bundle, Context()))
    module = traced(bundle, "vision", "float32")
    path = export_onnx(bundle, tmp_path / "out", batches=(1,)).artifact.path("vision")
    nudged = edited(path, tmp_path / "vision.onnx", initializer_of(path, PROJECTOR, 1), 1.05)
    with pytest.raises(GateFailed, match="vision part differs") as raised:
        check_parity(module, nudged, precision="float32")
    assert "report it" in raised.value.hint
    with monkeypatch.context() as unsteady:
        # Whoever has to agree with float64 to the last bit cannot.
        unsteady.setitem(TOLERANCES, "float32", Tolerance(relative=1e-5, cosine=1.1))
        with pytest.raises(GateFailed, match="vision part differs") as raised:
            check_parity(module, nudged, precision="float32")
    assert "torch's own float64 differs" in raised.value.hint
    monkeypatch.setattr("mmcompress.export.parity._worst", lambda *given: replace(_worst(*given), relative=1.0))
    monkeypatch.setattr("mmcompress.export.parity._as_exact_as_torch", lambda *given: False)
    assert check_parity(module, path, precision="float32")
    monkeypatch.setattr(module, "part", replace(module.part, choosing=False))
    with pytest.raises(GateFailed, match="vision part differs"):
        check_parity(module, path, precision="float32")


def test_a_wrong_activation_grid_is_found(unsigned, unsigned_export, tmp_path):
    path = unsigned_export.artifact.path("vision")
    scale = initializer_of(path, "vision_model.encoder.layer.2.mlp.fc1/QuantizeLinear", 1)
    broken = edited(path, tmp_path / "vision.onnx", scale, 1.01)
    with pytest.raises(GateFailed, match="rounded differently"):
        check_parity(traced(unsigned, "vision", "float32"), broken, precision="float32")


def test_a_wrong_weight_scale_is_found_although_rounding_hides_it(unsigned, unsigned_export, tmp_path):
    path = unsigned_export.artifact.path("vision")
    node = "vision_model.encoder.layer.0.mlp.fc1/DequantizeLinear"
    names = [n.name for n in onnx.load(path).graph.node if n.name.startswith(node)]
    weights = {name: initializer_of(path, name, 1) for name in names}
    graph = onnx.load(path)
    sizes = {t.name: onnx.numpy_helper.to_array(t).size for t in graph.graph.initializer}
    (scale,) = [value for value in weights.values() if sizes[value] > 1]
    broken = edited(path, tmp_path / "vision.onnx", scale, 1.002)
    with pytest.raises(GateFailed, match=r"first in vision_model\.encoder\.layer\.0"):
        check_parity(traced(unsigned, "vision", "float32"), broken, precision="float32")


def test_unrounded_graphs_have_no_rounding_left_but_their_integers(unsigned_export):
    graph = onnx.load(unsigned_export.artifact.path("vision"))
    made = unrounded(graph)
    operators = [node.op_type for node in made.graph.node]
    assert "QuantizeLinear" not in operators
    assert operators.count("DequantizeLinear") == 18 + 1
    assert len(graph_grids(graph)) == 18 + 1
    onnx.checker.check_model(made)


def test_corners_keep_the_last_token_and_pad_every_second_row(clip):
    made = list(corners(traced(clip, "text", "float32"), (2,)))
    assert [tuple(inputs["input_ids"].shape) for inputs in made] == [(2, 8), (2, 16), (1, 20)]
    for inputs in made:
        assert (inputs["input_ids"][:, -1] == 3).all()
        assert inputs["attention_mask"][0].all()
    assert made[1]["attention_mask"][1].tolist() == [1] * 12 + [0] * 4
    # The padded row ends at its first end-of-text token, the twelfth.
    assert made[1]["input_ids"][1, 11:].tolist() == [3] * 5


def test_the_slow_reference_runs_where_onnxruntime_is_missing(clip, clip_export, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    run, name = open_graph(onnx.load(clip_export.artifact.path("vision")))
    assert name == "onnx.reference"
    inputs = clip.example_inputs("vision", 1)
    row = compare(run_torch(traced(clip, "vision", "float32"), inputs)[0], run(inputs)[0], name)
    assert TOLERANCES["float32"].holds(row)


def test_copies_do_not_touch_the_original(unsigned_export, tmp_path):
    path = unsigned_export.artifact.path("vision")
    shutil.copy(path, tmp_path / "v.onnx")
    unrounded(onnx.load(path))
    assert path.read_bytes() == (tmp_path / "v.onnx").read_bytes()
