"""TensorRT-RTX parses and builds without a GPU, so what needs no device is tested for real."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from mmcompress.errors import MissingError, UsageError
from mmcompress.export import tensorrt as building
from mmcompress.export.artifact import Component, TensorSpec, open_artifact, sha256
from mmcompress.export.tensorrt import EngineOptions, Profile, export_tensorrt, load_api, profile_shapes
from mmcompress.export.tensorrt_api import Api
from mmcompress.passes import build
from mmcompress.passes.base import Context
from tests import tiny

rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None, reason="tensorrt_rtx_bindings is not installed (extra rtx)"
)


def quantized(**params):
    bundle = tiny.bundle("clip")
    made = build("quantize", {"min_cosine": -1.0, **params})
    made.apply(bundle, made.plan(bundle, Context(data=tiny.data("clip", 4), num_samples=4, batch_size=4)))
    return bundle


PIXELS = TensorSpec("pixel_values", "float32", ("batch", 3, 8, 8))
IDS = TensorSpec("input_ids", "int64", ("batch", "tokens"))


def component(*inputs: TensorSpec, tokens: int = 0) -> Component:
    return Component("part", "part.onnx", 0, "", inputs, (), {}, {}, tokens=tokens)


def test_profiles_follow_the_named_axes():
    options = EngineOptions(batch=Profile(1, 4, 9))
    assert profile_shapes(component(PIXELS), options) == {"pixel_values": ((1, 3, 8, 8), (4, 3, 8, 8), (9, 3, 8, 8))}
    assert profile_shapes(component(IDS, tokens=77), options) == {"input_ids": ((1, 1), (4, 16), (9, 77))}
    assert profile_shapes(component(IDS, tokens=7), options) == {"input_ids": ((1, 1), (4, 7), (9, 7))}


def test_more_tokens_than_the_model_takes_are_refused():
    with pytest.raises(UsageError, match="100 tokens; part takes 77"):
        profile_shapes(component(IDS, tokens=77), EngineOptions(tokens=Profile(1, 10, 100)))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 3), (1, 4, 3)])
def test_profiles_must_be_in_order(sizes):
    with pytest.raises(UsageError, match="expected 1 <= least <= usual <= most"):
        Profile(*sizes)


def test_without_any_tensorrt_the_hint_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(MissingError, match="no usable TensorRT") as caught:
        load_api()
    assert "mmcompress[rtx]" in caught.value.hint


def test_tensorrt_without_a_gpu_is_missing_not_a_crash(monkeypatch):
    trt = ModuleType("tensorrt")

    class Logger:
        pass

    def builder(_logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.ILogger, trt.Builder = Logger, builder  # type: ignore[attr-defined]
    monkeypatch.setattr(Logger, "__init__", lambda self: None)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    with pytest.raises(MissingError, match="it needs a GPU and its driver"):
        load_api("tensorrt")


@pytest.mark.parametrize(
    ("used", "options"),
    [("tensorrt", {"capabilities": ("SM89",)}), ("tensorrt_rtx", {"version_compatible": True})],
)
def test_options_of_the_other_library_are_refused_not_ignored(used, options, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "load_api", lambda _name: Api(used, None))
    with pytest.raises(UsageError, match=f"{next(iter(options))} is an option of .*; {used} is used"):
        export_tensorrt(clip, tmp_path / "out", EngineOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_only_the_towers_that_are_exported_must_be_symmetric(unsigned):
    building._refuse_unsigned_layers(unsigned, ["text"])
    with pytest.raises(UsageError, match="symmetric int8 only"):
        building._refuse_unsigned_layers(unsigned, ["vision"])


@pytest.mark.parametrize("params", [{"activations": "dynamic"}, {"scheme": "W8A16"}], ids=["by token", "weights"])
def test_what_is_made_for_cpus_is_refused_with_or_without_tensorrt(params, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "load_api", lambda _name: pytest.fail("the model is looked at first"))
    with pytest.raises(UsageError, match="TensorRT") as caught:
        export_tensorrt(quantized(**params), tmp_path / "out")
    assert caught.value.hint == "quantize with --target tensorrt"
    assert list(tmp_path.iterdir()) == []


@rtx
@pytest.mark.parametrize(
    ("params", "towers"),
    [
        ({}, ["vision", "text"]),
        ({"activations": "dynamic"}, ["vision"]),
        ({"scheme": "FP8"}, ["vision"]),
        ({"scheme": "FP8", "activations": "dynamic"}, ["vision"]),
    ],
    ids=["int8", "int8 by token", "float8", "float8 by token"],
)
def test_what_is_quantized_for_it_builds(params, towers, tmp_path):
    """Word tables included, which stay floats: it looks up no integers."""
    options = EngineOptions(api="tensorrt_rtx", batch=Profile(1, 2, 4), capabilities=("SM89",))
    report = export_tensorrt(
        quantized(target="tensorrt", **params), tmp_path / "out", options, towers=towers, batches=(1,)
    )
    assert [engine.name for engine in report.engines] == towers
    assert all((tmp_path / "out" / engine.file).stat().st_size == engine.bytes > 0 for engine in report.engines)
    stored = report.artifact.component("vision").weights
    assert stored["FLOAT8E4M3FN" if "scheme" in params else "INT8"] > stored["FLOAT16"] / 4


@rtx
def test_symmetric_int8_in_half_precision_builds(signed_half_export, tmp_path):
    report = export_tensorrt(
        open_artifact(signed_half_export.artifact.directory),
        tmp_path / "out",
        EngineOptions(api="tensorrt_rtx", batch=Profile(1, 2, 4), capabilities=("SM89",)),
    )
    (engine,) = report.engines
    written = tmp_path / "out" / engine.file
    assert engine.sha256 == sha256(written)
    assert engine.onnx_sha256 == report.artifact.component("vision").sha256
    document = json.loads((tmp_path / "out" / "engine.json").read_text())
    assert (document["api"], document["capabilities"]) == ("tensorrt_rtx", ["SM89"])
    assert document["engines"][0]["profiles"] == {
        "pixel_values": {"least": [1, 3, 56, 56], "usual": [2, 3, 56, 56], "most": [4, 3, 56, 56]}
    }
    # The directory is still an ONNX artifact that every other runner can use.
    assert open_artifact(tmp_path / "out").path("vision").is_file()


@rtx
def test_a_text_tower_builds_in_bfloat16_straight_from_the_model(clip, tmp_path):
    report = export_tensorrt(clip, tmp_path / "out", towers=["text"], precision="bfloat16", batches=(1,))
    assert [engine.name for engine in report.engines] == ["text"]
    assert report.engines[0].precision == "bfloat16"
    assert report.artifact.opset == 22
    assert set(report.artifact.component("text").weights) - {"BOOL", "INT64", "INT32"} == {"BFLOAT16"}
    assert next(clip.model.parameters()).dtype == torch.float32
    assert report.engines[0].profiles["input_ids"]["most"] == [32, 20]


@rtx
@pytest.mark.parametrize("exported", [True, False])
def test_unsigned_activations_are_refused_with_the_way_out(exported, unsigned, unsigned_export, tmp_path):
    with pytest.raises(UsageError, match="symmetric int8 only") as caught:
        export_tensorrt(unsigned_export.artifact if exported else unsigned, tmp_path / "out")
    assert caught.value.hint == "quantize with --target tensorrt"
    assert list(tmp_path.iterdir()) == []


@rtx
def test_a_graph_that_does_not_parse_names_the_node(clip_export, tmp_path, monkeypatch):
    import onnx

    target = tmp_path / "broken"
    target.mkdir()
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20, "odd" : 1]> g (float[batch, 3] x) => (float[batch, 3] y) { y = odd.Strange(x) }'
    )
    graph.graph.node[0].name = "blocks.0/Strange"
    onnx.save(graph, target / "vision.onnx")
    spec = TensorSpec("x", "float32", ("batch", 3))
    part = Component("vision", "vision.onnx", 1, "", (spec,), (), {}, {})
    artifact = type(clip_export.artifact)(**{**vars(clip_export.artifact), "directory": target, "components": (part,)})
    with pytest.raises(UsageError, match="cannot parse") as caught:
        building.build_engines(artifact, load_api("tensorrt_rtx"), EngineOptions())
    assert "Strange" in caught.value.message
    assert "\n" not in caught.value.message


@rtx
def test_an_unknown_capability_lists_the_known_ones(clip_export, tmp_path):
    with pytest.raises(UsageError, match="no compute capability 'SM7'") as caught:
        export_tensorrt(
            clip_export.artifact, tmp_path / "out", EngineOptions(api="tensorrt_rtx", capabilities=("SM7",))
        )
    assert "SM75" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
