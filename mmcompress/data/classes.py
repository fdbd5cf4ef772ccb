"""Zero-shot classes: which labels there are, how they are called in a prompt, and the prompts.

classes.json is ``{"classes": ["cat", "dog"], "templates": ["a drawing of a {}"]}``. `classes` may also map the data's label
to its name in the prompt (``{"n01440764": "tench"}``), and ``"field": "group"`` reads the coarser label of each sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmcompress.data.sample import Sample
from mmcompress.errors import UsageError, closest

FILE_NAME = "classes.json"
DEFAULT_TEMPLATES = ("a photo of a {}",)
KEYS = ("classes", "templates", "field")

Field = Literal["label", "group"]


@dataclass(frozen=True)
class ZeroShot:
    """Classes for zero-shot classification, in the order of the class indices."""

    labels: tuple[str, ...]
    """As the data calls them."""
    names: tuple[str, ...]
    """As the prompts call them."""
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    field: Field = "label"
    """Which field of a sample holds its label."""

    def prompts(self) -> list[list[str]]:
        """Return for each class its prompts, one for each template."""
        return [[template.replace("{}", name) for template in self.templates] for name in self.names]

    def index(self, sample: Sample) -> int:
        """Return the class index of `sample`; a label that is a number counts classes from 0.

        Raises UsageError when the sample has no label or one that is not among the classes.
        """
        label = sample.label if self.field == "label" else sample.group
        if label is None:
            raise UsageError(f"sample '{sample.key}' has no {self.field}", hint="zero-shot needs one for every sample")
        if label in self.labels:
            return self.labels.index(label)
        if label.isascii() and label.isdigit() and int(label) < len(self.labels):
            return int(label)
        raise UsageError(
            f"sample '{sample.key}' has {self.field} '{label}', which is not among the {len(self.labels)} classes",
            hint=closest(label, self.labels),
        )


def read_classes(path: Path) -> ZeroShot:
    """Read a classes.json. Raises UsageError naming the file and what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="give an existing classes.json") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}", hint='write {"classes": [...], "templates": [...]}') from error
    return parse_classes(document, str(path))


def parse_classes(document: Any, where: str) -> ZeroShot:
    """Return the classes in a parsed classes.json; `where` names it. Raises UsageError saying what is wrong."""
    if not isinstance(document, dict):
        raise UsageError(f"{where} holds a {type(document).__name__}, not an object", hint='write {"classes": [...]}')
    for key in document:
        if key not in KEYS:
            raise UsageError(f"{where} has an unknown key '{key}'", hint=closest(key, KEYS))
    classes = document.get("classes")
    if isinstance(classes, dict):
        labels, names = _strings(list(classes), where, "classes"), _strings(list(classes.values()), where, "classes")
    else:
        labels = names = _strings(classes, where, "classes")
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UsageError(f"{where} lists class '{twice}' twice", hint="list every class once")
    templates = _strings(document.get("templates", list(DEFAULT_TEMPLATES)), where, "templates")
    for template in templates:
        if "{}" not in template:
            raise UsageError(f"{where}: template '{template}' has no {{}}", hint="put {} where the class name goes")
    field = document.get("field", "label")
    if field not in ("label", "group"):
        raise UsageError(f"{where}: field '{field}' is unknown", hint=closest(str(field), ("label", "group")))
    return ZeroShot(labels, names, templates, field)


def zero_shot_classes(samples: Iterable[Sample]) -> ZeroShot:
    """Return the classes found in the labels of `samples`, sorted, underscores read as spaces, with the default prompt.

    Raises UsageError when fewer than two labels are there.
    """
    labels = tuple(sorted({sample.label for sample in samples if sample.label is not None}))
    if len(labels) < 2:
        raise UsageError(
            f"the data has {len(labels)} labels; zero-shot needs 2 or more",
            hint=f"add a {FILE_NAME} or labels, or choose another task",
        )
    return ZeroShot(labels, tuple(label.replace("_", " ") for label in labels))


def _strings(found: Any, where: str, key: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not found or not all(isinstance(item, str) and item for item in found):
        raise UsageError(f"{where}: '{key}' must be a non-empty list of texts", hint=f'write "{key}": ["...", "..."]')
    return tuple(found)
