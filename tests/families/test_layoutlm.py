"""What only LayoutLMv3 has: places of words, biases that all blocks share, weights that are read without a call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmcompress import passes
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.families import family_for
from mmcompress.families.layoutlm import reading_order
from mmcompress.passes.base import Context
from tests import tiny

NAMES = ("layoutlm", "layoutlm_pages", "layoutlm_words")


def test_words_stand_in_reading_order() -> None:
    assert reading_order(1) == [[0, 0, 125, 1000]]
    boxes = reading_order(10)
    assert boxes[7] == [875, 0, 1000, 500]
    assert boxes[8] == [0, 500, 125, 1000]
    assert max(max(box) for box in reading_order(500)) <= 1000


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_what_the_model_gives(name: str) -> None:
    bundle = tiny.bundle(name)
    samples = list(tiny.data(name, 2))
    inputs = bundle.prepare("joint", samples)
    text = inputs["input_ids"].shape[1]
    mask = inputs["attention_mask"][:, :text]
    assert not mask.bool().all()  # one page has fewer words, or nothing would be padded
    with torch.no_grad():
        output = bundle.model(**{**inputs, "attention_mask": mask})
        rows = bundle.encode("joint", inputs)
    if name == "layoutlm":
        torch.testing.assert_close(rows, (output.last_hidden_state[:, :text] * mask[:, :, None]).flatten(1))
    elif name == "layoutlm_pages":
        torch.testing.assert_close(rows.square(), output.logits.softmax(-1), rtol=1e-4, atol=1e-6)
    else:
        labelled = output.logits.softmax(-1) * mask[:, :, None]
        torch.testing.assert_close(rows.unflatten(1, (text, -1)).square(), labelled, rtol=1e-4, atol=1e-6)


def test_a_words_place_matters() -> None:
    bundle = tiny.bundle("layoutlm_pages")
    inputs = bundle.example_inputs("joint", 1)
    moved = {**inputs, "bbox": inputs["bbox"].flip(1)}
    with torch.no_grad():
        assert (bundle.encode("joint", inputs) - bundle.encode("joint", moved)).abs().max() > 1e-4


def test_the_mask_covers_all_the_blocks_see() -> None:
    bundle = tiny.bundle("layoutlm")
    seen: list[int] = []
    handle = bundle.module(bundle.tower("joint").blocks[0].path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    inputs = bundle.example_inputs("joint", 1)
    bundle.encode("joint", inputs)
    handle.remove()
    assert seen == [inputs["attention_mask"].shape[1]] == [16 + 1 + 49]


def test_heads_stay_because_blocks_share_their_biases() -> None:
    bundle = tiny.bundle("layoutlm")
    heads = passes.build("prune", {"units": ["heads"], "score": "random", "ratio": 0.05, "compensate": "none"})
    with pytest.raises(UsageError, match="column a head, which all blocks share"):
        heads.check(bundle)
    config = bundle.model.config
    config.has_relative_attention_bias = config.has_spatial_attention_bias = False
    model = type(bundle.model)(config).eval()
    free = Bundle(model, bundle.processor, bundle.family, bundle.source)
    heads.check(free)
    heads.apply(free, heads.plan(free, Context()))
    assert free.encode("joint", free.example_inputs("joint", 1)).isfinite().all()


@pytest.mark.parametrize("scheme", ["W8A16", "W8A8"])
def test_weights_that_are_read_without_a_call_stay_float(scheme: str) -> None:
    bundle = tiny.bundle("layoutlm_words")
    made = passes.build("quantize", {"scheme": scheme})
    made.apply(bundle, made.plan(bundle, Context(tiny.data("layoutlm_words", 4), num_samples=4)))
    uncalled = bundle.tower("joint").uncalled
    assert len(uncalled) == 3
    assert all(type(bundle.module(path)) is nn.Linear for path in uncalled)


def test_what_cannot_be_read_is_refused() -> None:
    bundle = tiny.bundle("layoutlm")
    (sample,) = tiny.data("layoutlm", 1)
    with pytest.raises(UsageError, match="has no words"):
        bundle.prepare("joint", [replace(sample, texts=())])
    bundle.processor.tokenizer = tiny.tokenizer()
    with pytest.raises(UsageError, match="does not take the places of words"):
        bundle.prepare("joint", [sample])
    bundle.processor.image = None
    with pytest.raises(UsageError, match="no image processor"):
        bundle.prepare("joint", [sample])
    bundle.model.config.visual_embed = False
    with pytest.raises(UsageError, match="of words alone"):
        bundle.family.model_class(bundle.model.config)
    with pytest.raises(UsageError, match="LayoutLMv3ForQuestionAnswering is not supported"):
        family_for({"model_type": "layoutlmv3", "architectures": ["LayoutLMv3ForQuestionAnswering"]})


def test_a_long_page_is_cut() -> None:
    bundle = tiny.bundle("layoutlm")
    (sample,) = tiny.data("layoutlm", 1)
    inputs = bundle.prepare("joint", [replace(sample, texts=("cat " * 100,))])
    assert inputs["input_ids"].shape[1] == 64 - 1 - 1
