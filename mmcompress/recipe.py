"""Recipes: an ordered list of passes with their data, export and gates, written as YAML with strict keys.

seed: 0
data: {calibration: demo:train, evaluation: demo:test, num_samples: 256}
tasks: [retrieval]
steps:
  - prune: {ratio: 0.3}
  - quantize: {scheme: W8A8}
export: {to: onnx, runners: [onnxruntime, openvino]}
gates: {max_drop: {retrieval.image_to_text_r1: 0.02}, min_speedup: 1.5, max_size: 0.5}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmcompress.errors import UsageError, closest


@dataclass(frozen=True)
class Step:
    """One pass by name, with the parameters the recipe gives (the others are the pass's defaults)."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """Which data is used for what; see `mmcompress.data.open_data` for what can be named."""

    calibration: str = ""
    """Seen by passes: calibration, importance, distillation."""
    evaluation: str = ""
    """Seen by nothing but the measurements."""
    num_samples: int = 128
    """How many samples calibration looks at."""
    evaluation_samples: int = 0
    """How many samples are evaluated; 0 means all."""
    batch_size: int = 16


@dataclass(frozen=True)
class Export:
    """What is exported at the end, and on which runtimes it is compared with the original."""

    to: str = ""
    """"onnx" or "" (nothing); engines are made from the result, by ``mmc export --to tensorrt``."""
    precision: str = "float32"
    runners: tuple[str, ...] = ()
    threads: int = 0
    """0: as many as OMP_NUM_THREADS says, else all cores this process may use."""
    batch: int = 1
    rounds: int = 30


@dataclass(frozen=True)
class Gates:
    """What must hold of the result; a failed gate ends the run with exit code 3."""

    max_drop: dict[str, float] = field(default_factory=dict)
    """Metric name -> largest loss that is accepted, in the metric's own unit (0.02 is two points of R@1)."""
    min_speedup: float = 0.0
    """Of the slowest tower listed under export, against the original on its best runner."""
    max_size: float = 0.0
    """Bytes of the weights as a share of the original's."""


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: what is recorded in mmc.json is exactly this."""

    steps: tuple[Step, ...]
    seed: int = 0
    device: str = "cpu"
    tasks: tuple[str, ...] = ()
    """What is measured; by default retrieval; of a model that answers in text transcription, vqa or captioning, as the data is."""
    control: bool = True
    """Compare pruning and merging with a random selection at the same ratio."""
    data: Data = field(default_factory=Data)
    export: Export = field(default_factory=Export)
    gates: Gates = field(default_factory=Gates)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists, in the form `parse` reads."""
        document = dataclasses.asdict(self)
        document["steps"] = [{step.name: dict(step.params)} for step in self.steps]
        return _plain(document)

    def to_yaml(self) -> str:
        """Return the YAML text of the resolved recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; `overrides` are ``--set`` values such as "prune.ratio=0.5". Raises UsageError."""
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UsageError(
            f"there is no recipe {path}", hint="give a YAML file; the project's recipes/ has examples"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="give a YAML file") from error
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(
            f"{path} is not YAML: {' '.join(str(error).split())}", hint="check the indentation there"
        ) from error
    return parse(document, overrides)


def parse(document: Any, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe a YAML document says. Raises UsageError naming the wrong key and the closest right one."""
    if not isinstance(document, dict):
        raise UsageError(
            f"a recipe is a mapping with 'steps'; this is a {type(document).__name__}", hint="see recipes/"
        )
    document = _underscored(document)
    _check_keys(document, Recipe, "recipe")
    steps = [_step(item) for item in _list(document.pop("steps", []), "steps")]
    sections = {name: _section(kind, document.pop(name, None) or {}, name) for name, kind in SECTIONS.items()}
    made = _fill(Recipe, {**document, **sections, "steps": tuple(steps)}, "recipe")
    for override in overrides:
        made = _override(made, override)
    if not made.steps:
        raise UsageError("the recipe has no steps", hint="add at least one pass under 'steps:'; mmc passes lists them")
    return made


SECTIONS: dict[str, type] = {"data": Data, "export": Export, "gates": Gates}
CHOICES: dict[str, tuple[str, ...]] = {
    "export.to": ("", "onnx"),
    "export.precision": ("float32", "float16", "bfloat16"),
}


def _step(item: Any) -> Step:
    if isinstance(item, str):
        return Step(item.replace("_", "-"))
    if not isinstance(item, dict) or len(item) != 1:
        raise UsageError(f"a step is 'pass: {{parameter: value}}'; this is {item!r}", hint="start each step with '- '")
    ((name, params),) = item.items()
    if params is not None and not isinstance(params, dict):
        raise UsageError(
            f"steps.{name} is {params!r}; expected parameters", hint=f"write '{name}: {{parameter: value}}'"
        )
    return Step(str(name).replace("_", "-"), {str(k).replace("-", "_"): v for k, v in (params or {}).items()})


def _override(recipe: Recipe, text: str) -> Recipe:
    """Apply one ``a.b=value``: a section's key, a top-level key, or a parameter of every step of that pass."""
    path, equals, raw = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text} has no '='", hint="write --set prune.ratio=0.5")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text} is not YAML: {' '.join(str(error).split())}", hint="quote the value") from error
    head, _, key = path.strip().partition(".")
    key = key.replace("-", "_")
    if not key:
        head = head.replace("-", "_")
        if head not in {f.name for f in dataclasses.fields(Recipe)} - {"steps", *SECTIONS}:
            raise UsageError(f"--set {text} names no key", hint="write --set pass.parameter=value")
        return _fill(Recipe, {**vars(recipe), head: value}, "recipe")
    if head in SECTIONS:
        changed = _section(SECTIONS[head], {**vars(getattr(recipe, head)), key: value}, head)
        return dataclasses.replace(recipe, **{head: changed})
    name = head.replace("_", "-")
    if name not in {step.name for step in recipe.steps}:
        known = [*SECTIONS, *(step.name for step in recipe.steps)]
        raise UsageError(f"--set {text}: the recipe has no step '{head}'", hint=closest(head, known))
    steps = tuple(Step(step.name, {**step.params, key: value}) if step.name == name else step for step in recipe.steps)
    return dataclasses.replace(recipe, steps=steps)


