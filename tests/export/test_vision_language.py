"""Vision-language models in three graphs answer as the checkpoint does: pictures or none, prompts of uneven length, any batch."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.data import Sample, Video
from mmcompress.errors import UsageError
from mmcompress.export.artifact import Artifact, open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.bench_answers import AnswerTarget
from mmcompress.jobs.bench_targets import Source
from mmcompress.jobs.generate import generate, samples_of
from mmcompress.measure.answerer import artifact_answerer, bundle_answerer
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.progress import Silent
from mmcompress.surgery.quantized_base import Quantized
from tests import tiny

MODELS = ("llava_clip", "paligemma")


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Artifact]:
    bundle = tiny.bundle(request.param)
    report = export_onnx(bundle, tmp_path_factory.mktemp(request.param) / "out", batches=(1, 2))
    return bundle, open_artifact(report.artifact.directory)


def test_several_pictures_go_through_the_vision_part_one_by_one(exported: tuple[Bundle, Artifact]) -> None:
    bundle, artifact = exported
    first, second, third = tiny.images(3)
    asked = [
        Sample("two", picture=first, further=(second,), question="what is this ?"),
        Sample("none", question="what is this ?"),
        Sample("frames", video=Video((third, first, second)), question="how many ?"),
    ]
    want = bundle.generate(asked)
    answerer = artifact_answerer(artifact, threads=1)
    assert len(answerer.asked(asked)["pixel_values"]) == 5
    assert answerer.generate(asked) == want
    assert [answerer.generate([sample])[0] for sample in asked] == want


def test_the_graphs_take_any_batch_prompt_and_past(exported: tuple[Bundle, Artifact]) -> None:
    _, artifact = exported
    assert [component.name for component in artifact.components] == ["vision", "embed", "language"]
    graph = onnx.load(artifact.path("language")).graph
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    assert dims["inputs_embeds"] == ["batch", "tokens", 32]
    assert dims["attention_mask"] == ["batch", "past + tokens"]
    assert dims["position_ids"] == ["batch", "tokens"]
    assert dims["past_value_2"] == ["batch", 2, "past", 8]  # of two heads, each for two of the queries'
    sizes = {(row["batch"], row["tokens"], row["past"]) for row in artifact.component("language").parity}
    assert {batch for batch, _, _ in sizes} == {1, 2}
    assert any(tokens > 1 and past == 0 for _, tokens, past in sizes)
    assert any(tokens == 1 and past > 1 for _, tokens, past in sizes)


def test_stages_of_a_benchmark(exported: tuple[Bundle, Artifact], tmp_path: Path) -> None:
    bundle, artifact = exported
    target = AnswerTarget(Source(artifact.directory, artifact=artifact), "x", "cpu", tmp_path, Silent(), 4)
    assert target.towers == ("vision", "prompt", "token", "answer")  # looking tokens up is no stage
    prompt = target.asked(2)["input_ids"].shape[1]
    shapes = {stage: {k: v.shape for k, v in target.arrays(stage, 2, 16).items()} for stage in target.towers}
    assert shapes["vision"] == {"pixel_values": (2, 3, 56, 56)}
    assert shapes["prompt"]["inputs_embeds"] == (2, prompt, 32)
    assert shapes["prompt"]["attention_mask"] == (2, prompt)
    assert shapes["token"]["past_key_0"] == (2, 2, prompt + 2, 8)
    assert shapes["token"]["attention_mask"] == (2, prompt + 3)
    torch_target = AnswerTarget(Source(tmp_path, bundle=bundle), "y", "cpu", tmp_path, Silent(), 4)
    for stage in ("prompt", "token"):
        assert torch_target.macs(stage, 16) == target.macs(stage, 16)
    # torch runs the encoder's last block too where the connector reads the one before; no graph holds what nobody reads.
    assert torch_target.macs("vision", 16) >= target.macs("vision", 16)


@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16"])
def test_quantized_blocks_that_nobody_reads_are_in_no_graph(scheme: str, tmp_path: Path) -> None:
    """The connector reads the block before the last: the last one's integers are neither exported nor missed."""
    bundle = tiny.bundle("llava_clip")
    made = build("quantize", {"scheme": scheme, "min_cosine": -1.0, "keep_float": ("model.language_model.*",)})
    made.apply(bundle, made.plan(bundle, Context(data=tiny.data("llava_clip", 4), num_samples=4, batch_size=2)))
    blocks = bundle.tower("vision").blocks
    quantized = [module for module in bundle.module(blocks[-1].path).modules() if isinstance(module, Quantized)]
    artifact = export_onnx(bundle, tmp_path / "out", batches=(1,)).artifact
    names = [value.name for value in onnx.load(artifact.path("vision")).graph.initializer]
    assert quantized
    assert any(f"layers.{len(blocks) - 2}.mlp" in name for name in names)
    assert not any(f"layers.{len(blocks) - 1}." in name for name in names)


def test_an_answer_ends_where_the_model_has_no_place_left() -> None:
    bundle = tiny.bundle("llava_clip")
    answerer = bundle_answerer(bundle, threads=1)
    sample = Sample("a", question="what " * 245)
    prompt = answerer.asked([sample])["input_ids"].shape[1]
    assert 256 - 8 < prompt < 256
    assert len(answerer.write([sample]).rows[0]) <= 256 - prompt
    with pytest.raises(UsageError, match=f"{prompt} tokens of prompt and 100 of answer"):
        answerer.write([sample], 100)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_checkpoint_answers_what_its_parts_do_not_take(tmp_path: Path, name: str) -> None:
    """Pictures of any size: what is asked of a checkpoint is never cut to fit a graph."""
    bundle = tiny.bundle(name)
    checkpoint.save(bundle, tmp_path / "model")
    tiny.images(1)[0].save(tmp_path / "picture.png")
    asked = samples_of([], [tmp_path / "picture.png"], "what is this ?")
    made = generate(tmp_path / "model", asked)
    assert list(made.answers) == bundle.generate(asked)
    assert made.timing() == {}
    with pytest.raises(UsageError):
        generate(tmp_path / "model", asked, limit=3)
