"""Every family under the one contract, and how a family is found."""

from __future__ import annotations

import pytest

from mmcompress.errors import UsageError
from mmcompress.families import FAMILIES, family_for
from tests import tiny
from tests.families.contract import FamilyContract


class TestClip(FamilyContract):
    model = "clip"


class TestSiglip(FamilyContract):
    model = "siglip"


class TestSiglip2(FamilyContract):
    model = "siglip2"


class TestDualEncoderVit(FamilyContract):
    model = "dual_encoder_vit"


class TestDualEncoderDinov2(FamilyContract):
    model = "dual_encoder_dinov2"


def test_every_family_is_under_the_contract() -> None:
    covered = {tiny.bundle(cls.model).family.name for cls in FamilyContract.__subclasses__()}
    assert covered == set(FAMILIES)
    assert {cls.model for cls in FamilyContract.__subclasses__()} == set(tiny.FAMILIES)


def test_an_unknown_class_lists_the_supported_ones_and_the_file_to_copy() -> None:
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is not supported") as caught:
        family_for({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    assert "CLIPModel" in caught.value.hint
    assert "families/clip.py" in caught.value.hint


def test_a_dual_encoder_with_gated_mlps_is_refused() -> None:
    bundle = tiny.bundle("dual_encoder_dinov2")
    bundle.model.config.vision_config.use_swiglu_ffn = True
    with pytest.raises(UsageError, match="gated MLPs"):
        bundle.family.model_class(bundle.model.config)


def test_without_a_tokenizer_texts_are_refused() -> None:
    bundle = tiny.bundle("clip")
    bundle.processor.tokenizer = None
    for use in (bundle.embed_texts, bundle.cut_texts):
        with pytest.raises(UsageError, match="no tokenizer"):
            use(["a cat"])


def test_half_a_model_is_not_taken_for_a_whole_one() -> None:
    with pytest.raises(UsageError, match="CLIPVisionModel is not supported"):
        family_for({"model_type": "clip", "architectures": ["CLIPVisionModel"]})
