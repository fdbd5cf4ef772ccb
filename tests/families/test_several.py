"""Samples that show several pictures, or frames of a video: what each family makes of them, alone and in a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmcompress.bundle import Bundle, Processor
from mmcompress.data import Sample, Video
from mmcompress.errors import UsageError
from mmcompress.families.qwen_vl_video import SETTINGS, frame_pixels, video_patches
from mmcompress.measure.answerer import bundle_answerer
from tests import tiny, tiny_vlm

QWEN = tuple(name for name in tiny_vlm.MODELS if name.startswith("qwen"))
FIRST, SECOND, THIRD = tiny.images(3)


def samples() -> list[Sample]:
    """Two pictures with a turn before, none, one, three frames, and two pictures beside a video of two frames."""
    asked = Sample("", ("a red cat",), question="what is this ?")
    return [
        replace(asked, key="two", picture=FIRST, further=(SECOND,)),
        replace(asked, key="none"),
        replace(asked, key="one", picture=THIRD),
        replace(asked, key="frames", video=Video((FIRST, SECOND, THIRD), 1.0)),
        replace(asked, key="both", picture=FIRST, further=(THIRD,), video=Video((SECOND, THIRD))),
    ]


@pytest.fixture(params=tiny_vlm.MODELS)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return tiny.bundle(request.param)


def test_a_batch_equals_its_samples(bundle: Bundle) -> None:
    several = samples()
    answers = bundle.generate(several)
    assert answers == [bundle.generate([sample])[0] for sample in several]
    together = torch.from_numpy(bundle.embed("language", several))
    for row, sample in zip(together, several, strict=True):
        torch.testing.assert_close(row, torch.from_numpy(bundle.embed("language", [sample]))[0], rtol=1e-3, atol=1e-4)


def test_rows_are_the_models_own_distributions(bundle: Bundle) -> None:
    """As its forward makes them of the inputs that `generate` is given: pixel_values_videos and the rest for Qwen."""
    for sample in samples():
        inputs = bundle.prepare("language", [sample])
        keys = ("input_ids", "attention_mask", "token_type_ids", "image_counts", *bundle.family.image_keys)
        asked = {key: inputs[key] for key in keys if key in inputs} | {"position_ids": torch.tensor([])}
        given = bundle.family.generation_inputs(bundle.model, asked)
        given.pop("position_ids", None)
        with torch.no_grad():
            rows = bundle.encode("language", inputs).unflatten(1, (-1, bundle.model.lm_head.out_features))
            logits = bundle.model(**given).logits[0, inputs["answer_positions"][0]]
        torch.testing.assert_close(rows[0].square(), logits.softmax(-1), rtol=1e-4, atol=1e-6)


def test_every_picture_is_seen_and_so_is_their_order(bundle: Bundle) -> None:
    two, _, _, frames, _ = samples()
    changed = [
        replace(two, further=(THIRD,)),
        replace(two, picture=SECOND, further=(FIRST,)),
        replace(frames, video=Video((FIRST, THIRD, SECOND), 1.0)),
        replace(frames, video=Video((FIRST, SECOND), 1.0)),
    ]
    whole = [two, two, frames, frames]
    for before, after in zip(whole, changed, strict=True):
        want, got = (torch.from_numpy(bundle.embed("language", [sample])) for sample in (before, after))
        assert (want - got).abs().max() > 1e-4, after.key


def test_vision_tower_takes_each_picture_by_itself(bundle: Bundle) -> None:
    two, none, one, frames, both = samples()
    whole = bundle.family.name == "qwen_vl"
    counts = [len(bundle.items("vision", sample)) for sample in (two, none, one, frames, both)]
    assert counts == [2, 0, 1, 1 if whole else 3, 3 if whole else 4]
    assert bundle.items("vision", one) == [one]
    items = [item for sample in (two, frames) for item in bundle.items("vision", sample)]
    rows = torch.from_numpy(bundle.embed("vision", items))
    for place, item in enumerate(items):
        alone = torch.from_numpy(bundle.embed("vision", [item]))[0]
        torch.testing.assert_close(rows[place][: len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert not rows[place][len(alone) :].any()


def test_one_picture_a_sample_leaves_the_inputs_as_they_were(bundle: Bundle) -> None:
    _, _, one, *_ = samples()
    inputs = bundle.prepare("language", [one, replace(one, picture=FIRST)])
    assert "image_counts" not in inputs
    assert "grid_seconds" not in inputs
    assert len(inputs["pixel_values"]) == 2


def words(bundle: Bundle, sample: Sample) -> list[str]:
    ids = bundle.prepare("language", [replace(sample, texts=("",))])["input_ids"][0].tolist()
    found: list[str] = bundle.processor.tokenizer.convert_ids_to_tokens(ids)
    return found


@pytest.mark.parametrize("name", QWEN)
def test_qwen_is_shown_frames_as_a_video(name: str) -> None:
    """Three frames of 56 x 56 pixels in two layers, 4 tokens each, as four patches of 28 pixels."""
    bundle = tiny.bundle(name)
    said = words(bundle, samples()[3])
    assert said.count("<video>") == 8
    assert "<image>" not in said
    assert (said.count("<vision>"), said.count("</vision>")) == ((2, 2) if name == "qwen3_vl" else (1, 1))
    both = words(bundle, samples()[4])
    assert (both.count("<image>"), both.count("<video>")) == (8, 4)
    assert both.index("<image>") < both.index("<video>") < both.index("what")
    inputs = bundle.prepare("language", [samples()[3]])
    assert inputs["image_grid_thw"].tolist() == [[2, 4, 4]]
    assert inputs["grid_seconds"].tolist() == [2.0]  # two frames, one a second


def test_qwen3_is_told_the_middle_of_each_layer() -> None:
    """Frames at 0, 1, 2 s, the last repeated at 3 s: layers of 0 and 1 s, 2 and 3 s, whose middles are 0.5 and 2.5 s."""
    bundle = tiny.bundle("qwen3_vl")
    inputs = bundle.prepare("vision", bundle.items("vision", samples()[3]))
    shown = bundle.family.shown(bundle.model, bundle.processor, inputs, 0)
    each = "<vision>" + 4 * "<video>" + "</vision>"
    assert shown.stands == f"<0.5 seconds>{each}<2.5 seconds>{each}"


def test_the_rate_spaces_the_positions_of_qwen25() -> None:
    """tokens_per_second is 2 there: layers of two frames are 2 * 2 / rate positions apart."""
    bundle = tiny.bundle("qwen2_5_vl")
    per_second = bundle.model.config.vision_config.tokens_per_second
    for rate in (0.5, 1.0, 4.0):
        sample = replace(samples()[3], video=Video((FIRST, SECOND, THIRD), rate))
        inputs = bundle.prepare("language", [sample])
        moving = inputs["input_ids"][0] == bundle.model.config.video_token_id
        times = inputs["position_ids"][0, 0, moving]
        assert times.unique().tolist() == [times.min().item(), times.min().item() + int(per_second * 2 / rate)]


def test_patches_of_a_video_lie_as_qwens_do() -> None:
    """By hand: layer by layer, square of four patches by square; in a patch colour by colour, first frame, then second."""
    bundle = tiny.bundle("qwen2_vl")
    pixels = bundle.processor.image
    frames = [image.resize((56, 84)) for image in (FIRST, SECOND, THIRD)]
    got, grid = video_patches(bundle.processor, Video(tuple(frames)), "qwen2_vl")
    assert grid.tolist() == [2, 6, 4]
    tables = []
    for frame in (*frames, frames[-1]):
        table = torch.from_numpy(np.asarray(frame, dtype=np.float64)) / 255
        tables.append((table - torch.tensor(pixels.image_mean)) / torch.tensor(pixels.image_std))
    rows = []
    for layer in (0, 2):
        for top, left in ((top, left) for top in range(0, 6, 2) for left in range(0, 4, 2)):
            for row, column in ((row, column) for row in (top, top + 1) for column in (left, left + 1)):
                cut = (slice(row * 14, row * 14 + 14), slice(column * 14, column * 14 + 14))
                both = [tables[frame][(*cut, colour)].flatten() for colour in range(3) for frame in (layer, layer + 1)]
                rows.append(torch.cat(both))
    torch.testing.assert_close(got.double(), torch.stack(rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("files", "kind", "want"),
    [
        ({}, "qwen2_vl", None),
        ({SETTINGS: b'{"min_pixels": 100, "max_pixels": 900}'}, "qwen2_vl", (100, 900)),
        ({SETTINGS: b'{"size": {"shortest_edge": 100, "longest_edge": 900}}'}, "qwen2_5_vl", (100, 900)),
        (
            {"processor_config.json": b'{"video_processor": {"size": {"shortest_edge": 100, "longest_edge": 900}}}'},
            "qwen3_vl",
            (10, 90),
        ),
    ],
)
def test_frames_are_as_large_as_the_video_processor_says(files: dict[str, bytes], kind: str, want: Any) -> None:
    size = frame_pixels(Processor(files=files), 10, kind)
    assert size == (None if want is None else {"shortest_edge": want[0], "longest_edge": want[1]})


def test_settings_that_are_no_json_are_named() -> None:
    with pytest.raises(UsageError, match="video_preprocessor_config.json is not JSON"):
        frame_pixels(Processor(files={SETTINGS: b"{"}), 1, "qwen2_vl")


@pytest.mark.parametrize("name", ["llava_next", "smolvlm", "paligemma"])
def test_the_parts_answer_as_the_whole(name: str) -> None:
    """Which sees each picture by itself, tiles and all."""
    bundle = tiny.bundle(name)
    several = samples()
    assert bundle_answerer(bundle, threads=1).generate(several) == bundle.generate(several)


@pytest.mark.parametrize("name", QWEN)
def test_exported_qwen_sees_layers_of_a_video_as_pictures(name: str) -> None:
    """At 224 x 224 pixels, 64 tokens a layer; a video processor's settings would have frames larger than the graph takes."""
    bundle = tiny.bundle(name)
    first, second, third = (image.resize((224, 224)) for image in (FIRST, SECOND, THIRD))
    asked = [
        Sample("both", picture=second, video=Video((first, third), 0.5), question="what ?"),
        Sample("none", question="how many ?"),
        Sample("video", video=Video((first, second, third), 1.0), question="is this a big red cat ?"),
        Sample("two", picture=third, further=(first,), question="two of the small trees ?"),
    ]
    want = bundle.generate(asked)
    assert len(set(want)) > 1
    bundle.processor.files = {SETTINGS: b'{"min_pixels": 200704, "max_pixels": 602112}'}
    assert bundle_answerer(bundle, threads=1).generate(asked) == want


@pytest.mark.parametrize("name", ["clip", "blip", "vilt", "layoutlm"])
def test_models_that_look_at_one_picture_say_so(name: str) -> None:
    bundle = tiny.bundle(name)
    tower = bundle.towers()[0].name
    two, _, _, frames, _ = samples()
    for sample, what in ((two, "2 images"), (frames, "video frames")):
        with pytest.raises(UsageError, match=f"has {what} where one image is looked at"):
            bundle.prepare(tower, bundle.items(tower, sample))
