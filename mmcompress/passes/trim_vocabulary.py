"""trim-vocabulary: the rows of a word table, and the tokens of its tokenizer, that the data's texts do not use go.

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

    def control(self, decisions: Mapping[str, Any] | None = None) -> TrimVocabulary | None:
        """Return the pass that keeps as many tokens, drawn at random."""
        return None if self.method == "random" else dataclasses.replace(self, method="random")

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Texts are written once, which is next to nothing."""
        return work.dataset * 1e-3

    def check(self, bundle: Bundle) -> None:
        """Refuse models without a tower of words, and tables and output layers that are no plain floats."""
        words_of(bundle, self.tower)
        if bundle.processor.tokenizer is not None:
            vocabulary.tokens_of(document_of(bundle.processor))

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Count the tokens of the data's texts; return those that stay."""
        words = words_of(bundle, self.tower)
        if self.minimum == 0:
            return Plan({"before": words.size, "after": words.size, "kept": "", "special": []})
        document = document_of(bundle.processor)
        counts, texts = _counts(bundle, words.tower, context, words.size)
        frequent = counts.argsort(descending=True, stable=True)
        used = [int(index) for index in frequent if counts[index] >= self.minimum][: self.tokens]
        named = {*vocabulary.added(document), *spoken_of(bundle)}
        special = sorted(index for index in named if 0 <= index < words.size)
        kept = vocabulary.closed(document, [*special, *used])
        if self.method == "random":
            kept = _drawn(document, special, len(kept), context.seed)
        # A table may have more rows than the tokenizer has tokens.
        tokens = sum(index < vocabulary.size(document) for index in kept)
        decisions = {"before": words.size, "after": len(kept), "kept": write_ranges(kept), "special": special}
        decisions["tokens"] = tokens
        before = sum(tensor.numel() for tensor in words.rows(bundle).values())
        tensors = {name: rows.detach()[kept] for name, rows in words.rows(bundle).items()}
        facts = {
            "texts": texts,
            "used": int((counts > 0).sum()),
            "parameters": {"before": before, "after": before // words.size * len(kept)},
        }
        return Plan(decisions, tensors, facts)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Cut table and output layer and, where there still is one of the old size, the tokenizer."""
        kept = read_ranges(plan.decisions["kept"])
        if not kept:
            return
        words = words_of(bundle, self.tower)
        new = {old: place for place, old in enumerate(kept)}
        words.cut(bundle, new, plan.tensors)
        renumber(bundle, words.tower, {index: new[index] for index in plan.decisions["special"]}, new, words.size)
        tokenizer = bundle.processor.tokenizer
        if tokenizer is not None and vocabulary.size(document_of(bundle.processor)) != plan.decisions["tokens"]:
            bundle.processor = with_document(bundle.processor, vocabulary.trimmed(document_of(bundle.processor), kept))

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune nothing."""
        return {}


def _counts(bundle: Bundle, tower: str, context: Context, size: int) -> tuple[Tensor, int]:
    """Return how often each token stands in the data's texts (V,), and how many texts there are."""
    counts, texts = torch.zeros(size, dtype=torch.int64), 0
    data = context.require_data("trim-vocabulary")
    starts = range(0, len(data), context.batch_size)
    for start in track(starts, context.progress, "counting tokens", len(starts)):
        samples = (data[number] for number in range(start, min(start + context.batch_size, len(data))))
        items = [item for sample in samples for item in bundle.items(tower, sample)]
        texts += len(items)
        for ids in _ids(bundle.prepare(tower, items)) if items else ():
            counts += torch.bincount(ids[(ids >= 0) & (ids < size)].cpu(), minlength=size)
    if not texts:
        raise UsageError(
            "no sample of the data has a text", hint="give data whose texts speak of what will be asked for"
        )
    return counts, texts


def _ids(inputs: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield the tokens (T,) that inputs hold, without padding."""
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_mask")):
        if ids in inputs:
            yield inputs[ids][inputs[mask].bool()] if mask in inputs else inputs[ids].flatten()


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
