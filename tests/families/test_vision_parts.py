"""The way a vision tower is traced gives what the model's own way gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from mmcompress.errors import UsageError
from mmcompress.families.smolvlm import _places
from tests import tiny, tiny_vlm


@pytest.mark.parametrize("name", tiny_vlm.MODELS)
@torch.no_grad()
def test_image_tokens_are_the_same(name: str) -> None:
    bundle = tiny.bundle(name)
    images = bundle.family.example_images(bundle.model, 2)
    width = bundle.family.image_width(bundle.model)
    want = torch.cat([tokens.reshape(-1, width) for tokens in bundle.family.image_tokens(bundle.model, images)])
    vision, *_ = bundle.family.parts(bundle.model)
    got = vision.compute(bundle.model, *bundle.family.looked_at(bundle.model, images).values())
    torch.testing.assert_close(got.reshape(-1, width), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [4, 14, 16, 26, 27, 32, 37])
def test_smolvlm_places_are_the_buckets_of_the_model(side: int) -> None:
    config = SmolVLMVisionConfig(hidden_size=2, num_attention_heads=1, image_size=side * 2, patch_size=2)
    embeddings = SmolVLMVisionEmbeddings(config)
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight[:, 0] = torch.arange(side**2)
        made = embeddings(torch.zeros(1, 3, side * 2, side * 2), torch.ones(1, side, side, dtype=torch.bool))
    assert made[0, :, 0].tolist() == _places(side)


def test_a_picture_that_does_not_fill_its_tile_is_refused() -> None:
    bundle = tiny.bundle("smolvlm")
    images = bundle.family.example_images(bundle.model, 1)
    images["pixel_attention_mask"][:, :, :, 40:] = 0
    with pytest.raises(UsageError, match="does not fill its tile"):
        bundle.family.looked_at(bundle.model, images)


def test_another_grid_than_the_exported_one_is_refused() -> None:
    bundle = tiny.bundle("qwen2_5_vl")
    images = bundle.family.example_images(bundle.model, 2)
    images["image_grid_thw"][1] = torch.tensor([1, 8, 8])
    with pytest.raises(UsageError, match=r"\[1, 8, 8\] patches; the exported vision part takes \[1, 16, 16\]"):
        bundle.family.looked_at(bundle.model, images)


@pytest.mark.parametrize("name", tiny_vlm.MODELS)
@torch.no_grad()
def test_the_parts_give_the_models_own_logits(name: str) -> None:
    """Whatever the language model is given of a picture, deepstack included, goes through the parts."""
    bundle = tiny.bundle(name)
    shown = [sample for sample in tiny.data(name, 4) if sample.picture is not None]
    if name.startswith("qwen"):
        shown = [replace(sample, picture=sample.image.resize((224, 224))) for sample in shown]
    inputs = bundle.prepare("language", shown[:1])
    last = inputs["attention_mask"].sum() - 1
    vision, embed, language = bundle.family.parts(bundle.model)
    images = {key: inputs[key] for key in bundle.family.image_keys if key in inputs}
    seen = vision.compute(bundle.model, *bundle.family.looked_at(bundle.model, images).values())
    rows = embed.compute(bundle.model, inputs["input_ids"])
    rows[inputs["input_ids"] == bundle.model.config.image_token_id] = seen.reshape(-1, seen.shape[-1])
    places = inputs.get("position_ids", torch.arange(rows.shape[1]).expand(1, -1))
    example = language.example({"batch": 1, "tokens": 2, "past": 0})
    empty = [value for key, value in example.items() if key.startswith("past")]
    got = language.compute(bundle.model, rows, inputs["attention_mask"], places, *empty)[0]
    given = {**images, **{key: inputs[key] for key in ("input_ids", "attention_mask")}, "position_ids": places}
    if "token_type_ids" in inputs:
        given["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    want = bundle.model(**bundle.family.generation_inputs(bundle.model, given)).logits[:, last]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_where_the_tokens_of_tiles_go_by_hand() -> None:
    """Tiles of 4 x 4 tokens. A picture of 56 x 112 is seen whole, then as two tiles side by side, with an end to each line."""
    bundle = tiny.bundle("llava_next")
    pixels = torch.zeros(2, 3, 3, 56, 56)
    found = bundle.family.looked_at(
        bundle.model, {"pixel_values": pixels, "image_sizes": torch.tensor([[56, 112], [28, 112]])}
    )
    assert found["pixel_values"].shape == (6, 3, 56, 56)
    first, second = found["image_places"][:52].tolist(), found["image_places"][52:].tolist()
    assert first[:16] == list(range(1, 17))
    assert first[16:25] == [17, 18, 19, 20, 33, 34, 35, 36, 0]
    assert first[25:34] == [21, 22, 23, 24, 37, 38, 39, 40, 0]
    # Half as high, it lies between padding: the first and the last of the four lines are cut off.
    assert second[:16] == list(range(49, 65))
    assert second[16:] == [69, 70, 71, 72, 85, 86, 87, 88, 0, 73, 74, 75, 76, 89, 90, 91, 92, 0]


@torch.no_grad()
def test_pictures_of_several_shapes_are_packed_as_by_the_model() -> None:
    bundle = tiny.bundle("llava_next")
    sizes = torch.tensor([[56, 112], [20, 112], [130, 40], [112, 100]])
    pixels = torch.randn(4, 5, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": pixels, "image_sizes": sizes}
    want = torch.cat(bundle.family.image_tokens(bundle.model, given))
    vision, *_ = bundle.family.parts(bundle.model)
    got = vision.compute(bundle.model, *bundle.family.looked_at(bundle.model, given).values())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
