"""`reduce-visual-tokens` with positions "original": a language model is told where in the picture the tokens were that are left."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.passes.reduce_visual_tokens import ReduceVisualTokens
from mmcompress.recipe import Step
from mmcompress.surgery.cache_lengths import CACHE
from mmcompress.surgery.reducing import choice_of
from tests import tiny

FAMILIES = ("llava_clip", "llava_siglip", "smolvlm", "paligemma")
REDUCE: tuple[str, dict[str, Any]] = ("reduce-visual-tokens", {"keep": 0.3, "method": "clusters"})
DROP: tuple[str, dict[str, Any]] = ("drop-visual-tokens", {"keep": 0.5, "after": [1]})


def run(family: str, *steps: tuple[str, dict[str, Any]]) -> Bundle:
    bundle = tiny.bundle(family)
    for number, (name, params) in enumerate(steps, 1):
        stage = pipeline.Stage(number, Step(name, params), build(name, params))
        pipeline.run_stage(bundle, stage, Context(data=tiny.data(family, 8), seed=5))
    return bundle


@contextmanager
def watching_positions(bundle: Bundle) -> Iterator[list[Tensor]]:
    """What the language model turns queries and keys by: (B, T) of each of its calls."""
    found: list[Tensor] = []

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    rotary = bundle.module(bundle.tower("language").path).rotary_emb
    hook = rotary.register_forward_pre_hook(look, with_kwargs=True)  # type: ignore[operator, union-attr]
    try:
        yield found
    finally:
        hook.remove()


def images_of(bundle: Bundle, inputs: dict[str, Tensor]) -> Tensor:
    prompt = bundle.tower("language").prompt
    assert prompt is not None
    return torch.isin(inputs["input_ids"], torch.tensor(prompt.image_tokens))


def inputs_of(bundle: Bundle, count: int = 4) -> dict[str, Tensor]:
    samples = tiny.asked(count, turns=bundle.family.name != "paligemma")
    return bundle.prepare("language", [bundle.items("language", sample)[0] for sample in samples])


@pytest.mark.parametrize("family", FAMILIES)
def test_words_stand_where_they_would_with_all_tokens_and_tokens_where_they_were(family: str) -> None:
    whole, fewer = tiny.bundle(family), run(family, ("reduce-visual-tokens", {"keep": 0.3, "method": "random"}))
    connector = fewer.tower("vision").connector
    assert connector is not None
    choice = choice_of(fewer.module(connector.path))
    assert choice is not None
    seen = {}
    for name, bundle in (("whole", whole), ("fewer", fewer)):
        inputs = inputs_of(bundle)
        with watching_positions(bundle) as found, torch.no_grad():
            bundle.encode("language", inputs)
        image, (positions, *_) = images_of(bundle, inputs), found
        positions = positions.expand(len(image), -1)
        rows = zip(positions, image, inputs["attention_mask"].bool(), strict=True)
        seen[name] = [(row[mask & present].tolist(), row[~mask & present].tolist()) for row, mask, present in rows]
    for (all_tokens, all_words), (tokens, words) in zip(seen["whole"], seen["fewer"], strict=True):
        assert words == all_words
        pictures = [all_tokens[at : at + choice.tokens] for at in range(0, len(all_tokens), choice.tokens)]
        assert tokens == [picture[place] for picture in pictures for place in choice.drawn]


def test_counted_positions_follow_one_another() -> None:
    bundle = run("llava_clip", ("reduce-visual-tokens", {"keep": 0.3, "positions": "counted"}))
    with watching_positions(bundle) as found:
        bundle.generate(tiny.data("llava_clip", 8).take(1))
    assert (found[0][0].diff() == 1).all()
    apart = run("llava_clip", ("reduce-visual-tokens", {"keep": 0.3}))
    with watching_positions(apart) as found:
        apart.generate(tiny.data("llava_clip", 8).take(1))
    # What is written follows the prompt at a distance of one, with a cache of fewer tokens as well.
    assert [int(one[0, 0]) - int(found[0][0, -1]) for one in found[1:]] == list(range(1, len(found)))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask_a_leap_of_positions_begins_no_new_text(family: str) -> None:
    bundle = run(family, REDUCE)
    inputs = {name: value[:1] for name, value in inputs_of(bundle, 1).items()}
    images = {key: inputs[key] for key in bundle.family.image_keys if key in inputs}  # type: ignore[attr-defined]
    given = {"input_ids": inputs["input_ids"], **images, "use_cache": False}
    with torch.no_grad():
        masked = bundle.model(attention_mask=inputs["attention_mask"], **given).logits
        torch.testing.assert_close(bundle.model(**given).logits, masked)


def test_a_conversation_goes_on_behind_the_pictures_place() -> None:
    """A prompt in two calls with one cache, its words behind the picture in the second, is the prompt in one."""
    bundle = run("llava_clip", REDUCE)
    inputs = {name: value[:1] for name, value in inputs_of(bundle, 1).items()}
    last = int(images_of(bundle, inputs)[0].nonzero().max()) + 1
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad():
        whole = bundle.model(input_ids=ids, pixel_values=pixels).logits[:, -1]
        first = bundle.model(input_ids=ids[:, : last + 1], pixel_values=pixels, use_cache=True)
        second = bundle.model(input_ids=ids[:, last + 1 :], **{CACHE: getattr(first, CACHE)})
    torch.testing.assert_close(second.logits[:, -1], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [(REDUCE, DROP), (DROP, REDUCE)], ids=["reduce-drop", "drop-reduce"])
def test_with_tokens_that_leave_on_the_way(steps: tuple[tuple[str, dict[str, Any]], ...], tmp_path: Path) -> None:
    bundle = run("llava_clip", *steps)
    samples = list(tiny.asked(4))
    answers = bundle.generate(samples)
    assert answers == [bundle.generate([sample])[0] for sample in samples]
    assert copy.deepcopy(bundle).generate(samples) == answers
    checkpoint.save(bundle, tmp_path / "model")
    assert checkpoint.load(tmp_path / "model").generate(samples) == answers
    export_onnx(bundle, tmp_path / "exported", batches=(1, 2))
    artifact = open_artifact(tmp_path / "exported")
    outputs = [one.name for one in onnx.load(artifact.path("vision"), load_external_data=False).graph.output]
    assert outputs == ["image_embeds", "image_places"]
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(artifact, runner, threads=1)
        assert answerer.generate(samples) == answers
        answerer.close()


def test_other_pictures_places_say_nothing_of_ready_made_tokens() -> None:
    bundle = run("llava_clip", REDUCE)
    example = bundle.example_inputs("language", 3)
    with torch.no_grad():
        before = bundle.encode("language", example)
        bundle.encode("language", inputs_of(bundle, 3))
        assert torch.equal(bundle.encode("language", example), before)


def test_the_control_stands_as_the_method_does() -> None:
    control = ReduceVisualTokens(keep=0.3, positions="counted").control()
    assert control is not None
    assert (control.method, control.positions) == ("random", "counted")
