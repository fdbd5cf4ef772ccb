"""`--dry-run`: the time of a plan, from the time of one sample."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcompress import checkpoint, room, streamed
from mmcompress.jobs import estimate as estimating
from mmcompress.passes import quantize_moments
from mmcompress.progress import Silent
from mmcompress.recipe import parse
from tests import tiny


def test_controls_are_planned_and_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tiny.bundle("clip"), tmp_path / "model")
    pairs = zip(tiny.images(6), tiny.texts(6), strict=True)
    rows = []
    for index, (image, text) in enumerate(pairs):
        image.save(tmp_path / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": text}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(estimating, "_seconds_per_sample", lambda *_: 10.0)
    steps = [{"merge-tokens": {"keep": 0.5}}, {"prune": {"score": "magnitude", "compensate": "bias"}}]
    data = {"calibration": str(tmp_path), "evaluation": str(tmp_path), "num_samples": 4}

    def planned(**settings: object) -> list[int]:
        recipe = parse({"steps": steps, "data": data, **settings})
        found = estimating.estimate(tmp_path / "model", recipe, tmp_path / "out", progress=Silent())
        return [*(step["seconds"] for step in found["steps"]), found["seconds"]]

    measured = 6 * 10 + round(estimating.STATISTICS)
    first, second = measured, 2 * 4 * 10 + measured
    assert planned(control=False) == [first, second, first + second + measured]
    assert planned() == [2 * first, 2 * second, 2 * (first + second) + measured]
    exported = round(4 * estimating.EXPORTED)  # two towers, of the original and of the result
    assert planned(export={"to": "onnx"})[-1] == 2 * (first + second) + measured + exported


def test_what_goes_layer_by_layer_is_planned_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tiny.bundle("clip"), tmp_path / "model")
    data = tiny.write_pairs(tmp_path / "pairs", 6)

    def planned(**params: object) -> dict[str, float]:
        step = {"quantize": {"scheme": "W4A16", "group_size": 16, "sensitivity_samples": 0, **params}}
        recipe = parse({"steps": [step], "data": {"calibration": str(data), "num_samples": 4}})
        return estimating.estimate(tmp_path / "model", recipe, tmp_path / "out", progress=Silent())

    monkeypatch.setattr(room, "available", lambda: 1)
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("the weights were read"))
    monkeypatch.setattr(streamed, "SHARD_BYTES", 0)
    monkeypatch.setattr(estimating, "STREAMED", 1e12)
    monkeypatch.setattr(estimating, "_seconds_per_sample", lambda bundle, *_: bundle.embed_images(tiny.images(1)).size)
    assert planned()["seconds"] == 0  # to the nearest, no samples are looked at
    monkeypatch.setattr(quantize_moments, "MOMENTS_BYTES", 1)
    assert planned(rounding="gptq")["seconds"] == 4 * 24  # one look, however little room moments have
