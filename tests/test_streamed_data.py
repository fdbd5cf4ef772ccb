"""With data, layer by layer decides and writes what a run in memory does, and goes on where it was killed."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress import checkpoint, passes, room, streamed
from mmcompress.data import Dataset
from mmcompress.jobs import compress as job
from mmcompress.kept import Kept
from mmcompress.opened import opened
from mmcompress.passes import quantize_fit, quantize_judge, quantize_moments
from mmcompress.passes.base import Context
from mmcompress.passes.quantize_calibrate import batches, watch
from mmcompress.passes.quantize_moments import linears_of
from mmcompress.passes.quantize_smooth import USUAL
from mmcompress.recipe import Recipe, parse
from mmcompress.surgery.watch import Sums
from tests import tiny
from tests.test_streamed import same_weights, stored, without_measurements

SAMPLES = 7
FOUR = {"scheme": "W4A16", "group_size": 16}
GPTQ = {**FOUR, "rounding": "gptq"}
FITTED = {**FOUR, "rounding": "hqq", "scaling": "awq", "clip": True}
ALL = {**FITTED, "rounding": "gptq"}
STATIC = {"scheme": "W8A8", "smooth": 0.75}
RUNS: list[tuple[str, dict[str, Any]]] = [
    *((name, params) for name in ("llava_dinov2", "dual_encoder_dinov2") for params in (GPTQ, FITTED, STATIC)),
    ("qwen2_5_vl", {**GPTQ, "scaling": "awq", "balance": "text", "correct_bias": True}),
    ("clip", {**ALL, "correct_bias": True, "keep_float": ("*.v_proj",)}),
    ("qwen3_vl", {"scheme": "W8A16", "scaling": "awq", "language_scheme": "W4A8"}),
    ("clip", {**FOUR, "rounding": "adaround", "scaling": "equalize", "towers": ["vision"]}),
    ("whisper", {"scheme": "W8A8", "observer": "mse", "smooth": 0.5}),
    ("clip", {"scheme": "W8A8", "activations": "dynamic"}),
    # Too much is lost: groups are judged alone, take 8 bits, and stay floats.
    ("llava_clip", {**GPTQ, "min_cosine": 0.9999}),
    ("clip", {**STATIC, "min_cosine": 0.9995, "sensitivity": True, "target": "openvino", "logits": "int8"}),
]


LLAVA = "llava_dinov2"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine in which no model fits."""
    monkeypatch.setattr(room, "available", lambda: 1)


def recipe(params: dict[str, Any], **data: Any) -> Recipe:
    sampling = {"calibration": "here", "num_samples": SAMPLES, "batch_size": 3, **data}
    return parse({"steps": [{"quantize": params}], "data": sampling})


def show(monkeypatch: pytest.MonkeyPatch, name: str, count: int = SAMPLES) -> Dataset:
    data = tiny.data(name, count)
    monkeypatch.setattr(job, "open_data", lambda where: data)
    return data


def named(value: Any) -> str:
    return "-".join(str(each) for each in value.values()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("name", "params"), RUNS, ids=named)
