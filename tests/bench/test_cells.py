"""Results come back as they were written, and people can read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import cells


def test_results_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    rate: dict[str, Any] = {"value": 0.25, "low": -1e-7, "high": 30.0}
    document = {
        "plain": {**rate, "n": 12},
        "without n": rate,
        "more": {**rate, "n": 3, "chance": 0.5, "difference": {**rate, "n": 3}},
        "rows": [{"value": 1, "low": 2, "high": 3}, {"value": 1, "low": 2}, "0.1 [0.2]", [1.5, None, True]],
    }
    cells.write_result(tmp_path / "one.json", document)
    assert cells.read("one") == document
    written = json.loads((tmp_path / "one.json").read_text())
    assert written["plain"] == "0.25 [-1e-07, 30.0] n=12"
    assert written["more"] == {
        "is": written["plain"].replace("12", "3"),
        "chance": 0.5,
        "difference": written["more"]["is"],
    }


def test_numbers_have_five_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    rate = {"value": 0.123456789, "low": 2 / 3, "high": 1234567.8}
    cells.write_result(tmp_path / "two.json", {"rate": rate, "bytes": 123456789})
    assert cells.read("two") == {"rate": {"value": 0.12346, "low": 0.66667, "high": 1234600.0}, "bytes": 123456789}


def test_what_is_not_there_is_empty() -> None:
    assert cells.read("nothing") == {}
