"""prune on a decoder: heads of cross-attention are units of their own, priced by the encoder's length; ties stay."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Record
from mmcompress.measure.cost import cost_of
from mmcompress.passes import prune_effects, prune_scores
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_crosscheck import crosscheck
from mmcompress.passes.prune_cut import cut_heads
from mmcompress.passes.prune_units import Group, count_costs, count_tokens, list_groups
from mmcompress.passes.quantize import Quantize
from mmcompress.surgery.watch import evaluating, watch_gradients
from tests import tiny
from tests.passes import decoding


def pruned(bundle: Bundle, **params: Any) -> Plan:
    made = Prune(**params)
    made.check(bundle)
    plan = made.plan(bundle, decoding.context())
    made.apply(bundle, plan)
    facts = made.fit(bundle, decoding.context())
    bundle.history.append(Record("prune", dataclasses.asdict(made), plan.decisions, facts, 0.0))
    return plan


def groups_of(bundle: Bundle, *kinds: str, tower: str = "decoder") -> list[Group]:
    owner = bundle.tower(tower)
    return list_groups(bundle, [owner], kinds, (), count_tokens(bundle, owner))


def test_costs_by_hand() -> None:
    # C 48, 4 heads of 12; 16 tokens look at 50 states.
    bundle = decoding.bundle()
    own, cross, *_ = groups_of(bundle, "heads")
    assert (own.key, cross.key) == ("decoder.0", "decoder.0.cross")
    assert (cross.units, cross.width, cross.kind, cross.block) == (4, 12, "heads", 0)
    # Keys have no bias in Whisper.
    assert own.cost.parameters == cross.cost.parameters == 12 * (49 + 48 + 49) + 12 * 48
    assert own.cost.macs == 16 * 4 * 12 * 48 + 2 * 16 * 16 * 12
    assert cross.cost.macs == (16 * 2 + 50 * 2) * 12 * 48 + 2 * 16 * 50 * 12
    (neurons, *_) = groups_of(bundle, "neurons")
    (block, *_) = groups_of(bundle, "blocks")
    assert block.cost.macs == 4 * (own.cost.macs + cross.cost.macs) + neurons.units * neurons.cost.macs


def test_a_decoder_costs_what_it_does_itself() -> None:
    bundle = decoding.bundle()
    blocks = groups_of(bundle, "blocks")
    costs = count_costs(bundle, bundle.tower("decoder"))
    last = 16 * 48 * 25
    assert costs.macs == sum(block.cost.macs for block in blocks) + last
    shared = 48 * 25
    own = {n: p for n, p in bundle.model.named_parameters(remove_duplicate=False) if n.startswith("model.decoder.")}
    assert costs.parameters == sum(p.numel() for p in own.values())
    assert costs.parameters > sum(block.cost.parameters for block in blocks) + shared


def test_the_encoder_a_decoder_looks_at_is_not_counted_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = decoding.bundle()
    tower = bundle.tower("decoder")
    want, whole = count_costs(bundle, tower), cost_of(bundle).towers
    assert whole["decoder"].macs == want.macs
    ready = bundle.family.example_inputs
    states = bundle.example_inputs("decoder", 1)

    def unready(self: Any, model: nn.Module, name: str, batch: int) -> dict[str, Tensor]:
        if name == "audio":
            return ready(model, name, batch)
        ids = {key: states[key][:batch] for key in ("decoder_input_ids", "decoder_mask")}
        return {**ready(model, "audio", batch), **ids}

    monkeypatch.setattr(type(bundle.family), "example_inputs", unready)
    assert count_costs(bundle, tower) == want
    assert cost_of(bundle).towers == whole


def test_slicing_cross_heads_equals_silencing_them() -> None:
    bundle = decoding.bundle()
    bundle.model.double()
    masked = copy.deepcopy(bundle)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in bundle.example_inputs("decoder", 2).items()}
    view = bundle.tower("decoder").blocks[1].cross
    assert view is not None
    cut_heads(bundle, view, [0, 3])
    with torch.no_grad():
        masked.module(view.reader).weight[:, 12:36] = 0  # type: ignore[index]
    torch.testing.assert_close(bundle.encode("decoder", inputs), masked.encode("decoder", inputs), rtol=0, atol=1e-12)
    again = bundle.tower("decoder").blocks[1]
    assert again.cross is not None
    assert (again.cross.heads, again.attention.heads) == (2, 4)


@pytest.mark.parametrize(
    "params",
    [
        {"ratio": 0.3},
        {"ratio": 0.3, "budget": "macs", "multiple": 1, "score": "taylor"},
        {"ratio": 0.2, "units": ("heads",), "score": "activation", "towers": ("decoder",)},
        {"ratio": 0.2, "units": ("heads",), "score": "magnitude", "uniform": True, "compensate": "bias"},
        {"ratio": 0.3, "units": ("blocks",), "score": "block-influence", "compensate": "none"},
        {"ratio": 0.3, "score": "random", "compensate": "none"},
    ],
    ids=lambda params: "-".join(str(value) for value in params.values()),
)
def test_what_was_promised_is_what_a_recount_finds_and_it_reloads(params: dict[str, Any], tmp_path: Path) -> None:
    bundle = decoding.bundle()
    plan = pruned(bundle, **params)
    towers = [tower for tower in bundle.towers() if tower.name in plan.decisions["after"]]
    assert {tower.name: dataclasses.asdict(count_costs(bundle, tower)) for tower in towers} == plan.decisions["after"]
    assert plan.decisions["after"]["decoder"]["parameters"] < plan.decisions["before"]["decoder"]["parameters"]
    assert decoding.tied(bundle)
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert decoding.same(bundle, again)
    assert decoding.tied(again)


def faint_cross_attention() -> Bundle:
    """The first two cross-attention heads of each block hardly matter."""
    bundle = decoding.bundle()
    with torch.no_grad():
        for block in bundle.tower("decoder").blocks:
            assert block.cross is not None
            bundle.module(block.cross.reader).weight[:, :24] *= 1e-4  # type: ignore[operator]
    return bundle


def heads(bundle: Bundle) -> list[tuple[int, int]]:
    return [(b.attention.heads, b.cross.heads) for b in bundle.tower("decoder").blocks if b.cross]


def test_heads_of_both_attentions_are_chosen_and_recorded_apart() -> None:
    bundle = faint_cross_attention()
    plan = pruned(bundle, ratio=0.15, units=("heads",), towers=("decoder",))
    assert plan.decisions["kept"]["heads"]["decoder.0.cross"] == "2-3"
    assert plan.decisions["kept"]["heads"]["decoder.1.cross"] == "2-3"
    assert all(own > cross == 2 for own, cross in heads(bundle))


def test_uniform_is_each_attention_by_itself() -> None:
    bundle = faint_cross_attention()
    pruned(bundle, ratio=0.08, units=("heads",), towers=("decoder",), uniform=True, normalise="none")
    assert heads(bundle) == [(4, 2), (4, 2)]
    # One of them uneven, and the next step cannot make it uniform.
    view = bundle.tower("decoder").blocks[0].cross
    assert view is not None
    cut_heads(bundle, view, [0])
    with pytest.raises(UsageError, match="decoder has blocks of 1 to 2 heads; uniform needs equal ones"):
        Prune(uniform=True).check(bundle)


def test_quantized_cross_attention_is_refused() -> None:
    bundle = decoding.bundle()
    only = Quantize(scheme="W8A16", keep_float=("*self_attn*", "*fc*"), towers=("decoder",))
    only.apply(bundle, only.plan(bundle, Context()))
    with pytest.raises(UsageError, match=r"encoder_attn.q_proj is a QuantizedLinear; prune cuts nn.Linear"):
        Prune(towers=("decoder",)).check(bundle)


def test_gate_gradients_predict_what_silencing_a_little_does() -> None:
    """Turning a unit down a little changes any function of the rows by so much of its gate gradient, to first order."""
    bundle = decoding.bundle()
    inputs = bundle.example_inputs("decoder", 2)
    groups = groups_of(bundle, "heads", "neurons")
    torch.manual_seed(0)
    direction = torch.randn_like(bundle.encode("decoder", inputs), dtype=torch.float64)
    effects: dict[str, Tensor] = {}

    def record(path: str, states: Tensor, gradient: Tensor) -> None:
        units = next(group.units for group in groups if group.reader == path)
        effects[path] = (states * gradient).unflatten(-1, (units, -1)).flatten(0, -3).sum((0, 2))

    def value() -> Tensor:
        return (nn.functional.normalize(bundle.encode("decoder", inputs).double(), dim=-1) * direction).sum()

    with evaluating(bundle.model), watch_gradients({g.reader: bundle.module(g.reader) for g in groups}, record):
        value().backward()
    assert [group.part for group in groups if group.reader in effects] == ["", "cross", ""] * 2
    step = 0.01
    with torch.no_grad():
        for group in groups:
            weight: Any = bundle.module(group.reader).weight
            kept, found = weight[:, : group.width].clone(), []
            for gate in (1 + step, 1 - step):
                weight[:, : group.width] = kept * gate
                found.append(value())
            weight[:, : group.width] = kept
            change = (found[0] - found[1]) / (2 * step)
            torch.testing.assert_close(change.float(), effects[group.reader][0], rtol=1e-2, atol=3e-4)


def test_scores_do_not_depend_on_slices_or_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = decoding.bundle()
    groups = groups_of(bundle, "heads", "neurons")
    found = []
    for size in (1, 64):
        monkeypatch.setattr(prune_effects, "slice_size", lambda *_, size=size: size)
        found.append(prune_effects.taylor(bundle, groups, decoding.context(), "embedding"))
    batched, single = (
        prune_scores.activation(bundle, groups, decoding.context(batch_size=size), centred=True) for size in (3, 1)
    )
    for one, other in [*zip(*found, strict=True), *zip(batched, single, strict=True)]:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_taylor_is_the_distance_of_the_distributions() -> None:
    """Mean square over random directions = squared distance of the normalised rows, for a unit weak enough."""
    bundle = decoding.bundle()
    cross = next(group for group in groups_of(bundle, "heads") if group.part == "cross")
    reader: Any = bundle.module(cross.reader)
    data = tiny.spoken(1)
    with torch.no_grad():
        reader.weight[:, :12] *= 0.1
    found = torch.stack(
        [
            prune_effects.taylor(bundle, [cross], decoding.context(1, data=data, seed=seed), "embedding")[0][0]
            for seed in range(200)
        ]
    ).mean()
    inputs = bundle.prepare("decoder", bundle.items("decoder", data[0]))
    with torch.no_grad():
        before = nn.functional.normalize(bundle.encode("decoder", inputs), dim=-1)
        reader.weight[:, :12] = 0
        after = nn.functional.normalize(bundle.encode("decoder", inputs), dim=-1)
    torch.testing.assert_close(found, (before - after).square().sum(), rtol=0.3, atol=0)
    # ... which is half of the mean KL divergence.
    assert inputs["decoder_mask"].all()
    p, q = (row.double().reshape(-1, 25).square() for row in (before, after))
    divergence = (p * (p / q).log()).sum().float()
    torch.testing.assert_close((before - after).square().sum(), divergence / 2, rtol=0.05, atol=0)


def test_our_groups_are_torch_prunings() -> None:
    pytest.importorskip("torch_pruning")
    bundle = decoding.bundle()
    # 2 blocks of one head, one cross head and one neuron each.
    assert crosscheck(bundle, [bundle.tower("decoder")]) == 6


def test_training_keeps_the_tie() -> None:
    bundle = decoding.bundle()
    pruned(bundle, ratio=0.2)
    ids = bundle.example_inputs("decoder", 2)["decoder_input_ids"]
    features = bundle.example_inputs("audio", 2)["input_features"]
    bundle.model(input_features=features, labels=ids).loss.backward()
    torch.optim.AdamW(bundle.model.parameters(), lr=0.01).step()
    assert decoding.tied(bundle)


def test_a_contrastive_score_needs_pairs_of_embeddings() -> None:
    with pytest.raises(UsageError, match="whisper models embed nothing into a shared space"):
        Prune(objective="contrastive").check(decoding.bundle())
    Prune(objective="contrastive", score="magnitude").check(decoding.bundle())
