"""Tasks of lm-eval (EleutherAI) and lmms-eval, run on our models: `mmc eval --task lm-eval:NAME`, with their prompts and metrics.

The harness asks, we answer: its requests become samples (the context is the question, a continuation the text, its image or audio
the picture or recording), and its metrics of each document become values that are paired and given intervals like ours. What it
computes over the whole data only is passed on as a note. Differences from their own models: the model's chat template is always
applied, by the family; few-shot examples stand inside the question; an answer is as long as the family makes it, and is cut at the
task's stop strings; only greedy answers are given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.data import Sample, Waveform
from mmcompress.errors import MissingError, UsageError
from mmcompress.evaluate.answers import Answering, answer
from mmcompress.evaluate.evaluation import Evaluation
from mmcompress.evaluate.findings import Finding
from mmcompress.evaluate.likelihoods import BATCH, Likelihoods
from mmcompress.evaluate.scene import Measured, Results, Scene

PREFIXES = ("lm-eval:", "lmms-eval:")
# What lmms-eval notes of a document beside its metrics.
NO_METRICS = frozenset(
    ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media")
)
PLACE_OF_A_PICTURE = re.compile(r"<(image|audio)( \d+)?>")
Read = Callable[[Sequence[Sample]], Likelihoods]
"""Leads a model through the texts of samples, without their end."""
Harness = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]
"""How to evaluate, the tasks there are, and what makes a model of ours one of the harness's: (model, read, batch) -> it."""


