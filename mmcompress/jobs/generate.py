"""`mmc generate`: answers to a few files, from a checkpoint in torch or an exported artifact in an engine, and what they took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress import checkpoint
from mmcompress.bundle import Cut
from mmcompress.data.dataset import Dataset, Memory, batches
from mmcompress.data.folder import frames_of
from mmcompress.data.sample import FRAME_RATE, Audio, Sample, Stored, Video
from mmcompress.errors import NotExportable, UsageError
from mmcompress.export.artifact import is_artifact, open_artifact
from mmcompress.measure.answerer import Answerer, artifact_answerer, bundle_answerer
from mmcompress.measure.writing import Written
from mmcompress.parts import Exportable


@dataclass(frozen=True)
class Generated:
    """Answers in the order of the inputs, and the cost of each batch."""

    model: str
    runner: str
    inputs: tuple[str, ...]
    answers: tuple[str, ...]
    tokens: tuple[int, ...]
    """Of each answer, as far as the loop that counts them was used; else empty."""
    prepare: tuple[float, ...] = ()
    """Seconds of decoding and preprocessing, by batch."""
    written: tuple[Written, ...] = field(default=(), repr=False)

    def timing(self) -> dict[str, Any]:
        """Return milliseconds by stage and tokens per second; medians over batches and steps. Empty where nothing was timed."""
        if not self.written:
            return {}
        further = [step for one in self.written for step in one.steps[1:]]
        rows = [len(one.rows) for one in self.written for _ in one.steps[1:]]
        return {
            "prepare_ms": _milliseconds(self.prepare),
            **{
                f"{name}_ms": _milliseconds([one.seconds[name] for one in self.written if name in one.seconds])
                for name in self.written[0].seconds
            },
            "prompt_ms": _milliseconds([one.steps[0] for one in self.written]),
            "first_token_ms": _milliseconds([one.first_token for one in self.written]),
            "token_ms": _milliseconds(further) if further else None,
            "tokens_per_second": sum(rows) / sum(further) if further else None,
            "cache_bytes": max(one.cache_bytes for one in self.written),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the document of ``--json``."""
        counts: Sequence[int | None] = self.tokens or [None] * len(self.answers)
        return {
            "model": self.model,
            "runner": self.runner,
            "answers": [
                {"input": name, "text": text, "tokens": count}
                for name, text, count in zip(self.inputs, self.answers, counts, strict=True)
            ],
            "timing": self.timing(),
        }


def samples_of(
    audio: Sequence[Path],
    images: Sequence[Path],
    prompt: str,
    *,
    frames: Sequence[Path] = (),
    rate: float = FRAME_RATE,
    together: bool = False,
) -> list[Sample]:
    """Return a sample for each recording, each picture and each folder of frames (`rate` a second), or one for the prompt alone.

    `together`: one sample for all pictures. Raises UsageError when there is nothing to answer, for files that are not there, and
    for frames that make no video.
    """
    made = [Sample(str(path), audio=Audio(Stored.at(path)), question=prompt) for path in audio]
    shown = [Sample(str(path), picture=Stored.at(path), question=prompt) for path in images]
    if together and shown:
        pictures = [sample.picture for sample in shown if sample.picture is not None]
        more = f" and {len(images) - 1} more" if len(images) > 1 else ""
        shown = [replace(shown[0], key=f"{images[0]}{more}").showing(pictures)]
    made += shown
    made += [Sample(str(path), video=Video(tuple(frames_of(path)), rate), question=prompt) for path in frames]
    if not made and not prompt:
        raise UsageError("there is nothing to answer", hint="give --audio FILE, --image FILE or --prompt TEXT")
    return made or [Sample("prompt", question=prompt)]


def generate(
    model: str | Path,
    samples: Sequence[Sample],
    *,
    runner: str | None = None,
    limit: int | None = None,
    batch: int = 8,
    threads: int | None = None,
    device: str = "cpu",
) -> Generated:
    """Answer `samples` with `model`: a checkpoint in torch, an exported directory in `runner` (default: onnxruntime).

    Raises UsageError for a checkpoint with another runner, for samples the model cannot take, and for a limit where the family
    names no parts.
    """
    if is_artifact(model):
        name = runner or "onnxruntime"
        return _answered(
            str(model), name, artifact_answerer(open_artifact(model), name, threads=threads), samples, limit, batch
        )
    if runner not in (None, "torch"):
        raise UsageError(f"{model} is a checkpoint, which only torch runs", hint=f"mmc export {model} -o DIRECTORY")
    bundle = checkpoint.load(model, device=device)
    if isinstance(bundle.family, Exportable):
        try:
            answerer = bundle_answerer(bundle, threads=threads)
            if not answerer.decoding.resizes:
                return _answered(str(model), "torch", answerer, samples, limit, batch)
        except NotExportable:
            # Parts take less than the whole model, such as pictures without padding; without them nothing is timed.
            if limit is not None:
                raise
    if limit is not None:
        raise UsageError(
            f"this {bundle.family.name} model answers through transformers, which takes its limit from generation_config.json",
            hint="set max_new_tokens there, and leave --max-new-tokens out",
        )
    answers = [text for part in batches(Dataset(Memory(samples), "files"), batch) for text in bundle.generate(part)]
    return Generated(str(model), "torch", tuple(sample.key for sample in samples), tuple(answers), ())


def _answered(
    model: str, runner: str, answerer: Answerer, samples: Sequence[Sample], limit: int | None, batch: int
) -> Generated:
    prepare, written, answers, tokens = [], [], [], []
    for part in batches(Dataset(Memory(samples), "files"), batch):
        begun = time.perf_counter()
        cut, texts = Cut.of(answerer.family, answerer.processor, part), []
        for portion in cut.portions:
            asked = answerer.asked(portion)
            prepare.append(time.perf_counter() - begun)
            written.append(answerer.writer.write(asked, limit))
            texts += answerer.texts(written[-1].rows)
            begun = time.perf_counter()
        answers += cut.joined(texts)
        counts = iter([len(row) for one in written[-len(cut.portions) :] for row in one.rows])
        tokens += [sum(next(counts) for _ in range(pieces)) for pieces in cut.counts]
    answerer.close()
    return Generated(
        model,
        runner,
        tuple(sample.key for sample in samples),
        tuple(answers),
        tuple(tokens),
        tuple(prepare),
        tuple(written),
    )


def _milliseconds(seconds: Sequence[float]) -> float:
    return float(np.median(seconds) * 1e3)
