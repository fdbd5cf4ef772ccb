"""quantize with inputs rounded by token, and in 8-bit floats: which layers, without data, what is refused and exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.recipe import Step
from mmcompress.surgery.float8 import Float8Linear
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedConv2d, QuantizedEmbedding, QuantizedLinear, TiedLinear
from mmcompress.surgery.quantized_base import Quantized
from tests import tiny
from tests.passes import decoding

FAMILY = "dual_encoder_dinov2"
W8A8: dict[str, Any] = {"scheme": "W8A8", "activations": "dynamic"}
W4A8: dict[str, Any] = {"scheme": "W4A8", "group_size": 16}
FP8: dict[str, Any] = {"scheme": "FP8", "target": "tensorrt"}
FP8_BY_TOKEN: dict[str, Any] = {**FP8, "activations": "dynamic"}
BY_TOKEN = pytest.mark.parametrize("params", [W8A8, W4A8, FP8_BY_TOKEN], ids=["w8a8", "w4a8", "fp8"])
EVERY = pytest.mark.parametrize("params", [W8A8, W4A8, FP8_BY_TOKEN, FP8], ids=["w8a8", "w4a8", "fp8", "fp8-static"])


def run(params: dict[str, Any], bundle: Bundle | None = None, data: Context | None = None) -> Bundle:
    bundle = bundle or tiny.bundle(FAMILY)
    settings = {"min_cosine": -1.0, **params}
    if data is None:
        data = Context(data=tiny.dataset(8), num_samples=8, batch_size=4)
    pipeline.run_stage(bundle, pipeline.Stage(1, Step("quantize", settings), Quantize(**settings)), data)
    return bundle


def layers(bundle: Bundle) -> dict[str, Quantized]:
    return {path: module for path, module in bundle.model.named_modules() if isinstance(module, Quantized)}


@torch.no_grad()
def embeddings(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {tower.name: bundle.encode(tower.name, bundle.example_inputs(tower.name, 3)) for tower in bundle.towers()}


def same(one: Bundle, other: Bundle) -> bool:
    first, second = embeddings(one), embeddings(other)
    return all(torch.equal(first[name], second[name]) for name in first)


@BY_TOKEN
def test_no_data_is_needed_and_weights_can_stream(params: dict[str, Any]) -> None:
    assert Quantize(**params).streams()
    assert not Quantize(**{**params, "scheme": "W8A8", "activations": "static", "target": "cpu"}).streams()
    bundle = run(params, data=Context())
    assert any(layer.tokens is not None for layer in layers(bundle).values())
    assert "cosine" not in bundle.history[-1].plan["towers"]["vision"]


@pytest.mark.parametrize(
    ("params", "linear", "scheme"),
    [(W8A8, QuantizedLinear, "W8A8"), (W4A8, PackedLinear, "W4A8"), (FP8_BY_TOKEN, Float8Linear, "FP8")],
)
def test_linears_round_tokens_and_all_else_has_8_bit_weights(
    params: dict[str, Any], linear: type[nn.Module], scheme: str
) -> None:
    bundle = run(params, data=Context())
    decided = bundle.history[-1].plan["layers"]
    for path, layer in layers(bundle).items():
        assert isinstance(layer, linear | QuantizedConv2d | QuantizedEmbedding)
        assert (layer.tokens is not None) == isinstance(layer, linear)
        assert decided[path] == (scheme if isinstance(layer, linear) else "W8A16")
    tables = set() if params.get("target") == "tensorrt" else {QuantizedEmbedding}
    assert {type(layer) for layer in layers(bundle).values()} == {linear, QuantizedConv2d, *tables}


@pytest.mark.parametrize(("target", "zero_point"), [("cpu", 128), ("openvino", 0), ("cuda", 0), ("tensorrt", 0)])
def test_only_cpus_want_unsigned_inputs(target: Any, zero_point: int) -> None:
    bundle = run({**W8A8, "target": target, "towers": ("vision",)}, data=Context())
    found = [layer for layer in layers(bundle).values() if isinstance(layer, QuantizedLinear)]
    assert {layer.input_grid() for layer in found} == {(1.0, zero_point)}
    assert not any(layer.rounds_inputs for layer in found)


@pytest.mark.parametrize("target", ["cpu", "openvino", "cuda", "tensorrt"])
def test_on_cpus_8_bit_weights_alone_may_be_multiplied_in_blocks(target: Any) -> None:
    bundle = run({"scheme": "W8A16", "target": target}, data=Context())
    linears = [layer for layer in layers(bundle).values() if isinstance(layer, QuantizedLinear)]
    assert {layer.rounds_inputs for layer in linears} == {target == "cpu"}


def test_a_table_and_the_linear_that_shares_its_weight() -> None:
    """Integers they share, and inputs are rounded by token all the same; not with 8-bit floats, nor for TensorRT."""
    last = run(W8A8, decoding.bundle(), Context()).module(decoding.LAST)
    assert isinstance(last, TiedLinear)
    assert last.tokens is not None
    for params, data in ((FP8_BY_TOKEN, Context()), (FP8, decoding.context())):
        bundle = run({**params, "target": "cuda"}, decoding.bundle(), data)
        last, table = bundle.module(decoding.LAST), bundle.module(decoding.TABLE)
        assert isinstance(last, TiedLinear)
        assert last.input_grid() is None
        assert isinstance(table, QuantizedEmbedding)
        bundle = run(params, decoding.bundle(), data)
        assert type(bundle.module(decoding.LAST)) is nn.Linear
        assert type(bundle.module(decoding.TABLE)) is nn.Embedding


def test_static_8_bit_floats_cover_what_was_seen() -> None:
    bundle = tiny.bundle(FAMILY)
    path = bundle.tower("vision").blocks[0].mlp.reader
    seen: list[torch.Tensor] = []
    handle = bundle.module(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    bundle.embed("vision", tiny.images(8))
    handle.remove()
    layer = run({**FP8, "sensitivity_samples": 0}).module(path)
    assert isinstance(layer, Float8Linear)
    assert layer.input_scale is not None
    largest = max(float(part.abs().max()) for part in seen)
    assert layer.input_scale.item() == pytest.approx(largest / 448, rel=1e-5)


@EVERY
def test_reloaded_it_is_bit_equal_and_so_is_a_copy(params: dict[str, Any], tmp_path: Path) -> None:
    bundle = run(params)
    assert not same(bundle, tiny.bundle(FAMILY))
    assert same(bundle, copy.deepcopy(bundle))
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert same(bundle, again)
    assert {k: v.dtype for k, v in again.model.state_dict().items()} == {
        k: v.dtype for k, v in bundle.model.state_dict().items()
    }
    checkpoint.save(again, tmp_path / "again")
    for file in ("model.safetensors", "mmc.json"):
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@EVERY
def test_a_batch_is_its_single_samples(params: dict[str, Any]) -> None:
    bundle = run(params)
    for tower, items in (("vision", tiny.images(4)), ("text", [f"a cat {n}" for n in range(4)])):
        together = torch.from_numpy(bundle.embed(tower, items))
        alone = torch.stack([torch.from_numpy(bundle.embed(tower, [item])[0]) for item in items])
        torch.testing.assert_close(alone, together, rtol=2e-2, atol=2e-2)


@EVERY
def test_gradients_reach_what_is_trainable(params: dict[str, Any]) -> None:
    bundle = run(params)
    bundle.encode("vision", bundle.example_inputs("vision", 2)).square().sum().backward()
    grads = [p.grad for n, p in bundle.model.named_parameters() if bundle.tower("vision").owns(n)]
    assert sum(grad is not None and bool(grad.abs().sum() > 0) for grad in grads) > 10


def test_with_data_channels_of_different_size_share_a_token_s_grid(tmp_path: Path) -> None:
    original = tiny.bundle(FAMILY)
    with torch.no_grad():
        for block in original.tower("vision").blocks:
            original.module(f"{block.path}.norm2").weight[::7] *= 60  # type: ignore[index,operator]
    want, path = embeddings(original)["vision"], original.tower("vision").blocks[0].mlp.writers[0]
    errors = {}
    for name, data in (("smoothed", None), ("plain", Context())):
        made = run({**W8A8, "towers": ("vision",)}, copy.deepcopy(original), data)
        errors[name] = (embeddings(made)["vision"] - want).square().mean().item()
        plan = made.history[-1].plan
        assert (path in plan.get("scaled", {})) == (name == "smoothed")
        # The norm before it has taken the gain over.
        assert made.module(path).input_gain is None
        assert any(path in readers for readers in plan.get("folds", {}).values()) == (name == "smoothed")
    assert errors["smoothed"] < 0.7 * errors["plain"]


def test_each_token_for_itself_is_nearer_than_one_grid_for_all() -> None:
    original = tiny.bundle(FAMILY)
    with torch.no_grad():
        for block in original.tower("vision").blocks:
            bundle_norm = original.module(f"{block.path}.norm2")
            bundle_norm.weight[::7] *= 60  # type: ignore[index,operator]
    want = embeddings(original)["vision"]
    cosines = {}
    for activations in ("static", "dynamic"):
        made = run({**W8A8, "activations": activations, "smooth": 0.0, "towers": ("vision",)}, copy.deepcopy(original))
        cosines[activations] = nn.functional.cosine_similarity(want, embeddings(made)["vision"]).mean().item()
    assert 1 - cosines["dynamic"] < 0.7 * (1 - cosines["static"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scheme": "FP8"}, "FP8 does not go to cpu: no CPU multiplies 8-bit floats"),
        ({"scheme": "fp8", "target": "openvino"}, "FP8 does not go to openvino"),
        ({"text_scheme": "FP8"}, "FP8 does not go to cpu"),
        ({"scheme": "W4A8", "target": "tensorrt"}, "W4A8 does not go to tensorrt"),
        ({**FP8, "observer": "mse"}, "observer mse weighs the steps of integers"),
    ],
)
def test_what_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(**params)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("params", "dtype"),
    [(W8A8, "INT8"), (FP8, "FLOAT8E4M3FN"), ({"scheme": "W8A16"}, "UINT8")],
    ids=["w8a8", "fp8-static", "w8a16"],
)
def test_graphs_hold_what_is_stored_and_agree(params: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    bundle = run({**params, "towers": ("text",), "embeddings": False}, data=None)
    report = export_onnx(bundle, tmp_path / "out", towers=["text"], batches=(1, 3))
    (made,) = report.components
    stored = sum(layer.weight_shape.numel() for layer in layers(bundle).values())
    assert stored <= made.component.weights[dtype] <= stored + 1  # a zero point
    assert made.component.quantized == len(layers(bundle))
    exact = [row for row in made.parity if not row.rounding]
    assert exact
    assert max(row.relative for row in exact) <= 1e-4
    whole = [row for row in made.parity if row.rounding]
    # Where torch rounds as the graph does, they differ by what goes the other way at a tie; else by the rounding itself.
    assert min(row.cosine for row in whole) > (0.999 if dtype == "UINT8" else 0.99999)


def test_the_decision_is_replayed_without_values() -> None:
    """On meta tensors the layers are the same, from what was decided alone."""
    for params in (W8A8, W4A8, FP8, FP8_BY_TOKEN):
        bundle = run(params)
        settings = Quantize(**{"min_cosine": -1.0, **params})
        with torch.device("meta"):
            shell = Bundle(
                type(bundle.model)(tiny.bundle(FAMILY).model.config), bundle.processor, bundle.family, bundle.source
            )
        settings.apply(shell, Plan(bundle.history[-1].plan))
        described = [
            {key: (value.shape, value.dtype) for key, value in made.model.state_dict().items()}
            for made in (bundle, shell)
        ]
        assert described[0] == described[1]
        assert {path: layer.tokens for path, layer in layers(shell).items()} == {
            path: layer.tokens for path, layer in layers(bundle).items()
        }
