"""Accuracy with intervals: tasks over embeddings, comparisons with the original, and the verdict on a compression."""

from mmcompress.evaluate.embed import Embedder, Embeddings, embed_dataset, embed_texts
from mmcompress.evaluate.evaluation import Comparison, Evaluation, compare, evaluate
from mmcompress.evaluate.findings import Finding
from mmcompress.evaluate.store import read_evaluation, write_evaluation
from mmcompress.evaluate.tasks import TASKS, Measured, Task
from mmcompress.evaluate.verdict import Facts, Speed, verdict

__all__ = [
    "TASKS",
    "Comparison",
    "Embedder",
    "Embeddings",
    "Evaluation",
    "Facts",
    "Finding",
    "Measured",
    "Speed",
    "Task",
    "compare",
    "embed_dataset",
    "embed_texts",
    "evaluate",
    "read_evaluation",
    "verdict",
    "write_evaluation",
]
