"""Checkpoints in other tools' layouts: the same integers, an honest config, everything else as floats, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.layout_four_bits import Awq, cheapest_size
from mmcompress.export.layouts import LAYOUTS
from mmcompress.export.loadable import LayoutReport, export_layout
from mmcompress.ops.grouped import Grouped, nearest
from mmcompress.ops.layouts import codes_of
from mmcompress.passes.base import Context
from mmcompress.passes.merge_tokens import MergeTokens
from mmcompress.passes.prune import Prune
from mmcompress.passes.quantize import Quantize
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear
from tests import tiny
from tests.passes import decoding
from tests.unpacking import read_awq, read_gptq

VLM = "llava_clip"
READERS: dict[str, Any] = {
    "awq": read_awq,
    "gptq": lambda stored: read_gptq(stored, added=1),
    "compressed-tensors": lambda stored: Grouped(
        codes_of(stored["weight_packed"], 4, int(stored["weight_shape"][1])),
        stored["weight_scale"],
        codes_of(stored["weight_zero_point"].t(), 4, int(stored["weight_shape"][0])).t(),
    ).dequantized(),
}


def quantized(family: str = VLM, **params: Any) -> Bundle:
    bundle = tiny.bundle(family)
    made = Quantize(**{"scheme": "W4A16", "min_cosine": -1.0, "group_size": 16, "rounding": "nearest", **params})
    made.apply(bundle, made.plan(bundle, Context(data=tiny.data(family, 8), num_samples=8, batch_size=4)))
    return bundle


@pytest.fixture(scope="module")
def vlm() -> Bundle:
    return quantized(sensitivity_samples=0)


def written(
    bundle: Bundle, out: Path, name: str, **more: Any
) -> tuple[LayoutReport, dict[str, Tensor], dict[str, Any]]:
    report = export_layout(bundle, out, name, **more)
    return report, load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def own(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{path}."): value for name, value in tensors.items() if name.startswith(f"{path}.")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_said_layers_hold_the_same_weight_and_all_else_the_same_floats(name: str, vlm: Bundle, tmp_path: Path) -> None:
    report, tensors, config = written(vlm, tmp_path / "out", name, precision="float32")
    said = {
        path: layer
        for path, layer in vlm.model.named_modules()
        if isinstance(layer, PackedLinear) and path not in report.floats
    }
    assert len(said) == sum(report.kinds.values()) > 10
    for path, layer in said.items():
        weight = layer.grouped()
        scale = weight.scale if name == "compressed-tensors" else weight.scale.half().float()
        want = Grouped(weight.codes, scale, weight.zero_point).dequantized()
        assert torch.equal(READERS[name](own(tensors, path)), want)
    for path in report.floats:
        assert torch.equal(tensors[f"{path}.weight"], vlm.module(path).weight)
    names = {f"{path}.weight" if path in said else key for key in tensors for path in [key.rpartition(".")[0]]}
    plain = tiny.bundle(VLM).model
    biases = {f"{path}.bias" for path in said if said[path].bias is not None}
    assert names | biases == set(plain.state_dict())
    for key, value in vlm.model.state_dict().items():
        path = key.rpartition(".")[0]
        if path not in said and path not in report.floats:
            assert torch.equal(tensors[key], value)
    floats = {path for path, module in plain.named_modules() if isinstance(module, nn.Linear)} - said.keys()
    listed = config["quantization_config"]
    kept = {
        "awq": lambda: set(listed["modules_to_not_convert"]),
        "gptq": lambda: {key.removeprefix("-:^").removesuffix("$").replace("\\.", ".") for key in listed["dynamic"]},
        "compressed-tensors": lambda: set(listed["ignore"]),
    }[name]()
    assert kept == floats
    assert config["dtype"] == "float32"
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert {"tokenizer.json", "preprocessor_config.json"} <= {file.name for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(("name", "scale_bytes"), [("compressed-tensors", 4), ("awq", 2)])
def test_bytes_are_counted(name: str, scale_bytes: int, vlm: Bundle, tmp_path: Path) -> None:
    report, tensors, _ = written(vlm, tmp_path / "out", name)
    assert report.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    expected = 0
    for path, layer in vlm.model.named_modules():
        if isinstance(layer, PackedLinear) and path not in report.floats:
            weights, groups = layer.in_features * layer.out_features, layer.in_features // 16
            # Half a byte a weight and a zero point; compressed-tensors adds the shape, two numbers of 8 bytes.
            zeros = layer.out_features * groups // 2
            expected += weights // 2 + scale_bytes * layer.out_features * groups + zeros
            expected += 16 if name == "compressed-tensors" else 0
    assert report.integer_bytes == expected
    assert {value.dtype for key, value in tensors.items() if key.endswith("bias")} == {
        torch.float32 if name == "compressed-tensors" else torch.float16
    }


def test_the_card_says_what_loads_it_and_what_was_rounded(vlm: Bundle, tmp_path: Path) -> None:
    report, _, _ = written(vlm, tmp_path / "out", "awq")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "LlavaForConditionalGeneration.from_pretrained" in text
    assert report.loaded_by in text
    # Half of float16's step of 2^-10 at most.
    assert 0 < report.scales_off <= 2**-11
    assert f"scales: to float16, by at most {report.scales_off:.1e}" in text
    assert "floats: to float16" in text
    assert "`model.language_model.embed_tokens` is written as floats: Embedding, no Linear" in text


def test_gptq_takes_the_stack_of_blocks_with_most_weights(vlm: Bundle, tmp_path: Path) -> None:
    """The language model's MLPs have 144 outputs, which its kernels do not take: the vision tower's stack is left with more."""
    report, tensors, config = written(vlm, tmp_path / "out", "gptq")
    listed = config["quantization_config"]
    stack = listed["block_name_to_quantize"]
    assert stack == vlm.tower("vision").blocks_path
    said = {key.rpartition(".")[0] for key in tensors if key.endswith(".qweight")}
    blocks = len(vlm.tower("vision").blocks)
    (inside,) = listed["modules_in_block_to_quantize"]
    assert said == {f"{stack}.{index}.{name}" for index in range(blocks) for name in inside}
    assert report.floats["lm_head"] == "48 outputs, no multiple of 32"
    assert (
        report.floats["model.multi_modal_projector.linear_1"] == f"outside of {stack}, where alone transformers looks"
    )
    assert listed["checkpoint_format"] == "gptq"


def change(bundle: Bundle, path: str, weight: Tensor, size: int) -> None:
    """Put another 4-bit layer in a layer's place, with its bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight, linear.bias = nn.Parameter(weight), bundle.module(path).bias  # type: ignore[assignment]
    bundle.replace(path, PackedLinear(linear, size, nearest))


