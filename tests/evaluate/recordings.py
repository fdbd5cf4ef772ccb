"""A small world of recordings whose words are known, and models that hear them well, badly or not at all."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mmcompress.data import Dataset, Memory, Sample, Waveform

WORDS = ("red", "blue", "green", "cat", "dog", "house", "tree", "car", "drawing", "river", "stone", "bread")
RATE = 16_000


def transcript(number: int) -> str:
    """2 to 9 words; the number's own first."""
    rng = np.random.default_rng([7, number])
    return " ".join([WORDS[number % 12], *rng.choice(WORDS, rng.integers(1, 9))])


def recording(number: int) -> Waveform:
    """Tells its number by its loudness, and is as long as its transcript asks for."""
    return Waveform(np.full(100 * len(transcript(number).split()), (number + 1) / 10_000, np.float32), RATE)


def speech(n: int) -> Dataset:
    """Return `n` recordings with their transcripts; group "half 0" or "half 1"."""
    samples = [
        Sample(f"s{i:04d}", (transcript(i).capitalize() + ".",), group=f"half {int(i < n // 2)}", audio=recording(i))
        for i in range(n)
    ]
    return Dataset(Memory(samples), "speech")


def spoken(*transcripts: str) -> Dataset:
    """Return one recording for each of `transcripts`."""
    samples = [Sample(f"s{i}", (text,), audio=recording(i)) for i, text in enumerate(transcripts)]
    return Dataset(Memory(samples), "spoken")


def number_of(sample: Sample) -> int:
    """Return which recording this is, -1 for silence."""
    return round(float(sample.waveform(RATE)[0]) * 10_000) - 1


class Hearing:
    """Writes down what is said, but mishears a share of the words; of those in `deaf` it hears nothing right."""

    def __init__(self, wrong: float = 0.0, seed: int = 0, deaf: Collection[int] = (), silence: str = "") -> None:
        self.wrong, self.seed, self.deaf, self.silence = wrong, seed, deaf, silence
        self.largest_batch = 0

    def generate(self, samples: Sequence[Sample]) -> list[str]:
        self.largest_batch = max(self.largest_batch, len(samples))
        return [self._heard(number_of(sample)) for sample in samples]

    def _heard(self, number: int) -> str:
        if number < 0:
            return self.silence
        misheard = np.random.default_rng([self.seed, number]).random(20) < (1 if number in self.deaf else self.wrong)
        words = transcript(number).split()
        return " ".join("wrong" if bad else word for word, bad in zip(words, misheard, strict=False))


class Saying:
    """Gives prepared answers, one a recording; nothing to silence."""

    def __init__(self, *answers: str) -> None:
        self.answers = answers

    def generate(self, samples: Sequence[Sample]) -> list[str]:
        numbers = [number_of(sample) for sample in samples]
        return [self.answers[number] if number >= 0 else "" for number in numbers]