def test_the_files_are_those_of_a_run_in_memory(
    name: str, params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored(name, tmp_path / "model")
    show(monkeypatch, name)
    job.compress(model, recipe(params), tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(room, "available", lambda: 1)
        patched.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("the whole model was loaded"))
        job.compress(model, recipe(params), tmp_path / "streamed")
    one, other = ((tmp_path / kind / "model.safetensors").read_bytes() for kind in ("streamed", "whole"))
    first, second = (
        without_measurements(json.loads((tmp_path / k / "mmc.json").read_text())) for k in ("streamed", "whole")
    )
    assert first == second
    assert one == other


@pytest.mark.parametrize("name", [*tiny.EVERY, *tiny.MIXTURES])
def test_every_model_computes_in_step_what_it_does_alone(name: str, tmp_path: Path) -> None:
    """One sample a batch, some without a picture; each layer is given everything before it is reached, and is reached once."""
    model = stored(name, tmp_path / "model")
    whole, context = checkpoint.load(model), Context(data=tiny.data(name, 5), num_samples=5, batch_size=1)
    with opened(model, [model / "model.safetensors"], to_run=True) as bundle:
        made = streamed.Streamed(**vars(bundle))
        for tower in whole.towers():
            inputs = list(batches(whole, tower.name, context, 5, "test"))
            for got, one in zip(made.encode_all(tower.name, inputs), inputs, strict=True):
                with torch.inference_mode():
                    wanted = whole.encode(tower.name, one)
                # torch has a fast path of its own for nn.MultiheadAttention, which SigLIP's head is.
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 if "siglip" in name else 0)
            paths = [path for path in linears_of(made, [n for n, _ in made.model.named_modules()]) if tower.owns(path)]
            calls: list[dict[str, int]] = [dict.fromkeys(paths, 0), dict.fromkeys(paths, 0)]
            for each, seen in zip((whole, made), calls, strict=True):

                def record(path: str, tokens: Tensor, seen: dict[str, int] = seen) -> None:
                    seen[path] += len(tokens)

                complete = lambda path, seen=seen: seen.__setitem__(path, -seen[path])  # noqa: E731
                modules = {path: each.module(path) for path in paths}
                watch(each, each.tower(tower.name), modules, record, context, "test", complete=complete)
            assert calls[0] == calls[1]
            assert any(calls[0].values())


class Killed(BaseException):
    """What leaves everything where it is, as a killed process does."""