def test_what_one_block_cannot_have_no_block_has_in_gptq(vlm: Bundle, tmp_path: Path) -> None:
    bundle = copy.deepcopy(vlm)
    path = bundle.tower("vision").blocks[1].attention.reader
    plain = nn.Linear(32, 32)
    bundle.replace(path, QuantizedLinear(plain, None))
    report, tensors, _ = written(bundle, tmp_path / "out", "gptq")
    name = path.rpartition(".")[2]
    assert not [key for key in tensors if f".{name}.qweight" in key]
    assert report.floats[path] == "8 bits"
    other = bundle.tower("vision").blocks[0].attention.reader
    assert report.floats[other] == "not of 4 bits in every block"


def test_a_zero_point_of_0_needs_gptq_v2(vlm: Bundle, tmp_path: Path) -> None:
    bundle = copy.deepcopy(vlm)
    path = bundle.tower("vision").blocks[0].attention.reader
    change(bundle, path, torch.rand(32, 32) + 1, 16)
    _, tensors, config = written(bundle, tmp_path / "out", "gptq")
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    weight = bundle.module(path).grouped()  # type: ignore[union-attr,operator]
    half = Grouped(weight.codes, weight.scale.half().float(), weight.zero_point)
    assert torch.equal(read_gptq(own(tensors, path), added=0), half.dequantized())


