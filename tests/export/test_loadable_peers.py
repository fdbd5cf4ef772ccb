"""Checkpoints in compressed-tensors' layout, loaded by transformers with that package: they give what ours give, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.export.loadable import LayoutReport, export_layout
from mmcompress.passes.base import Context
from mmcompress.passes.quantize import Quantize
from tests import tiny

pytest.importorskip("compressed_tensors", reason="pip install 'mmcompress[peers]'")


def answers(bundle: Bundle) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {
            tower.name: bundle.encode(tower.name, bundle.example_inputs(tower.name, 2)) for tower in bundle.towers()
        }


@pytest.mark.parametrize("family", ["llava_clip", "siglip", "whisper"])
@pytest.mark.parametrize(
    "params",
    [
        {"scheme": "W4A16", "group_size": 16},
        {"scheme": "W4A16", "group_size": 0},
        {"scheme": "W8A16"},
        # What no Linear is becomes floats: its input would be rounded here and not there.
        {"scheme": "W8A8", "target": "cpu", "smooth": 0.0, "keep_float": ("*patch*", "*conv*")},
        {"scheme": "W8A8", "target": "cuda", "smooth": 0.0, "keep_float": ("*patch*", "*conv*")},
    ],
    ids=["w4a16", "w4a16-rows", "w8a16", "w8a8-unsigned", "w8a8-signed"],
)
def test_transformers_computes_the_same(family: str, params: dict[str, Any], tmp_path: Path) -> None:
    bundle = tiny.bundle(family)
    matching = tuple(
        pattern
        for pattern in params.get("keep_float", ())
        if any(pattern.strip("*") in path for path, _ in bundle.model.named_modules())
    )
    tied = tuple(path for tower in bundle.towers() for pair in tower.tied for path in pair)
    made = Quantize(**{**params, "keep_float": (*matching, *(tied if "keep_float" in params else ()))}, min_cosine=-1.0)
    made.apply(bundle, made.plan(bundle, Context(data=tiny.data(family, 8), num_samples=8, batch_size=4)))
    same_in_transformers(bundle, family, tmp_path / "out")


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4"])
def test_transformers_computes_the_same_from_4_bit_floats(scheme: str, tmp_path: Path) -> None:
    bundle = tiny.wide()
    made = Quantize(scheme=scheme, target="cuda", min_cosine=-1.0)
    made.apply(bundle, made.plan(bundle, Context()))
    report = same_in_transformers(bundle, "siglip", tmp_path / "out")
    assert f"{scheme.lower()}-pack-quantized" in report.kinds


@pytest.mark.parametrize("params", [{"scheme": "W4A16", "scaling": "awq"}, {"scheme": "W8A8"}], ids=["awq", "smoothed"])
def test_scaled_inputs_of_a_language_model_leave_nothing_to_multiply(params: dict[str, Any], tmp_path: Path) -> None:
    """Norms, values and the linear half of gated MLPs take gains over."""
    bundle = tiny.bundle("llava_clip")
    made = Quantize(
        **{"towers": ("language",), "keep_float": ("lm_head",), "group_size": 16, "min_cosine": -1.0, **params}
    )
    plan = made.plan(bundle, Context(data=tiny.data("llava_clip", 8), num_samples=8, batch_size=4))
    made.apply(bundle, plan)
    folded = {path for paths in plan.decisions["folds"].values() for path in paths}
    assert folded == {name.removesuffix(".gain") for name in plan.tensors if name.endswith(".gain")}
    assert len(folded) > 5 * len(bundle.tower("language").blocks)
    assert set(same_in_transformers(bundle, "llava_clip", tmp_path / "out").floats.values()) == {"Embedding, no Linear"}


def test_layers_whose_gain_is_left_become_the_floats_they_stand_for(tmp_path: Path) -> None:
    bundle = tiny.bundle("siglip")
    made = Quantize(scheme="W8A8", min_cosine=-1.0)
    made.apply(bundle, made.plan(bundle, Context(data=tiny.data("siglip", 8), num_samples=8, batch_size=4)))
    report = export_layout(bundle, tmp_path / "out", "compressed-tensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    path = bundle.tower("vision").blocks[0].mlp.reader
    assert report.floats[path] == "its input is multiplied by a gain that nothing before could take over"
    layer: Any = bundle.module(path)
    assert torch.equal(stored[f"{path}.weight"], layer.weight * layer.input_gain)
    torch.testing.assert_close(stored[f"{path}.weight"], tiny.bundle("siglip").module(path).weight, rtol=0, atol=0.02)


def same_in_transformers(bundle: Bundle, family: str, out: Path) -> LayoutReport:
    report = export_layout(bundle, out, "compressed-tensors")
    loaded, found = type(bundle.model).from_pretrained(out, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    # Of a model that was loaded compressed, the first call of the whole model decompresses: here its parts are called.
    for hook in list(loaded._forward_pre_hooks.values()):
        hook(loaded, ())
    other = copy.copy(bundle)
    other.model = loaded.eval()
    want, have = answers(bundle), answers(other)
    assert {type(module) for module in loaded.modules() if isinstance(module, nn.Linear)} <= {
        type(module) for module in tiny.bundle(family).model.modules()
    }
    for tower, rows in want.items():
        assert torch.equal(rows, have[tower]), tower
    return report


def test_what_transformers_refuses_is_said(tmp_path: Path) -> None:
    """When this fails, transformers has learned it: let the layout say so."""
    bundle = tiny.bundle("dual_encoder_dinov2")
    made = Quantize(scheme="W8A16")
    made.apply(bundle, made.plan(bundle, Context()))
    report = export_layout(bundle, tmp_path / "out", "compressed-tensors")
    assert "not transformers, which refuses models whose older checkpoints" in report.loaded_by
    with pytest.raises(ValueError, match="weights_in"):
        type(bundle.model).from_pretrained(tmp_path / "out")
