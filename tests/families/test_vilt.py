"""What only ViLT has: patches kept in their places, pictures of several sizes in one batch, answers from a list."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.evaluate.evaluation import evaluate
from tests import tiny


@pytest.fixture
def bundle() -> Bundle:
    return tiny.bundle("vilt")


def test_rows_are_the_models_own_distributions(bundle: Bundle) -> None:
    """Also of a picture that is padded beside a larger one: transformers draws an order of patches, which changes nothing else."""
    samples = list(tiny.data("vilt", 2))
    samples[1] = replace(samples[1], picture=samples[1].image.resize((80, 40)))
    inputs = bundle.prepare("joint", samples)
    assert not inputs["pixel_mask"].bool().all()
    text = inputs["attention_mask"][:, : inputs["input_ids"].shape[1]]
    given = {name: inputs[name] for name in ("input_ids", "pixel_values", "pixel_mask")}
    with torch.no_grad():
        rows = bundle.encode("joint", inputs)
        logits = bundle.model(**given, attention_mask=text).logits
    torch.testing.assert_close(rows.square(), logits.softmax(-1), rtol=1e-4, atol=1e-6)


def test_the_mask_covers_all_the_blocks_see(bundle: Bundle) -> None:
    inputs = bundle.example_inputs("joint", 2)
    seen: list[int] = []
    handle = bundle.module(bundle.tower("joint").blocks[0].path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    bundle.encode("joint", inputs)
    handle.remove()
    assert seen == [inputs["attention_mask"].shape[1]] == [16 + 1 + 49]


def test_pictures_of_several_sizes_are_as_if_alone(bundle: Bundle) -> None:
    samples = list(tiny.data("vilt", 3))
    for index, size in enumerate(((56, 56), (100, 50), (40, 70))):
        samples[index] = replace(samples[index], picture=samples[index].image.resize(size, Image.Resampling.BICUBIC))
    together = torch.from_numpy(bundle.embed("joint", samples))
    for row, sample in zip(together, samples, strict=True):
        torch.testing.assert_close(torch.from_numpy(bundle.embed("joint", [sample]))[0], row, rtol=0, atol=2e-5)


def test_the_answer_is_the_likeliest_in_the_config(bundle: Bundle) -> None:
    samples = list(tiny.data("vilt", 3))
    inputs = bundle.prepare("joint", samples)
    best = bundle.encode("joint", inputs).argmax(-1).tolist()
    assert bundle.generate(samples) == [f"answer {number}" for number in best]


def test_what_cannot_be_asked_is_refused(bundle: Bundle) -> None:
    (sample,) = tiny.data("vilt", 1)
    for broken, words in (
        (replace(sample, question=""), "has no text"),
        (replace(sample, question="cat " * 50), "has 52 tokens of text; vilt takes 20"),
    ):
        with pytest.raises(UsageError, match=words):
            bundle.generate([broken])
        assert bundle.items("joint", broken) == ([broken] if broken.question else [])
    bundle.model.config.max_image_length = 100
    with pytest.raises(UsageError, match="draw that many patches at random"):
        bundle.family.model_class(bundle.model.config)
    bundle.processor.image = None
    with pytest.raises(UsageError, match="no image processor"):
        bundle.prepare("joint", [sample])


def test_the_matching_class_has_no_task_and_says_so() -> None:
    bundle = tiny.bundle("vilt_retrieval")
    data = tiny.data("vilt_retrieval", 4)
    with pytest.raises(UsageError, match="neither embeddings nor answers"):
        evaluate(bundle, data)
    with torch.no_grad():
        rows = bundle.encode("joint", bundle.prepare("joint", list(data)))
    assert rows.shape == (4, 48)