def packed(rows: int, columns: int, size: int) -> PackedLinear:
    return PackedLinear(nn.Linear(columns, rows), size, nearest)


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        # As halves a layer of groups of 16 takes 2 - 0.5 - 2.5 / 16 = 1.344 bytes a weight more; groups of 16 for all take
        # 2.5 / 16 - 2.5 / 32 = 0.078 more for each of the others: as much for 17.2 of them.
        ([32] * 18 + [16], 32),
        ([32] * 17 + [16], 16),
        ([64] * 8 + [32], 32),
        ([64, 128], 64),
        ([256, 256], -1),
        ([256, 128], 128),
    ],
)
def test_gptq_and_awq_get_the_size_of_groups_that_takes_the_fewest_bytes(sizes: list[int], chosen: int) -> None:
    assert cheapest_size(packed(32, 256, size) for size in sizes) == chosen


def test_coarser_groups_are_repeated_and_finer_ones_become_floats(tmp_path: Path) -> None:
    bundle = quantized(group_size=0, sensitivity_samples=0)
    blocks = bundle.tower("vision").blocks
    for path in (path for path, layer in list(bundle.model.named_modules()) if isinstance(layer, PackedLinear)):
        change(bundle, path, bundle.module(path).weight, 16)  # type: ignore[arg-type]
    coarse, fine = blocks[0].attention.reader, blocks[1].attention.reader
    change(bundle, coarse, torch.randn(32, 32), 32)
    _, tensors, config = written(bundle, tmp_path / "awq", "awq")
    assert config["quantization_config"]["group_size"] == 16
    assert own(tensors, coarse)["scales"].shape == (2, 32)
    assert Awq(32).refusal(fine, bundle.module(fine)) == "groups of 16, not of 32"  # type: ignore[arg-type]
    _, _, config = written(bundle, tmp_path / "both", "compressed-tensors")
    groups = config["quantization_config"]["config_groups"].values()
    targets = {group["weights"]["group_size"]: group["targets"] for group in groups}
    # One group a row is what compressed-tensors calls one per channel.
    assert targets[None] == [coarse]
    assert fine in targets[16]


def test_scales_beyond_float16_stay_floats(vlm: Bundle, tmp_path: Path) -> None:
    bundle = copy.deepcopy(vlm)
    path = bundle.tower("language").blocks[0].attention.reader
    change(bundle, path, torch.randn(32, 32) * 1e-6, 16)
    report, tensors, _ = written(bundle, tmp_path / "out", "awq", precision="float32")
    assert "beyond float16" in report.floats[path]
    assert torch.equal(tensors[f"{path}.weight"], bundle.module(path).weight)


def test_a_shared_weight_is_one_table_of_floats(tmp_path: Path) -> None:
    bundle = quantized("whisper", scheme="W8A16")
    report, tensors, config = written(bundle, tmp_path / "out", "compressed-tensors")
    assert report.floats[decoding.LAST] == "its weight is an embedding table's"
    assert f"{decoding.LAST}.weight" not in tensors
    assert torch.equal(tensors[f"{decoding.TABLE}.weight"], bundle.module(decoding.TABLE).weight)
    listed = config["quantization_config"]
    assert decoding.LAST in listed["ignore"]
    assert listed["format"] == "pack-quantized"
    (group,) = listed["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")


@pytest.mark.parametrize(("target", "symmetric"), [("cpu", False), ("cuda", True)])
def test_grids_of_inputs_are_said_with_their_zero_points(target: Any, symmetric: bool, tmp_path: Path) -> None:
    bundle = quantized(scheme="W8A8", smooth=0.0, target=target)
    report, tensors, config = written(bundle, tmp_path / "out", "compressed-tensors")
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["input_activations"]["symmetric"] is symmetric
    assert config["quantization_config"]["dequantize"] is False
    assert report.unrounded == ("model.vision_tower.embeddings.patch_embedding",)
    layer = bundle.module("lm_head")
    assert isinstance(layer, QuantizedLinear)
    stored = own(tensors, "lm_head")
    assert torch.equal(stored["weight"], layer.weight_int8)
    assert stored["input_scale"].item() == layer.input_scale
    # Unsigned 0..255 with zero point z is signed -128..127 with zero point z - 128.
    zero_point = int(layer.input_zero_point) - 128 if not symmetric else None
    assert (stored["input_zero_point"].item() if not symmetric else stored.get("input_zero_point")) == zero_point


