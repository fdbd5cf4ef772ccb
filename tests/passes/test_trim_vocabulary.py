"""trim-vocabulary: texts of kept words are embedded as before, bit for bit; sizes, special ids and the tokenizer follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.manifest import Record
from mmcompress.passes.base import Context
from mmcompress.passes.trim_vocabulary import TrimVocabulary, renumber
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
    renumber(bundle, "text", {3: 7}, 9)
    assert config.vocab_size == 9
    assert vars(config)["eos_token_id"] == 7
    assert all(vars(config)[name] == value for name, value in before.items() if value != 3)
    owners = [module for module in bundle.module("text_model").modules() if "eos_token_id" in vars(module)]
    assert owners
    assert all(module.eos_token_id == 7 for module in owners)


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
    ("given", "message"), [({"minimum": -1}, "minimum is -1"), ({"tokens": 0}, "tokens is 0; expected at least 1")]
)
def test_bad_parameters(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrimVocabulary(**given)


def test_what_cannot_be_trimmed_is_refused() -> None:
    with pytest.raises(UsageError, match="whisper models are none"):
        TrimVocabulary().check(tiny.bundle("whisper"))
    with pytest.raises(UsageError, match="the vision tower reads no words"):
        TrimVocabulary(tower="vision").check(tiny.bundle("clip"))
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
