"""The 4-bit Linear: what it stores, that it multiplies by that, that it exports as it is stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmcompress.measure.size import parameters
from mmcompress.ops.grouped import nearest
from mmcompress.surgery import quantized_base
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized_base import weights_unread

GROUPS = pytest.mark.parametrize("size", [16, 32, 96])


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 10, bias=bias)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@GROUPS
def test_two_weights_share_a_byte_and_a_group_its_scale(size: int) -> None:
    made = PackedLinear(linear(), size, nearest)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in made.state_dict().items()}
    groups = 96 // size
    assert shapes == {
        "weight_int4": ((10, 48), torch.uint8),
        "weight_scale": ((10, groups), torch.float32),
        "weight_zero_point": ((10, (groups + 1) // 2), torch.uint8),
        "bias": ((10,), torch.float32),
    }


@GROUPS
def test_it_multiplies_by_the_rounded_weight(size: int) -> None:
    layer, states = linear(), x(2, 5, 96)
    made = PackedLinear(layer, size, nearest)
    want = nearest(layer.weight, size).dequantized()
    assert torch.equal(made.weight, want)
    assert torch.equal(made(states), nn.functional.linear(states, want, layer.bias))


@pytest.mark.parametrize("bias", [True, False])
def test_a_large_weight_is_floats_some_rows_at_a_time(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PackedLinear(linear(bias), 32, nearest)
    monkeypatch.setattr(quantized_base, "AT_ONCE", 3 * 96)
    parts = PackedLinear(linear(bias), 32, nearest)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    asked: list[tuple[int, int]] = []
    rows = parts.weight_rows
    monkeypatch.setattr(parts, "weight_rows", lambda start, stop: asked.append((start, stop)) or rows(start, stop))
    want = nn.functional.linear(x(4, 96), whole.weight, whole.bias)
    torch.testing.assert_close(parts(x(4, 96)), want)
    assert asked == [(0, 3), (3, 6), (6, 9), (9, 10)]


@GROUPS
def test_meta_layers_have_the_same_state(size: int) -> None:
    real = PackedLinear(linear(), size, nearest)
    meta = PackedLinear(linear().to("meta"), size, nearest)
    assert {k: (v.shape, v.dtype) for k, v in real.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in meta.state_dict().items()
    }
    assert all(value.is_meta for value in meta.state_dict().values())
    meta.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(meta.weight, real.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_codes(dtype: torch.dtype) -> None:
    made = PackedLinear(linear(), 32, nearest)
    half = copy.deepcopy(made).to(dtype)
    assert torch.equal(half.weight_int4, made.weight_int4)
    assert torch.equal(half.weight_zero_point, made.weight_zero_point)
    assert half.weight.dtype == half(x(4, 96).to(dtype)).dtype == dtype
    torch.testing.assert_close(half(x(4, 96).to(dtype)).float(), made(x(4, 96)), rtol=0.05, atol=0.05)


def test_gradients_reach_the_input_and_the_bias() -> None:
    made = PackedLinear(linear(), 32, nearest)
    states = x(4, 96).requires_grad_()
    made(states).sum().backward()
    torch.testing.assert_close(states.grad, made.weight.sum(0).expand(4, -1))
    assert made.bias.grad is not None
    assert made.bias.grad.tolist() == [4.0] * 10


def test_its_size_is_counted_without_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PackedLinear(linear(), 32, nearest)
    counted = parameters(made)
    assert counted.elements == 96 * 10 + 10
    assert counted.bytes == 96 * 10 // 2 + 10 * 3 * 4 + 10 * 2 + 10 * 4
    monkeypatch.setattr(made, "weight_rows", lambda *_: pytest.fail("a weight was unpacked"))
    with weights_unread():
        assert made.weight.shape == (10, 96)
        assert made(x(2, 96)).shape == (2, 10)


class Block(nn.Module):
    """Two layers of different groups; the second has one scale for a whole row."""

    def __init__(self, rounds_inputs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = PackedLinear(nn.Linear(96, 64), 32, nearest, rounds_inputs)
        self.two = PackedLinear(nn.Linear(64, 12, bias=False), 64, nearest, rounds_inputs)
        self.three = PackedLinear(nn.Linear(12 * 4, 7), 48, nearest, rounds_inputs)

    def forward(self, states: Tensor) -> Tensor:
        made: Tensor = self.three(self.two(torch.relu(self.one(states))).flatten(1))
        return made


def exported(block: nn.Module, path: Path, states: Tensor) -> Any:
    import onnx
    from onnxscript import optimizer

    from mmcompress.export.graph import simplify

    program = torch.export.export(block.eval(), (states,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    made = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False, optimize=False)
    assert made is not None
    optimizer.optimize_ir(made.model)
    simplify(made.model)
    made.save(path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path).graph


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_export_writes_the_stored_bytes_and_both_engines_agree(rounds_inputs: bool, tmp_path: Path) -> None:
    import onnx
    import onnxruntime
    import openvino

    block = Block(rounds_inputs)
    graph = exported(block, tmp_path / "block.onnx", x(3, 4, 96))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    layers = (block.one, block.two, block.three)
    for node, layer, block_size in zip(products, layers, (32, 64, 16), strict=True):
        codes, scale, zero_point = (stored[name] for name in node.input[1:4])
        assert codes.shape == (layer.out_features, layer.in_features // block_size, block_size // 2)
        assert codes.tobytes() == layer.weight_int4.numpy().tobytes()
        blocks = layer.in_features // block_size
        assert scale.shape == (layer.out_features, blocks)
        assert zero_point.shape == (layer.out_features, (blocks + 1) // 2)
        level = next(attribute.i for attribute in node.attribute if attribute.name == "accuracy_level")
        assert level == (4 if rounds_inputs else 1)
    # Nothing is stored twice, nor as floats.
    assert sum(array.nbytes for array in stored.values() if array.dtype == np.uint8 and array.ndim == 3) == sum(
        layer.weight_int4.nbytes for layer in layers
    )
    session = onnxruntime.InferenceSession(tmp_path / "block.onnx", providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(tmp_path / "block.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3):
        states = x(batch, 4, 96)
        want = block(states).detach()
        off = 0.02 if rounds_inputs else 1e-5
        (found,) = session.run(None, {session.get_inputs()[0].name: states.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), want, rtol=off, atol=off)
        (other,) = compiled([states.numpy()]).values()
        torch.testing.assert_close(torch.from_numpy(other), want, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("size", [32, 1024])
def test_a_weight_too_large_for_the_exporter_to_fold_is_a_constant_too(size: int, tmp_path: Path) -> None:
    graph = exported(PackedLinear(nn.Linear(1024, 3000), size, nearest), tmp_path / "large.onnx", x(3, 2, 1024))
    assert [node.op_type for node in graph.node] == ["MatMulNBits", "Add"]
    blocks = 1024 // min(size, 128)
    held = 3000 * 1024 // 2 + 3000 * blocks * 4 + 3000 * blocks // 2 + 3000 * 4
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) == held


def test_a_gain_multiplies_the_input_and_divides_the_weight() -> None:
    layer, states, gain = linear(), x(2, 5, 96), torch.linspace(0.5, 2, 96)
    made = PackedLinear(layer, 32, nearest, gain=gain)
    want = nearest(layer.weight / gain, 32).dequantized()
    assert torch.equal(made.weight, want)
    assert torch.equal(made(states), nn.functional.linear(states * gain, want, layer.bias))
    assert set(made.state_dict()) - set(PackedLinear(layer, 32, nearest).state_dict()) == {"input_gain"}
    meta = PackedLinear(linear().to("meta"), 32, nearest, gain=torch.ones(96, device="meta"))
    meta.to_empty(device="cpu").load_state_dict(made.state_dict())
    assert torch.equal(meta(states), made(states))
