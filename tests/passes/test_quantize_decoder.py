"""quantize on a decoder: one weight for the table and the last Linear, cross-attention, schemes of more towers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Record
from mmcompress.measure.cost import cost_of
from mmcompress.ops.rounding import UINT8
from mmcompress.passes import quantize_layers
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_calibrate import calibrate
from mmcompress.passes.quantize_judge import Judge, groups_of
from mmcompress.surgery.quantized import QuantizedEmbedding, TiedLinear
from mmcompress.surgery.quantized_base import Quantized
from tests.passes import decoding
from tests.passes.decoding import LAST, TABLE


def run(bundle: Bundle | None = None, **params: Any) -> tuple[Bundle, Plan]:
    bundle = bundle or decoding.bundle()
    made = Quantize(**params)
    made.check(bundle)
    plan = made.plan(bundle, decoding.context())
    made.apply(bundle, plan)
    bundle.history.append(
        Record("quantize", dataclasses.asdict(made), plan.decisions, made.fit(bundle, Context()), 0.0)
    )
    return bundle, plan


def int8_paths(bundle: Bundle, tower: str = "decoder") -> set[str]:
    owner = bundle.tower(tower)
    return {path for path, m in bundle.model.named_modules() if owner.owns(path) and isinstance(m, Quantized)}


@pytest.mark.parametrize("scheme", ["W8A8", "W8A16"])
def test_a_shared_weight_is_rounded_held_and_stored_once(scheme: str, tmp_path: Path) -> None:
    bundle, plan = run(scheme=scheme, min_cosine=-1.0)
    table, last = bundle.module(TABLE), bundle.module(LAST)
    assert isinstance(table, QuantizedEmbedding)
    assert isinstance(last, TiedLinear)
    assert last.weight_int8 is table.weight_int8
    assert last.weight_scale is table.weight_scale
    assert plan.decisions["tied"] == {LAST: TABLE}
    assert (last.input_scale is not None) == (scheme == "W8A8")
    assert not {f"{LAST}.weight_int8", f"{LAST}.weight_scale", f"{LAST}.weight"} & set(bundle.model.state_dict())
    checkpoint.save(bundle, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    shape = tuple(table.weight_int8.shape)
    assert [name for name, value in stored.items() if tuple(value.shape) == shape] == [f"{TABLE}.weight_int8"]
    again = checkpoint.load(tmp_path / "model")
    assert decoding.same(bundle, again)
    assert again.module(LAST).weight_int8 is again.module(TABLE).weight_int8
    checkpoint.save(again, tmp_path / "again")
    for file in ("model.safetensors", "config.json", "mmc.json"):
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_the_layers_stay_one_through_copies_and_conversions() -> None:
    bundle, _ = run(scheme="W8A8", min_cosine=-1.0)
    twin = copy.deepcopy(bundle)
    assert decoding.same(bundle, twin)
    assert twin.module(LAST).table is twin.module(TABLE)
    assert twin.module(TABLE) is not bundle.module(TABLE)
    twin.model.double().float().to("cpu")
    assert twin.module(LAST).weight_scale is twin.module(TABLE).weight_scale
    assert decoding.same(bundle, twin)


def test_bytes_count_a_shared_weight_once() -> None:
    bundle = decoding.bundle()
    vocabulary, width = bundle.module(TABLE).weight.shape
    named = sum(p.nbytes for name, p in bundle.model.named_parameters() if bundle.tower("decoder").owns(name))
    assert cost_of(bundle).towers["decoder"].bytes == named
    _, plan = run(bundle, scheme="W8A16", min_cosine=-1.0)
    assert plan.decisions["towers"]["decoder"]["bytes_before"] == named
    unique = {id(v): v for v in bundle.model.state_dict(keep_vars=True).values()}
    own = {name: value for name, value in bundle.model.state_dict().items() if bundle.tower("decoder").owns(name)}
    assert sum(v.numel() == vocabulary * width for v in own.values()) == 1
    facts = Quantize().fit(bundle, Context())["bytes"]
    assert facts["decoder"] == sum(v.nbytes for v in own.values()) == cost_of(bundle).towers["decoder"].bytes
    assert facts["decoder"] + facts["audio"] == sum(v.nbytes for v in unique.values()) == cost_of(bundle).bytes


def test_smoothing_leaves_the_shared_weight_alone() -> None:
    bundle, plan = run(scheme="W8A8", min_cosine=-1.0, fold=False)
    assert bundle.module(LAST).input_gain is None
    assert not {name for name in plan.tensors if name.startswith(LAST) and name.endswith("gain")}
    assert all(
        bundle.module(path).input_gain is not None for path in int8_paths(bundle) - {LAST, TABLE} if "embed" not in path
    )
    weight = decoding.bundle().module(TABLE).weight
    scale = bundle.module(TABLE).weight_scale
    assert isinstance(weight, torch.Tensor)
    # The first row, of the padding token, is 0 and so on any grid.
    torch.testing.assert_close(scale[1:], weight[1:].abs().amax(1) / 127)


@pytest.mark.parametrize(
    "params", [{"keep_float": (TABLE,)}, {"keep_float": (LAST,)}, {"embeddings": False}], ids=["table", "last", "none"]
)
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16"])
def test_half_of_a_shared_weight_is_never_quantized(scheme: str, params: dict[str, Any], tmp_path: Path) -> None:
    bundle, plan = run(scheme=scheme, min_cosine=-1.0, **params)
    assert not {LAST, TABLE} & set(plan.decisions["layers"])
    assert plan.decisions["tied"] == {}
    assert decoding.tied(bundle)
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert decoding.tied(again)
    assert decoding.same(bundle, again)


def test_a_tie_that_is_none_is_refused() -> None:
    bundle = decoding.bundle()
    bundle.module(LAST).weight = nn.Parameter(torch.randn(25, 48))
    with pytest.raises(UsageError, match="hold different weights, and config.json says they share one"):
        Quantize().check(bundle)
    Quantize(towers=("audio",)).check(bundle)
    bundle.model.config.tie_word_embeddings = False
    bundle, plan = run(bundle, scheme="W8A16", min_cosine=-1.0)
    assert plan.decisions["tied"] == {}
    assert not torch.equal(bundle.module(LAST).weight_int8, bundle.module(TABLE).weight_int8)


def test_a_small_table_is_quantized_where_its_linear_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_layers, "SMALL_TABLE", 2.0)
    bundle, plan = run(scheme="W8A16", min_cosine=-1.0)
    assert {TABLE, LAST} < set(plan.decisions["layers"])
    assert not isinstance(bundle.module("model.encoder.embed_positions"), QuantizedEmbedding)


def test_a_last_layer_that_is_read_but_not_called_keeps_its_table_float(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = decoding.bundle()

    def encode(model: Any, tower: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if tower == "audio":
            return model.model.encoder(inputs["input_features"]).last_hidden_state.flatten(1)
        heard = model.model.encoder(inputs["input_features"]).last_hidden_state
        written = model.model.decoder(input_ids=inputs["decoder_input_ids"], encoder_hidden_states=heard)
        return (written.last_hidden_state @ model.proj_out.weight.T).softmax(-1).sum(1)

    monkeypatch.setattr(type(bundle.family), "encode", lambda self, *args: encode(*args))
    _, plan = run(bundle, scheme="W8A8", min_cosine=-1.0, fold=False)
    assert not {LAST, TABLE} & set(plan.decisions["layers"])
    assert decoding.tied(bundle)


def test_a_limit_gives_both_back(tmp_path: Path) -> None:
    def spoiled() -> Bundle:
        bundle = decoding.bundle()
        with torch.no_grad():
            # One value per row that takes all levels: rounding ruins the rest of the row.
            bundle.module(TABLE).weight[:, 0] = 40.0  # type: ignore[index]
        return bundle

    _, everything = run(spoiled(), scheme="W8A16", min_cosine=-1.0, towers=("decoder",), sensitivity=True)
    free = everything.decisions["towers"]["decoder"]
    assert max(free["sensitivity"], key=lambda name: free["sensitivity"][name]) == TABLE
    assert LAST not in free["sensitivity"]
    limit = (1 + free["cosine"]) / 2
    bundle, plan = run(spoiled(), scheme="W8A16", min_cosine=limit, towers=("decoder",))
    report = plan.decisions["towers"]["decoder"]
    assert report["kept_float"] == [TABLE, LAST]
    assert report["cosine"] >= limit > report["cosine_all_quantized"]
    assert decoding.tied(bundle)
    checkpoint.save(bundle, tmp_path / "model")
    assert decoding.same(bundle, checkpoint.load(tmp_path / "model"))


def test_apply_makes_the_same_structure_on_meta_tensors_and_ties() -> None:
    bundle, plan = run(scheme="W8A8", min_cosine=-1.0)
    with torch.device("meta"):
        empty = type(bundle.model)(bundle.model.config)
    shell = Bundle(empty, bundle.processor, bundle.family, bundle.source)
    # A record is read back with its keys in another order, the Linear perhaps before its table.
    layers = dict(sorted(plan.decisions["layers"].items(), reverse=True))
    Quantize(scheme="W8A8").apply(shell, Plan({**plan.decisions, "layers": layers}))
    real = {key: (tensor.shape, tensor.dtype) for key, tensor in bundle.model.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in shell.model.state_dict().items()} == real
    assert shell.module(LAST).table is shell.module(TABLE)


def test_a_linear_named_before_its_table_finds_it_quantized() -> None:
    model = nn.ModuleDict({"a_head": nn.Linear(4, 6), "table": nn.Embedding(6, 4)})
    bundle = dataclasses.replace(decoding.bundle(), model=model)
    decisions = {"layers": {"a_head": "W8A16", "table": "W8A16"}, "tied": {"a_head": "table"}}
    Quantize(scheme="W8A16").apply(bundle, Plan(decisions))  # type: ignore[arg-type]
    assert bundle.module("a_head").table is bundle.module("table")


def test_training_keeps_integers_shared_and_gradients_reach_the_encoder() -> None:
    bundle, _ = run(scheme="W8A16", min_cosine=-1.0)
    ids = bundle.example_inputs("decoder", 2)["decoder_input_ids"]
    features = bundle.example_inputs("audio", 2)["input_features"]
    bundle.model(input_features=features, labels=ids).loss.backward()
    grads = [p.grad for n, p in bundle.model.named_parameters() if n.startswith("model.encoder.conv1")]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    before = outputs_of_last(bundle)
    torch.optim.SGD(bundle.model.parameters(), lr=0.01).step()
    assert bundle.module(LAST).weight_int8 is bundle.module(TABLE).weight_int8
    assert torch.equal(outputs_of_last(bundle), before)


def outputs_of_last(bundle: Bundle) -> torch.Tensor:
    states = torch.randn(3, bundle.module(LAST).in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = bundle.module(LAST)(states)
    return found


def test_cross_attention_is_a_group_of_its_own() -> None:
    bundle = decoding.bundle()
    tower = bundle.tower("decoder")
    cross = tower.blocks[0].cross
    assert cross is not None
    groups = groups_of(tower, [TABLE, LAST, *tower.blocks[0].attention.writers, *cross.writers, cross.reader])
    assert groups == {
        TABLE: [TABLE, LAST],
        "model.decoder.layers.0.attention": list(tower.blocks[0].attention.writers),
        "model.decoder.layers.0.cross": [*cross.writers, cross.reader],
    }


def test_keys_and_values_of_all_blocks_read_the_encoder_on_one_grid() -> None:
    bundle, _ = run(scheme="W8A8", min_cosine=-1.0, fold=False)
    crosses = [block.cross for block in bundle.tower("decoder").blocks]
    first, *others = [bundle.module(path) for cross in crosses if cross for path in cross.writers[1:]]
    for other in others:
        for name in ("input_scale", "input_zero_point", "input_gain"):
            assert torch.equal(getattr(first, name), getattr(other, name))
    queries = [bundle.module(cross.writers[0]) for cross in crosses if cross]
    assert not torch.equal(queries[0].input_gain, first.input_gain)


def grids(bundle: Bundle, paths: list[str], context: Context) -> dict[str, Any]:
    tower = bundle.tower("decoder")
    return calibrate(bundle, tower, paths, UINT8, context, method="min-max", percentile=0, smooth=0.0)


def test_padding_of_the_texts_has_no_say_in_the_grids() -> None:
    bundle = decoding.bundle()
    with torch.no_grad():
        # One channel far above all others, even after the norm, for the padding token alone.
        bundle.module(TABLE).weight[0, 3] = 1e3  # type: ignore[index]
    paths = [path for block in bundle.tower("decoder").blocks for path in (*block.attention.writers, block.mlp.reader)]
    batched, single = (grids(bundle, paths, decoding.context(batch_size=size)) for size in (3, 1))
    for path in paths:
        torch.testing.assert_close(batched[path].scale, single[path].scale, rtol=1e-4, atol=0)


def test_the_texts_mask_hides_nothing_of_what_the_encoder_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where by chance there are as many states as tokens."""
    bundle = decoding.bundle()
    cross = bundle.tower("decoder").blocks[0].cross
    assert cross is not None
    states = torch.randn(3, 9, 48, generator=torch.Generator().manual_seed(0))
    states[:, 8] *= 50
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[:, 7:] = 0
    inputs = {"encoder_hidden_states": states, "decoder_input_ids": torch.ones_like(mask), "decoder_mask": mask}
    monkeypatch.setattr(type(bundle.family), "prepare", lambda *_: inputs)
    path = cross.writers[1]
    grid = grids(bundle, [path], decoding.context(3))[path]
    assert grid.scale.item() == pytest.approx(((states.max() - states.min()) / 255).item(), rel=1e-5)


