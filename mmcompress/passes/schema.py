"""The parameters of a pass, read from its source without importing it.

A pass is a frozen dataclass whose fields are its recipe keys and its command-line options; the docstring under a field is its
help text. Importing a pass costs seconds (torch), and neither `--help` nor checking a recipe needs that.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcompress.errors import UsageError, closest

SCALARS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass(frozen=True)
class Parameter:
    """One field: `kind` is a scalar name, "list[<scalar>]" or "dict[str, <scalar>]"."""

    name: str
    kind: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    optional: bool = False

    def coerce(self, value: Any, where: str) -> Any:
        """Return `value` as this parameter's type. Raises UsageError saying what was given and what was expected."""
        if value is None or (self.optional and value in ("none", "null")):
            if self.optional:
                return None
            raise UsageError(
                f"{where}.{self.name} is empty; expected {self.expected}", hint="remove the key to get the default"
            )
        try:
            made = self._convert(value)
        except (TypeError, ValueError):
            raise UsageError(
                f"{where}.{self.name} is {value!r}; expected {self.expected}", hint=f"default: {self.default!r}"
            ) from None
        if self.choices and made not in self.choices:
            raise UsageError(
                f"{where}.{self.name} is {value!r}; expected {self.expected}", hint=closest(str(value), self.choices)
            )
        return made

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(self.choices) if self.choices else self.kind

    def _convert(self, value: Any) -> Any:
        if self.kind.startswith("list["):
            inner = SCALARS[self.kind[5:-1]]
            parts = _parts(value) if isinstance(value, str) else value
            if not isinstance(parts, list | tuple):
                raise TypeError
            return tuple(_scalar(inner, part) for part in parts)
        if self.kind.startswith("dict["):
            inner = SCALARS[self.kind[len("dict[str,") : -1]]
            if isinstance(value, str):
                value = dict(part.split("=", 1) for part in _parts(value))
            if not isinstance(value, dict):
                raise TypeError
            return {str(key): _scalar(inner, item) for key, item in value.items()}
        return _scalar(SCALARS[self.kind], value)


def _parts(text: str) -> list[str]:
    """Return the parts of "a, b"; none for an empty text."""
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    made = kind(value)
    # Every limit is a comparison, and nan passes most of them.
    if kind is float and not math.isfinite(made):
        raise ValueError
    return made


@dataclass(frozen=True)
class Schema:
    """A pass's first docstring paragraph and its parameters, in order."""

    summary: str
    description: str
    parameters: tuple[Parameter, ...]

    def coerce(self, params: dict[str, Any], where: str) -> dict[str, Any]:
        """Return `params` with every value of its declared type. Raises UsageError for unknown keys and wrong types."""
        known = {parameter.name: parameter for parameter in self.parameters}
        made = {}
        for raw, value in params.items():
            key = str(raw).replace("-", "_")
            if key not in known:
                raise UsageError(f"{where} has no parameter '{raw}'", hint=closest(key, known))
            made[key] = known[key].coerce(value, where)
        return made


@functools.cache
def read_schema(module: str, cls: str) -> Schema:
    """Parse the dataclass `cls` in `module`'s source file."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is listed in PASSES but does not exist"
    assert spec.origin is not None, f"{module} has no source file"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)
    parameters = []
    for node, following in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        annotation = ast.unparse(node.annotation)
        if annotation.startswith("ClassVar"):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        assert node.value is not None, f"{cls}.{node.target.id} has no default: every parameter of a pass needs one"
        parameters.append(_parameter(node.target.id, annotation, _literal(node.value), text))
    doc = ast.get_docstring(body) or ""
    return Schema(" ".join(doc.split("\n\n")[0].split()), doc, tuple(parameters))


def _literal(node: ast.expr) -> Any:
    """A field's default: a literal, or field(default_factory=dict|lambda: literal)."""
    if isinstance(node, ast.Call):
        factory = next(keyword.value for keyword in node.keywords if keyword.arg == "default_factory")
        if isinstance(factory, ast.Lambda):
            return ast.literal_eval(factory.body)
        return {"dict": {}, "list": []}[ast.unparse(factory)]
    return ast.literal_eval(node)


def _parameter(name: str, annotation: str, default: Any, text: str) -> Parameter:
    optional = annotation.endswith("| None")
    annotation = annotation.removesuffix("| None").strip()
    if annotation.startswith("Literal["):
        choices = ast.literal_eval(f"({annotation[8:-1]},)")
        return Parameter(name, "str", default, text, choices, optional)
    if annotation.startswith("tuple["):
        annotation = "list[" + annotation[6:].split(",")[0] + "]"
    return Parameter(name, annotation.replace(" ", "").replace("dict[str,", "dict[str,"), default, text, (), optional)
