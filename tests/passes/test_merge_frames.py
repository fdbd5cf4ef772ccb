"""Fewer layers of a video for a language model: tokens, positions, batches, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmcompress.errors import UsageError
from mmcompress.jobs.inspect import applies
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.surgery.frames import FrameMerging, Stage, merged
from tests import tiny
from tests.passes.filming import (
    IMAGES,
    embedded,
    every_case,
    every_model,
    fewer,
    film,
    layers_given,
    moving_positions,
    samples,
)


@every_case
def test_a_batch_equals_its_samples_and_a_cache_changes_nothing(name: str, settings: dict[str, Any]) -> None:
    bundle, several = fewer(name, trained=True, **settings), samples()
    answers = bundle.generate(several)  # padded on the left
    assert len(set(answers)) > 1
    assert answers == [bundle.generate([sample])[0] for sample in several]
    together = embedded(bundle, *several)  # padded on the right
    for row, sample in zip(together, several, strict=True):
        alone = embedded(bundle, sample)[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-3, atol=1e-4)
    bundle.model.generation_config.use_cache = False
    assert bundle.generate(several) == answers


@every_case
def test_rows_are_the_models_own_distributions(name: str, settings: dict[str, Any]) -> None:
    """As its forward makes them of whole grids and short prompts, whose tokens it places itself."""
    bundle = fewer(name, trained=True, **settings)
    for sample in samples():
        inputs = bundle.prepare("language", [sample])
        keys = ("input_ids", "attention_mask", "image_counts", *bundle.family.image_keys)  # type: ignore[attr-defined]
        asked = {key: inputs[key] for key in keys if key in inputs} | {"position_ids": torch.tensor([])}
        given = bundle.family.generation_inputs(bundle.model, asked)  # type: ignore[attr-defined]
        with torch.no_grad():
            rows = bundle.encode("language", inputs).unflatten(1, (-1, bundle.model.lm_head.out_features))
            logits = bundle.model(**given).logits[0, inputs["answer_positions"][0]]
        torch.testing.assert_close(rows[0].square(), logits.softmax(-1), rtol=1e-4, atol=1e-6)


@every_model
def test_what_is_left_is_the_mean_and_untrained_stages_change_nothing(name: str) -> None:
    """Nine frames are five layers, the last of one frame twice."""
    whole = layers_given(tiny.bundle(name), film(IMAGES))
    assert len(whole) == 5
    by_two = layers_given(fewer(name, stride=2), film(IMAGES))
    torch.testing.assert_close(by_two, torch.stack([whole[:2].mean(0), whole[2:4].mean(0), whole[4]]))
    by_four = layers_given(fewer(name, stride=4), film(IMAGES))
    torch.testing.assert_close(by_four, torch.stack([whole[:4].mean(0), whole[4]]))
    assert len(layers_given(fewer(name, stride=8), film(IMAGES))) == 1
    for stride in (2, 4, 8):
        plain, staged = fewer(name, stride=stride), fewer(name, stride=stride, convolution=True)
        assert torch.equal(layers_given(plain, film(IMAGES)), layers_given(staged, film(IMAGES)))


@every_model
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_equal_frames_give_the_tokens_of_one(name: str, stride: int) -> None:
    still = layers_given(tiny.bundle(name), film(IMAGES[:1] * 10))
    assert torch.allclose(still, still[:1].expand_as(still), atol=1e-6)
    given = layers_given(fewer(name, stride=stride), film(IMAGES[:1] * 10))
    assert len(given) == -(-5 // stride)
    rows = still[:1].expand(5, -1, -1)
    made = merged(fewer(name, stride=stride).module("model"), rows)
    assert torch.equal(made, rows[: len(made)])
    torch.testing.assert_close(given, made, rtol=0, atol=1e-6)


@every_case
def test_pictures_and_videos_of_one_layer_go_through_to_the_bit(name: str, settings: dict[str, Any]) -> None:
    plain, bundle = tiny.bundle(name), fewer(name, trained=True, **settings)
    for sample in (samples()[1], *samples()[3:]):
        assert torch.equal(embedded(bundle, sample), embedded(plain, sample)), sample.key
        assert bundle.generate([sample]) == plain.generate([sample])
    for sample in samples()[:3]:
        (item,) = plain.items("vision", replace(sample, picture=None, further=()))
        assert (bundle.embed("vision", [item]) == plain.embed("vision", [item])).all()


@every_model
def test_order_within_a_group_matters_to_trained_stages_alone(name: str) -> None:
    """Frames 1 and 2 are a layer, 3 and 4 another, both of the first group."""
    swapped = film([IMAGES[place] for place in (2, 3, 0, 1, 4, 5, 6, 7)])
    plain = fewer(name, stride=2)
    torch.testing.assert_close(embedded(plain, swapped), embedded(plain, film(IMAGES[:8])), rtol=1e-4, atol=1e-5)
    trained = fewer(name, trained=True, stride=2, convolution=True)
    assert (embedded(trained, swapped) - embedded(trained, film(IMAGES[:8]))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_times_are_means_and_rows_and_columns_stay(name: str) -> None:
    whole = moving_positions(tiny.bundle(name), film(IMAGES, 1.0)).unflatten(1, (5, 4))
    for stride, groups in ((2, ([0, 1], [2, 3], [4])), (4, ([0, 1, 2, 3], [4]))):
        got = moving_positions(fewer(name, stride=stride), film(IMAGES, 1.0)).unflatten(1, (-1, 4))
        assert torch.equal(got[1:], whole[1:, : len(groups)])
        want = [int(whole[0, group, 0].double().mean()) for group in groups]
        assert got[0].tolist() == [[time] * 4 for time in want]
    first = moving_positions(fewer(name, stride=2, method="first"), film(IMAGES, 1.0)).unflatten(1, (-1, 4))
    assert torch.equal(first, whole[:, ::2])


def test_what_comes_behind_a_video_stays_where_it_was() -> None:
    """Qwen2's text goes on behind the rows and columns of a video, whatever its layers."""
    plain, bundle = tiny.bundle("qwen2_vl"), fewer("qwen2_vl", stride=4)
    for sample in samples():
        want, got = (one.prepare("language", [sample])["position_ids"][0, :, -1] for one in (plain, bundle))
        assert torch.equal(want, got)


