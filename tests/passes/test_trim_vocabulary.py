"""trim-vocabulary: texts of kept words are embedded as before, bit for bit; sizes, special ids and the tokenizer follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.manifest import Record
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.passes.base import Context
from mmcompress.passes.prune_units import read_ranges
from mmcompress.passes.trim_vocabulary import TrimVocabulary
from mmcompress.passes.trim_words import renumber, spoken_of, words_of
from mmcompress.recipe import Step
from tests import tiny

USED = [word for word in tiny.WORDS if word.isalpha()][:5]


def data(*texts: str) -> Dataset:
    return Dataset(Memory([Sample(str(number), (text,)) for number, text in enumerate(texts)]))


def run(family: str, texts: tuple[str, ...] = (" ".join(USED),), **params: Any) -> tuple[Bundle, Record]:
    bundle = tiny.bundle(family)
    stage = pipeline.Stage(1, Step("trim-vocabulary", params), passes.build("trim-vocabulary", params))
    return bundle, pipeline.run_stage(bundle, stage, Context(data=data(*texts), batch_size=2))


@pytest.mark.parametrize("family", ["clip", "dual_encoder_dinov2", "clap", "altclip"])
def test_texts_of_kept_words_are_embedded_as_before(family: str, tmp_path: Path) -> None:
    texts = [" ".join(USED), USED[0], f"{USED[2]} {USED[1]}"]
    original = tiny.bundle(family)
    wanted = original.encode("text", original.prepare("text", texts))
    bundle, record = run(family)
    assert torch.equal(bundle.encode("text", bundle.prepare("text", texts)), wanted)
    # five words and [PAD] [CLS] [UNK] [SEP]
    assert record.plan["after"] == 9 < record.plan["before"]
    assert record.facts["parameters"]["after"] * record.plan["before"] == record.facts["parameters"]["before"] * 9
    tower = bundle.tower("text")
    assert 9 in [
        bundle.module(path).num_embeddings
        for path in tower.embeddings
        if hasattr(bundle.module(path), "num_embeddings")
    ]
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert torch.equal(again.encode("text", again.prepare("text", texts)), wanted)
    alone = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert alone(texts[0])["input_ids"] == bundle.processor.tokenizer(texts[0])["input_ids"]


def test_other_words_become_unknown_or_pieces_but_no_text_is_impossible() -> None:
    bundle, _ = run("clip")
    other = next(word for word in tiny.WORDS if word not in USED)
    made = bundle.encode("text", bundle.prepare("text", [other]))
    assert made.isfinite().all()


def test_the_most_frequent_stay() -> None:
    texts = (f"{USED[0]} {USED[0]} {USED[1]}", f"{USED[0]} {USED[1]} {USED[2]}")
    bundle, record = run("clip", texts, minimum=2)
    assert record.plan["after"] == 4 + 2
    # [CLS] and [SEP] are counted as any other: they and one word are the three most frequent.
    bundle, record = run("clip", texts, tokens=3)
    vocabulary = bundle.processor.tokenizer.get_vocab()
    assert USED[0] in vocabulary
    assert USED[2] not in vocabulary


def test_nothing_asked_for_changes_nothing() -> None:
    bundle, record = run("clip", minimum=0)
    assert record.plan["after"] == record.plan["before"]
    assert bundle.processor is not None
    assert bundle.model.config.text_config.vocab_size == tiny.bundle("clip").model.config.text_config.vocab_size


def test_the_end_of_a_text_is_still_found(tmp_path: Path) -> None:
    """CLIP pools where the end token stands, which has another number now."""
    bundle, _ = run("clip")
    config = bundle.model.config.text_config
    tokenizer = bundle.processor.tokenizer
    assert config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(USED[0])["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert max(ids) < config.vocab_size


def test_special_tokens_that_move_are_said_to_everyone_who_knows_them() -> None:
    bundle = tiny.bundle("clip")
    config = bundle.model.config.text_config
    before = {name: value for name, value in vars(config).items() if name.endswith("_token_id")}
    assert before["eos_token_id"] == 3
    renumber(bundle, "text", {3: 7}, dict.fromkeys(range(9), 0), config.vocab_size)
    assert config.vocab_size == 9
    assert vars(config)["eos_token_id"] == 7
    assert all(vars(config)[name] == value for name, value in before.items() if value != 3)
    owners = [module for module in bundle.module("text_model").modules() if "eos_token_id" in vars(module)]
    assert owners
    assert all(module.eos_token_id == 7 for module in owners)


@pytest.mark.parametrize("family", ["clip", "dual_encoder_dinov2", "clap", "altclip"])
def test_short_texts_need_no_places_for_long_ones(family: str, tmp_path: Path) -> None:
    """The longest has five words; one of seven is cut, here as elsewhere, and was so by the table before."""
    texts = [" ".join(USED), USED[0]]
    original = tiny.bundle(family)
    wanted = original.encode("text", original.prepare("text", texts))
    bundle, record = run(family, (texts[1], texts[0], texts[1]), minimum=0, length=0)
    longest = original.prepare("text", texts)["input_ids"].shape[1]
    assert record.plan["length"]["after"] == longest < record.plan["length"]["before"]
    assert record.plan["after"] == record.plan["before"]
    assert torch.equal(bundle.encode("text", bundle.prepare("text", texts)), wanted)
    gone = sum(p.numel() for p in original.model.parameters()) - sum(p.numel() for p in bundle.model.parameters())
    cut, width = record.plan["length"]["before"] - longest, bundle.model.config.text_config.hidden_size
    assert gone == cut * width
    long = f"{texts[0]} {texts[0]}"
    assert bundle.prepare("text", [long])["input_ids"].shape[1] == longest
    assert bundle.encode("text", bundle.prepare("text", [long])).isfinite().all()
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert torch.equal(again.encode("text", again.prepare("text", texts)), wanted)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == longest
    plain = AutoModel.from_pretrained(tmp_path / "model")
    inputs = again.prepare("text", texts)
    # CLAP's are normalised there.
    rows = [plain.eval().get_text_features(**inputs).pooler_output, again.encode("text", inputs)]
    torch.testing.assert_close(*(torch.nn.functional.normalize(each, dim=-1) for each in rows))


def test_words_and_places_go_together() -> None:
    bundle, record = run("clip", length=9)
    assert record.plan["after"] == 9
    assert bundle.model.config.text_config.max_position_embeddings == 9
    texts, original = [USED[1]], tiny.bundle("clip")
    wanted = original.encode("text", original.prepare("text", texts))
    assert torch.equal(bundle.encode("text", bundle.prepare("text", texts)), wanted)


def test_random_keeps_as_many() -> None:
    made = TrimVocabulary()
    control = made.control()
    assert control is not None
    assert control.method == "random"
    assert control.control() is None
    _, chosen = run("clip")
    _, drawn = run("clip", method="random")
    assert drawn.plan["after"] == chosen.plan["after"]
    assert drawn.plan["kept"] != chosen.plan["kept"]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"minimum": -1}, "minimum is -1"), ({"tokens": 0}, "tokens is 0; expected at least 1")],
)
def test_bad_parameters(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrimVocabulary(**given)


def test_what_cannot_be_trimmed_is_refused() -> None:
    with pytest.raises(UsageError, match="do neither"):
        TrimVocabulary().check(tiny.bundle("layoutlm"))
    with pytest.raises(UsageError, match="no plain output layer of"):
        TrimVocabulary().check(tiny.bundle("blip"))
    with pytest.raises(UsageError, match="the vision tower reads no words"):
        TrimVocabulary(tower="vision").check(tiny.bundle("clip"))
    for family in ("siglip", "whisper"):
        with pytest.raises(UsageError, match="models has none that a short text leaves unread"):
            TrimVocabulary(length=0).check(tiny.bundle(family))
    for length in (2, 21):
        with pytest.raises(UsageError, match=f"length is {length}; expected 3 to 20 tokens for the text tower"):
            TrimVocabulary(length=length).check(tiny.bundle("clip"))
    with pytest.raises(UsageError, match="length is -1"):
        TrimVocabulary(length=-1)
    with pytest.raises(UsageError, match="no sample of the data has a text"):
        TrimVocabulary().plan(
            tiny.bundle("clip"), Context(data=Dataset(Memory([Sample("1", picture=tiny.images(1)[0])])))
        )


def test_a_quantized_table_is_refused() -> None:
    bundle = tiny.bundle("clip")
    params = {"scheme": "W8A16"}
    pipeline.run_stage(bundle, pipeline.Stage(1, Step("quantize", params), passes.build("quantize", params)), Context())
    with pytest.raises(UsageError) as refused:
        TrimVocabulary().check(bundle)
    assert refused.value.hint == "put trim-vocabulary before quantize"


WRITING = ("llava_clip", "qwen2_vl", "smolvlm", "paligemma", "whisper")


def written(family: str, **params: Any) -> tuple[Bundle, Bundle, Record]:
    """Return a model that writes, the same trimmed to what 6 samples use, and what is recorded of that."""
    before, after = tiny.bundle(family), tiny.bundle(family)
    stage = pipeline.Stage(1, Step("trim-vocabulary", params), passes.build("trim-vocabulary", params))
    return before, after, pipeline.run_stage(after, stage, Context(data=tiny.data(family, 6), batch_size=2))


def probabilities(bundle: Bundle, family: str) -> torch.Tensor:
    """Return (B * T, V) of the answers of what the model was trimmed to."""
    tower = bundle.forced.answering
    items = [bundle.items(tower, sample)[0] for sample in tiny.data(family, 6)]
    inputs = bundle.prepare(tower, items)
    places = bundle.forced.next_tokens(bundle.model, inputs)
    with torch.no_grad():
        roots = bundle.encode(tower, inputs).double()
    return roots.unflatten(1, (places.shape[1], -1))[places >= 0].square()


@pytest.mark.parametrize("family", WRITING)
def test_what_can_still_be_written_is_as_likely_as_before_among_itself(family: str, tmp_path: Path) -> None:
    before, after, record = written(family)
    kept = read_ranges(record.plan["kept"])
    assert len(kept) == record.plan["after"] < record.plan["before"]
    wanted = probabilities(before, family)[:, kept]
    wanted /= wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(probabilities(after, family), wanted, rtol=1e-5, atol=1e-7)
    words = words_of(after)
    assert words.tied == words_of(before).tied
    assert {rows.shape[0] for rows in words.rows(after).values()} == {len(kept)}
    checkpoint.save(after, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert torch.equal(probabilities(again, family), probabilities(after, family))
    samples = list(tiny.data(family, 3))
    assert again.generate(samples) == after.generate(samples)
    assert again.model.generation_config.eos_token_id == after.model.generation_config.eos_token_id


def test_settings_for_writing_follow() -> None:
    bundle = tiny.bundle("whisper")
    settings, special = bundle.model.generation_config, {3: 1, 5: 4}
    settings.eos_token_id, settings.pad_token_id = [3, 5], 3
    settings.suppress_tokens, settings.begin_suppress_tokens = [2, 5, 9], [9]
    settings.lang_to_id, settings.forced_decoder_ids = {"<|en|>": 5}, [[1, 5], [2, None]]
    assert spoken_of(bundle) >= {3, 5}
    renumber(bundle, "decoder", special, {3: 1, 5: 4, 9: 6}, bundle.model.config.vocab_size)
    assert (settings.eos_token_id, settings.pad_token_id) == ([1, 4], 1)
    assert (settings.suppress_tokens, settings.begin_suppress_tokens) == ([4, 6], [6])
    assert (settings.lang_to_id, settings.forced_decoder_ids) == ({"<|en|>": 4}, [[1, 4], [2, None]])


def test_plain_transformers_writes_the_same(tmp_path: Path) -> None:
    _, bundle, _ = written("llava_clip")
    assert checkpoint.save(bundle, tmp_path / "model").plain_transformers
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    inputs = bundle.prepare("language", [bundle.items("language", tiny.data("llava_clip", 1)[0])[0]])
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, bundle.model(**ids).logits)
    assert model.config.text_config.vocab_size == model.lm_head.out_features


def test_exported_it_answers_the_same(tmp_path: Path) -> None:
    _, bundle, _ = written("whisper")
    samples = list(tiny.data("whisper", 3))
    answerer = artifact_answerer(export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact, "onnxruntime", threads=1)
    assert answerer.generate(samples) == bundle.generate(samples)
    answerer.close()
