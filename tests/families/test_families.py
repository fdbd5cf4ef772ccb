"""Every family under the one contract, and how a family is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmcompress import passes
from mmcompress.bundle import Bundle, DualEncoder, Generator
from mmcompress.data import Sample
from mmcompress.errors import UsageError
from mmcompress.families import FAMILIES, family_for
from mmcompress.passes.base import Context
from tests import tiny
from tests.families.contract import (
    AnsweringContract,
    DualEncoderContract,
    FamilyContract,
    GeneratorContract,
    TeacherForcedContract,
    VisionLanguageContract,
)


class TestClip(DualEncoderContract):
    model = "clip"


class TestSiglip(DualEncoderContract):
    model = "siglip"


class TestSiglip2(DualEncoderContract):
    model = "siglip2"


class TestDualEncoderVit(DualEncoderContract):
    model = "dual_encoder_vit"


class TestDualEncoderDinov2(DualEncoderContract):
    model = "dual_encoder_dinov2"


class TestAltClip(DualEncoderContract):
    model = "altclip"


class TestChineseClip(DualEncoderContract):
    model = "chinese_clip"


class TestClap(DualEncoderContract):
    model = "clap"
    towers = ("audio", "text")


class TestFlava(DualEncoderContract):
    model = "flava"

    def test_encode_is_what_the_model_gives(self, bundle: Bundle) -> None:
        """The model gives states of all tokens; its contrastive head, in training, projects the first."""
        inputs = bundle.example_inputs("vision", 2) | bundle.example_inputs("text", 2)
        output = bundle.model(**inputs, skip_multimodal_encoder=True)
        for name, states in (("vision", output.image_embeddings), ("text", output.text_embeddings)):
            project = bundle.module(bundle.tower(name).heads[0])
            torch.testing.assert_close(bundle.encode(name, bundle.example_inputs(name, 2)), project(states)[:, 0])

    def test_the_multimodal_encoder_runs_on_pruned_towers(self, bundle: Bundle) -> None:
        made = passes.build("prune", {"ratio": 0.3, "score": "magnitude", "compensate": "none"})
        made.apply(bundle, made.plan(bundle, Context()))
        inputs = bundle.example_inputs("vision", 2) | bundle.example_inputs("text", 2)
        assert bundle.model(**inputs).multimodal_embeddings.shape == (2, 1 + 50 + 16, 32)


class TestWhisper(TeacherForcedContract, GeneratorContract):
    model = "whisper"
    towers = ("audio", "decoder")

    def items(self, tower: str) -> list[Any]:
        return self.samples()

    def samples(self) -> list[Sample]:
        return list(tiny.spoken(3))


class TestBlip(TeacherForcedContract, GeneratorContract):
    model = "blip"
    towers = ("vision", "decoder")

    def items(self, tower: str) -> list[Any]:
        return self.samples()

    def samples(self) -> list[Sample]:
        return list(tiny.data(self.model, 3))


class TestBlipVqa(TestBlip):
    model = "blip_vqa"
    towers = ("vision", "text", "decoder")


class TestBlipRetrieval(DualEncoderContract):
    model = "blip_retrieval"

    def test_encode_is_what_the_model_gives(self, bundle: Bundle) -> None:
        """With its matching head turned off, the model gives cosines."""
        inputs = bundle.example_inputs("vision", 2) | bundle.example_inputs("text", 3)
        scores = bundle.model(**inputs, use_itm_head=False).itm_score
        image, text = (
            torch.nn.functional.normalize(bundle.encode(name, bundle.example_inputs(name, n)), dim=-1)
            for name, n in (("vision", 2), ("text", 3))
        )
        torch.testing.assert_close(scores, image @ text.T)


class TestVilt(AnsweringContract):
    model = "vilt"
    towers = ("joint",)

    def items(self, tower: str) -> list[Any]:
        return self.samples()

    def samples(self) -> list[Sample]:
        return list(tiny.data(self.model, 3))


class TestViltRetrieval(FamilyContract):
    model = "vilt_retrieval"
    towers = ("joint",)

    def items(self, tower: str) -> list[Any]:
        return list(tiny.data(self.model, 3))

    def test_it_neither_embeds_nor_answers(self, bundle: Bundle) -> None:
        assert not isinstance(bundle.family, DualEncoder | Generator)


class TestLayoutLm(TestViltRetrieval):
    model = "layoutlm"


class TestLayoutLmPages(TestViltRetrieval):
    model = "layoutlm_pages"


class TestLayoutLmWords(TestViltRetrieval):
    model = "layoutlm_words"


class TestLlavaClip(VisionLanguageContract):
    model = "llava_clip"


class TestLlavaSiglip(VisionLanguageContract):
    model = "llava_siglip"


class TestLlavaDinov2(VisionLanguageContract):
    model = "llava_dinov2"


class TestLlavaNext(VisionLanguageContract):
    model = "llava_next"


class AtOneSize(VisionLanguageContract):
    """Exported, these look at pictures of one size."""

    def resized(self, sample: Sample) -> Sample:
        return sample if sample.picture is None else replace(sample, picture=sample.image.resize((224, 224)))


class TestQwen2VL(AtOneSize):
    model = "qwen2_vl"


class TestQwen25VL(AtOneSize):
    model = "qwen2_5_vl"


class TestQwen3VL(AtOneSize):
    model = "qwen3_vl"


class TestQwen3VLMoe(AtOneSize):
    model = "qwen3_vl_moe"


class TestSmolVLM(VisionLanguageContract):
    model = "smolvlm"


class TestIdefics3(VisionLanguageContract):
    model = "idefics3"


class TestPaliGemma(VisionLanguageContract):
    model = "paligemma"


def test_every_family_is_under_the_contract() -> None:
    covered, todo = set(), [FamilyContract]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        covered |= {cls.model} if hasattr(cls, "model") else set()
    assert covered == {*tiny.EVERY, *tiny.MIXTURES}
    assert {tiny.bundle(model).family.name for model in covered} == set(FAMILIES)


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
