"""What only BLIP has: three classes of one model type, heads that cannot be cut, padding that cross-attention must not see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmcompress import passes
from mmcompress.bundle import Bundle
from mmcompress.data import Sample
from mmcompress.errors import UsageError
from mmcompress.families import family_for
from tests import tiny

VOCABULARY = 24


def test_the_class_decides_the_family() -> None:
    names = {
        name: family_for({"model_type": "blip", "architectures": [name]}).name
        for name in ("BlipForConditionalGeneration", "BlipForQuestionAnswering", "BlipForImageTextRetrieval")
    }
    assert list(names.values()) == ["blip", "blip_vqa", "blip_retrieval"]
    with pytest.raises(UsageError, match="BlipModel is not supported"):
        family_for({"model_type": "blip", "architectures": ["BlipModel"]})


def test_vision_heads_stay_and_neurons_go() -> None:
    bundle = tiny.bundle("blip")
    with pytest.raises(
        UsageError, match="heads of the vision tower cannot be removed: BLIP computes how wide a head is"
    ):
        passes.build("prune", {"units": ["heads"], "score": "random", "towers": ["vision"]}).check(bundle)
    made = passes.build("prune", {"ratio": 0.2, "score": "random", "compensate": "none"})
    kept = made.plan(bundle, passes.base.Context()).decisions["kept"]
    assert kept["heads"]
    assert all(place.startswith("decoder.") for place in kept["heads"])
    assert any(place.startswith("vision.") for place in kept["neurons"])


@pytest.mark.parametrize("name", ["blip", "blip_vqa"])
def test_decoder_rows_are_the_models_own_distributions(name: str) -> None:
    bundle = tiny.bundle(name)
    (sample,) = tiny.data(name, 1)
    inputs = bundle.prepare("decoder", [sample])
    given = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
    with torch.no_grad():
        rows = bundle.encode("decoder", inputs).unflatten(1, (-1, VOCABULARY))[0]
        states = bundle.model.vision_model(inputs["pixel_values"]).last_hidden_state
        if given:
            states = bundle.model.text_encoder(**given, encoder_hidden_states=states).last_hidden_state
        logits = bundle.model.text_decoder(inputs["decoder_input_ids"], encoder_hidden_states=states).logits[0]
    torch.testing.assert_close(rows.square(), logits.softmax(-1), rtol=1e-4, atol=1e-6)
    words = bundle.processor.tokenizer.convert_tokens_to_ids(sample.texts[0].split())
    assert inputs["decoder_input_ids"].tolist() == [[1, *words]]


@pytest.mark.parametrize("name", ["blip", "blip_vqa"])
def test_answers_are_what_the_models_own_generate_gives(name: str) -> None:
    bundle = tiny.bundle(name)
    for sample in tiny.data(name, 3):
        inputs = bundle.prepare("decoder", [sample])
        asked = {key: inputs[key] for key in ("pixel_values", "input_ids") if key in inputs}
        ids = bundle.model.generate(**asked, max_new_tokens=23, num_beams=1, do_sample=False)
        text = bundle.processor.tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)[0].strip()
        assert bundle.generate([sample]) == [text]


def test_the_answer_depends_on_picture_and_question() -> None:
    bundle = tiny.bundle("blip_vqa")
    (sample,) = tiny.data("blip_vqa", 1)
    others = [replace(sample, picture=tiny.images(1, seed=5)[0]), replace(sample, question="is the big car red ?")]
    rows = torch.from_numpy(bundle.embed("decoder", [sample, *others]))
    assert all((rows[0] - row).abs().max() > 1e-3 for row in rows[1:])


def test_question_and_caption_are_told_apart() -> None:
    captioned, asked = (next(iter(tiny.data(name, 1))) for name in ("blip", "blip_vqa"))
    with pytest.raises(UsageError, match="asks a question, and BlipForConditionalGeneration only captions"):
        tiny.bundle("blip").generate([asked])
    answerer = tiny.bundle("blip_vqa")
    with pytest.raises(UsageError, match="asks nothing, and BlipForQuestionAnswering answers questions"):
        answerer.generate([captioned])
    with pytest.raises(UsageError, match="has 202 tokens; blip_vqa takes 24"):
        answerer.generate([replace(asked, question="cat " * 200)])
    assert [answerer.items(tower, captioned) for tower in ("vision", "text", "decoder")] == [[captioned], [], []]
    assert answerer.items("decoder", asked) == [asked]


def test_no_hook_stays() -> None:
    bundle = tiny.bundle("blip_vqa")
    bundle.generate(list(tiny.data("blip_vqa", 2)))
    assert not any(module._forward_pre_hooks for module in bundle.model.modules())


def test_the_matching_head_works_on_pruned_towers() -> None:
    bundle = tiny.bundle("blip_retrieval")
    made = passes.build("prune", {"ratio": 0.2, "score": "magnitude", "compensate": "none"})
    made.apply(bundle, made.plan(bundle, passes.base.Context()))
    inputs = bundle.example_inputs("vision", 2) | bundle.example_inputs("text", 2)
    assert bundle.model(**inputs).itm_score.shape == (2, 2)


@pytest.mark.parametrize("part", ["image", "tokenizer"])
def test_missing_preprocessing_is_named(part: str) -> None:
    bundle: Bundle = tiny.bundle("blip")
    setattr(bundle.processor, part, None)
    sample: Sample = next(iter(tiny.data("blip", 1)))
    with pytest.raises(UsageError, match="no image processor" if part == "image" else "no tokenizer"):
        bundle.prepare("decoder", [sample])
