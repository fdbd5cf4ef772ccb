"""Trimmed tokenizers write what they keep as before, everything else in pieces, and nothing is impossible."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from mmcompress.errors import UsageError
from mmcompress.ops.vocabulary import closed, needed, size, trimmed


def document(model: dict[str, Any], **more: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    return {**whole, **more}


def special(index: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def words(made: dict[str, Any], text: str) -> list[str]:
    found: list[str] = Tokenizer.from_str(json.dumps(made)).encode(text).tokens
    return found


PIECES = ["[PAD]", "a", "##b", "##c", "abc", "ab", "##bc", "[UNK]", "[CLS]", "[SEP]"]


def wordpiece() -> dict[str, Any]:
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": numbered(PIECES)}  # fmt: skip
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [8], "tokens": ["[CLS]"]}},
    }
    added = [special(PIECES.index(name), name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")]
    padding = {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    return document(model, added_tokens=added, post_processor=template, padding=padding)


def test_wordpiece_keeps_characters_and_special_tokens() -> None:
    whole = wordpiece()
    assert size(whole) == 10
    assert needed(whole) == {0, 1, 2, 3, 7, 8, 9}
    kept = closed(whole, [5])
    assert kept == [0, 1, 2, 3, 5, 7, 8, 9]
    made = trimmed(whole, kept)
    assert words(whole, "abc") == ["[CLS]", "abc", "[PAD]", "[PAD]"]
    assert words(made, "abc") == ["[CLS]", "ab", "##c", "[PAD]"]
    encoded = Tokenizer.from_str(json.dumps(made)).encode("ab")
    assert encoded.ids == [6, 4, 0, 0]
    assert [token["id"] for token in made["added_tokens"]] == [0, 5, 6, 7]


def bpe() -> dict[str, Any]:
    merges = ["a b", "ab c", "c d", "ab cd", "b c", "a bc", "abcd d"]
    return document({
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "merges": merges,
        "vocab": numbered(["a", "b", "c", "d", "ab", "abc", "cd", "abcd", "bc", "abcdd"]),
    })  # fmt: skip


def test_bpe_keeps_what_a_token_is_merged_from() -> None:
    whole = bpe()
    assert needed(whole) == {0, 1, 2, 3}
    # abcd = ab + cd, which come of a + b and c + d
    assert closed(whole, [7]) == [0, 1, 2, 3, 4, 6, 7]
    assert closed(whole, [9]) == [0, 1, 2, 3, 4, 6, 7, 9]
    # abc is made by two rules; the first one counts: ab + c
    assert closed(whole, [5]) == [0, 1, 2, 3, 4, 5]
    made = trimmed(whole, closed(whole, [5]))
    assert made["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert words(made, "abc") == words(whole, "abc") == ["abc"]
    assert words(whole, "cd") == ["cd"]
    assert words(made, "cd") == ["c", "d"]


def test_merges_written_as_pairs_are_the_same() -> None:
    pairs = bpe()
    pairs["model"]["merges"] = [rule.split(" ") for rule in pairs["model"]["merges"]]
    assert trimmed(pairs, closed(pairs, [7])) == trimmed(bpe(), closed(bpe(), [7]))


def test_unigram_keeps_scores_and_its_unknown_token() -> None:
    entries = [["<pad>", 0.0], ["▁", -2.0], ["a", -3.0], ["▁ab", -1.0], ["<unk>", 0.0], ["b", -4.0], ["▁aab", -1.5]]
    model = {"type": "Unigram", "unk_id": 4, "byte_fallback": False, "vocab": entries}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    whole = document(model, pre_tokenizer=metaspace)
    kept = closed(whole, [6])
    assert kept == [1, 2, 4, 5, 6]
    made = trimmed(whole, kept)
    assert made["model"]["unk_id"] == 2
    assert made["model"]["vocab"] == [entries[index] for index in kept]
    assert words(whole, "aab ab") == ["▁aab", "▁ab"]
    assert words(made, "aab ab") == ["▁aab", "▁", "a", "b"]


def test_roberta_frames_are_renumbered() -> None:
    frame = {
        "type": "RobertaProcessing",
        "sep": ["</s>", 5],
        "cls": ["<s>", 4],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    whole = bpe()
    whole["post_processor"] = {"type": "Sequence", "processors": [frame]}
    made = trimmed(whole, [0, 1, 2, 3, 4, 5])
    assert made["post_processor"] == whole["post_processor"]
    moved = trimmed(whole, [0, 3, 4, 5])["post_processor"]["processors"][0]
    assert (moved["sep"], moved["cls"]) == (["</s>", 3], ["<s>", 2])
    assert frame["sep"] == ["</s>", 5]


def test_all_kept_is_the_same_tokenizer() -> None:
    for whole in (wordpiece(), document({**bpe()["model"], "merges": [["a", "b"]]})):
        assert trimmed(whole, range(size(whole))) == whole


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="the tokenizer is a Holistic"):
        closed(document({"type": "Holistic", "vocab": {}}), [])
