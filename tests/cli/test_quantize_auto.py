"""`mmc quantize --scheme auto`: what it prints, what it records, and how it fails."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mmcompress import checkpoint
from tests.cli.conftest import Mmc

AUTO = ("--scheme", "auto", "--group-size", "16", "--min-cosine", "-1")


def test_a_table_of_what_was_judged_and_a_finding(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = mmc("quantize", saved, "-o", out, *AUTO, "--bits", "6", "--data", data, "--sensitivity")
    assert done.code == 0, done.err
    # The first thing said after the step's name is how it compares with one scheme for all.
    assert done.err.splitlines()[1].startswith("auto: 1 - cosine ")
    assert "auto loses less than any one scheme for all layers" in done.out
    assert "What quantizing each group of layers alone costs" in done.out
    plan = json.loads((out / "mmc.json").read_text())["records"][0]["plan"]
    options = [option for report in plan["towers"].values() for option in report["options"]]
    judged = [option for option in options if option["scheme"] != "W16A16"]
    shown = [line for line in done.out.splitlines() if line.startswith(("vision ", "text "))]
    assert len(shown) == len(judged)
    losses = [float(line.split()[-1]) for line in shown]
    assert losses == sorted(losses, reverse=True)
    assert sum(" yes " in line for line in shown) == sum(option["chosen"] for option in judged)
    assert plan["mixed"]["spent"] <= 6
    assert checkpoint.load(out).history[0].name == "quantize"


def test_other_schemes_have_the_table_too(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    words = ("quantize", saved, "-o", tmp_path / "out", "--scheme", "W8A16", "--data", data, "--sensitivity", "--json")
    rows = mmc(*words).document["sensitivity"]
    assert {row["scheme"] for row in rows} == {"W8A16"}
    assert {row["tower"] for row in rows} == {"vision", "text"}
    assert all(row["bytes_saved"] > 0 and row["chosen"] for row in rows)


def test_it_is_not_printed_unasked(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    found = mmc("quantize", saved, "-o", tmp_path / "out", *AUTO, "--bits", "6", "--data", data, "--json")
    assert found.document["sensitivity"] == []


def test_random_assignment_is_the_control(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    words = ("quantize", saved, "-o", tmp_path / "out", *AUTO, "--bits", "6", "--data", data, "--eval-data", data)
    found = mmc(*words, "--json").document
    assert "quantize (random)" in [row["stage"] for row in found["stages"]]
    assert any("random selection at the same ratio" in finding["text"] for finding in found["verdict"])


def test_a_budget_too_small_leaves_nothing_behind(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    found = mmc("quantize", saved, "-o", tmp_path / "out", *AUTO, "--bits", "2", "--data", data)
    assert found.code == 2
    assert "bits is 2; the least that vision and text can have is" in found.error
    assert not (tmp_path / "out").exists()


def test_without_the_solver(mmc: Mmc, saved: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == "highspy" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    found = mmc("quantize", saved, "-o", tmp_path / "out", *AUTO, "--bits", "6", "--data", data)
    assert found.code == 4
    assert "highspy" in found.error
    assert "mmcompress[mixed]" in found.err
    assert "step 1 of 1" not in found.err  # before anything was judged
