"""quantize with int8 logits: queries and keys on grids of their own, in torch, in checkpoints, in graphs, in what OpenVINO runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export import rounding
from mmcompress.export.loadable import export_layout
from mmcompress.export.onnx import export_onnx
from mmcompress.manifest import Record
from mmcompress.measure.runners import open_runner
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.distill import Distill
from mmcompress.passes.factorize import Factorize
from mmcompress.passes.prune import Prune
from mmcompress.passes.quantize import Quantize
from mmcompress.surgery.quantized import QuantizedLinear
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
INT8: dict[str, Any] = {"target": "openvino", "logits": "int8"}


def context(family: str = "clip", **more: Any) -> Context:
    return Context(data=tiny.data(family, 8), num_samples=8, batch_size=4, **more)


def run(given: Bundle | str = "clip", **params: Any) -> tuple[Bundle, Plan]:
    bundle = tiny.bundle(given) if isinstance(given, str) else given
    settings = {**INT8, "min_cosine": -1.0, "sensitivity_samples": 4, **params}
    made = Quantize(**settings)
    made.check(bundle)
    plan = made.plan(bundle, context())
    made.apply(bundle, plan)
    recorded = json.loads(json.dumps(plan.decisions))
    bundle.history.append(Record(name="quantize", params=settings, plan=recorded, facts={}, seconds=0.0))
    return bundle, plan


def rounded(bundle: Bundle) -> dict[str, QuantizedLinear]:
    """The layers whose outputs are rounded."""
    found = {p: m for p, m in bundle.model.named_modules() if getattr(m, "output_scale", None) is not None}
    assert all(isinstance(layer, QuantizedLinear) for layer in found.values())
    return found  # type: ignore[return-value]


def queries_and_keys(bundle: Bundle) -> set[str]:
    return {path for tower in bundle.towers() for block in tower.blocks for path in block.attention.writers[:2]}


def same(one: Bundle, other: Bundle) -> bool:
    pairs = [(bundle.embed("vision", tiny.images(3)), bundle.embed("text", tiny.texts(3))) for bundle in (one, other)]
    return all(np.array_equal(*each) for each in zip(*pairs, strict=True))


@pytest.fixture(scope="module")
def made() -> tuple[Bundle, Plan]:
    return run()


def test_queries_and_keys_have_grids_and_nothing_else_has(made: tuple[Bundle, Plan]) -> None:
    bundle, plan = made
    assert set(rounded(bundle)) == queries_and_keys(bundle)
    writers = [block.attention.writers for tower in bundle.towers() for block in tower.blocks]
    assert plan.decisions["logits"] == {query: key for query, key, _ in writers}
    for layer in rounded(bundle).values():
        assert layer.output_zero_point is not None
        assert (layer.output_zero_point.dtype, int(layer.output_zero_point)) == (torch.int8, 0)


@pytest.mark.parametrize("observer", ["min-max", "percentile"])
def test_grids_cover_what_the_float_layers_gave_out(observer: Any) -> None:
    bundle = tiny.bundle("clip")
    path = bundle.tower("vision").blocks[1].attention.writers[1]
    seen: list[torch.Tensor] = []
    handle = bundle.module(path).register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    bundle.embed("vision", tiny.images(8))
    handle.remove()
    largest = max(float(part.abs().max()) for part in seen)
    layer = rounded(run(observer=observer, percentile=100.0, towers=("vision",), sensitivity_samples=0)[0])[path]
    # The images of the samples are these; 127 steps to either side of 0.
    assert float(layer.output_scale) == pytest.approx(largest / 127, rel=1e-3)  # type: ignore[arg-type]


def test_padding_has_no_say_in_the_grids() -> None:
    scales = []
    for batch_size in (8, 1):
        bundle = tiny.bundle("clip")
        found = Quantize(**INT8, towers=("text",), sensitivity_samples=0).plan(
            bundle, Context(data=tiny.dataset(8), num_samples=8, batch_size=batch_size)
        )
        scales.append({name: value for name, value in found.tensors.items() if name.endswith(".output_scale")})
    assert len(scales[0]) == 2 * 2
    for name, value in scales[0].items():
        torch.testing.assert_close(value, scales[1][name], rtol=1e-4, atol=0)


def test_off_nothing_is_added() -> None:
    bundle, plan = run(logits="float")
    assert "logits" not in plan.decisions
    assert not rounded(bundle)
    assert not any("output_" in name for name in (*bundle.model.state_dict(), *plan.tensors))


def test_reloaded_it_is_bit_equal_and_so_is_a_copy(made: tuple[Bundle, Plan], tmp_path: Path) -> None:
    bundle, _ = made
    assert not same(bundle, run(logits="float")[0])
    assert same(bundle, copy.deepcopy(bundle))
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert same(bundle, again)
    assert set(rounded(again)) == set(rounded(bundle))
    grids = {path: layer.output_grid() for path, layer in rounded(bundle).items()}
    assert {path: layer.output_grid() for path, layer in rounded(again).items()} == grids
    checkpoint.save(again, tmp_path / "again")
    assert (tmp_path / "again" / "mmc.json").read_text() == (tmp_path / "model" / "mmc.json").read_text()


def test_the_plan_can_be_put_in_place_on_meta_tensors(made: tuple[Bundle, Plan]) -> None:
    _, plan = made
    bundle = tiny.bundle("clip")
    bundle.model.to("meta")
    Quantize(**INT8).apply(bundle, Plan(plan.decisions))
    assert set(rounded(bundle)) == queries_and_keys(bundle)
    assert all(buffer.is_meta for layer in rounded(bundle).values() for buffer in layer.buffers())


@pytest.fixture(scope="module")
def exported(made: tuple[Bundle, Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = export_onnx(made[0], tmp_path_factory.mktemp("logits") / "out", towers=["vision"])
    return report.artifact.path("vision")


def test_the_logits_product_multiplies_what_was_rounded(made: tuple[Bundle, Plan], exported: Path) -> None:
    bundle, _ = made
    graph = onnx.load(exported).graph
    maker = {output: node for node in graph.node for output in node.output}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [maker[maker[node.input[0]].input[0]] for node in graph.node if node.op_type == "Softmax"]
    assert [node.op_type for node in products] == ["MatMul"] * 3
    for block, product in zip(bundle.tower("vision").blocks, products, strict=True):
        for path, name in zip(block.attention.writers, product.input, strict=False):
            node = maker[name]
            while node.op_type in ("Reshape", "Transpose"):
                node = maker[node.input[0]]
            assert node.op_type == "DequantizeLinear"
            before = maker[node.input[0]]
            assert before.op_type == "QuantizeLinear"
            assert maker[before.input[0]].name == f"{path}/Add"  # behind the bias
            layer = rounded(bundle)[path]
            for pair in (node, before):
                assert (float(values[pair.input[1]]), int(values[pair.input[2]])) == layer.output_grid()
                assert values[pair.input[2]].dtype == np.int8


def test_runtimes_agree_with_torch(made: tuple[Bundle, Plan], exported: Path) -> None:
    bundle, _ = made
    pixels = bundle.prepare("vision", tiny.images(4))
    want = bundle.embed("vision", tiny.images(4))
    runners = ["onnxruntime"]
    try:
        import openvino  # noqa: F401

        runners.append("openvino")
    except ImportError:
        pass
    for name in runners:
        runner = open_runner(name, exported)
        (got,) = runner.run({key: value.numpy() for key, value in pixels.items()}).values()
        cosines = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
        assert cosines.min() > 0.998, name
        runner.close()


def test_openvino_computes_the_logits_of_integers(exported: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install 'mmcompress[openvino]'")
    compiled = openvino.Core().compile_model(str(exported), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [
        {key: value.astype(str) for key, value in node.get_rt_info().items()}
        for node in compiled.get_runtime_model().get_ordered_ops()
    ]
    linears = [facts for facts in found if facts["layerType"] == "FullyConnected"]
    for writer, precision in (("q_proj", "i8"), ("k_proj", "i8"), ("v_proj", "f32")):
        own = [facts for facts in linears if f"self_attn.{writer}/" in facts["originalLayersNames"]]
        assert [facts["outputPrecisions"] for facts in own] == [precision] * 3
    attentions = [facts for facts in found if "Softmax" in facts["originalLayersNames"]]
    assert [(facts["layerType"], facts["runtimePrecision"]) for facts in attentions] == [("Subgraph", "i8")] * 3


def test_graphs_are_compared_with_and_without_this_rounding(made: tuple[Bundle, Plan], exported: Path) -> None:
    grids = rounding.graph_grids(onnx.load(exported))
    assert {layer.output_grid() for path, layer in rounded(made[0]).items() if "vision" in path} <= grids
    plain = rounding.unrounded(onnx.load(exported))
    assert not rounding.graph_grids(plain)


def test_logits_are_floats_again_before_layers_are() -> None:
    path = "vision_model.encoder.layers.1.self_attn.q_proj"
    bundle = tiny.bundle("clip")
    with torch.no_grad():
        # One huge channel of one head: all others are rounded to 0 beside it, and only logits suffer.
        bundle.module(path).bias[0] = 1e4  # type: ignore[index]
        bundle.module(path.replace("q_proj", "k_proj")).weight[0] = 0.0  # type: ignore[index]
        bundle.module(path.replace("q_proj", "k_proj")).bias[0] = 0.0  # type: ignore[index]
    loose = run(copy.deepcopy(bundle), towers=("vision",))[1].decisions["towers"]["vision"]
    least = (loose["cosine"] + 1) / 2
    plain = run(copy.deepcopy(bundle), towers=("vision",), logits="float")[1].decisions["towers"]["vision"]
    assert loose["cosine"] < least < plain["cosine"]
    made, plan = run(bundle, towers=("vision",), min_cosine=least)
    report = plan.decisions["towers"]["vision"]
    assert report["float_logits"] == [path]
    assert report["kept_float"] == []
    assert path not in plan.decisions["logits"]
    assert len(plan.decisions["logits"]) == 2
    left = {name for name in queries_and_keys(made) if "vision" in name and "layers.1." not in name}
    assert set(rounded(made)) == left
    assert f"{path}.output_scale" not in plan.tensors


def test_what_stays_float_takes_its_partner_along() -> None:
    bundle, _ = run(keep_float=("vision_model.encoder.layers.0.self_attn.q_proj",))
    left = queries_and_keys(bundle) - {f"vision_model.encoder.layers.0.self_attn.{name}_proj" for name in "qk"}
    assert set(rounded(bundle)) == left


def test_layers_are_floats_only_where_logits_were_not_enough() -> None:
    bundle, plan = run(towers=("vision",), min_cosine=0.9999)
    report = plan.decisions["towers"]["vision"]
    assert report["kept_float"]
    assert len(report["float_logits"]) == 3
    # From there on it goes as if they had never been rounded.
    plain = run(towers=("vision",), min_cosine=0.9999, logits="float")[1].decisions["towers"]["vision"]
    assert (report["kept_float"], report["cosine"]) == (plain["kept_float"], plain["cosine"])
    assert "logits" not in plan.decisions
    assert not rounded(bundle)
    assert not any(name.endswith(".output_scale") for name in plan.tensors)


def test_pruned_and_factorized_layers_have_them_too(tmp_path: Path) -> None:
    bundle = tiny.bundle("clip")
    for cut in (Prune(ratio=0.3, compensate="none", score="magnitude"), Factorize(ratio=0.2)):
        cut.apply(bundle, cut.plan(bundle, context()))
    bundle, _ = run(bundle)
    factors = [path for path in rounded(bundle) if path.endswith(".up")]
    assert len(rounded(bundle)) == len(queries_and_keys(bundle))
    assert not any(path.endswith(".down") for path in rounded(bundle))
    assert {path.removesuffix(".up") for path in rounded(bundle)} == queries_and_keys(bundle)
    assert factors or not any("up" in path for path, _ in bundle.model.named_modules())


def test_gradients_pass_and_grids_stay_while_it_trains(made: tuple[Bundle, Plan]) -> None:
    bundle = copy.deepcopy(made[0])
    grids = {path: layer.output_grid() for path, layer in rounded(bundle).items()}
    biases = {path: layer.bias.detach().clone() for path, layer in rounded(bundle).items()}
    settings = Distill(steps=3, batch_size=4, learning_rate=1e-3, amp=False, train="integers", keep_worse=True)
    data = Context(data=tiny.dataset(8), teacher=lambda: tiny.bundle("clip"))
    plan = settings.plan(bundle, data)
    settings.apply(bundle, plan)
    settings.fit(bundle, data)
    assert {path: layer.output_grid() for path, layer in rounded(bundle).items()} == grids
    assert any(not torch.equal(layer.bias, biases[path]) for path, layer in rounded(bundle).items())


def test_smoothing_gains_go_into_values_only(made: tuple[Bundle, Plan]) -> None:
    folds = made[1].decisions["folds"]
    assert folds
    assert not folds.keys() & rounded(made[0]).keys()


def test_other_layouts_say_that_they_drop_it(tmp_path: Path) -> None:
    bundle = tiny.bundle("llava_clip")
    settings = Quantize(**INT8, towers=("vision",), smooth=0.0, sensitivity_samples=0)
    settings.check(bundle)
    settings.apply(bundle, settings.plan(bundle, context("llava_clip")))
    report = export_layout(bundle, tmp_path / "out", "compressed-tensors")
    assert set(report.float_outputs) == set(rounded(bundle))
    told = f"outputs of {len(rounded(bundle))} query and key Linears: not rounded to 8 bits any more"
    assert told in (tmp_path / "out" / "README.md").read_text()


def test_a_budget_of_time_may_choose_it() -> None:
    from mmcompress.passes.quantize_options import options_of

    bundle = tiny.bundle("clip")
    settings = Quantize(**INT8, scheme="auto", latency_ms=1.0, towers=("vision",))
    settings.check(bundle)
    options = options_of(settings, bundle, bundle.tower("vision"), ("W8A16", "W8A8"), context())
    attention = next(group for group in options.groups if group.name.endswith("layers.0.attention"))
    grids = {
        each.scheme: {path for path, layer in each.made.items() if getattr(layer, "output_scale", None) is not None}
        for each in attention.candidates
    }
    pair = {f"vision_model.encoder.layers.0.self_attn.{name}_proj" for name in "qk"}
    assert {scheme: found for scheme, found in grids.items() if found} == {"W8A8": pair}


@pytest.mark.parametrize(
    ("family", "params", "message"),
    [
        ("clip", {"target": "cpu"}, "does not go to cpu: only OpenVINO"),
        ("clip", {"target": "tensorrt"}, "does not go to tensorrt"),
        ("clip", {"activations": "dynamic"}, "given: dynamic activations"),
        ("clip", {"scheme": "W8A16"}, "given: W8A16"),
        ("clip", {"scheme": "auto", "bits": 8.0}, "given: AUTO"),
        ("blip", {}, "no attention of vision"),
        ("qwen2_vl", {"towers": ("language",)}, "no attention of language"),
        ("clip", {"keep_float": ("*_proj",)}, "or they stay float"),
    ],
)
def test_what_gains_nothing_is_refused(family: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Quantize(**{**INT8, **params}).check(tiny.bundle(family))
    assert error.value.hint


def test_keys_in_a_cache_stay_floats() -> None:
    bundle = tiny.bundle("whisper")
    settings = Quantize(**INT8, sensitivity_samples=0)
    settings.apply(bundle, settings.plan(bundle, context("whisper")))
    decoders = {block.path for tower in bundle.towers() for block in tower.blocks if block.cross}
    assert decoders
    assert rounded(bundle)
    assert not any(path.startswith(block + ".") for path in rounded(bundle) for block in decoders)
