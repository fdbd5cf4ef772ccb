"""Models that answer in text: their exported parts write the very tokens that transformers' greedy search writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mmcompress import passes
from mmcompress.bundle import Bundle
from mmcompress.errors import GateFailed, UsageError
from mmcompress.export.artifact import Artifact, open_artifact
from mmcompress.export.onnx import ExportReport, export_onnx
from mmcompress.export.parity import check_parity
from mmcompress.export.tensorrt import export_tensorrt
from mmcompress.export.trace import trace, traced
from mmcompress.families.answers import greedy
from mmcompress.measure.answerer import Answerer, artifact_answerer, bundle_answerer
from mmcompress.measure.onnx_graph import read_graph, rounded_blocks
from mmcompress.ops.masks import HIDDEN, causal_mask
from mmcompress.passes.base import Context, Plan
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedEmbedding, QuantizedLinear, TiedLinear
from mmcompress.surgery.quantized_base import Quantized
from tests import tiny
from tests.export.test_parity import edited, initializer_of

RUNNERS = ("onnxruntime", "openvino")
A = 4
"""The token of the word "a", which tiny Whisper says sooner or later."""


@pytest.fixture
def bundle() -> Bundle:
    return tiny.bundle("whisper")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_onnx(tiny.bundle("whisper"), tmp_path_factory.mktemp("whisper") / "out")


@pytest.fixture(scope="module")
def artifact(report: ExportReport) -> Artifact:
    return open_artifact(report.artifact.directory)


def tokens(bundle: Bundle, count: int) -> list[list[int]]:
    """Return what transformers itself writes, up to the end."""
    features = bundle.prepare("audio", list(tiny.spoken(count)))["input_features"]
    settings = greedy(bundle.model.generation_config, 12)
    settings.return_timestamps = False
    settings.max_new_tokens = 12
    with torch.no_grad():
        rows = bundle.model.generate(features, generation_config=settings).tolist()
    end = settings.eos_token_id
    ends = [
        settings.pad_token_id,
        *(end if isinstance(end, list) else [end]),
    ]  # the end itself is taken away, and padded
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def with_settings(artifact: Artifact, runner: str = "onnxruntime", **settings: Any) -> Answerer:
    assert artifact.generation is not None
    made = Artifact(**{**vars(artifact), "generation": {**artifact.generation, **settings}})
    return artifact_answerer(made, runner, threads=1)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": A},
        {"eos_token_id": [A, 9], "begin_suppress_tokens": [A]},
        {"suppress_tokens": [0, 1, 2, 24, A]},
        {"lang_to_id": {"<|en|>": 20, "<|de|>": 21, "<|fr|>": 22}, "is_multilingual": True},
        {
            "lang_to_id": {"<|en|>": 20, "<|de|>": 21},
            "task_to_id": {"transcribe": 22, "translate": 23},
            "language": "de",
            "is_multilingual": True,
        },
    ],
    ids=["uneven lengths", "several ends", "suppressed", "which language it is", "German"],
)
def test_the_tokens_are_those_of_torch(
    bundle: Bundle, artifact: Artifact, runner: str, settings: dict[str, Any]
) -> None:
    for name, value in settings.items():
        setattr(bundle.model.generation_config, name, value)
    answerer = with_settings(artifact, runner, **settings)
    lengths = set()
    for count in (1, 2, 5):
        want = tokens(bundle, count)
        written = answerer.write(list(tiny.spoken(count)))
        assert written.rows == want
        lengths |= {len(row) for row in want}
        if "eos_token_id" in settings:
            # A step for each token of the longest row, and one for its end: nothing is written once all have ended.
            assert len(written.steps) == min(12, max(map(len, want)) + 1)
    if "eos_token_id" in settings:
        assert len(lengths) > 1  # rows that ended wait for those that have not
    answerer.close()


def test_answers_are_those_of_the_bundle_and_of_its_parts_in_torch(bundle: Bundle, artifact: Artifact) -> None:
    samples = list(tiny.spoken(4))
    want = bundle.generate(samples)
    assert len(set(want)) > 1
    assert artifact_answerer(artifact, threads=1).generate(samples) == want
    assert bundle_answerer(bundle, threads=1).generate(samples) == want


def test_one_decoder_serves_the_start_and_every_step(report: ExportReport) -> None:
    """Compared with torch at an empty past, in the middle, and once where the decoder has no place left."""
    decoder = report.components[1]
    assert {(row.batch, row.tokens, row.past) for row in decoder.parity} == {
        *((batch, *sizes) for batch in (1, 2, 7) for sizes in ((2, 0), (1, 2), (3, 5))),
        (1, 1, 23),
    }
    assert max(row.relative for row in decoder.parity) <= 1e-5
    assert [component.component.name for component in report.components] == ["audio", "decoder"]


def test_declared_axes_stay_symbolic(artifact: Artifact) -> None:
    graph = onnx.load(artifact.path("decoder")).graph
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert dims["input_ids"] == ["batch", "tokens"]
    assert dims["cross_key_0"] == ["batch", 4, 50, 12]
    assert dims["past_value_1"] == ["batch", 4, "past", 12]
    assert dims["logits"] == ["batch", 25]


def test_each_weight_is_on_disk_once(bundle: Bundle, artifact: Artifact) -> None:
    """The word table, tied to the output layer, is one; keys and values of the cross-attention lie with the encoder only."""
    stored = sum(parameter.nbytes for parameter in bundle.model.parameters())
    found = sum(component.weights["FLOAT"] for component in artifact.components)
    # The part that listens uses neither queries nor output of the cross-attention, the other neither keys nor values.
    assert stored <= found < stored * 1.001 + 1000


@pytest.mark.parametrize(
    "params",
    [
        {"scheme": "W8A16"},
        {"scheme": "W8A16", "target": "openvino"},
        {"scheme": "W8A8"},
        {"scheme": "W8A8", "activations": "dynamic"},
    ],
)
def test_quantized_it_answers_the_same_and_keeps_its_integers(
    tmp_path: Path, bundle: Bundle, params: dict[str, Any]
) -> None:
    made = passes.build("quantize", params)
    context = Context(data=tiny.spoken(8))
    made.apply(bundle, made.plan(bundle, context))
    report = export_onnx(bundle, tmp_path / "out", batches=(1, 2))
    found = {m.weight_int8.data_ptr(): m.weight_int8.nbytes for m in bundle.model.modules() if isinstance(m, Quantized)}
    integers = sum(found.values())  # the table and the output layer tied to it are one
    found_bytes = [component.component.weights for component in report.components]
    stored = sum(weights.get(dtype, 0) for weights in found_bytes for dtype in ("INT8", "UINT8"))
    # A zero point has a byte too.
    rounded = sum(component.component.nodes.get("QuantizeLinear", 0) for component in report.components)
    assert integers <= stored <= integers + rounded
    samples = list(tiny.spoken(5))
    for runner in RUNNERS:
        assert artifact_answerer(report.artifact, runner, threads=1).generate(samples) == bundle.generate(samples)


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_in_4_bits_it_answers_the_same_and_keeps_its_bytes(tmp_path: Path, bundle: Bundle, target: str) -> None:
    made = passes.build("quantize", {"scheme": "W4A16", "group_size": 16, "target": target})
    made.apply(bundle, made.plan(bundle, Context()))
    report = export_onnx(bundle, tmp_path / "out", batches=(1, 2))
    layers = [module for module in bundle.model.modules() if isinstance(module, PackedLinear)]
    # The output layer, which shares the word table, is multiplied in blocks too, of 8 bits.
    blocks = [module for module in bundle.model.modules() if isinstance(module, TiedLinear) and target == "cpu"]
    assert len(blocks) == (target == "cpu")
    promised = sum(layer.weight_int4.nbytes + layer.weight_zero_point.nbytes for layer in layers)
    promised += sum(layer.weight_int8.nbytes for layer in blocks)
    stored = [component.component.weights for component in report.components]
    # Cross-attention's keys and values lie with the encoder: each layer is in one of the parts.
    assert sum(weights["UINT8"] for weights in stored) == promised
    eight_bits = [m for m in bundle.model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    tables = {module.weight_int8.data_ptr() for module in eight_bits}
    assert sum(part.component.quantized for part in report.components) == len(layers) + len(tables)
    assert sum(component.component.nodes["MatMulNBits"] for component in report.components) == len(layers + blocks)
    for component in report.components:
        exact = [row for row in component.parity if not row.rounding or target == "openvino"]
        assert max(row.relative for row in exact) <= 1e-4
        assert any(row.rounding for row in component.parity)
        graph = read_graph(tmp_path / "out" / component.component.file)
        packed = any(node.op_type == "MatMulNBits" for node in graph.graph.node)
        assert (rounded_blocks(graph) > 0) == (packed and target == "cpu")
    samples = list(tiny.spoken(5))
    for runner in RUNNERS:
        assert artifact_answerer(report.artifact, runner, threads=1).generate(samples) == bundle.generate(samples)


def test_pruned_unevenly_it_answers_the_same(tmp_path: Path, bundle: Bundle) -> None:
    """Blocks of different numbers of heads, one block less."""
    heads = {"decoder.0": "0,2-3", "decoder.0.cross": "1,3"}
    for units, kept in (("heads", {"heads": heads}), ("blocks", {"blocks": {"audio": "0,2"}})):
        everything = {"heads": {}, "neurons": {}, "blocks": {}} | kept
        passes.build("prune", {"units": [units]}).apply(bundle, Plan({"kept": everything}))
    artifact = export_onnx(bundle, tmp_path / "out", batches=(1, 2)).artifact
    dims = {spec.name: spec.dims for spec in artifact.component("decoder").inputs}
    assert (dims["past_key_0"][1], dims["cross_key_0"][1], dims["past_key_1"][1]) == (3, 2, 4)
    samples = list(tiny.spoken(5))
    assert artifact_answerer(artifact, threads=1).generate(samples) == bundle.generate(samples)


def test_half_precision_answers(tmp_path: Path, bundle: Bundle) -> None:
    artifact = export_onnx(bundle, tmp_path / "out", precision="float16", batches=(2,)).artifact
    assert "FLOAT" not in artifact.component("decoder").weights
    assert {spec.dtype for spec in artifact.component("decoder").inputs} == {"int64", "float32"}
    assert len(artifact_answerer(artifact, threads=1).generate(list(tiny.spoken(2)))) == 2


def test_a_wrong_weight_is_found_in_its_block(tmp_path: Path, bundle: Bundle, artifact: Artifact) -> None:
    path = artifact.path("decoder")
    bias = initializer_of(path, "model.decoder.layers.1.fc2/Add", 1)
    broken = edited(path, tmp_path / "decoder.onnx", bias, 1.5)
    with pytest.raises(GateFailed, match=r"decoder part differs .* first in model\.decoder\.layers\.1$"):
        check_parity(traced(bundle, "decoder", "float32"), broken, precision="float32")


def test_only_what_a_part_computes_with_is_its_own(bundle: Bundle) -> None:
    used = trace(traced(bundle, "audio", "float32"), 20).used
    assert "model.decoder.layers.0.encoder_attn.k_proj.weight" in used
    assert "model.encoder.conv1.weight" in used
    assert not [name for name in used if "self_attn" in name and name.startswith("model.decoder")]
    assert "model.decoder.embed_tokens.weight" not in used


def test_what_the_loop_does_not_know_is_refused(tmp_path: Path, bundle: Bundle) -> None:
    bundle.model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(UsageError, match="sets no_repeat_ngram_size to 3, which exported models do not know"):
        export_onnx(bundle, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_half_a_model_cannot_answer(tmp_path: Path, bundle: Bundle, artifact: Artifact) -> None:
    with pytest.raises(UsageError, match="audio alone cannot answer: whisper is audio, decoder"):
        export_onnx(bundle, tmp_path / "out", towers=["audio"])


def test_room_for_the_answer(artifact: Artifact) -> None:
    answerer = artifact_answerer(artifact, threads=1)
    samples = list(tiny.spoken(2))
    assert [len(row) for row in answerer.write(samples, 22).rows] == [22, 22]
    with pytest.raises(UsageError, match="2 tokens of prompt and 23 of answer are 25; the model takes 24") as caught:
        answerer.write(samples, 23)
    assert "at most 22" in caught.value.hint
    with pytest.raises(UsageError, match="0 tokens"):
        answerer.write(samples, 0)


def test_what_an_answer_costs(artifact: Artifact) -> None:
    written = artifact_answerer(artifact, threads=1).write(list(tiny.spoken(3)))
    assert list(written.seconds) == ["audio"]
    assert len(written.steps) == 12
    assert written.first_token == written.seconds["audio"] + written.steps[0]
    # Keys and values of 2 blocks, 3 rows of 4 heads of 12 floats: of 50 states that were heard, and of 2 + 11 tokens. The twelfth
    # is never read.
    assert written.cache_bytes == 2 * 2 * 3 * 4 * 12 * 4 * (50 + 13)


def test_no_engine_is_built_of_a_growing_cache(
    tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmcompress.export.tensorrt.load_api", lambda _name: None)
    with pytest.raises(UsageError, match="engines are built of models that embed"):
        export_tensorrt(artifact, tmp_path / "out")


def test_masks_by_hand() -> None:
    hidden = HIDDEN
    assert causal_mask(1, 2, torch.float32)[0, 0].tolist() == [[0, 0, hidden], [0, 0, 0]]
    present = torch.tensor([[0, 1, 1]])
    assert causal_mask(1, 2, torch.float32, present)[0, 0].tolist() == [[hidden, 0, hidden], [hidden, 0, 0]]
    nobody = causal_mask(0, 2, torch.float32, torch.tensor([[0, 1]]))[0, 0].tolist()
    assert nobody == [[0, hidden], [hidden, 0]]  # the padding looks at itself


def test_chained_calls_are_plain_calls(bundle: Bundle, artifact: Artifact) -> None:
    """What is kept by an engine goes on to the next call as it is, between parts too."""
    for runner in RUNNERS:
        answerer = artifact_answerer(artifact, runner, threads=1)
        audio, decoder = (*answerer.writer.earlier, answerer.writer.last)
        features = answerer.asked(list(tiny.spoken(2)))
        heard = audio.runner.chain(features, keep=audio.outputs)
        plain = audio.runner.run(features)
        empty = {name: np.zeros((2, 4, 0, 12), np.float32) for name in decoder.names if name.startswith("past_")}
        ids = {"input_ids": np.array([[1, 24], [1, 24]])}
        kept = [name for name in decoder.outputs if name != "logits"]
        first = decoder.runner.chain({**heard, **empty, **ids}, keep=kept)
        want = decoder.runner.run({**plain, **empty, **ids})
        np.testing.assert_array_equal(first["logits"], want["logits"])
        step = {"input_ids": np.array([[5], [7]])}
        past = {name.replace("present", "past"): value for name, value in first.items() if name != "logits"}
        second = decoder.runner.chain({**heard, **past, **step}, keep=kept)["logits"]
        past = {name.replace("present", "past"): value for name, value in want.items() if name != "logits"}
        np.testing.assert_allclose(second, decoder.runner.run({**plain, **past, **step})["logits"], rtol=0, atol=1e-6)
        with pytest.raises(UsageError, match="there is no input 'past'"):
            decoder.runner.chain({**heard, **empty, **step, "past": empty["past_key_0"]}, keep=kept)
        answerer.close()
