"""quantize with NF4 and FP4: which layers take them, that plain transformers loads the checkpoint, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import MissingError, NotExportable, UsageError
from mmcompress.export.loadable import export_layout
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.cost import cost_of
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.prune import Prune
from mmcompress.passes.quantize import Quantize
from mmcompress.pipeline import Stage, run_stage
from mmcompress.recipe import Step
from mmcompress.surgery.float_codes import is_float_coded
from tests import tiny

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'mmcompress[bnb]'")
pytest.importorskip("accelerate", reason="pip install 'mmcompress[bnb]'")


def context() -> Context:
    return Context(data=tiny.dataset(8), num_samples=8, batch_size=4)


def run(bundle: Bundle | None = None, **params: Any) -> Bundle:
    bundle = bundle or tiny.wide()
    given = {"scheme": "NF4", "min_cosine": -1.0, **params}
    run_stage(bundle, Stage(1, Step("quantize", given), Quantize(**given)), context())
    return bundle


def coded(bundle: Bundle) -> set[str]:
    return {path for path, module in bundle.model.named_modules() if is_float_coded(module)}


def answers(bundle: Bundle) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {
            tower.name: bundle.encode(tower.name, bundle.example_inputs(tower.name, 2)) for tower in bundle.towers()
        }


def same(one: Bundle, other: Bundle) -> bool:
    first, second = answers(one), answers(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_linears_take_the_codes_and_everything_else_stays_as_it_was() -> None:
    original, bundle = tiny.wide(), run()
    want = {
        path
        for path, module in original.model.named_modules()
        # The attention pool's output projection is read by its owner; the text projection has 24 outputs.
        if type(module) is nn.Linear and module.out_features % 32 == 0
    }
    assert coded(bundle) == want
    before, after = original.model.state_dict(), bundle.model.state_dict()
    untouched = {name for name in before if name.rpartition(".")[0] not in want or name.endswith("bias")}
    assert all(torch.equal(after[name], before[name]) for name in untouched)
    assert set(bundle.history[0].plan["layers"].values()) == {"NF4"}


@pytest.mark.parametrize("scheme", ["NF4", "FP4"])
def test_a_checkpoint_loads_again_and_twice_saved_is_the_same(scheme: str, tmp_path: Path) -> None:
    bundle = run(scheme=scheme)
    manifest = checkpoint.save(bundle, tmp_path / "one")
    again = checkpoint.load(tmp_path / "one")
    assert type(again.model) is type(bundle.model)
    assert coded(again) == coded(bundle)
    assert same(bundle, again)
    checkpoint.save(again, tmp_path / "two")
    for name in ("model.safetensors", "mmc.json", "config.json", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert manifest.plain_transformers
    assert "Plain `transformers` loads it too, with bitsandbytes" in (tmp_path / "one" / "README.md").read_text()


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_plain_transformers_loads_it_and_computes_the_same(family: str, tmp_path: Path) -> None:
    bundle = run(tiny.wide(family))
    checkpoint.save(bundle, tmp_path / "out")
    plain, found = type(bundle.model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    other = Bundle(plain.eval(), bundle.processor, bundle.family, bundle.source)
    assert coded(other) == coded(bundle)
    for module in plain.modules():
        if is_float_coded(module):
            module.support_avx512bf16_for_cpu = False  # computes in bfloat16, on CPUs that have it
    assert same(bundle, other)


def test_a_tower_of_integers_beside_it_needs_mmcompress(tmp_path: Path) -> None:
    bundle = run(scheme="W8A16", text_scheme="FP4")
    manifest = checkpoint.save(bundle, tmp_path / "out")
    assert not manifest.plain_transformers
    assert same(bundle, checkpoint.load(tmp_path / "out"))


def test_what_costs_too_much_goes_back_to_float() -> None:
    free = run().history[0].plan["towers"]["vision"]
    limit = (1 + free["cosine"]) / 2
    bundle = run(min_cosine=limit, towers=("vision",))
    report = bundle.history[0].plan["towers"]["vision"]
    assert report["cosine"] >= limit > report["cosine_all_quantized"]
    assert report["kept_float"]
    for path in report["kept_float"]:
        assert type(bundle.module(path)) is nn.Linear
        assert path in bundle.model.config.quantization_config["llm_int8_skip_modules"]


def test_bytes_are_those_of_the_codes() -> None:
    bundle, original = run(), tiny.wide()
    facts, report = bundle.history[0].facts["bytes"], bundle.history[0].plan["towers"]
    for tower in bundle.towers():
        saved = 0
        for path in coded(bundle):
            if tower.owns(path):
                layer = original.module(path)
                weights = layer.in_features * layer.out_features  # type: ignore[operator]
                description = bundle.module(path).state_dict()["weight.quant_state.bitsandbytes__nf4"].numel()
                saved += 4 * weights - (weights // 2 + 4 * weights // 64 + 4 * 16 + description)
        assert facts[tower.name] == report[tower.name]["bytes_before"] - saved


def test_doubly_quantized_plain_transformers_loads_it(tmp_path: Path) -> None:
    """Scales are 8 bits, a float for each 256 of them, and tables that say what they stand for."""
    bundle, once = run(scheme="NF4", double_quant=True), run()
    assert coded(bundle) == coded(once)
    for path in coded(bundle):
        stored, before = bundle.module(path).state_dict(), once.module(path).state_dict()
        blocks = before["weight.absmax"].numel()
        assert stored["weight.absmax"].dtype == torch.uint8
        assert stored["weight.absmax"].numel() == blocks
        assert stored["weight.nested_absmax"].numel() == -(-blocks // 256)
        assert torch.equal(stored["weight"], before["weight"])
        rows = bundle.module(path).weight.quant_state
        wanted = once.module(path).weight.quant_state.absmax
        scales = bitsandbytes.functional.dequantize_blockwise(rows.absmax, rows.state2) + rows.offset
        assert 0 < (scales - wanted).abs().max() < 0.02 * wanted.max()
    checkpoint.save(bundle, tmp_path / "out")
    again = checkpoint.load(tmp_path / "out")
    assert same(bundle, again)
    outline = checkpoint.outline(tmp_path / "out")
    for path in coded(bundle):
        told, stored = outline.module(path).state_dict(), bundle.module(path).state_dict()
        parts = ("weight", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map")
        assert [(told[part].shape, told[part].dtype) for part in parts] == [
            (stored[part].shape, stored[part].dtype) for part in parts
        ]
    outlined, whole = cost_of(outline), cost_of(bundle)
    assert outlined.parameters == whole.parameters
    assert abs(outlined.bytes - whole.bytes) <= 5 * len(coded(bundle))  # digits of one number each
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "bnb_4bit_use_double_quant"
    ]
    plain = type(bundle.model).from_pretrained(tmp_path / "out")
    for path in coded(bundle):
        state = plain.get_submodule(path).weight.quant_state
        assert state.nested
        assert torch.equal(state.absmax, bundle.module(path).weight.quant_state.absmax)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scheme": "W8A16", "double_quant": True}, "no tower gets NF4 or FP4"),
        ({"scheme": "NF4", "text_scheme": "FP4"}, "towers of NF4 and of FP4"),
        ({"scheme": "NF4", "target": "tensorrt"}, "NF4 does not go to tensorrt"),
        ({"scheme": "W8A16", "text_scheme": "fp4", "target": "openvino"}, "FP4 does not go to openvino"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(**params)
    assert message in caught.value.message
    assert caught.value.hint


def test_what_cannot_have_them_is_refused_with_what_can() -> None:
    with pytest.raises(UsageError, match="no Linear of the vision tower has inputs in multiples of 64") as caught:
        Quantize(scheme="NF4").plan(tiny.bundle("siglip"), Context())
    assert "--vision-scheme W16A16" in caught.value.hint


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named_before_any_work(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(MissingError, match=f"NF4 and FP4 need {package}") as caught:
        Quantize(scheme="NF4").check(tiny.wide())
    assert caught.value.hint == "pip install 'mmcompress[bnb]'"


def test_a_coded_tower_is_neither_quantized_again_nor_pruned_nor_exported(tmp_path: Path) -> None:
    bundle = run()
    with pytest.raises(UsageError, match="the vision tower is quantized already"):
        Quantize(scheme="W8A16").check(bundle)
    with pytest.raises(UsageError, match="is a Linear4bit; prune cuts nn.Linear"):
        Prune(ratio=0.3).check(bundle)
    with pytest.raises(NotExportable, match="weights of 4-bit floats") as caught:
        export_onnx(bundle, tmp_path / "out")
    assert "W4A16" in caught.value.hint
    with pytest.raises(UsageError, match="bitsandbytes' layers, which awq cannot say"):
        export_layout(bundle, tmp_path / "out", "awq")


def test_what_it_multiplies_is_counted_and_an_outline_has_its_bytes(tmp_path: Path) -> None:
    bundle, original = run(), tiny.wide()
    before, after = cost_of(original), cost_of(bundle)
    assert after.parameters == before.parameters
    assert {name: tower.macs for name, tower in after.towers.items()} == {
        name: tower.macs for name, tower in before.towers.items()
    }
    checkpoint.save(bundle, tmp_path / "out")
    outlined = cost_of(checkpoint.outline(tmp_path / "out"))
    assert outlined == after


def test_it_is_not_written_layer_by_layer() -> None:
    assert not Quantize(scheme="NF4").streams()
    assert Quantize(scheme="W4A16").streams()


def test_apply_makes_the_structure_without_values() -> None:
    bundle = tiny.wide()
    plan = Quantize(scheme="NF4").plan(bundle, Context())
    hollow = tiny.wide()
    hollow.model.to("meta")
    Quantize(scheme="NF4").apply(hollow, Plan(plan.decisions))
    assert coded(hollow) == set(plan.decisions["layers"])
    assert all(value.is_meta for value in hollow.model.state_dict().values())
