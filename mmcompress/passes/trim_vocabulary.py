"""trim-vocabulary: the rows of a word table, and the tokens of its tokenizer, that the data's texts do not use go.

Where asked (`length`), so do the rows of the table of places that no text is long enough for: shorter texts are as before, bit for
bit.

In a small embedder or language model the word table is much of the weights, and most of its words never come up in one field. Texts
of kept tokens are embedded as before, bit for bit. Other words are written in pieces that stay (single characters always do), so no
text becomes impossible, but the embedding of words that are gone is worse: take texts that speak of all that will be asked for.

A model that writes loses the same rows of its output layer: what it can still write has the probabilities it had, divided by their
sum. That layer is multiplied for every token, so writing becomes faster; a table alone is looked up, which takes no time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops import vocabulary
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.prune_units import read_ranges, write_ranges
from mmcompress.passes.trim_length import places, require_length, shorten, shortened
from mmcompress.passes.trim_words import renumber, spoken_of, words_of
from mmcompress.progress import track
from mmcompress.tokenizer import document_of, with_document


@dataclass(frozen=True)
class TrimVocabulary:
    """Remove the words that the data's texts do not use, from the tokenizer, the word table and the output layer.

    Texts of the words that stay are read as before; others in smaller pieces. Plain transformers loads the result.
    """

    name: ClassVar[str] = "trim-vocabulary"

    minimum: int = 1
    """How often a token has to occur in the data's texts to stay; 0 changes nothing."""
    tokens: int | None = None
    """At most so many tokens stay, the most frequent ones, besides those that no text can do without."""
    length: int | None = None
    """The most tokens a text may have afterwards, where places have a table: its other rows go; 0: as many as the data's longest
    text has. Longer texts are cut, as they are now at the model's own limit."""
    tower: str = ""
    """The tower whose words go; empty: the one that reads or writes texts."""
    method: Literal["used", "random"] = "used"
    """Which stay: those that are used; random is the control: as many, drawn at random."""

    def __post_init__(self) -> None:
        if self.minimum < 0:
            raise UsageError(
                f"trim-vocabulary.minimum is {self.minimum}; expected 0 or more", hint="1 keeps all that is used"
            )
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(
                f"trim-vocabulary.tokens is {self.tokens}; expected at least 1", hint="leave it out for all"
            )
        if self.length is not None and self.length < 0:
            raise UsageError(
                f"trim-vocabulary.length is {self.length}; expected a number of tokens, or 0",
                hint="0 means the longest text of the data",
            )

    def control(self, decisions: Mapping[str, Any] | None = None) -> TrimVocabulary | None:
        """Return the pass that keeps as many tokens, drawn at random."""
        return None if self.method == "random" else dataclasses.replace(self, method="random")

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Texts are written once, which is next to nothing."""
        return work.dataset * 1e-3

    def check(self, bundle: Bundle) -> None:
        """Refuse models without a tower of words, and tables and output layers that are no plain floats."""
        words = words_of(bundle, self.tower)
        if self.length is not None:
            require_length(bundle, words.tower, self.length)
        if bundle.processor.tokenizer is not None:
            vocabulary.tokens_of(document_of(bundle.processor))

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Count the tokens of the data's texts; return those that stay."""
        words = words_of(bundle, self.tower)
        seen = Seen(words.size)
        if self.minimum or self.length == 0:
            seen = _read(bundle, words.tower, context, words.size)
        decisions: dict[str, Any] = {"before": words.size, "after": words.size, "kept": "", "special": []}
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        if self.minimum:
            kept, special = self._kept(bundle, seen, context.seed)
            # A table may have more rows than the tokenizer has tokens.
            tokens = sum(index < vocabulary.size(document_of(bundle.processor)) for index in kept)
            decisions |= {"after": len(kept), "kept": write_ranges(kept), "special": special, "tokens": tokens}
            rows = words.rows(bundle)
            before = sum(tensor.numel() for tensor in rows.values())
            tensors |= {name: tensor.detach()[kept] for name, tensor in rows.items()}
            facts = {
                "texts": seen.texts,
                "used": int((seen.counts > 0).sum()),
                "parameters": {"before": before, "after": before // words.size * len(kept)},
            }
        if self.length is not None:
            length = self.length or seen.longest
            decisions["length"] = {"before": places(bundle, words.tower), "after": length}
            tensors |= shortened(bundle, words.tower, length)
        return Plan(decisions, tensors, facts)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Cut tables and output layer and, where there still is one of the old size, the tokenizer."""
        words, kept = words_of(bundle, self.tower), read_ranges(plan.decisions["kept"])
        if kept:
            new = {old: place for place, old in enumerate(kept)}
            words.cut(bundle, new, plan.tensors)
            renumber(bundle, words.tower, {index: new[index] for index in plan.decisions["special"]}, new, words.size)
            document = document_of(bundle.processor) if bundle.processor.tokenizer is not None else None
            if document is not None and vocabulary.size(document) != plan.decisions["tokens"]:
                bundle.processor = with_document(bundle.processor, vocabulary.trimmed(document, kept))
        if "length" in plan.decisions:
            shorten(bundle, words.tower, plan.decisions["length"]["after"], plan.tensors)

    def _kept(self, bundle: Bundle, seen: Seen, seed: int) -> tuple[list[int], list[int]]:
        """Return the tokens that stay, and those that no text can do without."""
        document = document_of(bundle.processor)
        frequent = seen.counts.argsort(descending=True, stable=True)
        used = [int(index) for index in frequent if seen.counts[index] >= self.minimum][: self.tokens]
        named = {*vocabulary.added(document), *spoken_of(bundle)}
        special = sorted(index for index in named if 0 <= index < len(seen.counts))
        kept = vocabulary.closed(document, [*special, *used])
        return (_drawn(document, special, len(kept), seed) if self.method == "random" else kept), special

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune nothing."""
        return {}


class Seen:
    """What the data's texts have."""

    def __init__(self, size: int) -> None:
        self.counts = torch.zeros(size, dtype=torch.int64)
        """(V,) how often each token stands in them."""
        self.texts = 0
        self.longest = 0
        """Tokens of the longest, special ones too."""

    def add(self, inputs: Mapping[str, Tensor]) -> None:
        """Add the texts that inputs hold."""
        size = len(self.counts)
        for rows in _ids(inputs):
            for ids in rows:
                self.longest = max(self.longest, len(ids))
                self.counts += torch.bincount(ids[(ids >= 0) & (ids < size)].cpu(), minlength=size)


def _read(bundle: Bundle, tower: str, context: Context, size: int) -> Seen:
    """Return what the data's texts have. Raises UsageError where there are none."""
    seen = Seen(size)
    data = context.require_data("trim-vocabulary")
    starts = range(0, len(data), context.batch_size)
    for start in track(starts, context.progress, "counting tokens", len(starts)):
        samples = (data[number] for number in range(start, min(start + context.batch_size, len(data))))
        items = [item for sample in samples for item in bundle.items(tower, sample)]
        seen.texts += len(items)
        if items:
            seen.add(bundle.prepare(tower, items))
    if not seen.texts:
        raise UsageError(
            "no sample of the data has a text", hint="give data whose texts speak of what will be asked for"
        )
    return seen


def _ids(inputs: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Yield each text's tokens (T,), without padding."""
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_mask")):
        if ids in inputs:
            shown = inputs[mask].bool() if mask in inputs else torch.ones_like(inputs[ids], dtype=torch.bool)
            yield [row[there] for row, there in zip(inputs[ids], shown, strict=True)]


def _drawn(document: vocabulary.Document, special: Sequence[int], size: int, seed: int) -> list[int]:
    """Return `size` tokens that are closed, of random ones; a few less where the last brings others along."""
    order = torch.randperm(vocabulary.size(document), generator=torch.Generator().manual_seed(seed)).tolist()
    known = {*vocabulary.tokens_of(document).values(), *vocabulary.added(document)}
    order = [*special, *(index for index in order if index in known)]
    low, high = len(special), len(order)
    while low < high:  # the most of them that stay within the size
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(vocabulary.closed(document, order[:middle])) <= size else (low, middle - 1)
    return vocabulary.closed(document, order[:low])
