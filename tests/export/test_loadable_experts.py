"""compressed-tensors of a mixture: each expert three Linears, read back by the package itself and by transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from mmcompress.bundle import Bundle
from mmcompress.ops.layouts import codes_of
from tests import tiny_vlm
from tests.export.test_loadable import own, quantized, written

MODEL = "qwen3_vl_moe"
HOLDER = "model.language_model.layers.0.mlp.experts"
KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {"scheme": "W8A16"},
    "4 bits": {},
    "4 bits by rows": {"group_size": 0},
    "4 bits, symmetric": {"symmetric_experts": True},
}


@pytest.fixture(autouse=True)
def even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons that groups of 16 divide."""
    monkeypatch.setitem(tiny_vlm.MIXED, "moe_intermediate_size", 48)


@pytest.fixture
def joining() -> Iterator[None]:
    """transformers is told how experts of this class are joined, as the README beside the weights says."""
    before = get_checkpoint_conversion_mapping(MODEL)
    register_checkpoint_conversion_mapping(MODEL, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
    yield
    register_checkpoint_conversion_mapping(MODEL, before, overwrite=True)


@torch.no_grad()
def output(bundle: Bundle) -> Tensor:
    return bundle.encode("language", bundle.example_inputs("language", 2))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_experts_once_it_knows_how_to_join_them(
    kind: str, tmp_path: Path, joining: None
) -> None:
    bundle = quantized(MODEL, sensitivity_samples=0, **KINDS[kind])
    report, _, _ = written(bundle, tmp_path / "out", "compressed-tensors", precision="float32")
    model, found = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(model.get_parameter(f"{HOLDER}.{name}"), bundle.module(HOLDER).floats(name))
    assert torch.equal(output(dataclasses.replace(bundle, model=model.eval())), output(bundle))
    assert "mlp.experts" not in " ".join(report.floats)


def test_codes_less_their_zero_points_are_the_same_numbers_in_eight_bits(tmp_path: Path) -> None:
    """As transformers and vLLM take them; 4 bits stay 4 where zero points are the middle."""
    for kind, bits in (("4 bits", 8), ("4 bits, symmetric", 4)):
        bundle = quantized(MODEL, sensitivity_samples=0, **KINDS[kind])
        report, tensors, config = written(bundle, tmp_path / kind, "compressed-tensors", precision="float32")
        layer = dict(bundle.module(HOLDER).linears())["1.up_proj"]
        stored = own(tensors, f"{HOLDER}.1.up_proj")
        assert set(stored) == {"weight_packed", "weight_scale", "weight_shape"}
        steps = codes_of(stored["weight_packed"], bits, 32).to(torch.int16) - 2 ** (bits - 1)  # type: ignore[arg-type]
        found = steps.unflatten(1, (2, 16)) * stored["weight_scale"][..., None]
        assert torch.equal(found.flatten(1), layer.weight)
        groups = config["quantization_config"]["config_groups"].values()
        (mixed,) = (group for group in groups if group["targets"][0].startswith("re:"))
        assert (mixed["weights"]["num_bits"], mixed["weights"]["symmetric"], mixed["weights"]["group_size"]) == (
            bits,
            True,
            16,
        )
        said = "without zero points" if bits == 4 else "stored in 8"
        assert report.kinds[f"pack-quantized, experts of 4 bits {said}"] == 2 * 4 * 3
        ignored = config["quantization_config"]["ignore"]
        assert {name for name in ignored if name.endswith("mlp.gate")} == {
            f"model.language_model.layers.{index}.mlp.gate" for index in (0, 2)
        }


def test_what_is_not_known_to_load_is_said(tmp_path: Path) -> None:
    report, _, _ = written(quantized(MODEL, sensitivity_samples=0), tmp_path / "out", "compressed-tensors")
    assert (
        "leaves the experts of this class at random numbers unless it is told first how to join them"
        in report.loaded_by
    )
    assert "vLLM, which was not tried" in report.loaded_by
    assert report.loaded_by in (tmp_path / "out" / "README.md").read_text()


def test_layouts_of_linears_alone_have_the_same_experts_in_floats(tmp_path: Path) -> None:
    bundle = quantized(MODEL, sensitivity_samples=0)
    report, tensors, _ = written(bundle, tmp_path / "out", "awq", precision="float32")
    assert "transformers has no Linear for" in report.floats[f"{HOLDER}.0.gate_proj"]
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(tensors[f"{HOLDER}.{name}"], bundle.module(HOLDER).floats(name))