def test_batches_of_different_length_are_judged_as_one() -> None:
    bundle = decoding.bundle()
    tower = bundle.tower("decoder")
    made = Quantize(scheme="W8A16")
    plan = made.plan(bundle, Context())
    swapped = copy.deepcopy(bundle)
    made.apply(swapped, plan)
    modules = {path: swapped.module(path) for path in plan.decisions["layers"] if tower.owns(path)}
    found = [Judge(bundle, "decoder", decoding.context(batch_size=size), 6) for size in (1, 2, 6)]
    assert [judge.samples for judge in found] == [6, 6, 6]
    first, *others = [judge.cosine(modules) for judge in found]
    assert others == pytest.approx([first] * 2, abs=1e-6)
    assert 0.5 < first < 1


def test_every_tower_can_have_its_own_scheme() -> None:
    bundle, plan = run(scheme="W8A16", audio_scheme="W8A8", min_cosine=-1.0)
    owner = bundle.tower("audio")
    schemes = {(owner.owns(path), scheme) for path, scheme in plan.decisions["layers"].items() if "embed" not in path}
    assert schemes == {(True, "W8A8"), (False, "W8A16")}
    bundle, plan = run(audio_scheme="W16A16", decoder_scheme="w8a16", min_cosine=-1.0)
    assert not int8_paths(bundle, "audio")
    assert set(plan.decisions["towers"]) == {"decoder"}
    before, after = decoding.outputs(decoding.bundle()), decoding.outputs(bundle)
    assert torch.equal(before["audio"], after["audio"])
    assert not torch.equal(before["decoder"], after["decoder"])


@pytest.mark.parametrize("tower", ["vision", "text", "audio", "decoder", "language"])
def test_schemes_are_checked_whatever_their_tower(tower: str) -> None:
    with pytest.raises(UsageError, match=f"quantize.{tower}_scheme is 'int8'; known schemes"):
        Quantize(**{f"{tower}_scheme": "int8"})  # type: ignore[arg-type]
    asked = Quantize(**{f"{tower}_scheme": "W8A16"})  # type: ignore[arg-type]
    if tower in ("audio", "decoder"):
        asked.check(decoding.bundle())
    else:
        with pytest.raises(UsageError, match=f"whisper has no tower '{tower}'"):
            asked.check(decoding.bundle())
