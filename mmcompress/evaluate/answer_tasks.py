"""The tasks of a model that answers in text: what it gets right, and how much it still says what it said before.

Everywhere in this package a metric is better when it is higher, so transcription reports the word accuracy, which is 1 - WER:
below 0 where an answer has more errors than the reference has words. It is that of the whole data, as word error rates are
published: all errors over all words of the references, not the mean of the recordings' rates. As a ratio of two sums it is
bootstrapped over recordings, each drawn with its words; a paired difference likewise, since both models hear the same words. In the
same way perplexity is reported as the mean log-likelihood of a token, of all tokens of the data: perplexity is exp of minus that.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from mmcompress.errors import UsageError
from mmcompress.evaluate import vqa
from mmcompress.evaluate.cider import cider_d
from mmcompress.evaluate.scene import Measured, Scene
from mmcompress.evaluate.words import Edits, common_start, edits


def transcription(scene: Scene) -> dict[str, Measured]:
    """Word accuracy: 1 - (substitutions + deletions + insertions) / words of the reference, over the whole data.

    Raises UsageError for a reference without a word in it.
    """
    counts = np.array([len(words) for words in scene.answers.reference_words], dtype=np.float32)
    if not counts.all():
        key = scene.keys[int(np.argmin(counts))]
        raise UsageError(
            f"the transcript of sample '{key}' has no words, so it has no word error rate",
            hint="leave the sample out; what is said to silence is measured anyway",
        )
    errors = np.array([found.total for found in all_edits(scene)], dtype=np.float32)
    # Saying nothing makes as many errors as there are words.
    return {"word_accuracy": Measured(1 - errors / counts, "sample", _each(scene), False, chance=0.0, weights=counts)}


def question_answering(scene: Scene) -> dict[str, Measured]:
    """accuracy: whether the answer is an accepted one, of ten people's as far as they agree. keyword: whether it contains one."""
    pairs = list(zip(scene.answers.texts, scene.answers.references, strict=True))
    return {
        "accuracy": _measured(scene, [vqa.accuracy(*pair) for pair in pairs], chance=0.0),
        "keyword": _measured(scene, [vqa.mentions(*pair) for pair in pairs], chance=0.0),
    }


def captioning(scene: Scene) -> dict[str, Measured]:
    """cider: CIDEr-D (see `cider`). exact: whether the words are those of a caption. keyword: whether all of one's words occur."""
    accepted = scene.answers.accepted_words
    said = scene.answers.words
    exact = [words in several for words, several in zip(said, accepted, strict=True)]
    keyword = [
        any(other and set(words).issuperset(other) for other in several)
        for words, several in zip(said, accepted, strict=True)
    ]
    cider = np.array(cider_d(said, accepted), dtype=np.float32)
    return {
        "cider": Measured(cider, "sample", scene.answers.owners, share=False, chance=0.0),
        "exact": _measured(scene, exact, chance=0.0),
        "keyword": _measured(scene, keyword, chance=0.0),
    }


def perplexity(scene: Scene) -> dict[str, Measured]:
    """answer_log_likelihood: the mean ln p of a token of the right answers; perplexity is exp of minus that. greedy: the share of
    answers of which each token is the most probable one."""
    found = scene.likelihoods
    mean = (found.log / found.tokens).astype(np.float32)
    weights = found.tokens.astype(np.float32)
    return {
        "answer_log_likelihood": Measured(mean, "sample", _each(scene), share=False, weights=weights),
        "greedy": Measured(found.greedy.astype(np.float32), "sample", _each(scene)),
    }


def answer_agreement(scene: Scene) -> dict[str, Measured]:
    """How alike the answers of the reference and of this model are.

    identical: the share of answers that are equal letter by letter. edit_similarity: 1 - edits / words of the longer answer.
    first_divergence: how many words both begin with, as a share of the reference's; 1 where it goes on beyond its end. Both once
    more in tokens, as this model's tokenizer cuts the two texts, where it has one.
    """
    if scene.reference is None or scene.reference.answered is None:
        raise UsageError("answer-agreement needs answers to agree with", hint="evaluate the original too (--baseline)")
    mine, other = scene.answers, scene.reference.answers
    # The other model's answers in this one's wording: a difference in spelling tables is none in answers.
    words = [(mine.wording.words(text), words) for text, words in zip(other.texts, mine.words, strict=True)]
    found = _alike(scene, words, "")
    if mine.tokenise is not None:
        texts = zip(other.texts, mine.texts, strict=True)
        found |= _alike(
            scene, [(mine.tokenise(was.strip()), mine.tokenise(now.strip())) for was, now in texts], "token_"
        )
    same = [a.strip() == b.strip() for a, b in zip(mine.texts, other.texts, strict=True)]
    return {"identical": _measured(scene, same), **found}


def _alike(
    scene: Scene, pairs: Sequence[tuple[Sequence[Hashable], Sequence[Hashable]]], prefix: str
) -> dict[str, Measured]:
    """Return edit_similarity and first_divergence of pairs (before, now) of words or tokens."""
    similar = [1 - edits(was, now).total / max(len(was), len(now), 1) for was, now in pairs]
    first = [common_start(was, now) / len(was) if was else float(not now) for was, now in pairs]
    return {f"{prefix}edit_similarity": _measured(scene, similar), f"{prefix}first_divergence": _measured(scene, first)}


def _measured(scene: Scene, values: Sequence[float], chance: float | None = None) -> Measured:
    return Measured(np.array(values, dtype=np.float32), "sample", scene.answers.owners, chance=chance)


def all_edits(scene: Scene) -> list[Edits]:
    """Return the edits between each reference and its answer."""
    return [edits(*pair) for pair in zip(scene.answers.reference_words, scene.answers.words, strict=True)]


def _each(scene: Scene) -> np.ndarray:
    return np.arange(len(scene.keys))
