"""What bench/results/*.json hold, read and written as cells of tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20
ESTIMATE = "is"
WRITTEN = re.compile(r"(\S+) \[(\S+), (\S+)\](?: n=(\d+))?")


def read(name: str) -> dict[str, Any]:
    """Return a result as it was given to `write_result`; nothing where there is none."""
    path = RESULTS / f"{name}.json"
    return _opened(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}  # type: ignore[no-any-return]


def write_result(path: Path, document: Any) -> None:
    """Write a result on one line: numbers with five digits, more than any interval leaves, and estimates as people read them."""
    text = json.dumps(_closed(document), separators=(",", ":"), ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _closed(value: Any) -> Any:
    """Write {value, low, high, n} as "0.52 [0.49, 0.55] n=1642"; beside more, under the key ESTIMATE."""
    if isinstance(value, dict):
        rest = {key: _closed(each) for key, each in value.items()}
        if not rest.keys() >= {"value", "low", "high"}:
            return rest
        text = f"{rest.pop('value')} [{rest.pop('low')}, {rest.pop('high')}]"
        text += f" n={rest.pop('n')}" if "n" in rest else ""
        return {ESTIMATE: text, **rest} if rest else text
    if isinstance(value, list | tuple):
        return [_closed(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _opened(value: Any) -> Any:
    if isinstance(value, dict):
        rest = {key: _opened(each) for key, each in value.items()}
        return {**rest.pop(ESTIMATE), **rest} if ESTIMATE in rest else rest
    if isinstance(value, list):
        return [_opened(each) for each in value]
    found = WRITTEN.fullmatch(value) if isinstance(value, str) else None
    if not found:
        return value
    names = ("value", "low", "high", "n")
    return {name: json.loads(part) for name, part in zip(names, found.groups(), strict=True) if part is not None}


def machine(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['threads']} threads of {machine['cpu']}"


def interval(estimate: dict[str, Any], digits: int = 3) -> str:
    return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def points(difference: dict[str, Any]) -> str:
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
