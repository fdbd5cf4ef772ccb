"""trim-vocabulary: the rows of a text tower's word table, and the tokens of its tokenizer, that the data's texts do not use go.

In a small embedder the word table is most of the weights, and most of its words never come up in one field. Texts of kept tokens
are embedded as before, bit for bit. Other words are written in pieces that stay (single characters always do), so no text becomes
impossible, but the embedding of words that are gone is worse: take texts that speak of all that will be asked for. Arithmetic
becomes no faster: a table is looked up, not multiplied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle, DualEncoder
from mmcompress.errors import UsageError
from mmcompress.ops import vocabulary
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.prune_units import read_ranges, write_ranges
from mmcompress.progress import track
from mmcompress.tokenizer import document_of, with_document
from mmcompress.views import Tower


@dataclass(frozen=True)
class TrimVocabulary:
    """Remove the words of a text tower that the data's texts do not use, from the tokenizer and the word table.

    Texts of the words that stay are embedded as before; others in smaller pieces. Plain transformers loads the result.
    """

    name: ClassVar[str] = "trim-vocabulary"

    minimum: int = 1
    """How often a token has to occur in the data's texts to stay; 0 changes nothing."""
    tokens: int | None = None
    """At most so many tokens stay, the most frequent ones, besides those that no text can do without."""
    tower: str = "text"
    """The tower whose words go."""
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
        """Refuse models without a text tower of their own, and tables that are no plain floats."""
        if not isinstance(bundle.family, DualEncoder):
            raise UsageError(
                f"trim-vocabulary is for the text towers of dual encoders; {bundle.family.name} models are none",
                hint="mmc quantize stores the word tables of other models in 8 bits",
            )
        _word_table(bundle, self.tower)
        if bundle.processor.tokenizer is not None:
            vocabulary.tokens_of(document_of(bundle.processor))

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Count the tokens of the data's texts; return those that stay."""
        path, table = _word_table(bundle, self.tower)
        if self.minimum == 0:
            return Plan({"before": table.num_embeddings, "after": table.num_embeddings, "kept": "", "special": []})
        document = document_of(bundle.processor)
        counts = _counts(bundle, self.tower, context, table.num_embeddings)
        frequent = counts.argsort(descending=True, stable=True)
        used = [int(index) for index in frequent if counts[index] >= self.minimum][: self.tokens]
        kept = vocabulary.closed(document, used)
        if self.method == "random":
            kept = _drawn(document, len(kept), context.seed)
        special = [index for index in vocabulary.added(document) if index < table.num_embeddings]
        decisions = {"before": table.num_embeddings, "after": len(kept), "kept": write_ranges(kept), "special": special}
        rows = torch.tensor(kept, device=table.weight.device)
        facts = {
            "texts": sum(1 for _ in _texts(bundle, self.tower, context)),
            "used": int((counts > 0).sum()),
            "parameters": {"before": table.weight.numel(), "after": len(kept) * table.embedding_dim},
        }
        return Plan(decisions, {f"{path}.weight": table.weight.detach()[rows]}, facts)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Cut the table and, where there still is one of the old size, the tokenizer."""
        kept = read_ranges(plan.decisions["kept"])
        if not kept:
            return
        path, table = _word_table(bundle, self.tower)
        new = {old: place for place, old in enumerate(kept)}
        padding = table.padding_idx
        made = nn.Embedding(
            len(kept), table.embedding_dim, new.get(padding) if padding is not None else None,
            device=table.weight.device, dtype=table.weight.dtype,
        )  # fmt: skip
        rows = plan.tensors.get(f"{path}.weight")
        if rows is not None:
            made.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
        made.train(table.training)
        bundle.replace(path, made)
        renumber(bundle, self.tower, {index: new[index] for index in plan.decisions["special"]}, len(kept))
        tokenizer = bundle.processor.tokenizer
        if tokenizer is not None and vocabulary.size(document_of(bundle.processor)) > len(kept):
            bundle.processor = with_document(bundle.processor, vocabulary.trimmed(document_of(bundle.processor), kept))

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune nothing."""
        return {}


def _word_table(bundle: Bundle, name: str) -> tuple[str, nn.Embedding]:
    """Return the text tower's word table and its path. Raises UsageError where there is none that can be cut."""
    tower = bundle.tower(name)
    size = getattr(_config(bundle, tower), "vocab_size", None)
    if size is None:
        raise UsageError(f"the {name} tower reads no words", hint="name the tower that does with --tower")
    tables = {path: bundle.module(path) for path in tower.embeddings}
    for path, table in tables.items():
        if type(table) is nn.Embedding and table.num_embeddings == size:
            return path, table
    names = ", ".join(f"{path} is a {type(table).__name__}" for path, table in tables.items())
    raise UsageError(
        f"the {name} tower has no plain table of {size} words: {names or 'it has no tables'}",
        hint="put trim-vocabulary before quantize",
    )


def _config(bundle: Bundle, tower: Tower) -> Any:
    return attrgetter(tower.config)(bundle.model.config) if tower.config else bundle.model.config


def _texts(bundle: Bundle, tower: str, context: Context) -> Iterator[str]:
    for sample in context.require_data("trim-vocabulary"):
        yield from bundle.items(tower, sample)


def _counts(bundle: Bundle, tower: str, context: Context, size: int) -> Tensor:
    """Return how often each token stands in the data's texts (V,)."""
    counts = torch.zeros(size, dtype=torch.int64)
    texts = list(_texts(bundle, tower, context))
    if not texts:
        raise UsageError(
            "no sample of the data has a text", hint="give data whose texts speak of what will be asked for"
        )
    starts = range(0, len(texts), context.batch_size)
    for start in track(starts, context.progress, "counting tokens", len(starts)):
        inputs = bundle.prepare(tower, texts[start : start + context.batch_size])
        mask = inputs.get("attention_mask")
        ids = inputs["input_ids"] if mask is None else inputs["input_ids"][mask.bool()]
        counts += torch.bincount(ids.flatten().cpu(), minlength=size)
    return counts


def _drawn(document: vocabulary.Document, size: int, seed: int) -> list[int]:
    """Return `size` tokens that are closed, of random ones; a few less where the last brings others along."""
    order = torch.randperm(vocabulary.size(document), generator=torch.Generator().manual_seed(seed)).tolist()
    known = {*vocabulary.tokens_of(document).values(), *vocabulary.added(document)}
    order = [index for index in order if index in known]
    low, high = 0, len(order)
    while low < high:  # the most of them that stay within the size
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(vocabulary.closed(document, order[:middle])) <= size else (low, middle - 1)
    return vocabulary.closed(document, order[:low])


def renumber(bundle: Bundle, name: str, special: Mapping[int, int], size: int) -> None:
    """Say in the tower's modules and configs how many tokens there are, and which ids the special ones have now."""
    tower = bundle.tower(name)
    config = _config(bundle, tower)
    config.vocab_size = size
    owners: Sequence[Any] = [config, *bundle.module(tower.path).modules()]
    for owner in owners:
        for key, value in list(vars(owner).items()):
            means_one = key.endswith("_token_id") or key == "padding_idx"
            if means_one and isinstance(value, int) and value in special and not isinstance(owner, nn.Embedding):
                setattr(owner, key, special[value])
