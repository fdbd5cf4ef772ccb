"""The way a vision tower is traced gives what the model's own way gives."""

from __future__ import annotations

import pytest
import torch
from transformers import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from mmcompress.errors import UsageError
from mmcompress.families.smolvlm import _places
from tests import tiny, tiny_vlm

EXPORTED = tiny_vlm.MODELS


@pytest.mark.parametrize("name", EXPORTED)
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
