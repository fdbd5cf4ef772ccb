"""Merging in the encoder of a vision-language model: what the connector reads has all tokens in their places again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.recipe import Step
from mmcompress.surgery.ledger import watching
from mmcompress.surgery.reduction import is_reduced, ledger_of
from tests import tiny

families = pytest.mark.parametrize(
    "family", ["llava_clip", "llava_siglip", "llava_dinov2", "llava_next", "smolvlm", "idefics3", "paligemma"]
)


def run(bundle: Bundle, *steps: tuple[str, dict[str, Any]]) -> Bundle:
    for number, (name, params) in enumerate(steps, 1):
        pipeline.run_stage(bundle, pipeline.Stage(number, Step(name, params), build(name, params)), Context())
    return bundle


@families
def test_the_connector_reads_every_token_in_its_place(family: str) -> None:
    plain, bundle = tiny.bundle(family), run(tiny.bundle(family), ("merge-tokens", {"keep": 0.6}))
    inputs = bundle.example_inputs("vision", 2)
    tower = bundle.tower("vision")
    assert tower.stream is not None
    ledger = ledger_of(bundle.module(tower.blocks[0].path))
    assert ledger is not None
    with torch.no_grad(), watching(ledger) as steps:
        made = bundle.family.image_tokens(bundle.model, inputs)  # type: ignore[attr-defined]
        whole = plain.family.image_tokens(plain.model, inputs)  # type: ignore[attr-defined]
    assert [rows.shape for rows in made] == [rows.shape for rows in whole]
    assert not torch.allclose(made[0], whole[0], atol=1e-3)
    assert steps[0] is not None
    assert steps[0].shape[2] == tower.stream.tokens
    assert len(steps) == (tower.stream.blocks or len(tower.blocks))


def test_blocks_behind_the_place_where_tokens_are_read_stay_as_they_are() -> None:
    bundle = tiny.bundle("llava_clip")
    assert bundle.model.config.vision_feature_layer == -2
    run(bundle, ("merge-tokens", {"keep": 0.6}))
    bound = [is_reduced(bundle.module(block.path)) for block in bundle.tower("vision").blocks]
    assert bound == [True] * (len(bound) - 1) + [False]


def test_equal_patches_merge_without_loss() -> None:
    """Of a picture of one colour each patch differs by its position alone; without positions nothing is lost."""
    outputs = []
    for steps in ((), (("merge-tokens", {"merged": (8, 4)}),)):
        bundle = tiny.bundle("llava_clip")
        with torch.no_grad():
            bundle.model.model.vision_tower.embeddings.position_embedding.weight.zero_()
        run(bundle, *steps)
        with torch.no_grad():
            outputs.append(bundle.encode("vision", {"pixel_values": torch.full((1, 3, 56, 56), 0.3)}))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava_clip", "smolvlm", "paligemma"])
def test_with_fewer_tokens_behind_the_connector_it_is_exported_and_read_back(family: str, tmp_path: Path) -> None:
    bundle = run(
        tiny.bundle(family), ("merge-tokens", {"keep": 0.6}), ("reduce-visual-tokens", {"keep": 0.5, "method": "pool"})
    )
    samples = [
        sample.showing([sample.picture.resize((224, 224))]) for sample in tiny.asked(3, turns=False) if sample.picture
    ]
    want = bundle.generate(samples)
    checkpoint.save(bundle, tmp_path / "saved")
    assert checkpoint.load(tmp_path / "saved").generate(samples) == want
    artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
    operators = {node.op_type for node in onnx.load(artifact.path("vision"), load_external_data=False).graph.node}
    assert not operators & {"ScatterElements", "ScatterND", "Loop", "NonZero"}
    answerer = artifact_answerer(artifact, "onnxruntime", threads=1)
    assert answerer.generate(samples) == want
    answerer.close()


def test_what_the_connector_asks_of_the_encoder_does_not_go_with_merging() -> None:
    asks = ("reduce-visual-tokens", {"keep": 0.5, "method": "visionzip"})
    with pytest.raises(UsageError, match="chooses image tokens by what the encoder looks at"):
        run(tiny.bundle("llava_clip"), asks, ("merge-tokens", {"keep": 0.6}))
    with pytest.raises(UsageError, match="which merges tokens before that"):
        run(tiny.bundle("llava_clip"), ("merge-tokens", {"keep": 0.6}), asks)


def test_several_read_layers_are_refused() -> None:
    bundle = tiny.bundle("llava_clip")
    bundle.model.config.vision_feature_layer = [-2, -3]
    with pytest.raises(UsageError, match="the connector reads several blocks"):
        build("merge-tokens", {"tower": "vision"}).check(bundle)
