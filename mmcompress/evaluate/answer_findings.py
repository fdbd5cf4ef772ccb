"""What a person must be told about answers before any metric: are they answers at all, and what kind of errors do they have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mmcompress.evaluate.answer_tasks import all_edits
from mmcompress.evaluate.controls import HALLUCINATED, Control
from mmcompress.evaluate.findings import Finding, Level
from mmcompress.evaluate.scene import Results, Scene
from mmcompress.evaluate.words import Edits
from mmcompress.ops.statistics import Estimate

# A speech model now and then says nothing, or gets stuck; from one answer in twenty on, that is what it does.
MANY = 0.05
# Fewer samples may have one answer by chance.
ENOUGH = 4
# A phrase of up to so many words that comes so often in a row is a loop, not emphasis.
LONGEST_PHRASE = 8
REPEATS = 5
SHOWN = 60


def answer_findings(scene: Scene, results: Results, seed: int = 0) -> list[Finding]:
    """Return what is wrong with the answers of `scene`: empty, all the same, caught in loops; word error rate and perplexity."""
    found = []
    if scene.answered is not None:
        words = scene.answered.words
        references = scene.answered.reference_words
        found += [*_empty(words), *_same(words, references), *_loops(words, references)]
    if "transcription" in results:
        found.append(_error_rate(scene, results["transcription"]["word_accuracy"].estimate(seed)))
    if "perplexity" in results:
        found.append(_perplexity(scene, results["perplexity"]["answer_log_likelihood"].estimate(seed)))
    return found


def silence_findings(seen: Sequence[Control], before: Sequence[Control] = ()) -> list[Finding]:
    """Return what `seen` says of words heard in silence: bad when the controls of the reference, `before`, had fewer."""
    found = []
    for control in seen:
        if control.metric != HALLUCINATED or not control.estimate.value:
            continue
        earlier = [other.estimate for other in before if other.metric == HALLUCINATED]
        more = bool(earlier) and control.estimate.low > earlier[0].value
        against = f", the reference {earlier[0].value:.3f}" if earlier else ""
        text = f"HALLUCINATES: hears words in silence, share {control.estimate}{against}"
        found.append(Finding("bad" if more else "note", text))
    return found


def _empty(words: list[list[str]]) -> list[Finding]:
    count, n = sum(not answer for answer in words), len(words)
    return [Finding(_level(count, n), f"EMPTY: {count} of {n} answers have no words")] if count else []


def _same(words: list[list[str]], references: list[list[str]]) -> list[Finding]:
    """One answer to most of what is asked, where not most of it should have one answer."""
    commonest, count = Counter(map(tuple, words)).most_common(1)[0]
    wanted = Counter(map(tuple, references)).most_common(1)[0][1] if references else 0
    n = len(words)
    if n < ENOUGH or not commonest or count <= n / 2 or wanted > n / 2:
        return []
    return [Finding("bad", f"COLLAPSED: {count} of {n} answers are '{_short(' '.join(commonest))}'")]


def _loops(words: list[list[str]], references: list[list[str]]) -> list[Finding]:
    wanted = references or [[] for _ in words]
    stuck = [
        phrase
        for answer, reference in zip(words, wanted, strict=True)
        if (phrase := loop(answer)) and not loop(reference)
    ]
    if not stuck:
        return []
    text = (
        f"LOOPS: {len(stuck)} of {len(words)} answers repeat themselves, such as '{_short(stuck[0])}' {REPEATS} times"
    )
    return [Finding(_level(len(stuck), len(words)), text)]


def loop(words: Sequence[str]) -> str:
    """Return the shortest phrase of at most 8 words that comes 5 times or more in a row, "" where there is none."""
    for size in range(1, LONGEST_PHRASE + 1):
        run = 0
        for index in range(size, len(words)):
            run = run + 1 if words[index] == words[index - size] else 0
            if run >= size * (REPEATS - 1):
                return " ".join(words[index - size + 1 : index + 1])
    return ""


def _error_rate(scene: Scene, accuracy: Estimate) -> Finding:
    count, total = sum(map(len, scene.answers.reference_words)), sum(all_edits(scene), Edits())
    rate = f"{1 - accuracy.value:.4f} [{1 - accuracy.high:.4f}, {1 - accuracy.low:.4f}] n={accuracy.n}"
    kinds = f"{total.substitutions} substituted, {total.deletions} left out, {total.insertions} added"
    return Finding("note", f"word error rate {rate}: of {count} words {kinds}")


def _perplexity(scene: Scene, likelihood: Estimate) -> Finding:
    value, low, high = (math.exp(-found) for found in (likelihood.value, likelihood.high, likelihood.low))
    tokens = int(scene.likelihoods.tokens.sum())
    return Finding(
        "note",
        f"perplexity of the right answers {value:.3f} [{low:.3f}, {high:.3f}] n={likelihood.n}: {tokens} tokens",
    )


def _level(count: int, n: int) -> Level:
    return "bad" if count >= MANY * n else "note"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
