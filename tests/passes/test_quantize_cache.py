"""quantize with a cache of integers: in torch, in batches, with and without it, beside other passes, in exported graphs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs import speed
from mmcompress.jobs.arrays import arrays_for
from mmcompress.jobs.bench_answers import AnswerTarget
from mmcompress.jobs.bench_targets import Source
from mmcompress.jobs.speed import compare_in_torch, example_arrays
from mmcompress.measure.answerer import artifact_answerer, bundle_answerer
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.progress import Silent
from mmcompress.recipe import Step
from mmcompress.surgery.cache_lengths import CACHE
from tests import tiny
from tests.passes.test_drop_visual_tokens import FAMILIES, asked, read, square

CACHED: tuple[str, dict[str, Any]] = ("quantize", {"scheme": "W16A16", "cache": "int8"})
# Target cpu lets engines round inputs, which torch does not.
W8A16: tuple[str, dict[str, Any]] = ("quantize", {"scheme": "W8A16", "cache": "int8", "target": "openvino"})
DROPS: dict[str, tuple[str, dict[str, Any]]] = {
    place: ("drop-visual-tokens", {"keep": 0.3, "after": (1,), "place": place}) for place in ("blocks", "mlp", "cache")
}
REDUCED: tuple[str, dict[str, Any]] = ("reduce-visual-tokens", {"keep": 0.5, "method": "grid"})
CHAINS = {
    "alone": (CACHED,),
    "with weights": (W8A16,),
    "after reduce": (REDUCED, CACHED),
    **{f"then drop from {place}": (CACHED, drop) for place, drop in DROPS.items()},
    **{f"after drop from {place}": (drop, CACHED) for place, drop in DROPS.items()},
}
every_chain = pytest.mark.parametrize("steps", CHAINS.values(), ids=CHAINS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def made(family: str, *steps: tuple[str, dict[str, Any]]) -> Bundle:
    bundle = tiny.bundle(family)
    for number, (name, params) in enumerate(steps, 1):
        pipeline.run_stage(bundle, pipeline.Stage(number, Step(name, params), build(name, params)), Context())
    return bundle


def answers_alike(bundle: Bundle, family: str) -> None:
    samples = asked(family)
    answers = bundle.generate(samples)
    assert answers == [bundle.generate([sample])[0] for sample in samples]
    bundle.model.generation_config.use_cache = False
    assert bundle.generate(samples) == answers


@every_family
def test_answers_depend_on_neither_batch_nor_cache(family: str) -> None:
    answers_alike(made(family, CACHED), family)


@every_chain
def test_beside_other_passes_too(steps: tuple[tuple[str, dict[str, Any]], ...], tmp_path: Path) -> None:
    bundle = made("llava_clip", *steps)
    written = checkpoint.save(bundle, tmp_path / "model")
    assert not written.plain_transformers
    again, inputs, samples = (
        checkpoint.load(tmp_path / "model"),
        bundle.example_inputs("language", 2),
        asked("llava_clip"),
    )
    for one in (again, copy.deepcopy(bundle)):
        with torch.no_grad():
            assert torch.equal(one.encode("language", inputs), bundle.encode("language", inputs))
        assert one.generate(samples) == bundle.generate(samples)
    answers_alike(again, "llava_clip")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "paligemma"])
def test_what_is_said_with_a_cache_is_what_is_said_without(family: str) -> None:
    """Of every token, against all at once; one row begins with padding. PaliGemma's prompt looks both ways: its half is another."""
    bundle, plain = made(family, CACHED), tiny.bundle(family)
    ids = torch.randint(10, 40, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache, parts = None, []
    with torch.no_grad():
        whole, floats = (
            one.model.model(input_ids=ids, attention_mask=mask, use_cache=False) for one in (bundle, plain)
        )
        for start, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
            more = {} if cache is None else {CACHE: cache}
            step = bundle.model.model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **more)
            parts.append(step.last_hidden_state)
            cache = getattr(step, CACHE)
    slowly = torch.cat(parts, dim=1)
    torch.testing.assert_close(slowly[:, 3:], whole.last_hidden_state[:, 3:], atol=1e-5, rtol=1e-4)
    assert (floats.last_hidden_state - whole.last_hidden_state)[:, 3:].abs().max() > 1e-4