def _section(kind: type, document: Any, where: str) -> Any:
    if not isinstance(document, dict):
        raise UsageError(f"{where} is {document!r}; expected a mapping", hint=f"keys: {', '.join(_keys(kind))}")
    document = _underscored(document)
    _check_keys(document, kind, where)
    return _fill(kind, document, where)


def _fill(kind: type, values: dict[str, Any], where: str) -> Any:
    """Build the dataclass, checking every value against its default's type."""
    checked = {}
    for entry in dataclasses.fields(kind):
        if entry.name not in values:
            continue
        value = values[entry.name]
        factory = entry.default_factory
        default = factory() if factory is not dataclasses.MISSING else entry.default
        name = f"{where}.{entry.name}"
        checked[entry.name] = _typed(value, default, name)
        if name in CHOICES and value not in CHOICES[name]:
            known = ", ".join(choice or "nothing" for choice in CHOICES[name])
            raise UsageError(f"{name} is '{value}'; expected one of {known}", hint=f"default: {default!r}")
    return kind(**checked)


def _underscored(document: dict[str, Any]) -> dict[str, Any]:
    """Both spellings of a key are accepted."""
    return {str(key).replace("-", "_"): value for key, value in document.items()}


def _typed(value: Any, default: Any, where: str) -> Any:
    if default is dataclasses.MISSING or dataclasses.is_dataclass(default):
        return value
    if isinstance(default, tuple):
        return tuple(str(item) for item in _list(value, where))
    if isinstance(default, dict):
        numbers = isinstance(value, dict) and all(
            isinstance(item, int | float) and not isinstance(item, bool) for item in value.values()
        )
        if not numbers:
            raise UsageError(f"{where} is {value!r}; expected a mapping of names to numbers", hint="{metric: 0.02}")
        return {str(key): float(item) for key, item in value.items()}
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise UsageError(f"{where} is {value!r}; expected {type(default).__name__}", hint=f"default: {default!r}")
    if isinstance(value, int | float) and not value >= 0:  # so that NaN is refused too
        raise UsageError(f"{where} is {value}; expected 0 or more", hint=f"default: {default!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise UsageError(
            f"{where} is {value!r}; expected a list", hint="write each item on a line of its own after '- '"
        )
    return list(value)


def _keys(kind: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(kind)]


def _check_keys(document: dict[str, Any], kind: type, where: str) -> None:
    known = _keys(kind)
    for key in document:
        if key not in known:
            raise UsageError(f"{where} has no key '{key}'", hint=closest(str(key), known))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
