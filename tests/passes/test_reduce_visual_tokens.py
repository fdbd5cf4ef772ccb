"""Fewer image tokens for a language model: prompts shrink with them, in torch and in exported graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Sample
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.manifest import Record
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.recipe import Step
from mmcompress.surgery.reducing import Method
from tests import tiny

ANY: tuple[Method, ...] = ("divprune", "clusters", "lftr", "tome", "selector", "relevance", "pool", "grid", "random")
ASKING: tuple[Method, ...] = ("visionzip", "prumerge", "attention")
CASES = [
    *(
        (family, method)
        for family in ("llava_clip", "llava_dinov2", "llava_siglip", "paligemma")
        for method in ANY + ASKING
    ),
    *(("smolvlm", method) for method in ANY),
]
every_case = pytest.mark.parametrize(("family", "method"), CASES)


def context(family: str) -> Context:
    return Context(data=tiny.data(family, 8), seed=5)


def reduced(family: str, **settings: Any) -> Bundle:
    bundle = tiny.bundle(family)
    made = build("reduce-visual-tokens", settings)
    made.check(bundle)
    plan = made.plan(bundle, context(family))
    made.apply(bundle, plan)
    made.fit(bundle, context(family))
    bundle.history.append(Record("reduce-visual-tokens", settings, plan.decisions))
    return bundle


def image_tokens(bundle: Bundle, samples: list[Sample]) -> list[int]:
    """How many image tokens each sample's prompt has."""
    asked: Any = bundle.family
    ids = asked.asked(bundle.model, bundle.processor, samples)["input_ids"]
    return (ids == bundle.model.config.image_token_id).sum(dim=1).tolist()  # type: ignore[no-any-return]


@every_case
def test_prompts_shrink_and_answers_do_not_depend_on_the_batch(family: str, method: str) -> None:
    before, bundle = tiny.bundle(family), reduced(family, keep=0.3, method=method)
    facts = build("reduce-visual-tokens", {"keep": 0.3, "method": method}).fit(bundle, context(family))
    assert facts["tokens_kept"] < facts["tokens"]
    samples = list(tiny.asked(4, turns=family != "paligemma"))  # one has no picture, one was asked something before
    samples.append(replace(samples[0], key="two", further=(samples[1].picture,)))  # type: ignore[arg-type]
    full, fewer = image_tokens(before, samples), image_tokens(bundle, samples)
    assert [few * facts["tokens"] for few in fewer] == [many * facts["tokens_kept"] for many in full]
    answers = bundle.generate(samples)
    assert answers == [bundle.generate([sample])[0] for sample in samples]
    bundle.model.generation_config.use_cache = False
    assert bundle.generate(samples) == answers


@every_case
def test_reload_is_bit_equal(family: str, method: str, tmp_path: Path) -> None:
    bundle = reduced(family, keep=0.3, method=method)
    assert not checkpoint.save(bundle, tmp_path / "out").plain_transformers
    again = checkpoint.load(tmp_path / "out")
    inputs = bundle.example_inputs("vision", 2)
    assert torch.equal(again.encode("vision", inputs), bundle.encode("vision", inputs))
    samples = list(tiny.asked(3, turns=False))
    assert again.generate(samples) == bundle.generate(samples)


@pytest.mark.parametrize(
    ("family", "method"),
    [("llava_clip", method) for method in ANY + ASKING] + [("paligemma", "visionzip"), ("smolvlm", "clusters")],
)
def test_exported_it_answers_the_same(family: str, method: str, tmp_path: Path) -> None:
    bundle = reduced(family, keep=0.3, method=method)
    samples = [replace(sample, picture=square(sample.picture)) for sample in tiny.asked(3, turns=False)]
    want = bundle.generate(samples)
    artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
    operators = {node.op_type for node in onnx.load(artifact.path("vision"), load_external_data=False).graph.node}
    assert not operators & {"ScatterElements", "ScatterND", "Loop", "NonZero"}
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(artifact, runner, threads=1)
        assert answerer.generate(samples) == want
        answerer.close()


def square(picture: Any) -> Any:
    return picture.resize((224, 224)) if picture else None


@every_case
def test_the_vision_tower_puts_what_was_kept_in_every_place(family: str, method: str) -> None:
    """So that it compares with other models: as many rows as before, none that was not handed on."""
    before, bundle = tiny.bundle(family), reduced(family, keep=0.3, method=method)
    inputs = bundle.example_inputs("vision", 2)
    with torch.no_grad():
        full, placed = before.encode("vision", inputs), bundle.encode("vision", inputs)
        handed = torch.stack(bundle.family.image_tokens(bundle.model, inputs))  # type: ignore[attr-defined]
    assert placed.shape == full.shape
    width = handed.shape[-1]
    for rows, tokens in zip(placed.unflatten(1, (-1, width)), handed, strict=True):
        apart = (rows[:, None] - tokens).abs().amax(dim=-1)
        # In PruMerge a token goes into several, so that between them a mean stands in its place.
        assert method == "prumerge" or max(apart.amin(dim=axis).max() for axis in (0, 1)) < 1e-5