def run_harness(
    model: Answering,
    read: Read | None,
    task: str,
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
    folder: Path | None = None,
) -> Evaluation:
    """Run one task or group of a harness, such as "lm-eval:mmmu_val", on its first `limit` documents.

    `folder` holds configurations (YAML) of further tasks. Raises MissingError without the harness; UsageError for a task it does
    not know, and for one that asks for more than `model` and `read` give.
    """
    package, _, name = task.partition(":")
    evaluate, task_manager, adapter = _lm_eval() if package == "lm-eval" else _lmms_eval()
    manager = task_manager(include_path=str(folder) if folder else None)
    if not manager.match_tasks([name]):
        raise UsageError(f"{package} has no task '{name}'", hint=f"{package} lists those it has")
    found = evaluate(
        model=adapter(model, read, batch), tasks=[name], limit=limit, task_manager=manager, bootstrap_iters=0,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    return read_results(task, found, seed)


def _lm_eval() -> Harness:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingError("tasks of lm-eval need lm-eval", hint="pip install 'mmcompress[lm-eval]'") from error

    class Adapter(LM):
        MULTIMODAL = True

        def __init__(self, model: Answering, read: Read | None, batch: int) -> None:
            super().__init__()
            self._model, self._read, self._batch = model, read, batch

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return generate_until(self._model, [request.args for request in requests], self._batch)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return log_likelihoods(self._read, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            raise UsageError(
                "the task asks for the probability of texts that answer nothing", hint="evaluate with --task perplexity"
            )

    return simple_evaluate, TaskManager, Adapter


def _lmms_eval() -> Harness:
    try:
        from lmms_eval.api.model import lmms
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingError(
            f"tasks of lmms-eval need lmms-eval: {error}", hint="pip install lmms-eval (it brings about 50 packages)"
        ) from error

    class Adapter(lmms):
        def __init__(self, model: Answering, read: Read | None, batch: int) -> None:
            super().__init__()
            self._model, self._read, self._batch = model, read, batch

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked = [with_media(request.args, self.task_dict) for request in requests]
            return generate_until(self._model, asked, self._batch)

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            # Its models return losses here in one task and probabilities in another (lmms-eval 0.7.3 takes the argmin).
            raise UsageError(
                "the task compares probabilities, which lmms-eval does not define for all models alike",
                hint="choose a task that generates answers, or one of lm-eval",
            )

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise UsageError("the task asks again after every answer", hint="choose a task of single questions")

    return simple_evaluate, TaskManager, Adapter


def with_media(request: tuple[Any, ...], documents: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a request of lmms-eval, which names a document, as lm-eval makes them: with its picture or recording.

    request: (context, settings, doc_to_visual, number, task, split).
    """
    context, settings, doc_to_visual, number, task, split = request
    document = documents[task][split][number]
    media: dict[str, list[Any]] = {"visual": [], "audio": []}
    for item in (doc_to_visual(document) if doc_to_visual else None) or ():
        media["audio" if isinstance(item, dict) and "array" in item else "visual"].append(item)
    return context, settings, media


def generate_until(model: Answering, requests: Sequence[tuple[Any, ...]], batch: int) -> list[str]:
    """Return the greedy answer to each (context, settings[, media]), cut at the first of the settings' stop strings."""
    said: list[str] = []
    for at in range(0, len(requests), batch):
        said += answer(model, [_sample(at + i, request) for i, request in enumerate(requests[at : at + batch])])
    return [_cut(text, request[1]) for text, request in zip(said, requests, strict=True)]


def log_likelihoods(read: Read | None, requests: Sequence[tuple[Any, ...]]) -> list[tuple[float, bool]]:
    """Return for each (context, continuation[, media]) ln p of the continuation, and whether it is the greedy one."""
    if read is None:
        raise UsageError(
            "the task asks for probabilities of answers, which this model does not give", hint="evaluate a checkpoint"
        )
    found: list[tuple[float, bool]] = []
    for at in range(0, len(requests), BATCH):
        part = requests[at : at + BATCH]
        scored = read([_sample(at + i, request, request[1]) for i, request in enumerate(part)])
        found += zip(scored.log.tolist(), scored.greedy.tolist(), strict=True)
    return found


def read_results(task: str, found: dict[str, Any], seed: int) -> Evaluation:
    """Return what a harness found as an evaluation; without a metric where none has a number for each document."""
    better = found.get("higher_is_better", {})
    keys: list[str] = []
    hashes = hashlib.sha256()
    values: list[dict[str, float]] = []
    for leaf, documents in sorted(found["samples"].items()):
        first = documents[0].get("filter") if documents else ""
        for document in documents:
            # The same document comes once for each way of reading an answer; the first is the task's own.
            if document.get("filter") != first:
                continue
            keys.append(f"{leaf}/{document['doc_id']}")
            hashes.update(str(document["doc_hash"]).encode())
            values.append(_numbers(document, better.get(leaf, {})))
    common = set.intersection(*map(set, values)) if values else set()
    owners = np.arange(len(keys))
    measured = {
        metric: _measured(np.array([of[metric] for of in values], dtype=np.float32), owners)
        for metric in sorted(common)
    }
    results: Results = {task: measured}
    config = {
        "tasks": [task], "data": task, "samples": len(keys), "fingerprint": hashes.hexdigest(), "seed": seed,
        "versions": found.get("versions", {}),
    }  # fmt: skip
    estimates = {task: {metric: of.estimate(seed) for metric, of in measured.items()}}
    notes = [
        Finding("note", f"{leaf} {metric}: {value:.4f}, of the whole data, without an interval")
        for leaf, by_metric in found.get("results", {}).items()
        for metric, value in by_metric.items()
        if isinstance(value, float)
        and "stderr" not in metric
        and metric.split(",")[0] not in {_plain(m) for m in common}
    ]
    return Evaluation(Scene(tuple(keys)), results, config, estimates, findings=tuple(notes))


def _sample(number: int, request: tuple[Any, ...], text: str = "") -> Sample:
    """Return a request as a sample. Raises UsageError for more than one picture or recording."""
    media = request[2] if len(request) > 2 else {}
    pictures, sounds = (list(media.get(kind) or ()) for kind in ("visual", "audio"))
    if len(pictures) > 1 or len(sounds) > 1:
        raise UsageError(
            f"a document has {len(pictures)} pictures and {len(sounds)} recordings; one of each can be asked about",
            hint="choose a task with one picture for each question",
        )
    audio = (
        Waveform(np.asarray(sounds[0]["array"], dtype=np.float32), int(sounds[0]["sampling_rate"])) if sounds else None
    )
    question = PLACE_OF_A_PICTURE.sub("", request[0]).strip()
    return Sample(
        str(number),
        (text.strip(),) if text else (),
        audio=audio,
        picture=pictures[0] if pictures else None,
        question=question,
    )


def _cut(text: str, settings: dict[str, Any]) -> str:
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise UsageError("the task asks for sampled answers; answers are greedy", hint="set its temperature to 0")
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text


def _numbers(document: dict[str, Any], better: dict[str, bool]) -> dict[str, float]:
    """Return the metrics of one document that are numbers, higher being better: the others with a minus."""
    found = {}
    for metric in document.get("metrics", sorted(document.keys() - NO_METRICS)):
        value = document[metric]
        if isinstance(value, dict):
            value = value.get("score")
        if isinstance(value, bool | int | float | np.number) and np.isfinite(value):
            lower = better.get(metric) is False
            found[f"minus_{metric}" if lower else metric] = -float(value) if lower else float(value)
    return found


def _plain(metric: str) -> str:
    return metric.removeprefix("minus_")


def _measured(values: np.ndarray, owners: np.ndarray) -> Measured:
    return Measured(values, "sample", owners, share=bool(np.all((values >= 0) & (values <= 1))))