@pytest.mark.parametrize(
    "params", [{"scheme": "W8A8", "activations": "dynamic"}, {"scheme": "W4A8"}], ids=["W8A8", "W4A8"]
)
def test_inputs_rounded_by_token_are_said_to_be_floats_there(params: dict[str, Any], tmp_path: Path) -> None:
    bundle = quantized(**params, smooth=0.0)
    report, _, config = written(bundle, tmp_path / "out", "compressed-tensors")
    rounding = [path for path, layer in bundle.model.named_modules() if getattr(layer, "tokens", None) is not None]
    assert rounding
    assert report.unrounded == tuple(rounding)
    groups = config["quantization_config"]["config_groups"].values()
    assert all(group["input_activations"] is None for group in groups)
    told = f"inputs of {len(rounding)} quantized layers: not rounded to 8 bits any more"
    assert told in (tmp_path / "out" / "README.md").read_text()


def pruned() -> Bundle:
    bundle = tiny.bundle("dual_encoder_dinov2")
    cut = Prune(ratio=0.3, compensate="none", score="magnitude")
    cut.apply(bundle, cut.plan(bundle, Context()))
    made = Quantize(scheme="W8A16")
    made.apply(bundle, made.plan(bundle, Context()))
    return bundle


def merged() -> Bundle:
    bundle = tiny.bundle("dual_encoder_dinov2")
    fewer = MergeTokens(keep=0.6)
    fewer.apply(bundle, fewer.plan(bundle, Context(data=tiny.dataset(4), num_samples=4)))
    made = Quantize(scheme="W8A16")
    made.apply(bundle, made.plan(bundle, Context()))
    return bundle


@pytest.mark.parametrize(
    ("made", "name", "message"),
    [
        (lambda: tiny.bundle(VLM), "awq", "nothing of llava_clip is quantized"),
        (lambda: quantized(scheme="W8A16"), "gptq", "gptq can say none of the 44 quantized layers"),
        (lambda: quantized(scheme="FP8", target="cuda"), "compressed-tensors", "k_proj: 8-bit floats"),
        (pruned, "compressed-tensors", "other tools cannot rebuild this model: config.json cannot say the shapes"),
        (merged, "compressed-tensors", "reduce tokens; plain transformers would run without that"),
        (lambda: quantized(), "ggml", "there is no layout 'ggml'"),
    ],
)
def test_what_others_could_not_load_is_refused(made: Any, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        export_layout(made(), tmp_path / "out", name)
    assert message in caught.value.message
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_awq_leaves_what_transformers_leaves(tmp_path: Path) -> None:
    """AwqQuantizer never converts the last layer: its integers would be unexpected, and its weight made up."""
    bundle = quantized("dual_encoder_vit", sensitivity_samples=0)
    last = next(reversed([name for name, _ in tiny.bundle("dual_encoder_vit").model.named_parameters()]))
    path = last.removesuffix(".weight")
    change(bundle, path, torch.randn(32, bundle.module(path).in_features), 16)  # type: ignore[arg-type]
    layout = Awq.of(bundle, {path: bundle.module(path)})  # type: ignore[dict-item]
    assert layout.refusal(path, bundle.module(path)) == "transformers leaves it as it is"  # type: ignore[arg-type]


def test_awq_refuses_names_its_readers_would_mistake(vlm: Bundle) -> None:
    layer = vlm.module("lm_head")
    with pytest.raises(UsageError, match="awq cannot leave proj floats and say model.block.o_proj"):
        Awq(16).config({"model.block.o_proj": layer}, ["other", "proj"])  # type: ignore[dict-item]
    listed = Awq(16).config({"model.block.o_proj": layer}, ["model.block.o"])  # type: ignore[dict-item]
    assert listed["modules_to_not_convert"] == ["model.block.o"]