def test_what_the_class_token_looks_at_is_kept() -> None:
    """Scores are those of the attention that the tokens came from, recomputed here from its own weights."""
    bundle = reduced("llava_clip", keep_tokens=7, method="attention")
    plain = tiny.bundle("llava_clip")
    inputs = bundle.example_inputs("vision", 1)
    plain.model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = plain.model.model.vision_tower(**inputs, output_attentions=True, output_hidden_states=True)
        assert plain.model.config.vision_feature_layer == -2
        weights = seen.attentions[-2]  # behind it come a block of which nothing is asked
        best = weights[0, :, 0, 1:].mean(dim=0).topk(7).indices.sort().values
        expected = plain.family.image_tokens(plain.model, inputs)[0][best]  # type: ignore[attr-defined]
        made = bundle.family.image_tokens(bundle.model, inputs)[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(made, expected)


def test_what_the_connector_asks_stays_when_blocks_are_pruned(tmp_path: Path) -> None:
    """And a model pruned after the reduction is loaded with both."""
    bundle = reduced("llava_clip", keep=0.3, method="visionzip")
    asked = bundle.tower("vision").needed
    assert len(asked) == 1
    params = {"ratio": 0.3, "units": ["blocks"], "score": "random", "compensate": "none", "towers": ["vision"]}
    pipeline.run_stage(bundle, pipeline.Stage(2, Step("prune", params), build("prune", params)), Context())
    assert len(bundle.tower("vision").blocks) < len(tiny.bundle("llava_clip").tower("vision").blocks)
    inputs = bundle.example_inputs("vision", 2)
    checkpoint.save(bundle, tmp_path / "out")
    assert torch.equal(checkpoint.load(tmp_path / "out").encode("vision", inputs), bundle.encode("vision", inputs))


@pytest.mark.parametrize(("asked", "kept"), [({"keep": 0.25}, 4), ({"keep_tokens": 15}, 9), ({"keep_tokens": 1}, 1)])
def test_pooling_keeps_a_whole_grid_within_what_was_asked(asked: dict[str, Any], kept: int) -> None:
    bundle, made = tiny.bundle("llava_clip"), build("reduce-visual-tokens", {"method": "pool", **asked})
    made.apply(bundle, made.plan(bundle, Context()))
    assert made.fit(bundle, Context())["tokens_kept"] == kept


def test_random_follows_the_seed() -> None:
    def drawn(seed: int) -> Any:
        made = build("reduce-visual-tokens", {"keep": 0.5, "method": "random"})
        return made.plan(tiny.bundle("llava_clip"), Context(seed=seed)).decisions["drawn"]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llava_clip", {"keep": 1.5}, "keep is 1.5; expected 0 < keep <= 1"),
        ("llava_clip", {"keep_tokens": 0}, "keep_tokens is 0; expected a number >= 1"),
        ("llava_clip", {"keep": 0.5, "keep_tokens": 3}, "both keep and keep_tokens"),
        ("llava_clip", {"keep_tokens": 1000}, "keep_tokens is 1000, but a picture has"),
        ("llava_clip", {"tower": "language"}, "nothing is handed from here to a language model"),
        ("llava_next", {}, "the tiles of a picture are put together"),
        ("qwen2_vl", {}, "a token's positions in the prompt are those of its patches"),
        ("clip", {}, "clip models cannot be given fewer image tokens: nothing is handed"),
        ("smolvlm", {"method": "visionzip"}, "method visionzip asks what the encoder looked at"),
    ],
)
def test_refusals_say_what_and_why(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        reduced(family, **settings)
    assert raised.value.hint


def test_a_second_reduction_and_other_sizes_are_refused() -> None:
    bundle = reduced("llava_clip", keep=0.5)
    with pytest.raises(UsageError, match="fewer tokens of each picture already"):
        build("reduce-visual-tokens", {}).check(bundle)
    pixels = bundle.example_inputs("vision", 1)["pixel_values"]
    with pytest.raises(UsageError, match="the image tokens were chosen of"):
        bundle.module("model.multi_modal_projector")(torch.zeros(1, 3, bundle.model.config.vision_config.hidden_size))
    assert bundle.encode("vision", {"pixel_values": pixels}).isfinite().all()
