"""`mmc distill --train quantized-weights`: by hand and in a recipe, what it needs, and what it refuses before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmcompress import checkpoint
from mmcompress.jobs import estimate as estimating
from mmcompress.measure.cost import cost_of
from mmcompress.surgery.master_weights import holders
from tests.cli.conftest import Mmc

QUANTIZE = ("--scheme", "W4A16", "--group-size", "16", "--sensitivity-samples", "0")
TRAIN = ("--train", "quantized-weights", "--steps", "2", "--batch-size", "3", "--learning-rate", "1e-3", "--keep-worse")
STEPS = [
    {"quantize": {"scheme": "W4A16", "group_size": 16, "sensitivity_samples": 0}},
    {"distill": {"train": "quantized-weights", "steps": 2, "batch_size": 3, "learning_rate": 1e-3, "keep_worse": True}},
]  # fmt: skip


@pytest.fixture
def four_bits(mmc: Mmc, saved: Path, tmp_path: Path) -> Path:
    out = tmp_path / "four-bits"
    assert mmc("quantize", saved, "-o", out, *QUANTIZE).code == 0
    return out


def facts(artifact: Path) -> dict[str, Any]:
    records = json.loads((artifact / "mmc.json").read_text())["records"]
    assert [record["pass"] for record in records] == ["quantize", "distill"]
    found: dict[str, Any] = records[1]["facts"]
    return found


def test_by_hand_and_as_a_recipe(mmc: Mmc, saved: Path, four_bits: Path, data: Path, tmp_path: Path) -> None:
    by_hand, recipe, together = tmp_path / "by-hand", tmp_path / "recipe.yaml", tmp_path / "together"
    done = mmc("distill", four_bits, "-o", by_hand, *TRAIN, "--teacher", saved, "--data", data)
    assert done.code == 0, done.err
    recipe.write_text(json.dumps({"steps": STEPS}))
    done = mmc("compress", saved, recipe, "-o", together, "--data", data)
    assert done.code == 0, done.err
    for artifact in (by_hand, together):
        found = facts(artifact)["quantized_weights"]
        assert found["from_teacher"] == 1.0
        assert found["changed"] > 0
    before, *after = [(artifact / "model.safetensors").read_bytes() for artifact in (four_bits, by_hand, together)]
    assert after[0] == after[1] != before
    assert len(after[0]) == len(before)
    layers = holders(checkpoint.load(by_hand).model)
    assert facts(by_hand)["quantized_weights"]["count"] == sum(each.weight_shape.numel() for each in layers.values())


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_cannot_train_is_refused_first(
    more: tuple[str, ...], mmc: Mmc, saved: Path, four_bits: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ("-o", out, *TRAIN, "--data", data, *more)
    floats = mmc("distill", saved, *given, "--teacher", saved)
    assert floats.code == 2
    assert "no layer of vision or text is quantized" in floats.error
    own = mmc("distill", four_bits, *given)
    assert own.code == 2
    assert "the teacher would be the quantized model itself" in own.error
    assert not out.exists()


def test_the_memory_of_masters_is_foreseen(
    mmc: Mmc, saved: Path, four_bits: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reported in MiB, which these models hardly fill: as if each byte were a thousand.
    for name in ("TRAINED", "ROUNDED", "TAUGHT"):
        monkeypatch.setattr(estimating, name, 1000 * getattr(estimating, name))

    def memory(model: Path, train: str, *steps: Any) -> float:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps({"steps": [*steps, {"distill": {"train": train, "teacher": str(saved)}}]}))
        found = mmc("compress", model, recipe, "-o", tmp_path / "out", "--data", data, "--dry-run", "--json")
        assert found.code == 0, found.err
        return float(found.document["memory_mib"])

    bundle, mib = checkpoint.load(four_bits), 2**20
    count = sum(layer.weight_shape.numel() for layer in holders(bundle.model).values())
    size = cost_of(bundle).bytes
    assert memory(four_bits, "all") == round(5500 * size / mib)
    # Master, rounded master, gradient, two moments, the teacher's: six floats, and a byte.
    assert memory(four_bits, "quantized-weights") == round((5500 * size + 25_000 * count) / mib)
    size = cost_of(checkpoint.load(saved)).bytes
    assert memory(saved, "quantized-weights", STEPS[0]) == round((5500 + 1250) * size / mib)
