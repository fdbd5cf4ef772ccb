"""Answers as words, and how many edits lie between two of them.

The word error rate counts the fewest substitutions, deletions and insertions that turn the reference into the answer
(Levenshtein 1966), after both went through the text normaliser of Whisper (Radford et al. 2022, appendix C): lower case, no
punctuation, contractions and spelling unified for English, numbers as digits. Other languages get its basic normaliser, and
those written without spaces are compared character by character, as in that paper. The normalisers are transformers' own;
British spellings are unified only where the tokenizer brings its table (normalizer.json). Deliberate difference: what has
neither letter nor digit is no word.

Shape alphabet: R reference words, A answer words.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

# Chinese, Cantonese, Japanese, Thai, Lao and Burmese: their words are not separated, so characters are counted.
WITHOUT_SPACES = frozenset({"zh", "yue", "ja", "th", "lo", "my"})


@dataclass(frozen=True)
class Wording:
    """How texts become words, so that only what was said is compared and not how it is written."""

    language: str = "en"
    """A two-letter code."""
    spelling: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Spellings of English words to unify, each with what stands for it."""

    @property
    def name(self) -> str:
        """What tells this wording from another: error rates over different ones do not pair."""
        spellings = f", {len(self.spelling)} spellings" if self.spelling and self.language == "en" else ""
        return f"whisper {self.language}{spellings}"

    def words(self, text: str) -> list[str]:
        """Return the normalised words of `text`, for a language without spaces its characters."""
        # The English normaliser leaves the last dot of "..." standing, and silence is often answered so.
        return [word for word in self._normalise(text).split() if any(map(str.isalnum, word))]

    @cached_property
    def _normalise(self) -> Callable[[str], str]:
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

        if self.language == "en":
            return EnglishTextNormalizer(dict(self.spelling))
        return BasicTextNormalizer(split_letters=self.language in WITHOUT_SPACES)


def language_code(name: str) -> str:
    """Return the code of a language that is named as in Whisper's settings: "German", "de" or "<|de|>"."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    plain = name.lower().removeprefix("<|").removesuffix("|>")
    return str(TO_LANGUAGE_CODE.get(plain, plain))


@dataclass(frozen=True)
class Edits:
    """What turns a reference into an answer."""

    substitutions: int = 0
    deletions: int = 0
    """Words of the reference that the answer lacks."""
    insertions: int = 0
    """Words of the answer that the reference lacks."""

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    def __add__(self, other: Edits) -> Edits:
        return Edits(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


def edits(reference: Sequence[Hashable], answer: Sequence[Hashable]) -> Edits:
    """Return the fewest edits between two lists of words (or of tokens), in one of the ways that need so few; the same every time.

    O(R * A) time and memory, after what both have in common at either end is set aside.
    """
    start = common_start(reference, answer)
    reference, answer = reference[start:], answer[start:]
    end = common_start(reference[::-1], answer[::-1])
    table = _distances(reference[: len(reference) - end], answer[: len(answer) - end])
    row, column = (size - 1 for size in table.shape)
    substitutions = 0
    while row and column:
        # Back through the cheapest cells, diagonally wherever that is one of the cheapest ways.
        here, diagonal = table[row, column], table[row - 1, column - 1]
        same = reference[row - 1] == answer[column - 1]
        if here == diagonal + (not same):
            substitutions += not same
            row, column = row - 1, column - 1
        elif here == table[row - 1, column] + 1:
            row -= 1
        else:
            column -= 1
    # Every word that is not substituted is kept, deleted or inserted: the total and the lengths give the rest.
    unpaired = int(table[-1, -1]) - substitutions
    longer = table.shape[1] - table.shape[0]
    return Edits(substitutions, (unpaired - longer) // 2, (unpaired + longer) // 2)


def common_start(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return how many words both begin with."""
    both = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(both) if one != other), min(len(first), len(second)))


def _distances(reference: Sequence[Hashable], answer: Sequence[Hashable]) -> np.ndarray:
    """Return (R + 1, A + 1): the fewest edits between the first r words of one and the first a of the other."""
    numbers = {word: index for index, word in enumerate(dict.fromkeys((*reference, *answer)))}
    wanted = np.array([numbers[word] for word in answer], dtype=np.int64)
    steps = np.arange(len(answer) + 1, dtype=np.int32)
    table = np.empty((len(reference) + 1, len(answer) + 1), dtype=np.int32)
    table[0] = steps
    for row, word in enumerate(reference, start=1):
        above = table[row - 1]
        table[row, 0] = row
        table[row, 1:] = np.minimum(above[:-1] + (wanted != numbers[word]), above[1:] + 1)
        # An insertion costs one more than the cell to the left: a running minimum of what is left of that slope.
        table[row] = np.minimum.accumulate(table[row] - steps) + steps
    return table
