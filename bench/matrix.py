"""The "Families" part of README.md: which pass applies to which tower, by its own `check` of a small model; and export.

Nothing is typed in but the columns: a family that comes, or a pass that learns something, changes the table by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.trace import traced_parts
from mmcompress.families import FAMILIES
from mmcompress.jobs.inspect import QUESTIONS, applies
from tests import tiny

BEGIN = "<!-- matrix -->"
END = "<!-- end matrix -->"
COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "prune heads": ("prune", {"ratio": 0.01, "units": ["heads"], "score": "magnitude"}),
    "prune head-dims": ("prune", {"ratio": 0.01, "units": ["head-dims"], "score": "magnitude"}),
    "prune neurons": ("prune", {"ratio": 0.01, "units": ["neurons"], "score": "magnitude"}),
    "prune blocks": ("prune", {"ratio": 0.01, "units": ["blocks"], "score": "random"}),
    "prune experts": ("prune", {"ratio": 0.01, "units": ["experts"], "score": "magnitude"}),
    "search-prune": ("search-prune", QUESTIONS["search-prune"]),
    "trim-vocabulary": ("trim-vocabulary", QUESTIONS["trim-vocabulary"]),
    "factorize": ("factorize", QUESTIONS["factorize"]),
    "narrow": ("narrow", QUESTIONS["narrow"]),
    "rotate": ("rotate", QUESTIONS["rotate"]),
    "sparsify": ("sparsify", QUESTIONS["sparsify"]),
    "merge-tokens": ("merge-tokens", QUESTIONS["merge-tokens"]),
    "coarsen-tokens": ("coarsen-tokens", QUESTIONS["coarsen-tokens"]),
    "reduce-visual-tokens": ("reduce-visual-tokens", QUESTIONS["reduce-visual-tokens"]),
    "drop-visual-tokens": ("drop-visual-tokens", QUESTIONS["drop-visual-tokens"]),
    "merge-frames": ("merge-frames", QUESTIONS["merge-frames"]),
    "quantize": ("quantize", QUESTIONS["quantize"]),
    "distill": ("distill", QUESTIONS["distill"]),
}
"""Heading -> pass and parameters."""

EXPORT = "export"
"""The heading of the last column, which is no pass."""

Answers = dict[str, dict[str, str]]
"""Heading -> tower -> "" where the pass applies, else the reason."""


Row = tuple[str, tuple[str, ...], Answers]
"""Class, towers and answers."""


def section(found: Sequence[Row] | None = None) -> str:
    """Return the part of README.md from marker to marker; `found` are its rows, where they are known."""
    notes: dict[str, int] = {}
    headings = (*COLUMNS, EXPORT)
    lines = [f"| class | towers | {' | '.join(headings)} |", "|---" * (len(headings) + 2) + "|"]
    for label, towers, answers in rows() if found is None else found:
        cells = [_cell(answers[heading], notes) for heading in headings]
        lines.append(f"| `{label}` | {', '.join(towers)} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
    return "\n".join([BEGIN, "", *lines, "", END])


def rows() -> list[Row]:
    """Return one row a class; models of one class that differ are told apart by name."""
    asked: dict[str, list[Row]] = {}
    for name in sorted((*tiny.EVERY, *tiny.MIXTURES), key=lambda name: list(FAMILIES).index(_family(name))):
        bundle = tiny.bundle(name)
        towers = bundle.towers()
        answers = {
            # The reasons of families that are alike are one note.
            heading: {
                tower.name: applies(bundle, key, tower, params)["reason"].replace(
                    f"{bundle.family.name} models", "such models"
                )
                for tower in towers
            }
            for heading, (key, params) in COLUMNS.items()
        }
        answers[EXPORT] = dict.fromkeys((tower.name for tower in towers), _refused(bundle))
        found = asked.setdefault(type(bundle.model).__name__, [])
        if all(answers != other for _, _, other in found):
            found.append((name, tuple(tower.name for tower in towers), answers))
    return [
        (label if len(models) == 1 else f"{label} ({name})", towers, answers)
        for label, models in asked.items()
        for name, towers, answers in models
    ]


def _refused(bundle: Bundle) -> str:
    """Return why a model cannot be exported, "" where it can."""
    try:
        traced_parts(bundle, "float32")
    except UsageError as error:
        return error.message
    return ""


def _family(name: str) -> str:
    own = tiny.bundle(name).family
    return next(key for key, family in FAMILIES.items() if family is own)


def _cell(reasons: dict[str, str], notes: dict[str, int]) -> str:
    marks = {
        tower: f"<sup>{notes.setdefault(why, len(notes) + 1)}</sup>" if why else "✓" for tower, why in reasons.items()
    }
    if len(set(marks.values())) == 1:
        return marks.popitem()[1]
    return ", ".join(f"{tower} {mark}" for tower, mark in marks.items())