@every_family
def test_forced_answers_do_not_depend_on_the_batch(family: str) -> None:
    """Rows are padded on the right then."""
    bundle = made(family, CACHED)
    samples = [
        replace(sample, texts=("what is this" + " how many" * number,)) for number, sample in enumerate(asked(family))
    ]
    with torch.no_grad():
        together = bundle.encode("language", bundle.prepare("language", samples))
        for number, sample in enumerate(samples):
            alone = bundle.encode("language", bundle.prepare("language", [sample]))[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("place", [None, *DROPS])
def test_a_cache_holds_integers_and_their_scales(place: str | None) -> None:
    """Of 32 tokens, of which 11 leave two of three blocks: two heads of eight codes, and a float32 for each token of a head."""
    bundle = made("llava_clip", CACHED, *([DROPS[place]] if place else []))
    cache = getattr(read(bundle, bundle.example_inputs("language", 1), use_cache=True), CACHE)
    counts = [32, 32, 32] if place is None else [32, 21, 21]
    for layer, count in zip(cache.layers, counts, strict=True):
        held = {name: getattr(layer, name) for name in layer.held_names}
        assert {name: (value.shape, value.dtype) for name, value in held.items()} == {
            "keys": ((1, 2, count, 8), torch.int8),
            "key_scale": ((1, 2, count, 1), torch.float32),
            "values": ((1, 2, count, 8), torch.int8),
            "value_scale": ((1, 2, count, 1), torch.float32),
        }
        assert sum(value.nbytes for value in held.values()) == 2 * count * 2 * (8 + 4)


def test_the_run_says_what_a_token_takes() -> None:
    facts = made("llava_clip", CACHED).history[-1].facts
    # Keys and values in three blocks of two heads of eight: float32 before, integers with a float32 each now.
    assert facts["cache_bytes_per_token_before"] == 2 * 3 * 2 * 8 * 4
    assert facts["cache_bytes_per_token"] == 2 * 3 * 2 * (8 + 4)
    assert "cache_bytes_per_token" not in made("llava_clip", ("quantize", {"scheme": "W8A16"})).history[-1].facts


EXPORTED = [
    *(
        pytest.param("llava_clip", CHAINS[name], id=f"llava_clip-{name}")
        for name in ("with weights", "then drop from blocks", "after drop from cache")
    ),
    *(pytest.param(family, CHAINS["alone"], id=family) for family in ("paligemma", "qwen3_vl")),
]


@pytest.mark.parametrize(("family", "steps"), EXPORTED)
def test_exported_it_answers_the_same(family: str, steps: tuple[Any, ...], tmp_path: Path) -> None:
    bundle = made(family, *steps)
    samples = [replace(sample, picture=square(sample.picture)) for sample in tiny.asked(3, turns=False)]
    want = bundle.generate(samples)
    artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
    sizes = []
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(artifact, runner, threads=1)
        assert answerer.generate(samples) == want
        assert [answerer.generate([sample])[0] for sample in samples] == want
        sizes.append(answerer.write(samples[:1], 2).cache_bytes)
        answerer.close()
    answerer = bundle_answerer(bundle, threads=1)
    assert answerer.generate(samples) == want
    assert {*sizes, answerer.write(samples[:1], 2).cache_bytes} == {sizes[0]}


def test_graphs_are_given_integers_and_give_them_out(tmp_path: Path) -> None:
    bundle = made("llava_clip", CACHED)
    artifact = export_onnx(bundle, tmp_path / "out", batches=(1, 2)).artifact
    graph = onnx.load(artifact.path("language")).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    for side in ("past", "present"):
        for what in ("key", "value"):
            assert kinds[f"{side}_{what}_2"] == onnx.TensorProto.INT8
            assert kinds[f"{side}_{what}_scale_2"] == onnx.TensorProto.FLOAT
    dims = {spec.name: spec.dims for spec in artifact.component("language").inputs}
    assert dims["past_value_2"] == ("batch", 2, "past", 8)
    assert dims["past_value_scale_2"] == ("batch", 2, "past", 1)
    rows = artifact.component("language").parity
    # Strictly where nothing is rounded, codes as they were before it; then loosely, which they are within by far.
    assert {row["rounding"] for row in rows} == {False, True}
    assert max(row["relative"] for row in rows if not row["rounding"]) < 1e-4
    # What a benchmark says a whole answer of four tokens takes: keys and values of two heads in three blocks.
    target = AnswerTarget(Source(artifact.directory, artifact=artifact), "x", "cpu", tmp_path, Silent(), 4)
    tokens = target.asked(1)["input_ids"].shape[1] + 4
    assert target.stages({}, 1)["cache_mib"] * 2**20 == 2 * 3 * 2 * tokens * (8 + 4)
    # And what a run times: a token behind a text of 16 and a picture of 16.
    assert example_arrays(artifact, "language", 1)["past_key_scale_0"].shape == (1, 2, 32, 1)


def test_a_run_in_torch_times_one_further_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache of what an example asks: what its integers cost is seen there alone."""
    plain, bundle = tiny.bundle("llava_clip"), made("llava_clip", CACHED)
    assert [row.tower for row in compare_in_torch(plain, plain, 1, 2, Silent())] == ["vision", "language"]
    held: list[int] = []

    def noting(specs: Any, batch: int, **more: Any) -> Any:
        arrays = arrays_for(specs, batch, **more)
        held.append(arrays["past_key_0"].nbytes)
        return arrays

    monkeypatch.setattr(speed, "arrays_for", noting)
    rows = compare_in_torch(plain, bundle, 1, 2, Silent())
    assert [row.tower for row in rows] == ["vision", "language", "one further token"]
    assert held == [2 * 32 * 8 * 4, 2 * 32 * 8]  # floats, integers


def test_half_precision_keeps_integers_too(tmp_path: Path) -> None:
    artifact = export_onnx(made("llava_clip", CACHED), tmp_path / "out", precision="float16", batches=(2,)).artifact
    kinds = {spec.name: spec.dtype for spec in artifact.component("language").inputs}
    assert (kinds["past_key_0"], kinds["past_key_scale_0"]) == ("int8", "float32")


def test_beams_find_what_they_find_alone() -> None:
    bundle = made("llava_clip", CACHED)
    bundle.model.generation_config.num_beams = 2
    samples = asked("llava_clip")
    assert bundle.generate(samples) == [bundle.generate([sample])[0] for sample in samples]


@pytest.mark.parametrize(
    ("family", "params", "why"),
    [
        ("clip", {}, "keep no keys and values: they write no answer"),
        ("whisper", {}, "look at an encoder's states through a cache of its own"),
        ("blip", {}, "look at an encoder's states through a cache of its own"),
        ("llava_clip", {"towers": ("vision",)}, "which quantize.towers does not name"),
    ],
)
def test_models_without_such_a_cache_are_refused(family: str, params: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        build("quantize", {**CACHED[1], **params}).check(tiny.bundle(family))
    assert caught.value.hint


def test_a_second_time_is_refused_and_weights_may_follow() -> None:
    bundle = made("llava_clip", CACHED)
    with pytest.raises(UsageError, match="keeps keys and values as integers already"):
        build(*CACHED).check(bundle)
    build("quantize", {"scheme": "W8A16"}).check(bundle)
