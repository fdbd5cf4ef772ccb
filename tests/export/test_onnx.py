"""Law 6: the exported graph computes what the model computes at every corner of its shapes, and is what was promised."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from mmcompress.errors import GateFailed, UsageError
from mmcompress.export import onnx as exporting
from mmcompress.export.artifact import is_artifact, open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.embedder import ArtifactEmbedder
from mmcompress.surgery.quantized import quantized
from mmcompress.surgery.quantized_base import Quantized
from tests import tiny
from tests.export.conftest import quantize_tower


def test_batches_and_token_counts_are_compared_with_torch(clip_export):
    vision, text = clip_export.components
    assert [row.batch for row in vision.parity] == [1, 2, 7]
    # 16 example tokens, half of them, and once the limit of 20.
    assert [(row.batch, row.tokens) for row in text.parity] == [
        *((batch, tokens) for batch in (1, 2, 7) for tokens in (8, 16)),
        (1, 20),
    ]
    assert all(row.relative <= 1e-4 and row.runner == "onnxruntime" for row in (*vision.parity, *text.parity))


def test_declared_axes_stay_symbolic(clip_export):
    text = ["batch", "tokens"]
    inputs = {"vision": {"pixel_values": ["batch", 3, 56, 56]}, "text": {"input_ids": text, "attention_mask": text}}
    for name, want in inputs.items():
        graph = onnx.load(clip_export.artifact.path(name)).graph
        dims = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }
        assert dims == {**want, "embeddings": ["batch", 24]}


def test_the_graph_is_free_of_what_hinders_fusion(clip_export, unsigned_export):
    vision = clip_export.artifact.component("vision")
    # 3 blocks: four linears of attention, two of the MLP, two products of attention; scales and masks are gone.
    assert vision.nodes["MatMul"] == 3 * 8
    assert vision.nodes["Softmax"] == 3
    assert not {"IsNaN", "Where", "Sqrt", "Cast", "Identity", "ScatterND", "ScatterElements"} & set(vision.nodes)
    # DINOv2 scales every residual branch by a vector; it is folded into the linear before.
    assert "Mul" not in unsigned_export.artifact.component("vision").nodes


def test_files_say_where_they_come_from_and_nothing_about_this_machine(clip_export):
    path = clip_export.artifact.path("vision")
    graph = onnx.load(path)
    assert {prop.key: prop.value for prop in graph.metadata_props}["mmc.source"] == "clip"
    assert graph.producer_name == "mmcompress"
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content
    assert any(node.name == "vision_model.encoder.layers.1.self_attn.q_proj/MatMul" for node in graph.graph.node)


def test_integers_stay_integers(unsigned, unsigned_export):
    component = unsigned_export.artifact.component("vision")
    layers = [module for module in unsigned.model.modules() if isinstance(module, Quantized)]
    assert component.quantized == len(layers) == 18 + 1
    assert component.weights["INT8"] == sum(layer.weight_int8.nbytes for layer in layers)
    # q, k and v share one QuantizeLinear only where their grids are equal; here every layer has its own.
    assert component.nodes["QuantizeLinear"] == 18 + 1
    exact, rounded = (
        [row for row in unsigned_export.components[0].parity if row.rounding is rounding] for rounding in (False, True)
    )
    assert max(row.relative for row in exact) <= 1e-4
    assert min(row.cosine for row in rounded) >= 0.98


def test_equal_grids_are_rounded_once(signed_half_export):
    # ViT's 18 linears and its pooler; in block 0 queries, keys and values have the same grid, so 2 pairs fall away.
    nodes = signed_half_export.artifact.component("vision").nodes
    assert nodes["QuantizeLinear"] == 19 - 2
    assert nodes["DequantizeLinear"] == 19 + 19 - 2


def test_half_precision_halves_the_floats_and_keeps_float32_outside(signed_half_export):
    component = signed_half_export.artifact.component("vision")
    assert "FLOAT" not in component.weights
    assert [spec.dtype for spec in (*component.inputs, *component.outputs)] == ["float32", "float32"]
    assert component.weights["INT8"] > component.weights["FLOAT16"]


def test_the_same_model_gives_the_same_bytes(tmp_path, clip, clip_export):
    again = export_onnx(clip, tmp_path / "out", towers=["text"], batches=(1,))
    assert again.artifact.component("text").sha256 == clip_export.artifact.component("text").sha256


def test_the_artifact_embeds_like_the_model(clip, clip_export):
    artifact = open_artifact(clip_export.artifact.directory)
    assert artifact == clip_export.artifact
    assert is_artifact(artifact.directory)
    embedder = ArtifactEmbedder(artifact, threads=1)
    images, texts = tiny.images(5), tiny.texts(5)
    np.testing.assert_allclose(embedder.embed_images(images), clip.embed_images(images), atol=1e-4)
    np.testing.assert_allclose(embedder.embed_texts(texts), clip.embed_texts(texts), atol=1e-4)
    scale, bias = clip.family.similarity(clip.model)
    assert embedder.similarity == (scale.item(), bias.item())
    embedder.close()


def test_images_of_any_shape(tmp_path):
    bundle = tiny.bundle("siglip2")
    report = export_onnx(bundle, tmp_path / "out", towers=["vision"], batches=(2,))
    # Images of other shapes are the point of SigLIP 2: their patches are padded and masked, their positions resized.
    images = [image.resize(size) for image, size in zip(tiny.images(3), ((56, 56), (64, 32), (24, 72)), strict=True)]
    embedder = ArtifactEmbedder(report.artifact, threads=1)
    np.testing.assert_allclose(embedder.embed_images(images), bundle.embed_images(images), atol=2e-4)


def test_weights_only(tmp_path):
    bundle = quantize_tower(tiny.bundle("dual_encoder_dinov2"), "text", None)
    words = "text_model.embeddings.word_embeddings"
    bundle.replace(words, quantized(bundle.module(words), None))
    report = export_onnx(bundle, tmp_path / "out", towers=["text"], batches=(1, 2))
    component = report.artifact.component("text")
    assert component.quantized == 14  # 2 blocks of 6 linears, the pooler, the words
    assert "QuantizeLinear" not in component.nodes
    assert max(row.relative for row in report.components[0].parity) <= 1e-4


def test_rows_read_at_fixed_positions_stay_integers(tmp_path):
    bundle = tiny.bundle("clip")
    positions = "vision_model.embeddings.position_embedding"
    bundle.replace(positions, quantized(bundle.module(positions), None))
    report = export_onnx(bundle, tmp_path / "out", towers=["vision"], batches=(2,))
    # 7 x 7 patches and the class token, 48 channels.
    assert report.artifact.component("vision").weights["INT8"] == 50 * 48
    assert report.components[0].parity[0].relative <= 1e-4


def test_what_protobuf_cannot_hold_goes_beside_the_graph(clip, clip_export, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "EXTERNAL_BYTES", 1000)
    report = export_onnx(clip, tmp_path / "out", towers=["text"], batches=(1,))
    artifact = open_artifact(tmp_path / "out")
    component = artifact.component("text")
    assert component.data == "text.onnx.data"
    assert component.bytes > clip_export.artifact.component("text").weights["FLOAT"]
    assert max(row.relative for row in report.components[0].parity) <= 1e-4
    texts = tiny.texts(3)
    embedder = ArtifactEmbedder(artifact, threads=1)
    np.testing.assert_allclose(embedder.embed_texts(texts), clip.embed_texts(texts), atol=1e-4)
    data = tmp_path / "out" / component.data
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="damaged"):
        open_artifact(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"towers": ["audio"]}, "no part 'audio'"),
        ({"precision": "float64"}, "precision is 'float64'"),
        ({"opset": 12}, "opset is 12"),
        ({"precision": "bfloat16", "opset": 20}, "opset is 20; expected 22"),
        ({"batches": ()}, "batches is"),
        ({"batches": (0,)}, "batches is"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(options, words, clip, tmp_path):
    with pytest.raises(UsageError, match=words) as caught:
        export_onnx(clip, tmp_path / "out", **options)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused(clip, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        export_onnx(clip, tmp_path / "out")


def test_a_failing_export_leaves_nothing_behind(clip, tmp_path, monkeypatch):
    def write_and_fail(_bundle, directory, *_args):
        (directory / "vision.onnx").write_bytes(b"half done")
        raise GateFailed("differs")

    monkeypatch.setattr(exporting, "_export_part", write_and_fail)
    with pytest.raises(GateFailed):
        export_onnx(clip, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_traced_is_one_clear_error(clip, tmp_path, monkeypatch):
    def looks_at_values(model, tower, inputs):
        return inputs["pixel_values"][: int(inputs["pixel_values"].abs().sum())].flatten(1)

    monkeypatch.setattr(clip.family, "encode", looks_at_values, raising=False)
    with pytest.raises(UsageError, match="the vision part cannot be exported") as caught:
        export_onnx(clip, tmp_path / "out", towers=["vision"])
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []
