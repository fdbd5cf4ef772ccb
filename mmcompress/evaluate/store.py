"""Evaluations on disk, so that a later run can be paired with an earlier one: one .npz, no pickles, the same bytes for
the same evaluation.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import UsageError
from mmcompress.evaluate.answers import Answers
from mmcompress.evaluate.controls import Control
from mmcompress.evaluate.embed import Embeddings
from mmcompress.evaluate.evaluation import Comparison, Evaluation
from mmcompress.evaluate.findings import Finding
from mmcompress.evaluate.scene import Measured, Scene
from mmcompress.evaluate.slices import Slice
from mmcompress.evaluate.words import Wording
from mmcompress.ops.statistics import Estimate

# 3 may hold answers, in 2 one reference each; embeddings without answers are written as 1 was, for earlier versions to read.
SCHEMAS = (1, 2, 3)


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write `evaluation` with its embeddings, its answers and its per-sample values to `path` (.npz)."""
    found, answered = evaluation.scene.embedded, evaluation.scene.answered
    arrays: dict[str, np.ndarray] = {}
    if found is not None:
        arrays |= {"images": found.images, "text_vectors": found.text_vectors, "pairs": found.pairs}
    if evaluation.scene.class_vectors is not None and evaluation.scene.class_index is not None:
        arrays |= {"class_vectors": evaluation.scene.class_vectors, "class_index": evaluation.scene.class_index}
    metrics: list[dict[str, Any]] = []
    for task, by_metric in evaluation.results.items():
        for metric, measured in by_metric.items():
            arrays[f"values/{task}/{metric}"] = measured.values
            if measured.weights is not None:
                arrays[f"weights/{task}/{metric}"] = measured.weights
            facts = {"unit": measured.unit, "share": measured.share, "chance": measured.chance}
            estimates = {"estimate": evaluation.estimates[task][metric].to_json()}
            if metric in evaluation.differences.get(task, {}):
                estimates["difference"] = evaluation.differences[task][metric].to_json()
            metrics.append({"task": task, "metric": metric, **facts, **estimates})
    document = {
        "schema": SCHEMAS[0] if answered is None and found is not None else SCHEMAS[-1],
        "config": evaluation.config,
        "keys": evaluation.scene.keys,
        "texts": found.texts if found is not None else (),
        **({"media": found.media} if found is not None and found.media != "image" else {}),
        **({"answers": _answers_to_json(answered)} if answered is not None else {}),
        "metrics": metrics,
        "slices": [part.to_json() for part in evaluation.slices],
        "controls": [control.to_json() for control in evaluation.controls],
        "findings": [finding.to_json() for finding in evaluation.findings],
    }
    content = json.dumps(document, ensure_ascii=False).encode()
    with open(path, "wb") as file:
        np.savez_compressed(file, document=np.frombuffer(content, dtype=np.uint8), **arrays)  # type: ignore[arg-type]


def read_evaluation(path: Path) -> Evaluation:
    """Return the evaluation in `path`. Raises UsageError when it is not one or is damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        document = json.loads(arrays.pop("document").tobytes())
        if document["schema"] not in SCHEMAS:
            raise UsageError(
                f"{path} has evaluation schema {document['schema']}; this mmc reads up to {SCHEMAS[-1]}",
                hint="evaluate again",
            )
        return _evaluation(document, arrays)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}", hint="evaluate the model again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not an evaluation: {error}", hint="evaluate the model again") from error


def _evaluation(document: dict[str, Any], arrays: dict[str, np.ndarray]) -> Evaluation:
    keys = tuple(document["keys"])
    answered = _answers(document["answers"]) if "answers" in document else None
    owners = {"image": np.arange(len(keys)), "sample": answered.owners if answered else np.arange(len(keys))}
    embedded = None
    if "images" in arrays:
        texts = tuple(document["texts"])
        embedded = Embeddings(
            keys, arrays["images"], texts, arrays["text_vectors"], arrays["pairs"], document.get("media", "image")
        )
        owners["text"] = embedded.text_owners
    results: dict[str, dict[str, Measured]] = {}
    estimates: Comparison = {}
    differences: Comparison = {}
    for row in document["metrics"]:
        task, metric = row["task"], row["metric"]
        results.setdefault(task, {})[metric] = Measured(
            arrays[f"values/{task}/{metric}"],
            row["unit"],
            owners[row["unit"]],
            row["share"],
            row["chance"],
            arrays.get(f"weights/{task}/{metric}"),
        )
        estimates.setdefault(task, {})[metric] = Estimate.from_json(row["estimate"])
        if "difference" in row:
            differences.setdefault(task, {})[metric] = Estimate.from_json(row["difference"])
    return Evaluation(
        Scene(
            keys,
            embedded,
            answered,
            class_vectors=arrays.get("class_vectors"),
            class_index=arrays.get("class_index"),
        ),
        results,
        document["config"],
        estimates,
        differences,
        tuple(_slice(row) for row in document["slices"]),
        tuple(_control(row) for row in document["controls"]),
        tuple(Finding(row["level"], row["text"]) for row in document["findings"]),
    )


def _answers_to_json(answered: Answers) -> dict[str, Any]:
    wording = {"language": answered.wording.language, "spelling": dict(answered.wording.spelling)}
    shared = {"shared": answered.shared} if answered.shared else {}
    return {"texts": answered.texts, "references": answered.references, "wording": wording, **shared}


def _answers(document: dict[str, Any]) -> Answers:
    wording = Wording(document["wording"]["language"], document["wording"]["spelling"])
    references = tuple((row,) if isinstance(row, str) else tuple(row) for row in document["references"])
    return Answers(tuple(document["texts"]), references, wording, tuple(document.get("shared", ())))


def _control(row: dict[str, Any]) -> Control:
    lost = Estimate.from_json(row["lost"]) if "lost" in row else None
    return Control(row["control"], row["task"], row["metric"], Estimate.from_json(row), row["chance"], lost)


def _slice(row: dict[str, Any]) -> Slice:
    difference = Estimate.from_json(row["difference"]) if "difference" in row else None
    return Slice(row["slice"], row["task"], row["metric"], Estimate.from_json(row), difference)