def killed_at(monkeypatch: pytest.MonkeyPatch, where: str, often: int) -> None:
    """Kill the run when it has done something `often` times."""
    owner, name = {
        "fitted": (Kept, "__setitem__"),
        "judged": (quantize_judge.Judge, "cosine"),
        "written": (streamed.Shards, "_write"),
    }[where]
    done, real = 0, getattr(owner, name)

    def counted(self: Any, *args: Any) -> Any:
        nonlocal done
        if done == often:
            raise Killed
        done += 1
        return real(self, *args)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("params", "where", "often"),
    [
        *((ALL, "fitted", often) for often in (3, 71)),
        (ALL, "judged", 1),
        (ALL, "written", 3),
        ({**GPTQ, "min_cosine": 0.9999, "correct_bias": True}, "written", 0),
        (STATIC, "fitted", 30),
        (STATIC, "judged", 0),
        (STATIC, "written", 0),
    ],
    ids=named,
)
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    params: dict[str, Any], where: str, often: int, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = stored(LLAVA, tmp_path / "model"), recipe(params)
    show(monkeypatch, LLAVA)
    monkeypatch.setattr(streamed, "SHARD_BYTES", 20_000)
    fitted: list[frozenset[str]] = []
    best = quantize_fit._best
    monkeypatch.setattr(
        quantize_fit,
        "_best",
        lambda settings, layers, *more: (fitted.append(frozenset(layers)), best(settings, layers, *more))[1],
    )
    job.compress(model, wanted, tmp_path / "whole")
    once = list(fitted)
    fitted.clear()
    with monkeypatch.context() as patched:
        killed_at(patched, where, often)
        with pytest.raises(Killed):
            job.compress(model, wanted, tmp_path / "out")
    before = list(fitted)
    job.compress(model, wanted, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    first, second = (json.loads((tmp_path / kind / "mmc.json").read_text()) for kind in ("whole", "out"))
    assert without_measurements(first) == without_measurements(second)
    # The one that was being kept is fitted again, no other.
    assert len(fitted) <= len(once) + 1
    assert set(fitted) == set(once)
    if where != "fitted":
        assert before == fitted[: len(before)]
    assert not (tmp_path / ".out.partial").exists()


def test_finished_towers_are_not_looked_at_again(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stored(LLAVA, tmp_path / "model")
    show(monkeypatch, LLAVA)
    looked: list[str] = []
    look = streamed.Streamed.encode_all
    monkeypatch.setattr(
        streamed.Streamed, "encode_all", lambda self, tower, *more: (looked.append(tower), look(self, tower, *more))[1]
    )
    with monkeypatch.context() as patched:
        killed_at(patched, "written", 0)
        with pytest.raises(Killed):
            job.compress(model, recipe(STATIC), tmp_path / "out")
    assert looked == ["vision"] * 3 + ["language"] * 3  # the ranges, the judge's floats, the judge's layers
    looked.clear()
    job.compress(model, recipe(STATIC), tmp_path / "out", resume=True)
    assert looked == []


def test_nothing_is_searched_layer_by_layer(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stored("clip", tmp_path / "model")
    show(monkeypatch, "clip")
    monkeypatch.setattr(streamed, "SHARD_BYTES", 20_000)
    job.compress(model, recipe({"scheme": "W8A8"}), tmp_path / "own")
    job.compress(model, recipe({"scheme": "W8A8", "smooth": USUAL}), tmp_path / "given")
    assert same_weights(tmp_path / "own", tmp_path / "given")


def test_a_run_in_memory_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stored(LLAVA, tmp_path / "model")
    show(monkeypatch, LLAVA)
    job.compress(model, recipe(GPTQ), tmp_path / "whole")
    with monkeypatch.context() as patched:
        killed_at(patched, "judged", 0)
        with pytest.raises(Killed):
            job.compress(model, recipe(GPTQ), tmp_path / "out")
    fitted: list[str] = []
    best = quantize_fit._best
    monkeypatch.setattr(quantize_fit, "_best", lambda *given: (fitted.extend(given[1]), best(*given))[1])
    job.compress(model, recipe(GPTQ), tmp_path / "out", resume=True)
    one, other = ((tmp_path / kind / "model.safetensors").read_bytes() for kind in ("whole", "out"))
    assert one == other
    assert fitted
    assert not any("vision" in path for path in fitted)


def test_one_moment_is_held_at_a_time(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of layers and batches."""
    model = stored("clip", tmp_path / "model")
    show(monkeypatch, "clip")
    made: list[weakref.ref[Sums]] = []
    most = 0

    class Counted(Sums):
        def add(self, states: Tensor, weights: Tensor | None = None) -> None:
            nonlocal most
            super().add(states, weights)
            held = [sums for ref in made if (sums := ref()) is not None and sums.second is not None]
            most = max(most, len(held))

    def counted(full: bool) -> Sums:
        sums = Counted(full)
        made.append(weakref.ref(sums))
        return sums

    monkeypatch.setattr(quantize_moments, "Sums", counted)
    job.compress(model, recipe({**GPTQ, "sensitivity_samples": 0}), tmp_path / "out")
    assert len(made) > 20
    assert most == 1


@pytest.mark.parametrize(
    ("params", "streams"),
    [
        (GPTQ, True),
        ({**GPTQ, "balance": "text"}, True),
        ({**FOUR, "rounding": "adaround"}, True),
        (STATIC, True),
        ({"scheme": "W8A16"}, True),
        ({**GPTQ, "balance": "modality"}, False),
        ({"scheme": "auto", "bits": 6.0}, False),
        ({"scheme": "NF4"}, False),
    ],
)
def test_what_streams_with_data(params: dict[str, Any], streams: bool) -> None:
    assert streamed.can_stream(passes.build("quantize", params), data=True) == streams


def test_only_what_does_not_fit_and_is_not_measured_streams_with_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored("clip", tmp_path / "model")

    def chosen(wanted: Recipe) -> bool:
        return job.streams(wanted, job.pipeline.stages(wanted.steps), model)

    size = room.bytes_as([model / "model.safetensors"], 4)
    for free, streams in ((round(1.4 * size), True), (round(1.6 * size), False), (None, False)):
        monkeypatch.setattr(room, "available", lambda free=free: free)
        assert chosen(recipe(GPTQ)) == streams
    monkeypatch.setattr(room, "available", lambda: 1)
    assert not chosen(recipe(GPTQ, evaluation="there"))
    sampling = {"data": {"calibration": "here"}}
    assert not chosen(parse({"steps": [{"quantize": GPTQ}], "device": "cuda", **sampling}))
    assert not chosen(parse({"steps": [{"merge-tokens": {"keep": 0.7}}, {"quantize": GPTQ}], **sampling}))
    assert chosen(parse({"steps": [{"merge-tokens": {"keep": 0.7}}, {"quantize": {"scheme": "W8A16"}}]}))
