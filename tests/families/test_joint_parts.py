"""Text and picture in one graph, or a question that looks: what is traced gives what the model's own way gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from mmcompress import checkpoint
from mmcompress.data import Sample
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.export.tensorrt import export_tensorrt
from mmcompress.families.blip_parts import read, see
from mmcompress.families.layoutlm_parts import distances
from mmcompress.families.vilt_parts import _stretched, cut
from mmcompress.jobs.bench import Settings, bench
from mmcompress.jobs.embedders import open_model
from mmcompress.measure.answerer import artifact_answerer, bundle_answerer
from mmcompress.measure.runners import open_runner
from tests import tiny

JOINT = ("layoutlm", "layoutlm_pages", "layoutlm_words", "vilt_retrieval")


@pytest.mark.parametrize("runner", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", JOINT)
def test_the_graph_gives_what_the_model_gives(name: str, runner: str, tmp_path: Path) -> None:
    """Of several pages or pictures, padded, through the files on disk."""
    bundle = tiny.bundle(name)
    samples = list(tiny.data(name, 3))
    if name == "vilt_retrieval":
        samples[1] = replace(samples[1], picture=samples[1].image.resize((100, 50), Image.Resampling.BICUBIC))
    inputs = bundle.prepare("joint", samples)
    text = inputs["attention_mask"][:, : inputs["input_ids"].shape[1]]
    assert not text.bool().all()
    own = {**inputs, "attention_mask": text}
    with torch.no_grad():
        want = bundle.model(**own)[0]
    given = bundle.family.asked_of(bundle.model, inputs) if name == "vilt_retrieval" else own
    artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
    opened = open_runner(runner, artifact.path("joint"), 1)
    (got,) = opened.run({key: value.numpy() for key, value in given.items()}).values()
    opened.close()
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-5)


def test_what_neither_embeds_nor_answers_is_timed_and_nothing_else(tmp_path: Path) -> None:
    bundle = tiny.bundle("layoutlm_words")
    checkpoint.save(bundle, tmp_path / "pages")
    artifact = export_onnx(bundle, tmp_path / "out", batches=(1,)).artifact
    with pytest.raises(UsageError, match="neither embeds nor answers"):
        open_model(artifact.directory)
    with pytest.raises(UsageError, match="does not answer in text"):
        artifact_answerer(artifact)
    settings = Settings(runners=("torch", "onnxruntime"), rounds=2, threads=1, memory=False)
    found = bench([str(tmp_path / "pages"), str(artifact.directory)], settings).to_json()
    timed = {(row["target"], row["runner"]) for row in found["results"]}
    assert {("pages", "torch"), ("pages", "onnxruntime"), ("out", "onnxruntime")} <= timed
    assert found["targets"][0]["macs"]["joint"] > 0


@pytest.mark.parametrize(("name", "stages"), [
    ("blip", ("vision", "prompt", "token", "answer")),
    ("blip_vqa", ("vision", "text", "prompt", "token", "answer")),
    ("vilt", ("prompt", "answer")),
])  # fmt: skip
def test_stages_of_a_benchmark(name: str, stages: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint.save(tiny.bundle(name), tmp_path / name)
    settings = Settings(runners=("torch", "onnxruntime"), rounds=2, threads=1, memory=False, new_tokens=4)
    found = bench([str(tmp_path / name)], settings).to_json()
    assert {row["tower"] for row in found["results"]} == set(stages)
    macs = found["targets"][0]["macs"]
    times = {stage: 3 if stage == "token" else 1 for stage in stages[:-1]}  # the prompt gives the first of four tokens
    assert macs["answer"] == sum(count * macs[stage] for stage, count in times.items())


def test_an_answer_that_is_said_at_once_has_one_step() -> None:
    answerer = bundle_answerer(tiny.bundle("vilt"), threads=1)
    written = answerer.write(list(tiny.data("vilt", 2)), 5)
    assert [len(row) for row in written.rows] == [1, 1]
    assert len(written.steps) == 1


def test_no_engine_is_built_of_what_does_not_embed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.export.tensorrt.load_api", lambda _name: None)
    artifact = export_onnx(tiny.bundle("layoutlm"), tmp_path / "out", batches=(1,)).artifact
    with pytest.raises(UsageError, match="engines are built of models that embed"):
        export_tensorrt(artifact, tmp_path / "engines")


def test_engines_round_no_logarithm_of_distances(tmp_path: Path) -> None:
    """Buckets of distances are numbers in the graph; they are the model's own."""
    bundle = tiny.bundle("layoutlm")
    known = distances(bundle.model)
    model = bundle.model.encoder.relative_position_bucket
    assert len(known.places) == 2 * 1024 + 1
    assert known.places[1024] == 0
    assert known.places[1024 + 700] == model(torch.tensor(700), num_buckets=8, max_distance=256)
    artifact = export_onnx(bundle, tmp_path / "out", batches=(1,)).artifact
    assert "Log" not in {node.op_type for node in onnx.load(artifact.path("joint")).graph.node}


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 4), (2, 1), (12, 20)])
def test_positions_are_stretched_as_torch_does(size: tuple[int, int]) -> None:
    table = torch.randn(1 + 49, 6, generator=torch.Generator().manual_seed(0))
    grid = table[1:].t().reshape(1, 6, 7, 7)
    want = nn.functional.interpolate(grid, size=size, mode="bilinear", align_corners=True)[0].flatten(1).t()
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    last = torch.tensor(size).expand(len(rows), -1) - 1
    places = torch.cat([torch.stack([rows, columns], dim=1), last], dim=1)[None]
    # torch works coordinates up to 6 out in float32, a rounding of 4e-7, and neighbours of the table differ by up to 6.
    torch.testing.assert_close(_stretched(table, 7, places)[0], want, rtol=0, atol=3e-6)


