"""From what a user names to something to evaluate: a checkpoint, an exported artifact, or a kept evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcompress import checkpoint
from mmcompress.evaluate.answers import Model
from mmcompress.evaluate.evaluation import Evaluation, evaluate
from mmcompress.evaluate.store import read_evaluation
from mmcompress.export.artifact import is_artifact, open_artifact
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.measure.embedder import ArtifactEmbedder


def open_model(
    target: str | Path, runner: str = "onnxruntime", device: str = "cpu", threads: int | None = None
) -> Model:
    """Open a checkpoint (torch on `device`) or an exported artifact (in `runner`)."""
    if is_artifact(target):
        artifact = open_artifact(target)
        if artifact.generation is not None:
            return artifact_answerer(artifact, runner, threads=threads)
        return ArtifactEmbedder(artifact, runner=runner, threads=threads)
    return checkpoint.load(target, device=device)


def evaluate_target(
    target: str | Path, runner: str = "onnxruntime", device: str = "cpu", **settings: Any
) -> Evaluation:
    """Evaluate what `target` names with `settings` (see `evaluate`); a .npz is an evaluation already."""
    if str(target).endswith(".npz"):
        return read_evaluation(Path(target))
    return evaluate(open_model(target, runner, device), **settings)
