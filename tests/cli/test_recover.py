"""`--recover`: training follows, of the towers that changed, as a step of its own; and times are written as people write them."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from mmcompress.cli.options import Duration
from tests.cli.conftest import Mmc

PRUNE = ("--ratio", "0.1", "--score", "magnitude", "--compensate", "none")


@pytest.mark.parametrize(("text", "minutes"), [("90s", 1.5), ("10m", 10.0), ("1.5h", 90.0)])
def test_times(text: str, minutes: float) -> None:
    assert Duration().convert(text, None, None) == pytest.approx(minutes)


@pytest.mark.parametrize("text", ["10", "m", "", "0m", "-1m", "nanm", "infh", "10 parsecs"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(click.BadParameter, match="such as 90s, 10m or 1h"):
        Duration().convert(text, None, None)


def test_training_follows_of_the_towers_that_changed(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    given = ("--towers", "vision", "--recover", "1s", "--data", data, "--json")
    done = mmc("prune", saved, "-o", tmp_path / "out", *PRUNE, *given)
    assert done.code == 0, done.err
    first, second = json.loads((tmp_path / "out" / "mmc.json").read_text())["records"]
    assert (first["pass"], second["pass"]) == ("prune", "distill")
    assert second["params"] == {"max_minutes": pytest.approx(1 / 60), "towers": "vision"}
    assert second["facts"]["towers"] == ["vision"]
    assert second["facts"]["steps"] >= 1


def test_without_data_it_is_refused_before_anything_is_done(mmc: Mmc, saved: Path, tmp_path: Path) -> None:
    done = mmc("prune", saved, "-o", tmp_path / "out", *PRUNE, "--recover", "10m", "-v")
    assert done.code == 2
    assert "distill needs data" in done.error
    assert "step 1" not in done.err


def test_search_and_recover(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    given = ("--ratio", "0.1", "--steps", "2", "--batch-size", "3", "--recover", "1s", "--data", data)
    done = mmc("search", saved, "-o", tmp_path / "out", *given)
    assert done.code == 0, done.err
    first, second = json.loads((tmp_path / "out" / "mmc.json").read_text())["records"]
    assert (first["pass"], second["pass"]) == ("search-prune", "distill")
    assert first["facts"]["recount"] == first["plan"]["after"]


def test_by_turns(mmc: Mmc, saved: Path, data: Path, tmp_path: Path) -> None:
    """Of what is left each round takes the same share, of both towers as asked."""
    given = ("--rounds", "2", "--recover", "2s", "--data", data, "--ratios", "vision=0.19,text=0.1", "--no-control")
    done = mmc(
        "prune", saved, "-o", tmp_path / "out", "--score", "magnitude", "--compensate", "none", "--multiple", 1, *given
    )
    assert done.code == 0, done.err
    records = json.loads((tmp_path / "out" / "mmc.json").read_text())["records"]
    assert [record["pass"] for record in records] == ["prune", "distill", "prune", "distill"]
    assert [record["params"]["max_minutes"] for record in records[1::2]] == [pytest.approx(1 / 60)] * 2
    whole, half, end = records[0]["plan"]["before"], records[0]["plan"]["after"], records[2]["plan"]["after"]
    assert records[2]["plan"]["before"] == half
    for tower, share, part in (("vision", 0.19, 0.1), ("text", 0.1, 0.051317)):
        shares = [record["params"]["ratios"][tower] for record in records[::2]]
        assert shares == [pytest.approx(part, abs=2e-6)] * 2
        assert half[tower]["parameters"] <= (1 - part) * whole[tower]["parameters"]
        left = end[tower]["parameters"] / whole[tower]["parameters"]
        assert 1 - share - 0.03 < left <= 1 - share


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--ratio", "0.1", "--rounds", "2"), "--recover does not say"),
        (("--target", "1e4", "--rounds", "2", "--recover", "1s"), "prune.target is given"),
        (("--latency-ms", "4", "--rounds", "2", "--recover", "1s"), "prune.latency_ms is given"),
        (("--ratio", "0.1", "--rounds", "0", "--recover", "1s"), "x>=1"),
    ],
)
def test_what_cannot_be_done_by_turns(
    mmc: Mmc, saved: Path, data: Path, tmp_path: Path, given: tuple[str, ...], said: str
) -> None:
    done = mmc("prune", saved, "-o", tmp_path / "out", "--data", data, *given)
    assert done.code == 2
    assert said in done.error
    assert not (tmp_path / "out").exists()
