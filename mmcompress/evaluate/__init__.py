"""Accuracy with intervals: tasks over embeddings and answers, comparisons with the original, the verdict on a compression."""

from mmcompress.evaluate.answers import Answering, Answers, Model, abilities, answer_dataset
from mmcompress.evaluate.embed import Embedder, Embeddings, embed_dataset, embed_texts
from mmcompress.evaluate.evaluation import Comparison, Evaluation, compare, evaluate
from mmcompress.evaluate.findings import Finding
from mmcompress.evaluate.scene import Measured, Task
from mmcompress.evaluate.store import read_evaluation, write_evaluation
from mmcompress.evaluate.tasks import TASKS
from mmcompress.evaluate.verdict import Facts, Speed, verdict

__all__ = [
    "TASKS",
    "Answering",
    "Answers",
    "Comparison",
    "Embedder",
    "Embeddings",
    "Evaluation",
    "Facts",
    "Finding",
    "Measured",
    "Model",
    "Speed",
    "Task",
    "abilities",
    "answer_dataset",
    "compare",
    "embed_dataset",
    "embed_texts",
    "evaluate",
    "read_evaluation",
    "verdict",
    "write_evaluation",
]