def test_a_picture_is_cut_by_hand() -> None:
    """Two by three patches of 8, of which the picture fills one by two."""
    model = tiny.bundle("vilt").model
    pixels = torch.arange(16 * 24).reshape(1, 1, 16, 24).expand(1, 3, -1, -1)
    mask = torch.zeros(1, 16, 24, dtype=torch.long)
    mask[:, :8, :16] = 1
    made = cut(model, pixels, mask)
    assert made["patch_mask"].tolist() == [[1, 1, 0, 0, 0, 0]]
    assert made["patches"][0, :, 0, 0, 0].tolist() == [0, 8, 16, 8 * 24, 8 * 24 + 8, 8 * 24 + 16]
    assert made["patches"][0, 1, 2, 1].tolist() == list(range(24 + 8, 24 + 16))
    assert made["patch_places"][0, :2].tolist() == [[0, 0, 0, 1], [0, 1, 0, 1]]


@torch.no_grad()
def test_a_question_is_read_as_the_model_reads_it() -> None:
    bundle = tiny.bundle("blip_vqa")
    inputs = bundle.prepare("text", list(tiny.data("blip_vqa", 3)))
    mask = inputs["attention_mask"]
    assert not mask.bool().all()
    want = bundle.family.read(bundle.model, inputs) * mask[:, :, None]
    seen = see(bundle.model, inputs["pixel_values"])
    got = read(bundle.model, inputs["input_ids"], mask, seen) * mask[:, :, None]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_decoder_does_not_look_at_a_questions_padding() -> None:
    """Its logits for a batch of questions of several lengths are those of each question alone."""
    bundle = tiny.bundle("blip_vqa")
    vision, text, decoder = bundle.family.parts(bundle.model)

    def logits(samples: list[Sample]) -> torch.Tensor:
        known = bundle.family.asked(bundle.model, bundle.processor, samples)
        for part in (vision, text):
            made = part.compute(bundle.model, *(known[name] for name in part.axes))
            known |= dict(zip(part.outputs, (made,) if isinstance(made, torch.Tensor) else made, strict=True))
        example = decoder.example({"batch": len(samples), "tokens": 1, "past": 0, "question": 2})
        empty = {name: value for name, value in example.items() if name.startswith("past")}
        given = {**known, **empty, "input_ids": torch.full((len(samples), 1), 1)}
        return decoder.compute(bundle.model, *(given[name] for name in decoder.axes))[0]

    samples = list(tiny.data("blip_vqa", 3))
    lengths = bundle.family.asked(bundle.model, bundle.processor, samples)["question_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    torch.testing.assert_close(logits(samples), torch.cat([logits([s]) for s in samples]), rtol=0, atol=1e-5)
