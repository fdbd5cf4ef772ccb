"""Fewer layers of a video for a language model: prompts, positions, batches, training, exported graphs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample, Video
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.inspect import applies
from mmcompress.measure.answerer import artifact_answerer, bundle_answerer
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.recipe import Step
from mmcompress.surgery.frames import FrameMerging, Stage, merged, merging_of, stages_of
from tests import tiny, tiny_vlm

QWEN = tuple(name for name in tiny_vlm.MODELS if name.startswith("qwen"))
IMAGES = tiny.images(9)
WIDE = [image.resize((112, 56)) for image in IMAGES[:3]]
SETTINGS: tuple[dict[str, Any], ...] = (
    {"stride": 2},
    {"stride": 4, "convolution": True},
    {"stride": 2, "method": "first"},
    {"stride": 4, "method": "random"},
)
every_model = pytest.mark.parametrize("name", QWEN)
every_case = pytest.mark.parametrize(
    ("name", "settings"), [(name, settings) for name in QWEN for settings in SETTINGS], ids=str
)


def film(frames: Sequence[Image], rate: float = 2.0, **more: Any) -> Sample:
    return Sample("film", ("a red cat",), video=Video(tuple(frames), rate), question="what is this ?", **more)


def samples() -> list[Sample]:
    """Videos of five layers, of one and, wider, of two beside a picture; a picture; none; two pictures."""
    asked = Sample("", ("a red cat",), question="what is this ?")
    return [
        film(IMAGES, 1.0),
        replace(film(IMAGES[3:5]), key="still"),
        replace(film(WIDE), key="both", picture=IMAGES[4], texts=("two dogs on a big house",)),
        replace(asked, key="one", picture=IMAGES[1]),
        replace(asked, key="none"),
        replace(asked, key="two", picture=IMAGES[5], further=(IMAGES[6],)),
    ]


def run(bundle: Bundle, *steps: tuple[str, dict[str, Any]], context: Context | None = None) -> Bundle:
    for number, (name, params) in enumerate(steps, 1):
        stage = pipeline.Stage(number, Step(name, params), build(name, params))
        pipeline.run_stage(bundle, stage, context or Context(seed=5))
    return bundle


def fewer(name: str, trained: bool = False, **settings: Any) -> Bundle:
    """Return a tiny model with frames merged; `trained`: what its stages add is no longer nothing."""
    bundle = run(tiny.bundle(name), ("merge-frames", settings))
    if trained:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for stage in stages_of(bundle.module("model")):
                for parameter in stage.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return bundle


def embedded(bundle: Bundle, *asked: Sample) -> Tensor:
    return torch.from_numpy(bundle.embed("language", list(asked)))


def layers_given(bundle: Bundle, sample: Sample) -> Tensor:
    """Return the tokens (M, N, C) that the language model is given of a video of 56 x 56 pixels, four a layer."""
    inputs = bundle.prepare("language", [sample])
    family: Any = bundle.family
    with torch.no_grad():
        given = family._given(bundle.model, inputs)["video"]
        deep = getattr(given, "deepstack_features", None) or []
        parts = [torch.cat(list(level)) for level in (given.pooler_output, *deep)]
    return torch.cat(parts, dim=-1).unflatten(0, (-1, 4))


def moving_positions(bundle: Bundle, sample: Sample) -> Tensor:
    """Return the positions (3, tokens) of a video."""
    inputs = bundle.prepare("language", [sample])
    return inputs["position_ids"][0][:, inputs["input_ids"][0] == bundle.model.config.video_token_id]


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


@every_case
def test_reload_and_copy_are_bit_equal(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    bundle = fewer(name, trained=True, **settings)
    written = checkpoint.save(bundle, tmp_path / "out")
    assert not written.plain_transformers
    for again in (checkpoint.load(tmp_path / "out"), copy.deepcopy(bundle)):
        assert merging_of(again.module("model")) == merging_of(bundle.module("model"))
        assert torch.equal(embedded(again, *samples()), embedded(bundle, *samples()))
        assert again.generate(samples()) == bundle.generate(samples())
    checkpoint.save(checkpoint.load(tmp_path / "out"), tmp_path / "again")
    for file in ("model.safetensors", "config.json", "mmc.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@every_model
def test_only_the_convolution_adds_weights(name: str) -> None:
    before = tiny.bundle(name).model.state_dict().keys()
    assert fewer(name, stride=4).model.state_dict().keys() == before
    bundle = fewer(name, stride=4, convolution=True)
    added = bundle.model.state_dict().keys() - before
    levels = 2 if name == "qwen3_vl" else 1
    assert len(added) == 2 * (2 + 2 * levels)
    language = bundle.tower("language")
    assert all(language.owns(key) and not bundle.tower("vision").owns(key) for key in added)
    facts = build("merge-frames", {"stride": 4, "convolution": True}).fit(bundle, Context())
    assert facts["parameters_added"] == 2 * levels * (32 * 3 + 32 + 32 * 32 + 32)


@every_model
def test_gradients_reach_the_stages(name: str) -> None:
    bundle = fewer(name, trained=True, stride=4, convolution=True)
    bundle.encode("language", bundle.prepare("language", samples()[:1])).sum().backward()
    stages = stages_of(bundle.module("model"))
    assert len(stages) == 2
    for parameter in (parameter for stage in stages for parameter in stage.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@every_model
def test_distill_trains_the_stages(name: str) -> None:
    """By what the teacher answers, who sees all layers; nothing else of the language model needs to."""
    bundle = fewer(name, stride=2, convolution=True)
    before = {key: value.clone() for key, value in bundle.model.state_dict().items()}
    films = [film(IMAGES[place:] + IMAGES[:place]) for place in range(8)]
    data = Dataset(Memory([replace(one, key=str(place)) for place, one in enumerate(films)]), "films")
    context = Context(data=data, seed=0, teacher=lambda: tiny.bundle(name))
    params = {"steps": 6, "batch_size": 4, "towers": ["language"], "train": "projection", "learning_rate": 1e-3}
    run(bundle, ("distill", params), context=context)
    changed = {key for key, value in bundle.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed >= {key for key in before if ".frame_stages." in key and ".mixes." in key}
    assert all(".frame_stages." in key or key == "lm_head.weight" for key in changed)
    facts = bundle.history[-1].facts
    assert facts["loss"]["after"] < facts["loss"]["before"]


@every_model
@pytest.mark.parametrize(
    "step",
    [
        ("drop-visual-tokens", {"keep": 0.5, "after": (1,)}),
        ("quantize", {"scheme": "W8A16"}),
        ("quantize", {"scheme": "W8A8", "target": "cpu"}),
    ],
    ids=["drop", "w8a16", "w8a8"],
)
@pytest.mark.parametrize("convolution", [False, True])
def test_it_combines(name: str, step: tuple[str, dict[str, Any]], convolution: bool, tmp_path: Path) -> None:
    merging = ("merge-frames", {"stride": 2, "convolution": convolution})
    data = Context(data=tiny.data(name, 8), num_samples=8, batch_size=4, seed=0)
    bundle = run(tiny.bundle(name), merging, step, context=data)
    several = samples()
    answers = bundle.generate(several)
    checkpoint.save(bundle, tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").generate(several) == answers
    if step[0] == "drop-visual-tokens":
        assert answers == [bundle.generate([sample])[0] for sample in several]
        turned = run(tiny.bundle(name), step, merging, context=data)
        assert turned.generate(several) == answers


def resized() -> list[Sample]:
    """As exported models see them: 224 x 224 pixels, 64 tokens a layer, of 256 that the tiny models take."""
    big = [image.resize((224, 224)) for image in IMAGES]
    return [
        film(big[:5], 1.0),
        Sample("none", question="how many ?"),
        replace(film(big[5:8], 0.5), key="both", picture=big[8], question="what ?"),
        Sample("two", picture=big[2], further=(big[3],), question="two of the small trees ?"),
    ]


@every_case
def test_the_parts_answer_as_the_whole(name: str, settings: dict[str, Any]) -> None:
    bundle = fewer(name, trained=True, **settings)
    want = bundle.generate(resized())
    assert len(set(want)) > 1
    assert bundle_answerer(bundle, threads=1).generate(resized()) == want


@pytest.mark.parametrize(
    ("name", "settings"), [(name, SETTINGS[1]) for name in QWEN] + [("qwen2_vl", own) for own in SETTINGS], ids=str
)
def test_exported_it_answers_the_same(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    bundle = fewer(name, trained=True, **settings)
    want = bundle.generate(resized())
    artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
    operators = {node.op_type for node in onnx.load(artifact.path("frames"), load_external_data=False).graph.node}
    assert not operators & {"ScatterElements", "ScatterND", "Loop", "NonZero", "GatherND", "If"}
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(artifact, runner, threads=1)
        assert answerer.generate(resized()) == want
        assert [answerer.generate([sample])[0] for sample in resized()] == want
        answerer.close()


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
