"""Whether an answer to a question is one of those accepted, as VQA is scored.

Answers are compared after the normalisation of the VQA evaluation (Antol et al. 2015, section 3; its published program): lower
case, no punctuation, no articles, number words up to ten as digits. Where ten or more people answered, an answer counts as far as
they agree with it: the mean over all choices of all but one of them of min(matches / 3, 1), as in that program. Fewer people than
that do not tell rare from wrong, so one match is then a hit.

Deliberate differences: apostrophes are dropped on both sides instead of restored from a table of contractions; an answer that is
nothing but an article stays, because reading the letter "A" is an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {**{word: str(number) for number, word in enumerate(NUMBERS)}, "none": "0"}
MANY_PEOPLE = 10
THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
SILENT = re.compile(r"['’]|\.(?!\d)")
BREAKS = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`,?!]")


def answer_words(text: str) -> list[str]:
    """Return the words of `text` that are compared."""
    plain = BREAKS.sub(" ", SILENT.sub("", THOUSANDS.sub("", text.lower())))
    words = [DIGITS.get(word, word) for word in plain.split()]
    return [word for word in words if word not in ARTICLES] or words


def accuracy(answer: str, accepted: Sequence[str]) -> float:
    """Return how right `answer` is, 0..1: a match with one of `accepted`; of ten or more, as far as they agree with it."""
    given = answer_words(answer)
    matches = sum(given == answer_words(other) for other in accepted)
    people = len(accepted)
    if people < MANY_PEOPLE:
        return float(matches > 0)
    # Leaving one out: one who agrees leaves matches - 1 others, one who does not leaves all of them.
    agree, others = min((matches - 1) / 3, 1), min(matches / 3, 1)
    return (matches * agree + (people - matches) * others) / people


def mentions(answer: str, accepted: Sequence[str]) -> bool:
    """Whether all words of one of `accepted` occur in `answer`, in any order: what a whole sentence may say too."""
    given = set(answer_words(answer))
    return any(words and given.issuperset(words) for words in map(answer_words, accepted))