def test_qwen3_is_told_the_mean_of_the_times() -> None:
    """One frame a second: layers at 0.5, 2.5, 4.5, 6.5 and 8.5 s."""
    each = "<vision>" + 4 * "<video>" + "</vision>"
    for settings, times in (({"stride": 2}, (1.5, 5.5, 8.5)), ({"stride": 4}, (3.5, 8.5)), ({"stride": 8}, (6.0,))):
        bundle = fewer("qwen3_vl", **settings)
        family: Any = bundle.family
        inputs = bundle.prepare("vision", bundle.items("vision", film(IMAGES, 1.0)))
        told = family.shown(bundle.model, bundle.processor, inputs, 0).stands
        assert told == "".join(f"<{time} seconds>{each}" for time in times)


@every_model
def test_random_follows_the_seed_and_is_recorded(name: str) -> None:
    made = build("merge-frames", {"stride": 4, "method": "random"})
    first, again, other = (made.plan(tiny.bundle(name), Context(seed=seed)).decisions for seed in (1, 1, 2))
    assert first == again != other
    whole, given = (layers_given(b, film(IMAGES)) for b in (tiny.bundle(name), fewer(name, stride=4, method="random")))
    assert any(torch.equal(given[0], layer) for layer in whole[:4])
    assert torch.equal(given[1], whole[4])
    assert build("merge-frames", {"stride": 4}).control() == made
    assert made.control() is None


def test_inspect_says_where_and_why_not() -> None:
    for name, tower, reason in (
        ("qwen2_vl", "language", ""),
        ("qwen2_vl", "vision", "in this tower: no language model is given a video there"),
        ("llava_clip", "language", "it is shown the frames of a video as pictures, one after the other"),
        ("clip", "text", "no language model is given a video"),
    ):
        bundle = tiny.bundle(name)
        found = applies(bundle, "merge-frames", bundle.tower(tower))
        assert found["applies"] is not bool(reason)
        assert reason in found["reason"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 3}, "stride is 3; expected one of 1, 2, 4, 8"),
        ({"method": "first", "convolution": True}, "adds to means, and method first makes none"),
        ({"tower": "vision"}, "frames of a video cannot be merged in this tower"),
    ],
)
def test_refusals_say_what_and_why(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        build("merge-frames", settings).check(tiny.bundle("qwen2_vl"))
    assert raised.value.hint


@every_model
def test_a_second_merging_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="fewer layers of a video already"):
        build("merge-frames", {}).check(fewer(name, stride=2))


def test_a_stage_by_hand() -> None:
    """One channel and one token: gelu(second - before + bias) times the weight comes to the mean; not where nothing moves."""
    stage = Stage(1, 1)
    with torch.no_grad():
        stage.mixes[0].weight.fill_(2.0)  # type: ignore[union-attr, operator]
        rows = [torch.tensor(values).reshape(2, 1, 1) for values in ([0.0, 3.0], [1.0, 3.0], [4.0, 3.0])]
        made = stage(*rows, torch.tensor([1.0, 0.0]).reshape(2, 1, 1))
    gelu = torch.nn.functional.gelu(torch.tensor(4.0))
    torch.testing.assert_close(made.flatten(), torch.tensor([2.5 + 2 * gelu, 3.0]))


def test_times_pass_through_the_same_tables() -> None:
    assert FrameMerging(4).times(torch.arange(6)).tolist() == [1.5, 4.5]
    assert FrameMerging(2, "random", (1, 0)).times(torch.arange(5)).tolist() == [1, 2, 4]
    assert [FrameMerging(4).left(layers) for layers in (1, 4, 5, 8)] == [1, 1, 2, 2]
