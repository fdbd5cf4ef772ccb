"""Which tokens a tokenizer cannot do without, and the same tokenizer without the others.

A tokenizer is the document that `tokenizers` writes (tokenizer.json). What stays is closed, so that every text can still be written
and what was kept can still be reached:

- WordPiece: single characters, alone and continuing a word (longer pieces are found greedily, longest first);
- BPE: single characters or bytes, and both parts of each merge that leads to a token that stays (Sennrich et al. 2016, 3.2);
- Unigram: single characters, and bytes where it falls back to them (Kudo 2018, 3.2);
- all: the unknown token, and whatever was added to the model's own tokens ([CLS], <|endoftext|>, …).

Those that stay keep their order, so that what counted as the last token still is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mmcompress.errors import UsageError

Document = dict[str, Any]
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
MODELS = ("WordPiece", "WordLevel", "BPE", "Unigram")


def size(document: Document) -> int:
    """Return one more than the largest id."""
    return max(*tokens_of(document).values(), *added(document)) + 1


def tokens_of(document: Document) -> dict[str, int]:
    """Return the model's own tokens with their ids. Raises UsageError for a kind of model that is not known here."""
    model = document["model"]
    kind = model.get("type")
    if kind not in MODELS:
        raise UsageError(
            f"the tokenizer is a {kind}; its vocabulary cannot be trimmed", hint="known: " + ", ".join(MODELS)
        )
    if kind == "Unigram":
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    found: dict[str, int] = model["vocab"]
    return found


def added(document: Document) -> dict[int, str]:
    """Return what was added to the model's own tokens, by id."""
    return {token["id"]: token["content"] for token in document.get("added_tokens") or ()}


def needed(document: Document) -> set[int]:
    """Return the ids without which some text could not be written, or the model would miss what it is told."""
    model, tokens = document["model"], tokens_of(document)
    kept = set(added(document))
    if model.get("unk_token") in tokens:
        kept.add(tokens[model["unk_token"]])
    if model.get("unk_id") is not None:
        kept.add(model["unk_id"])
    if model["type"] != "WordLevel":
        prefix = (model.get("continuing_subword_prefix") or "") if model["type"] != "Unigram" else "▁"
        suffix = model.get("end_of_word_suffix") or ""
        for token, index in tokens.items():
            bare = token.removeprefix(prefix).removesuffix(suffix) if prefix != token else token
            if len(bare) <= 1 or BYTE.fullmatch(token):
                kept.add(index)
    return kept


def closed(document: Document, wanted: Iterable[int]) -> list[int]:
    """Return `wanted` and all that has to stay with it, ascending."""
    kept = needed(document) | set(wanted)
    if document["model"]["type"] == "BPE":
        tokens = tokens_of(document)
        parts = {
            tokens[first + _bare(document, second)]: (tokens[first], tokens[second])
            for first, second in reversed(_merges(document))
            if first + _bare(document, second) in tokens
        }
        todo = list(kept)
        while todo:
            for part in parts.get(todo.pop(), ()):
                if part not in kept:
                    kept.add(part)
                    todo.append(part)
    return sorted(kept)


def trimmed(document: Document, kept: Sequence[int]) -> Document:
    """Return the tokenizer whose tokens are `kept` (closed, ascending), numbered from 0 in that order."""
    made = copy.deepcopy(document)
    model = made["model"]
    new = {old: place for place, old in enumerate(kept)}
    tokens = tokens_of(document)
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[index] for token, index in tokens.items() if index in new}
    if model["type"] == "BPE":
        left = model["vocab"]
        model["merges"] = [
            [first, second]
            for first, second in _merges(document)
            if first in left and second in left and first + _bare(document, second) in left
        ]
    for token in made.get("added_tokens") or ():
        token["id"] = new[token["id"]]
    if made.get("padding"):
        made["padding"]["pad_id"] = new[made["padding"]["pad_id"]]
    _renumber(made.get("post_processor"), new)
    return made


def _merges(document: Document) -> list[tuple[str, str]]:
    """Return the rules of BPE, the first one first: written as pairs, or by older versions as one text."""
    rules = document["model"]["merges"]
    pairs = [rule.split(" ", 1) if isinstance(rule, str) else rule for rule in rules]
    return [(first, second) for first, second in pairs]


def _bare(document: Document, token: str) -> str:
    """Return what the second part of a merge adds to the first."""
    return token.removeprefix(document["model"].get("continuing_subword_prefix") or "")


def _renumber(part: Any, new: dict[int, int]) -> None:
    """Change the ids in a post-processor, in place: a template's, those of BERT's and RoBERTa's, or several one after the other."""
    if not part:
        return
    for inner in part.get("processors", ()):
        _renumber(inner, new)
    for special in (part.get("special_tokens") or {}).values():
        special["ids"] = [new[index] for index in special["ids"]]
    for name in ("sep", "cls"):
        if name in part:
            content, index = part[name]
            part[name] = [content, new[index]]
