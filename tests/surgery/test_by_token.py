"""Layers that round each token, and those of 8-bit floats: what they compute, store and leave as."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxscript import optimizer
from torch import Tensor, nn

from mmcompress.export.graph import simplify
from mmcompress.export.translations import translations
from mmcompress.ops.grouped import nearest
from mmcompress.ops.token_rounding import TOKEN_FLOAT8, TOKEN_INT8, TOKEN_UINT8
from mmcompress.surgery.float8 import Float8Linear
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedEmbedding, QuantizedLinear, TiedLinear, quantized
from tests.surgery.test_packed import linear, x

export = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def by_token(layer: nn.Linear | None = None, grid: Any = TOKEN_UINT8) -> QuantizedLinear:
    made = quantized(layer or linear(), None)
    assert isinstance(made, QuantizedLinear)
    made.tokens = grid
    return made


def in_blocks(layer: nn.Linear) -> QuantizedLinear:
    made = quantized(layer, None)
    assert isinstance(made, QuantizedLinear)
    made.rounds_inputs = True
    return made


def graph_of(module: nn.Module, path: Path, states: Tensor) -> Any:
    """The simplified graph, of a dynamic batch."""
    program = torch.export.export(module.eval(), (states,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=20,
        verbose=False,
        optimize=False,
        custom_translation_table=translations(),
    )
    assert made is not None
    optimizer.optimize_ir(made.model)
    simplify(made.model)
    made.save(path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path).graph


def run(path: Path, states: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: states.numpy()})[0])


def test_integers_of_each_token_give_the_same() -> None:
    """What an engine does: integers multiplied exactly, then the token's scale and the row's."""
    made, states = by_token(), x(2, 5, 96)
    scale = states.abs().amax(-1, keepdim=True) / 127
    codes = (states / scale).round().to(torch.int64)
    want = (codes @ made.weight_int8.t().long()) * scale * made.weight_scale + made.bias
    torch.testing.assert_close(made(states), want.float(), rtol=1e-5, atol=1e-5)


def test_4_bits_beside_rounded_inputs_multiply_those() -> None:
    made, states = PackedLinear(linear(), 32, nearest), x(2, 5, 96)
    plain = made(states)
    made.tokens = TOKEN_INT8
    blocks = states.unflatten(-1, (3, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = ((blocks / scale).round() * scale).flatten(-2)
    torch.testing.assert_close(made(states), nn.functional.linear(rounded, made.weight, made.bias))
    assert not torch.equal(made(states), plain)


@pytest.mark.parametrize("static", [True, False])
def test_float8_multiplies_what_it_stores(static: bool) -> None:
    layer, states = linear(), x(2, 5, 96)
    made = Float8Linear(layer, static)
    assert made.weight_float8.dtype == torch.float8_e4m3fn
    assert made.weight_float8.float().abs().amax(1).tolist() == [448.0] * 10
    # A number is off by a sixteenth of itself, or by half of the smallest step, 2^-10 of the row's scale.
    off = (made.weight - layer.weight).abs()
    assert (off <= torch.maximum(layer.weight.abs() / 16, made.weight_scale[:, None] * 2**-10) * 1.001).all()
    if static:
        made.set_input_grid(torch.tensor(0.01))
        scale = torch.tensor(0.01)
    else:
        scale = states.abs().amax(-1, keepdim=True) / 448
    rounded = (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    want = nn.functional.linear(rounded, made.weight_float8.float() * made.weight_scale[:, None], layer.bias)
    torch.testing.assert_close(made(states), want)


@pytest.mark.parametrize("static", [True, False])
def test_float8_on_meta_and_back(static: bool) -> None:
    real, meta = Float8Linear(linear(), static), Float8Linear(linear().to("meta"), static)
    described = [{k: (v.shape, v.dtype) for k, v in made.state_dict().items()} for made in (real, meta)]
    assert described[0] == described[1]
    assert all(value.is_meta for value in meta.state_dict().values())
    meta.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(meta(x(3, 96)), real(x(3, 96)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float8_keeps_its_bits_in_other_precisions(dtype: torch.dtype) -> None:
    made = Float8Linear(linear(), static=True)
    other = copy.deepcopy(made).to(dtype)
    assert torch.equal(other.weight_float8.view(torch.uint8), made.weight_float8.view(torch.uint8))
    assert other.weight_float8.dtype == torch.float8_e4m3fn
    assert other.weight.dtype == other(x(4, 96).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    "made",
    [by_token(), by_token(grid=TOKEN_INT8), Float8Linear(linear(), False), Float8Linear(linear(), True)],
    ids=["uint8", "int8", "float8", "static float8"],
)
def test_gradients_pass_the_rounding(made: Any) -> None:
    states = x(4, 96).clamp(-1, 1).requires_grad_()  # a fresh static grid of 8-bit floats has steps of 1
    made(states).sum().backward()
    torch.testing.assert_close(states.grad, made.weight.sum(0).expand(4, -1))
    assert made.bias.grad.tolist() == [4.0] * 10
    made.bias.grad = None


@export
@pytest.mark.parametrize(
    ("made", "kind", "zero"),
    [
        (by_token(), np.uint8, 128),
        (by_token(grid=TOKEN_INT8), np.int8, 0),
        (Float8Linear(linear(), False), None, 0),
        (Float8Linear(linear(), True), None, 0),
    ],
    ids=["uint8", "int8", "float8", "static float8"],
)
def test_a_token_leaves_with_its_scale_outside_of_the_product(made: Any, kind: Any, zero: int, tmp_path: Path) -> None:
    if isinstance(made, Float8Linear) and made.input_scale is not None:
        made.set_input_grid(torch.tensor(0.01))
    graph = graph_of(made, tmp_path / "made.onnx", x(3, 2, 96))
    stored = {tensor.name: tensor for tensor in graph.initializer}
    (node,) = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    scale = float(numpy_helper.to_array(stored[node.input[1]]))
    point = stored[node.input[2]]
    assert (scale, float(numpy_helper.to_array(point).astype(np.float32))) == pytest.approx(made.input_grid())
    assert float(made.input_grid()[1]) == zero
    codes = made.weight_float8 if kind is None else made.weight_int8
    (weight,) = [tensor for tensor in graph.initializer if list(tensor.dims) == [96, 10]]
    assert weight.raw_data == codes.view(torch.uint8).t().contiguous().numpy().tobytes()
    assert kind is None or numpy_helper.to_array(point).dtype == kind
    for batch in (1, 3):
        states = x(batch, 2, 96)
        states[0, 0] = 0  # a token of zeros
        torch.testing.assert_close(run(tmp_path / "made.onnx", states), made(states).detach(), rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    """A table and the Linear that shares its weight, as a language model has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        table = quantized(nn.Embedding(50, 96), None)
        assert isinstance(table, QuantizedEmbedding)
        self.table, self.first = table, in_blocks(nn.Linear(96, 96))
        self.last = quantized(nn.Linear(96, 50, bias=False), None, table=table)
        assert isinstance(self.last, TiedLinear)
        self.last.rounds_inputs = True

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.last(self.first(self.table(ids)))
        return made


