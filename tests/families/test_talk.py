"""How a question becomes tokens: the checkpoint's chat template, and what is said where it does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Idefics3Processor, LlavaNextProcessor
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from mmcompress.bundle import Bundle
from mmcompress.data import Sample
from mmcompress.errors import UsageError
from mmcompress.families.smolvlm import AROUND, WHOLE
from tests import tiny


def words(bundle: Bundle, sample: Sample) -> str:
    """What a sample is asked as, in words."""
    ids = bundle.prepare("language", [replace(sample, texts=("",))])["input_ids"][0]
    return bundle.processor.tokenizer.decode(ids)


def shown(name: str, **more: object) -> Sample:
    return replace(next(iter(tiny.data(name, 1))), **more)


def test_the_picture_stands_before_the_first_question_and_turns_alternate() -> None:
    bundle = tiny.bundle("llava_clip")
    sample = shown("llava_clip", question="what is this ?", turns=(("how many ?", "two"),))
    said = words(bundle, sample).split()
    assert said.count("<image>") == 16
    spoken = " ".join(word for word in said if word != "<image>")
    assert spoken == "<s> User : how many ? Assistant : two User : what is this ? Assistant : </s>"
    assert said.index("<image>") < said.index("how")


def test_without_a_question_a_description_is_asked_for() -> None:
    assert "Describe" in words(tiny.bundle("llava_clip"), shown("llava_clip", question=""))


def test_a_question_about_code_is_no_list_of_contents() -> None:
    words(tiny.bundle("llava_clip"), shown("llava_clip", question="what is {'type': 'image'} ?"))


def test_llava_without_a_template_takes_the_words_it_was_first_trained_with() -> None:
    bundle = tiny.bundle("llava_clip")
    tokenizer = bundle.processor.tokenizer
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        said = words(bundle, shown("llava_clip", question="what is this ?"))
    finally:
        tokenizer.chat_template = kept
    said_words = said.split()
    assert said_words.count("<image>") == 16
    assert said_words.index("<image>") < said_words.index("what")
    # Then ASSISTANT, which this tokenizer does not know, the colon, and the end of an empty answer.
    assert " ".join(said_words[-7:-3]) == "what is this ?"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm"])
def test_others_are_refused_without_one(name: str) -> None:
    bundle = tiny.bundle(name)
    tokenizer = bundle.processor.tokenizer
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(UsageError, match="no chat template") as caught:
            bundle.generate([shown(name)])
    finally:
        tokenizer.chat_template = kept
    assert "chat_template.jinja" in caught.value.hint


def test_a_template_without_a_place_for_the_picture_is_refused() -> None:
    bundle = tiny.bundle("llava_clip")
    tokenizer = bundle.processor.tokenizer
    kept = tokenizer.chat_template
    tokenizer.chat_template = kept.replace("<image>", "")
    try:
        with pytest.raises(UsageError, match="writes 0 image tokens"):
            bundle.generate([shown("llava_clip")])
        tokenizer.chat_template = kept.replace("<image>", "<image><image>")
        with pytest.raises(UsageError, match="writes 2 image tokens"):
            bundle.generate([shown("llava_clip")])
    finally:
        tokenizer.chat_template = kept


def test_without_tokenizer_or_image_processor_it_says_which_file_is_missing() -> None:
    for part, file in (("tokenizer", "tokenizer.json"), ("image", "preprocessor_config.json")):
        bundle = tiny.bundle("llava_clip")
        setattr(bundle.processor, part, None)
        with pytest.raises(UsageError) as caught:
            bundle.generate([shown("llava_clip")])
        assert file in caught.value.hint


def test_paligemma_answers_single_questions() -> None:
    with pytest.raises(UsageError, match="earlier turns"):
        tiny.bundle("paligemma").generate([shown("paligemma", turns=(("how many ?", "two"),))])


def test_pictures_of_another_size_than_the_models_are_refused() -> None:
    bundle = tiny.bundle("llava_clip")
    bundle.model.config.vision_config.image_size = 70
    with pytest.raises(UsageError, match="56 x 56 pixels, config.json says 70"):
        bundle.generate([shown("llava_clip")])


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 2), (2, 2)])
def test_smolvlm_writes_tiles_as_transformers_does(rows: int, columns: int) -> None:
    for name in ("smolvlm", "idefics3"):
        bundle = tiny.bundle(name)
        count = bundle.family.example_image_tokens(bundle.model)
        got = bundle.family.placeholders(bundle.model, bundle.processor, {"tiles": torch.tensor([[rows, columns]])}, 0)
        if name == "smolvlm":
            assert got == get_image_prompt_string(rows, columns, count, AROUND, "<image>", WHOLE)
        else:
            processor = Idefics3Processor(bundle.processor.image, bundle.processor.tokenizer, image_seq_len=count)
            sizes = {"rows": [[rows]], "cols": [[columns]]}
            assert got == processor.replace_image_token(sizes, 0)


def test_llava_next_counts_its_tokens_as_transformers_does() -> None:
    bundle = tiny.bundle("llava_next")
    config = bundle.model.config
    processor = LlavaNextProcessor(
        bundle.processor.image,
        bundle.processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )
    for size in ((56, 56), (100, 60), (40, 150), (200, 190)):
        image = tiny.images(1)[0].resize(size)
        inputs = bundle.family.image_inputs(bundle.model, bundle.processor, [image])
        got = bundle.family.placeholders(bundle.model, bundle.processor, inputs, 0)
        want = processor(images=image, text="<image>", return_tensors="pt")["input_ids"]
        assert got.count("<image>") == int((want == config.image_token_id).sum())
