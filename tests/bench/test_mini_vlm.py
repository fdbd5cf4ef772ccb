"""The mini-VLM's training is the model's own forward in fewer tokens; the committed part builds what was measured."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlavaProcessor

from bench import assets, build_mini_vlm
from bench.build_mini_vlm import Training, rate, whiten
from bench.cells import read
from bench.mini_vlm import CHAT_TEMPLATE, IMAGE, PATCHES, assembled, fast_tokenizer, image_processor, train_tokenizer
from bench.vision_features import cached_features, patch_features
from bench.vlm_batches import Pictures, Talk, answer_loss, choose_patches, inked_patches
from bench.vlm_quality import Answering, correct, majority, messages, plain, read_rows
from bench.vqa_data import Drawn
from tests.built import built

CORPUS = ["What is this?", "Which category is it?", "red apple", "food & drink", "green pear", "fruit"] * 3
TURNS = [("What is this?", "red apple"), ("Which category is it?", "food & drink")]


@pytest.fixture(scope="module")
def tokenizer():
    return fast_tokenizer(train_tokenizer(CORPUS))


def processor(tokenizer) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def tiny(tokenizer):
    torch.manual_seed(0)
    tower = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, use_mask_token=False)
    ).eval()
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = assembled(tower, language, tokenizer.convert_tokens_to_ids(IMAGE))
    model.model.language_model.set_attn_implementation("eager")
    return model


def chat(turns: list[tuple[str, str]]) -> list[dict[str, object]]:
    last = {"role": "assistant", "content": [{"type": "text", "text": turns[-1][1]}]}
    return [*messages({"turns": turns[:-1], "question": turns[-1][0]}), last]


def test_capitals_are_single_letters_and_texts_come_back(tokenizer) -> None:
    assert len(tokenizer.encode("APPLE", add_special_tokens=False)) == 5
    assert len(tokenizer.encode("What is this?", add_special_tokens=False)) == 4
    for text in ("APPLE", "piñata “5 o’clock”", "red apple"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_template_writes_turns_between_its_marks(tokenizer) -> None:
    text = processor(tokenizer).apply_chat_template(messages({"turns": TURNS[:1], "question": "Why?"}))
    assert text == "<s><user><image>What is this?<assistant>red apple</s><user>Why?"
    asked = processor(tokenizer).apply_chat_template(messages({"question": "Why?"}), add_generation_prompt=True)
    assert asked == "<s><user><image>Why?<assistant>"
    with pytest.raises(Exception, match="not system"):
        processor(tokenizer).apply_chat_template([{"role": "system", "content": "Be brief."}])


def test_training_tokens_are_the_templates(tokenizer) -> None:
    tokens, said = Talk(tokenizer).after_image(TURNS)
    text = processor(tokenizer).apply_chat_template(chat(TURNS))
    assert tokens == tokenizer.encode(text, add_special_tokens=False)[3:]
    assert tokenizer.decode([token for token, is_said in zip(tokens, said, strict=True) if is_said]) == (
        "red apple</s>food & drink</s>"
    )


def test_the_loss_over_all_patches_is_the_models_own(tokenizer) -> None:
    model, talk = tiny(tokenizer), Talk(tokenizer)
    images = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    asked = [TURNS, TURNS[:1]]
    features = patch_features(model.model.vision_tower, image_processor(), images)
    shown = torch.arange(PATCHES).expand(2, -1)
    with torch.no_grad():
        found = answer_loss(model, talk, features, shown, asked)
    sums, count = 0.0, 0
    for image, turns in zip(images, asked, strict=True):
        text = processor(tokenizer).apply_chat_template(chat(turns))
        batch = processor(tokenizer)(text=text, images=image, return_tensors="pt")
        said = talk.after_image(turns)[1]
        labels = batch["input_ids"].clone()
        labels[0, : -len(said)] = -100
        labels[0, -len(said) :][~torch.tensor(said)] = -100
        with torch.no_grad():
            sums += float(model(**batch, labels=labels).loss) * sum(said)
        count += sum(said)
    assert float(found) == pytest.approx(sums / count, rel=1e-4)


def test_patches_left_out_keep_the_places_of_the_others(tokenizer) -> None:
    model, talk = tiny(tokenizer), Talk(tokenizer)
    features = torch.randn(1, 3, 16)
    with torch.no_grad():
        first, same, far = (
            answer_loss(model, talk, features, torch.tensor([shown]), [TURNS])
            for shown in ([0, 1, 2], [0, 1, 2], [0, 100, 200])
        )
    assert first == same
    assert abs(float(first - far)) > 1e-4


def test_preferred_patches_come_first_and_in_order() -> None:
    preference = torch.zeros(2, PATCHES)
    preference[0, [7, 9, 200]] = 1
    chosen = choose_patches(preference, 5, torch.Generator().manual_seed(0))
    assert {7, 9, 200} <= set(chosen[0].tolist())
    assert (chosen.diff(dim=1) > 0).all()
    assert chosen[0].tolist() != chosen[1].tolist()
    everything = choose_patches(preference, PATCHES, torch.Generator().manual_seed(0))
    assert everything.tolist() == [list(range(PATCHES))] * 2


def test_inked_patches_are_those_with_a_mark() -> None:
    image = Image.new("RGB", (224, 224), "white")
    image.putpixel((14 * 3, 14 * 2), (0, 0, 0))
    image.putpixel((223, 223), (254, 255, 255))
    assert inked_patches(image).nonzero().flatten().tolist() == [2 * 16 + 3, 255]


def test_whitening_makes_parts_equal_and_independent() -> None:
    features = torch.randn(5000, 6) @ torch.randn(6, 6) + 3
    projector = torch.nn.Module()
    projector.linear_1, projector.linear_2 = torch.nn.Linear(6, 4), torch.nn.Linear(4, 4)
    whiten(projector, features)
    out = projector.linear_1(features)
    torch.testing.assert_close(torch.cov(out.T), torch.eye(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-3, rtol=0)


def test_the_rate_rises_and_falls_to_a_fiftieth() -> None:
    assert rate(0, 1000) == pytest.approx(1 / build_mini_vlm.WARMUP)
    assert rate(build_mini_vlm.WARMUP, 1000) == pytest.approx(1)
    assert rate(1000, 1000) == pytest.approx(0.02)


def test_features_go_on_where_they_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    tower, images = Dinov2Model(config).eval(), image_processor()
    images.size = {"height": 28, "width": 28}
    drawn: list[int] = []

    def picture(row: int) -> Image.Image:
        drawn.append(row)
        return Image.new("RGB", (8, 8), (row * 20, 0, 0))

    first = np.array(cached_features(tmp_path, 5, picture, tower, images))
    assert first.shape == (5, 4, 8)
    assert drawn == [0, 1, 2, 3, 4]
    (tmp_path / "done").write_text("3")
    again = cached_features(tmp_path, 5, picture, tower, images)
    assert drawn[5:] == [3, 4]
    np.testing.assert_allclose(again, first, atol=1e-3)
    assert not np.array_equal(first[0], first[4])


def run(tokenizer, file: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    monkeypatch.setattr(build_mini_vlm, "BATCH_DRAWINGS", 2)
    monkeypatch.setattr(build_mini_vlm, "BATCH_SCENES", 2)
    answers = [{"naming": "red apple", "category": "food & drink"}, {"naming": "green pear", "kind": "fruit"}]
    pictures = Pictures([Drawn(file, {})] * 2, answers, 3)  # type: ignore[arg-type]
    features = np.random.default_rng(0).normal(size=(3, PATCHES, 16)).astype(np.float16)
    return Training(tiny(tokenizer), Talk(tokenizer), pictures, {"drawings": features, "scenes": features})


def test_a_resumed_training_is_the_uninterrupted_one(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tokenizer, tmp_path, monkeypatch)
    for _ in range(2):
        whole.run_step(10)
    whole.save(tmp_path / "state.pt")
    resumed = run(tokenizer, tmp_path, monkeypatch)
    resumed.load(tmp_path / "state.pt")
    losses = [training.run_step(10) for training in (whole, resumed)]
    assert losses[0] == losses[1]
    assert all(torch.equal(value, resumed.trained[name]) for name, value in whole.trained.items())
    assert all(torch.equal(value, resumed.average.values[name]) for name, value in whole.average.values.items())


def test_training_touches_no_vision_weight(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = run(tokenizer, tmp_path, monkeypatch)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.run_step(10)
    changed = {name for name, value in training.model.state_dict().items() if not torch.equal(value, before[name])}
    assert not {name for name in changed if "vision_tower" in name}
    assert {"model.multi_modal_projector.linear_1.weight", "lm_head.weight"} <= changed


def test_turns_of_a_picture_are_shuffled() -> None:
    pictures = Pictures([], [{"naming": "a", "category": "b", "kind": "c"}], 1)
    firsts = [pictures.drawing_turns(0, random.Random(seed))[0][1] for seed in range(60)]
    assert firsts.count("a") > 25
    assert {"b", "c"} <= set(firsts)


def test_answers_are_compared_without_case_and_full_stop() -> None:
    assert plain(" Red  Apple. ") == "red apple"
    rows = [{"texts": ["red apple"]}, {"texts": ["two", "2"]}, {"texts": ["x"]}]
    assert correct(rows, ["Red apple.", "2", "y"]).tolist() == [True, True, False]
    assert majority([{"texts": ["a"]}, {"texts": ["b"]}, {"texts": ["b"]}]) == pytest.approx(0.6667)


def test_the_committed_part_is_small_and_its_numbers_are_of_held_out_data() -> None:
    assert 0 < assets.TRAINED_VLM.stat().st_size <= 14_000_000
    result = read("mini_vlm")
    assert "twemoji" not in result["trained"]["drawings"]
    assert result["drawings"]["naming"]["n"] >= 1500
    assert all(result["slices"][name]["n"] >= 300 for name in ("counting", "reading", "position", "colour"))


@pytest.mark.real
def test_the_built_mini_vlm_is_the_measured_one() -> None:
    folder, data = built(assets.mini_vlm), assets.vqa("heldout")
    recorded = read("mini_vlm")["slices"]
    rows = [row for row in read_rows(data) if row["group"] == "colour"]
    hits = correct(rows, Answering(folder).answers(data, rows))
    # two near ties may fall the other way on another CPU
    assert hits.mean() == pytest.approx(recorded["colour"]["value"], abs=2.1 / len(rows))