@export
def test_what_is_multiplied_in_blocks_is_stored_once_with_the_table_it_shares(tmp_path: Path) -> None:
    module = Tied()
    ids = torch.randint(0, 50, (3, 4), generator=torch.Generator().manual_seed(0))
    graph = graph_of(module, tmp_path / "tied.onnx", ids)
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node, layer in zip(products, (module.first, module.last), strict=True):
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert (attributes["bits"], attributes["block_size"], attributes["accuracy_level"]) == (8, 32, 4)
        codes, scales = stored[node.input[1]], stored[node.input[2]]
        assert codes.dtype == np.uint8
        want = layer.weight_int8.numpy()
        assert np.array_equal(codes.reshape(want.shape).astype(np.int16) - 128, want)
        assert np.array_equal(scales, np.repeat(layer.weight_scale.numpy()[:, None], 3, axis=1))
    integers = [value for value in stored.values() if value.dtype in (np.int8, np.uint8)]
    assert sum(value.nbytes for value in integers) == 96 * 96 + 50 * 96
    repeated = module.first.repeated_bytes + module.last.repeated_bytes  # type: ignore[operator]
    assert repeated == 2 * 4 * (96 + 50)  # two more blocks for each row
    want = module(ids).detach()
    found = run(tmp_path / "tied.onnx", ids)
    assert 1e-4 < (found - want).abs().max() < 0.02 * want.abs().max()
    exact = onnx.load(tmp_path / "tied.onnx")
    for node in exact.graph.node:
        for attribute in node.attribute:
            attribute.i = 1 if attribute.name == "accuracy_level" else attribute.i
    onnx.save(exact, tmp_path / "exact.onnx")
    torch.testing.assert_close(run(tmp_path / "exact.onnx", ids), want, rtol=1e-4, atol=1e-4)


@export
@pytest.mark.parametrize(("width", "operator"), [(40, "MatMul"), (48, "MatMulNBits")])
def test_widths_no_block_divides_are_unpacked(width: int, operator: str, tmp_path: Path) -> None:
    graph = graph_of(in_blocks(nn.Linear(width, 8)), tmp_path / "odd.onnx", x(3, 2, width))
    assert [node.op_type for node in graph.node if "MatMul" in node.op_type] == [operator]


def test_layers_say_why_tensorrt_cannot_read_them() -> None:
    assert "zero point" in by_token().reason_for_cpus
    assert "in blocks" in in_blocks(linear()).reason_for_cpus
    assert not by_token(grid=TOKEN_INT8).reason_for_cpus
    assert not Float8Linear(linear(), False).reason_for_cpus
    assert Float8Linear(linear(), False).tokens is TOKEN_FLOAT8
