"""Exports cost seconds each, so tests share these."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.export.onnx import ExportReport, export_onnx
from mmcompress.ops.rounding import INT8, UINT8, Levels
from mmcompress.surgery.quantized import QuantizedConv2d, QuantizedLinear, quantized
from tests import tiny


def quantize_tower(bundle: Bundle, tower: str, inputs: Levels | None) -> Bundle:
    """Replace every Linear of a tower; each input gets a grid of its own, like after calibration."""
    root = bundle.tower(tower).path
    linears = [name for name, module in bundle.model.named_modules() if type(module) is nn.Linear]
    for index, name in enumerate(name for name in linears if name.startswith(root)):
        module = bundle.module(name)
        layer = quantized(module, inputs)
        assert isinstance(layer, QuantizedLinear)
        if inputs is not None:
            layer.set_input_grid(
                torch.tensor(0.04 + index * 1e-3), torch.tensor(120 if inputs is UINT8 else 0, dtype=inputs.dtype)
            )
        bundle.replace(name, layer)
    return bundle


@pytest.fixture(scope="session")
def clip() -> Bundle:
    return tiny.bundle("clip")


@pytest.fixture(scope="session")
def clip_export(clip, tmp_path_factory) -> ExportReport:
    return export_onnx(clip, tmp_path_factory.mktemp("clip") / "out")


@pytest.fixture(scope="session")
def unsigned() -> Bundle:
    """DINOv2 with W8A8 vision for CPUs, its patch embedding included."""
    bundle = quantize_tower(tiny.bundle("dual_encoder_dinov2"), "vision", UINT8)
    (patches,) = bundle.tower("vision").embeddings
    layer = quantized(bundle.module(patches), UINT8)
    assert isinstance(layer, QuantizedConv2d)
    layer.set_input_grid(torch.tensor(0.02), torch.tensor(128, dtype=torch.uint8))
    bundle.replace(patches, layer)
    return bundle


@pytest.fixture(scope="session")
def unsigned_export(unsigned, tmp_path_factory) -> ExportReport:
    return export_onnx(unsigned, tmp_path_factory.mktemp("unsigned") / "out", towers=["vision"])


@pytest.fixture(scope="session")
def signed_half_export(tmp_path_factory) -> ExportReport:
    """ViT with symmetric W8A8 vision in float16, as TensorRT wants it."""
    bundle = quantize_tower(tiny.bundle("dual_encoder_vit"), "vision", INT8)
    for path in bundle.tower("vision").blocks[0].attention.writers:
        # Calibrated on the same tensor, they have the same grid.
        bundle.module(path).set_input_grid(torch.tensor(0.04), torch.tensor(0, dtype=torch.int8))  # type: ignore[operator]
    return export_onnx(bundle, tmp_path_factory.mktemp("signed") / "out", towers=["vision"], precision="float16")
