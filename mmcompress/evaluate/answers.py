"""From a dataset to answers in text, batch by batch: what every task of a generating model starts from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mmcompress.bundle import Bundle, DualEncoder, Generator, TeacherForced
from mmcompress.data import Dataset, Sample, batches
from mmcompress.data.sample import Stored
from mmcompress.errors import UsageError
from mmcompress.evaluate.embed import Embedder
from mmcompress.evaluate.words import Wording, language_code
from mmcompress.progress import Progress, Silent, track

Need = Literal["embeddings", "answers", "likelihoods"]
SPELLINGS = "normalizer.json"
RATE = 16_000
"""What speech models listen at: fine enough for the length of a recording, which is all that silence has."""


@runtime_checkable
class Answering(Protocol):
    """Whatever answers samples in text: a model that transcribes or captions."""

    def generate(self, samples: Sequence[Sample]) -> list[str]:
        """Return one answer a sample; the same every time."""


Model = Embedder | Answering
"""What can be evaluated. A Bundle is either, as its family has it."""


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says to N samples, as it says it."""

    texts: tuple[str, ...]
    """The N answers."""
    references: tuple[tuple[str, ...], ...]
    """What the data accepts of each sample, () where that was not asked for."""
    wording: Wording
    """How words are told apart in both."""
    shared: tuple[int, ...] = ()
    """For each sample the first one with the same picture; () where every sample has its own."""
    tokenise: Callable[[str], list[int]] | None = None
    """Cuts an answer into the model's tokens; None where the model has no tokenizer, and for answers read from disk."""

    @property
    def owners(self) -> NDArray[np.int64]:
        """Return (N,): questions about one picture are not independent."""
        return np.array(self.shared or range(len(self.texts)), dtype=np.int64)

    @cached_property
    def words(self) -> list[list[str]]:
        """The normalised words of each answer."""
        return [self.wording.words(text) for text in self.texts]

    @cached_property
    def reference_words(self) -> list[list[str]]:
        """The normalised words of each sample's first reference."""
        return [self.wording.words(accepted[0]) for accepted in self.references]

    @cached_property
    def accepted_words(self) -> list[list[list[str]]]:
        """The normalised words of all references of each sample."""
        return [[self.wording.words(text) for text in accepted] for accepted in self.references]


def abilities(model: Model) -> frozenset[Need]:
    """Return what `model` can give."""
    if isinstance(model, Bundle):
        # A bundle has every method; what they do is its family's matter.
        embeds, generates = isinstance(model.family, DualEncoder), isinstance(model.family, Generator)
        reads = generates and isinstance(model.family, TeacherForced)
    else:
        embeds, generates, reads = isinstance(model, Embedder), isinstance(model, Answering), False
    needs: tuple[tuple[Need, bool], ...] = (("embeddings", embeds), ("answers", generates), ("likelihoods", reads))
    return frozenset(need for need, given in needs if given)


def wording_of(model: Model, language: str | None = None) -> Wording:
    """Return how the words of `model` are told apart, with its tokenizer's spellings.

    `language` is by default the one in the model's generation config, else English. Raises UsageError for a language that is
    neither a code of two or three letters nor a name Whisper knows.
    """
    named = (language or _own_language(model) or "en").lower()
    code = language_code(named)
    if not (code.isascii() and code.isalpha() and len(code) in (2, 3)):
        raise UsageError(
            f"'{named}' is not a language code", hint="use its letters in ISO 639, such as en, de, zh, yue"
        )
    return Wording(code, _spelling(model))


def _own_language(model: Model) -> str | None:
    settings = getattr(getattr(model, "model", None), "generation_config", None)
    return getattr(settings, "language", None)


def _spelling(model: Model) -> dict[str, str]:
    """The table of normalizer.json: from the file, because not every tokenizer class reads it."""
    processor = getattr(model, "processor", None)  # of a bundle or of an exported model
    if processor is None:
        return {}
    stored = processor.files.get(SPELLINGS)
    if stored is None:
        return getattr(processor.tokenizer, "english_spelling_normalizer", None) or {}
    try:
        found = json.loads(stored)
    except ValueError as error:
        raise UsageError(f"{SPELLINGS} is not JSON: {error}", hint="fetch the model again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{SPELLINGS} holds no table of spellings", hint="fetch the model again")
    return {str(word): str(other) for word, other in found.items()}


def answer_dataset(
    model: Answering,
    dataset: Dataset,
    wording: Wording,
    batch: int = 32,
    progress: Progress | None = None,
    with_references: bool = True,
) -> Answers:
    """Let `model` answer every sample of `dataset`, `batch` at a time.

    Raises ValueError when the model returns something else than one text a sample.
    """
    texts: list[str] = []
    references: list[tuple[str, ...]] = []
    first: dict[object, int] = {}
    shared: list[int] = []
    total = -(-len(dataset) // batch)
    for samples in track(batches(dataset, batch), progress or Silent(), "answering", total):
        for place, sample in enumerate(samples, start=len(texts)):
            shared.append(place if not sample.shown else first.setdefault(picture_of(sample), place))
        texts += answer(model, samples)
        references += [sample.texts for sample in samples] if with_references else []
    own = shared == list(range(len(shared)))
    return Answers(tuple(texts), tuple(references), wording, () if own else tuple(shared), _tokeniser(model))


def _tokeniser(model: Answering) -> Callable[[str], list[int]] | None:
    tokenizer = model.processor.tokenizer if isinstance(model, Bundle) else None
    if tokenizer is None:
        return None
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def picture_of(sample: Sample) -> object:
    """Return what is equal for samples that show the same: where it is stored, or the very pictures."""
    frames = sample.video.frames if sample.video else ()
    found = tuple(item if isinstance(item, Stored) else id(item) for item in (*sample.pictures, None, *frames))
    return found[0] if len(found) == 2 else found


def answer(model: Answering, samples: Sequence[Sample]) -> list[str]:
    """Return the model's answers to `samples`. Raises ValueError when they are not one text each."""
    found = list(model.generate(samples))
    if len(found) != len(samples) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"the model returned {len(found)} answers to {len(samples)} samples, expected one text each")
    return found
