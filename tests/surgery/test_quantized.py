"""Int8 layers: what they store, that integers would give the same, that they export as integers."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmcompress.ops.rounding import INT8, UINT8, Levels, fake_quantize, quantize, scale_from_range
from mmcompress.surgery.folding import fold
from mmcompress.surgery.quantized import (
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    TiedLinear,
    can_quantize,
    drop_ties,
    quantized,
)
from mmcompress.surgery.rounding_operators import translation_table

GRIDS = pytest.mark.parametrize("inputs", [UINT8, INT8], ids=["uint8", "int8"])


def linear(seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(24, 10, bias=bias)


def calibrated(layer: nn.Module, inputs: Levels, low: float = -3.0, high: float = 4.0) -> QuantizedLinear:
    made = quantized(layer, inputs)
    made.set_input_grid(*scale_from_range(torch.tensor(low), torch.tensor(high), inputs))
    assert isinstance(made, QuantizedLinear)
    return made


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_weights_are_off_by_at_most_half_a_step() -> None:
    for layer in (linear(), nn.Conv2d(3, 8, 4, stride=4), nn.Embedding(50, 12)):
        made = quantized(layer, None)
        assert isinstance(layer.weight, Tensor)
        scale = made.weight_scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        assert made.weight_int8.dtype == torch.int8
        assert ((made.weight - layer.weight).abs() <= scale * 0.5001).all()
        assert made.weight_int8.abs().amax() == 127


@GRIDS
def test_integer_arithmetic_gives_the_same(inputs: Levels) -> None:
    """What an engine does: integers multiplied and summed exactly, one multiplication by the scales, then the bias."""
    made = calibrated(linear(), inputs)
    states = x(2, 5, 24)
    assert made.input_scale is not None
    assert made.input_zero_point is not None
    q = quantize(states, made.input_scale, made.input_zero_point, inputs).long() - made.input_zero_point.long()
    sums = q @ made.weight_int8.long().T
    want = sums * (made.input_scale.double() * made.weight_scale.double()) + made.bias.double()
    torch.testing.assert_close(made(states).double(), want, rtol=1e-5, atol=1e-5)


def test_weight_only_keeps_inputs_as_they_are() -> None:
    made = quantized(linear(), None)
    states = x(4, 24)
    assert set(made.state_dict()) == {"weight_int8", "weight_scale", "bias"}
    assert torch.equal(made(states), nn.functional.linear(states, made.weight, made.bias))


@GRIDS
def test_a_gain_changes_the_rounding_only(inputs: Levels) -> None:
    layer = linear()
    gain = torch.linspace(0.5, 2, 24)
    made = quantized(layer, inputs, gain=gain)
    made.set_input_grid(*scale_from_range(torch.tensor(-9.0), torch.tensor(9.0), inputs))
    states = x(6, 24)
    torch.testing.assert_close(made(states), layer(states), rtol=0.1, atol=0.15)
    assert not torch.equal(made(states), calibrated(layer, inputs)(states))
    gain.zero_()
    assert made.input_gain is not None
    assert made.input_gain.all()


def test_convolution_and_embedding_follow_the_float_layers() -> None:
    torch.manual_seed(0)
    conv, table = nn.Conv2d(3, 8, 4, stride=4), nn.Embedding(50, 12)
    made, rows = quantized(conv, None), quantized(table, None)
    torch.testing.assert_close(made(x(2, 3, 16, 16)), conv(x(2, 3, 16, 16)), rtol=0.05, atol=0.02)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(rows(ids), rows.weight[ids])
    assert made.weight.dtype == rows.weight.dtype == torch.float32


@GRIDS
def test_gradients_reach_the_input_and_the_bias(inputs: Levels) -> None:
    made = calibrated(linear(), inputs)
    states = x(4, 24).requires_grad_()
    made(states).sum().backward()
    assert states.grad is not None
    # Straight through: the gradient of the float layer with the rounded weight.
    torch.testing.assert_close(states.grad, made.weight.sum(0).expand(4, -1))
    assert made.bias.grad is not None
    assert made.bias.grad.tolist() == [4.0] * 10


def test_outputs_are_rounded_behind_the_bias() -> None:
    """By hand: weights 127/127 and -127/127, inputs 0.6, 0.2 and 3; a step is 0.25, and -128..127 of them are there."""
    layer = nn.Linear(1, 2)
    layer.weight = nn.Parameter(torch.tensor([[1.0], [-1.0]]))
    layer.bias = nn.Parameter(torch.tensor([0.1, 40.0]))
    made = quantized(layer, None)
    assert isinstance(made, QuantizedLinear)
    made.add_output_grid(torch.tensor(0.25))
    assert made.output_grid() == (0.25, 0)
    # 0.7 -> 2.8 -> 3 steps; 0.3 -> 1.2 -> 1; 3.1 -> 12.4 -> 12; 39.4 and 39.8 and 37 are cut to 127 steps, 31.75.
    want = torch.tensor([[0.75, 31.75], [0.25, 31.75], [3.0, 31.75]])
    assert torch.equal(made(torch.tensor([[0.6], [0.2], [3.0]])), want)
    # -200 + 0.1 is cut to -128 steps.
    assert made(torch.tensor([[-200.0]]))[0, 0] == -32.0


@GRIDS
def test_a_grid_of_outputs_is_state_that_moves_loads_and_passes_gradients(inputs: Levels) -> None:
    made = calibrated(linear(), inputs)
    plain = set(made.state_dict())
    states = x(4, 24)
    before = made(states)
    made.add_output_grid(torch.tensor(0.05))
    assert set(made.state_dict()) - plain == {"output_scale", "output_zero_point"}
    assert torch.equal(made(states), fake_quantize(before, torch.tensor(0.05), torch.tensor(0), INT8))
    meta = calibrated(linear(seed=1), inputs)
    meta.add_output_grid()
    meta = meta.to("meta").to_empty(device="cpu")
    meta.load_state_dict(made.state_dict())
    assert torch.equal(meta(states), made(states))
    assert torch.equal(copy.deepcopy(made).half().output_zero_point, made.output_zero_point)  # type: ignore[arg-type]
    given = states.clone().requires_grad_()
    made(given).sum().backward()
    assert given.grad is not None
    inside = (before.abs() <= 127 * 0.05).float()  # straight through, but where outputs are cut off
    torch.testing.assert_close(given.grad, inside @ made.weight)


def test_rows_of_a_layer_with_rounded_outputs_are_not_scaled() -> None:
    made = calibrated(linear(), INT8)
    made.add_output_grid(torch.tensor(0.05))
    with pytest.raises(AssertionError, match="one grid"):
        fold(made, torch.full((10,), 2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_works_and_keeps_integers(dtype: torch.dtype) -> None:
    made = calibrated(linear(), UINT8)
    half = copy.deepcopy(made).to(dtype)
    assert torch.equal(half.weight_int8, made.weight_int8)
    assert half.weight.dtype == dtype
    out = half(x(4, 24).to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), made(x(4, 24)), rtol=0.05, atol=0.1)


def test_meta_layers_have_the_same_state() -> None:
    for layer in (linear(), linear(bias=False), nn.Conv2d(3, 8, 4), nn.Embedding(50, 12)):
        inputs = None if isinstance(layer, nn.Embedding) else UINT8
        real, meta = quantized(layer, inputs), quantized(copy.deepcopy(layer).to("meta"), inputs)
        assert {k: (v.shape, v.dtype) for k, v in real.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in meta.state_dict().items()
        }
        assert all(value.is_meta for value in meta.state_dict().values())
        meta.to_empty(device="cpu").load_state_dict(real.state_dict())
        assert torch.equal(meta.weight, real.weight)


def test_only_plain_layers_are_taken() -> None:
    pool = nn.MultiheadAttention(8, 2)
    assert not can_quantize(pool.out_proj)
    assert not can_quantize(nn.Conv2d(3, 4, 2, padding="same"))
    assert not can_quantize(nn.Conv2d(3, 4, 2, padding=1, padding_mode="reflect"))
    assert not can_quantize(nn.LayerNorm(4))
    assert can_quantize(linear())


class Writer(nn.Module):
    """What a language model ends in: a table, and a Linear with the same weight."""

    def __init__(self, inputs: Levels | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        table, last = nn.Embedding(50, 12), nn.Linear(12, 50)
        last.weight = table.weight
        self.table = quantized(table, None)
        self.last = quantized(last, inputs, table=self.table)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.last(self.table(ids))
        return found


def test_a_tied_linear_multiplies_by_the_tables_rows_and_stores_none() -> None:
    model = Writer(None)
    assert isinstance(model.last, TiedLinear)
    assert set(model.state_dict()) == {"table.weight_int8", "table.weight_scale", "last.bias"}
    states = x(4, 12)
    want = nn.functional.linear(states, model.table.weight, model.last.bias)
    assert torch.equal(model.last(states), want)
    # The same as a Linear quantized by itself: a scale per row is a scale per output channel.
    alone = nn.Linear(12, 50)
    with torch.no_grad():
        alone.weight.copy_(model.table.weight)
        alone.bias.copy_(model.last.bias)
    torch.testing.assert_close(quantized(alone, None)(states), want)
    model.table.weight_scale.mul_(2)
    assert not torch.equal(model.last(states), want)


@GRIDS
def test_a_tied_linear_has_an_input_grid_of_its_own(inputs: Levels) -> None:
    model = Writer(inputs)
    model.last.set_input_grid(*scale_from_range(torch.tensor(-3.0), torch.tensor(4.0), inputs))
    rest = {"last.input_scale", "last.input_zero_point", "last.bias"}
    assert set(model.state_dict()) == {"table.weight_int8", "table.weight_scale", *rest}
    plain = quantized(nn.Linear(12, 50), inputs)
    plain.load_state_dict({**model.last.state_dict(), **model.table.state_dict()})
    assert torch.equal(model.last(x(4, 12)), plain(x(4, 12)))


def test_tied_layers_stay_one_through_copies_conversions_and_loading() -> None:
    model = Writer(UINT8)
    twin = copy.deepcopy(model).half().float()
    twin.load_state_dict(model.state_dict())
    assert twin.last.table is twin.table
    assert twin.table is not model.table
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(twin(ids), model(ids))
    twin.table.weight_int8.zero_()
    assert not torch.equal(twin(ids), model(ids))


def test_ties_of_parameters_that_are_gone_are_dropped() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.writer, self.head, self.embed = Writer(None), nn.Linear(4, 6), nn.Embedding(6, 4)
            self.head.weight = self.embed.weight
            gone = {"writer.last.weight": "writer.table.weight"}
            self.all_tied_weights_keys = {"head.weight": "embed.weight", **gone}

    model = Model()
    drop_ties(model)
    assert model.all_tied_weights_keys == {"head.weight": "embed.weight"}
    drop_ties(nn.Linear(2, 2))


class Block(nn.Module):
    """Two Linears that read one normalised input, and a convolution before."""

    def __init__(self, inputs: Levels) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = quantized(nn.Conv2d(3, 16, 4, stride=4), inputs)
        self.patches.set_input_grid(*scale_from_range(torch.tensor(-3.0), torch.tensor(3.0), inputs))
        self.norm = nn.LayerNorm(16)
        self.one, self.two = (quantized(nn.Linear(16, 12), inputs, gain=torch.linspace(0.5, 2, 16)) for _ in range(2))
        for layer in (self.one, self.two):
            layer.set_input_grid(*scale_from_range(torch.tensor(-4.0), torch.tensor(4.0), inputs))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.norm(self.patches(pixels).flatten(2).transpose(1, 2))
        return self.one(tokens) * torch.sigmoid(self.two(tokens))


@GRIDS
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_export_writes_integers_once_and_onnxruntime_agrees(inputs: Levels, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    block = Block(inputs).eval()
    pixels = x(2, 3, 16, 16)
    program = torch.export.export(block, (pixels,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    made = torch.onnx.export(
        program, dynamo=True, opset_version=20, custom_translation_table=translation_table(), verbose=False
    )
    assert made is not None
    made.save(tmp_path / "block.onnx")
    graph = onnx.load(tmp_path / "block.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    matrices = [array for array in stored.values() if array.dtype == np.int8 and array.ndim >= 2]
    # Linear weights lie (in, out) and no copy of them stays behind.
    assert sorted(array.shape for array in matrices) == [(16, 3, 4, 4), (16, 12), (16, 12)]
    operators = [node.op_type for node in graph.node]
    # One for the pixels, one shared by the two Linears.
    assert operators.count("QuantizeLinear") == 2
    assert operators.count("DequantizeLinear") == 5
    assert "Transpose" not in [node.op_type for node in graph.node if node.input[0] in stored]
    session = onnxruntime.InferenceSession(tmp_path / "block.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2):
        (found,) = session.run(None, {session.get_inputs()[0].name: pixels[:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), block(pixels[:batch]).detach(), rtol=0.02, atol=0.02)


def test_types() -> None:
    made = [quantized(layer, None) for layer in (linear(), nn.Conv2d(3, 4, 2), nn.Embedding(4, 4))]
    assert [type(layer) for layer in made] == [QuantizedLinear, QuantizedConv2d, QuantizedEmbedding]
