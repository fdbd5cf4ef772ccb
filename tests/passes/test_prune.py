"""The laws of `prune` over every tiny family."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.manifest import Record
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_cut import cut_blocks
from mmcompress.passes.prune_units import count_costs, read_ranges
from tests import tiny

families = pytest.mark.parametrize("family", tiny.FAMILIES)
TOWERS = ("vision", "text")


def context(count: int = 12, batch_size: int = 6, seed: int = 0) -> Context:
    pairs = zip(tiny.images(count), tiny.texts(count), strict=True)
    samples = [Sample(key=str(i), texts=(text,), picture=image) for i, (image, text) in enumerate(pairs)]
    return Context(Dataset(Memory(samples)), num_samples=count, batch_size=batch_size, seed=seed)


def pruned(bundle: Bundle, settings: Prune, seed: int = 0) -> Plan:
    settings.check(bundle)
    plan = settings.plan(bundle, context(seed=seed))
    settings.apply(bundle, plan)
    return plan


def outputs(bundle: Bundle) -> dict[str, Tensor]:
    dtype = next(bundle.model.parameters()).dtype
    made = {}
    for tower in TOWERS:
        inputs = bundle.example_inputs(tower, 2)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        made[tower] = bundle.encode(tower, inputs)
    return made


def state(bundle: Bundle) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in bundle.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@families
def test_ratio_0_changes_nothing_and_needs_no_data(family: str) -> None:
    bundle = tiny.bundle(family)
    before, embedded = state(bundle), outputs(bundle)
    settings = Prune(ratio=0)
    settings.check(bundle)
    plan = settings.plan(bundle, Context())
    settings.apply(bundle, plan)
    assert same(before, state(bundle))
    assert same(embedded, outputs(bundle))
    assert plan.decisions["before"] == plan.decisions["after"]


@families
def test_slicing_equals_masking(family: str) -> None:
    bundle = tiny.bundle(family)
    bundle.model.double()
    settings = Prune(ratio=0.35, score="random", compensate="none", min_keep=0, multiple=1)
    plan = settings.plan(bundle, Context())
    masked = Bundle(copy.deepcopy(bundle.model), bundle.processor, bundle.family, bundle.source)
    silenced = 0
    for tower in masked.towers():
        for block in tower.blocks:
            for kind, reader, units in (
                ("heads", block.attention.reader, block.attention.heads),
                ("neurons", block.mlp.reader, block.mlp.neurons),
            ):
                text = plan.decisions["kept"][kind].get(f"{tower.name}.{block.index}")
                if text is not None:
                    gone = sorted(set(range(units)) - set(read_ranges(text)))
                    masked.module(reader).weight.data.unflatten(1, (units, -1))[:, gone] = 0
                    silenced += len(gone)
    assert silenced > 10
    settings.apply(bundle, plan)
    wanted, found = outputs(masked), outputs(bundle)
    for tower in TOWERS:
        torch.testing.assert_close(found[tower], wanted[tower], rtol=0, atol=1e-10)


@families
@pytest.mark.parametrize(
    "settings",
    [
        Prune(ratio=0.3, score="random", compensate="none"),
        Prune(ratio=0.3, score="magnitude", compensate="bias", budget="macs"),
        Prune(ratio=0.25, score="random", compensate="none", units=("blocks",)),
        Prune(ratio=0.2, score="magnitude", compensate="none", uniform=True, multiple=4, units=("neurons",)),
    ],
    ids=lambda settings: f"{settings.score}-{settings.budget}-{'-'.join(settings.units)}",
)
def test_the_recount_is_what_was_promised(family: str, settings: Prune) -> None:
    bundle = tiny.bundle(family)
    plan = pruned(bundle, settings)
    promised = plan.decisions["after"]
    assert settings.fit(bundle, Context())["recount"] == promised
    before = sum(costs[settings.budget] for costs in plan.decisions["before"].values())
    after = sum(costs[settings.budget] for costs in promised.values())
    assert after <= (1 - settings.ratio) * before
    assert json.loads(json.dumps(plan.decisions)) == plan.decisions
    for embeddings in outputs(bundle).values():
        assert embeddings.isfinite().all()
        embeddings.sum().backward()
    copy.deepcopy(bundle.model)


@families
def test_within_one_unit_of_the_budget(family: str) -> None:
    bundle = tiny.bundle(family)
    head = max(4 * b.attention.head_dim * 49 for tower in bundle.towers() for b in tower.blocks)
    for ratio in (0.05, 0.2, 0.4):
        plan = Prune(ratio=ratio, score="random", compensate="none").plan(bundle, Context())
        before = sum(costs["parameters"] for costs in plan.decisions["before"].values())
        after = sum(costs["parameters"] for costs in plan.decisions["after"].values())
        assert (1 - ratio) * before - head < after <= (1 - ratio) * before


@families
def test_stronger_never_costs_more(family: str) -> None:
    bundle = tiny.bundle(family)
    for budget in ("parameters", "macs"):
        plans = [
            Prune(ratio=r, budget=budget, score="magnitude", compensate="none").plan(bundle, Context())  # type: ignore[arg-type]
            for r in (0, 0.1, 0.2, 0.3, 0.4)
        ]
        costs = [sum(c[budget] for c in plan.decisions["after"].values()) for plan in plans]
        assert costs == sorted(costs, reverse=True)
        assert len(set(costs)) == len(costs)


@families
def test_lower_bounds_hold_at_the_largest_ratio(family: str) -> None:
    settings = Prune(ratio=0.99, score="magnitude", compensate="none", min_keep=0, multiple=8)
    bundle = tiny.bundle(family)
    with pytest.raises(UsageError, match=r"12 vision heads, 288 vision neurons, .* ratio 0.99 of") as caught:
        settings.check(bundle)
    largest = float(caught.value.hint.split("<= ")[1].split(",")[0])
    pruned(bundle, Prune(ratio=largest, score="magnitude", compensate="none", min_keep=0))
    for tower in bundle.towers():
        assert {block.attention.heads for block in tower.blocks} <= {1, 2}
        assert {block.mlp.neurons for block in tower.blocks} <= {8, 16}
    assert all(embeddings.isfinite().all() for embeddings in outputs(bundle).values())


@families
def test_one_tower_only_leaves_the_other_as_it_is(family: str) -> None:
    bundle = tiny.bundle(family)
    before, embedded = state(bundle), outputs(bundle)
    pruned(bundle, Prune(ratio=0.3, towers=("text",)))
    after = state(bundle)
    text = bundle.tower("text")
    others = [name for name in before if not text.owns(name)]
    assert same({name: before[name] for name in others}, {name: after[name] for name in others})
    assert torch.equal(outputs(bundle)["vision"], embedded["vision"])
    assert not torch.equal(outputs(bundle)["text"], embedded["text"])


@families
def test_planning_changes_nothing_and_repeats_itself(family: str) -> None:
    bundle = tiny.bundle(family)
    bundle.model.train()
    bundle.model.logit_scale.requires_grad_(False)
    before = state(bundle)
    for settings in (
        Prune(),
        Prune(score="activation", compensate="bias", budget="macs"),
        Prune(units=("blocks",), score="block-influence"),
    ):
        first, second = settings.plan(bundle, context()), settings.plan(bundle, context())
        assert first.decisions == second.decisions
        assert same(first.tensors, second.tensors)
    assert same(before, state(bundle))
    assert all(module.training for module in bundle.model.modules())
    assert all(p.requires_grad != (name == "logit_scale") for name, p in bundle.model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bundle.model.modules())


@families
def test_apply_on_meta_gives_the_same_shapes(family: str) -> None:
    for settings in (Prune(), Prune(ratio=0.2, units=("blocks",))):
        bundle = tiny.bundle(family)
        empty = Bundle(copy.deepcopy(bundle.model).to("meta"), bundle.processor, bundle.family, bundle.source)
        plan = pruned(bundle, settings)
        with torch.device("meta"):
            settings.apply(empty, Plan(json.loads(json.dumps(plan.decisions))))
        shapes = [{n: v.shape for n, v in b.model.state_dict().items()} for b in (bundle, empty)]
        assert shapes[0] == shapes[1]
        assert all(value.is_meta for value in empty.model.state_dict().values())


@families
def test_uniform_neurons_and_blocks_fit_into_the_config(family: str) -> None:
    bundle = tiny.bundle(family)
    # SigLIP's pooling head shares the vision blocks' width in its config; DINOv2's width is a multiple of 48 or cannot be said.
    towers, ratio = (("text",), 0.05) if family.startswith("siglip") else (TOWERS, 0.16)
    neurons = Prune(score="magnitude", compensate="none", uniform=True, units=("neurons",), multiple=48)
    pruned(bundle, dataclasses.replace(neurons, towers=towers, ratio=ratio))
    pruned(bundle, Prune(ratio=0.1, score="random", units=("blocks",)))
    for tower in bundle.towers():
        assert {block.mlp.neurons for block in tower.blocks} == ({48} if tower.name in towers else {96})
    bundle.family.write_config(bundle.model)
    plain = bundle.family.model_class(bundle.model.config)(bundle.model.config).eval()
    plain.load_state_dict(bundle.model.state_dict())
    again = Bundle(plain, bundle.processor, bundle.family, bundle.source)
    assert same(outputs(again), outputs(bundle))


@families
def test_blocks_go_as_if_they_were_skipped(family: str) -> None:
    bundle = tiny.bundle(family)
    skipping = Bundle(copy.deepcopy(bundle.model), bundle.processor, bundle.family, bundle.source)
    plan = pruned(bundle, Prune(ratio=0.2, towers=("vision",), units=("blocks",), score="random"))
    kept = read_ranges(plan.decisions["kept"]["blocks"]["vision"])
    assert len(kept) < 3
    for block in skipping.tower("vision").blocks:
        if block.index not in kept:
            module = skipping.module(block.path)
            # FLAVA's blocks return tuples.
            module.forward = lambda states, *_, **__: (states,) if family == "flava" else states  # type: ignore[method-assign]
    assert same(outputs(bundle), outputs(skipping))
    assert [block.index for block in bundle.tower("vision").blocks] == list(range(len(kept)))


def test_blocks_are_renumbered() -> None:
    bundle = tiny.bundle("dual_encoder_vit")
    cut_blocks(bundle, bundle.tower("text"), [1])
    (block,) = bundle.tower("text").blocks
    assert bundle.module(block.path).attention.self.layer_idx == 0


def test_pruning_twice() -> None:
    bundle = tiny.bundle("clip")
    for _ in range(2):
        plan = pruned(bundle, Prune(ratio=0.15))
    assert {t.name: count_costs(bundle, t).parameters for t in bundle.towers()} == {
        name: costs["parameters"] for name, costs in plan.decisions["after"].items()
    }


def test_a_budget_over_both_towers_beats_none_per_tower_and_ratios_are_kept() -> None:
    bundle = tiny.bundle("clip")
    plan = Prune(ratio=0.1, ratios={"vision": 0.4}, score="random", compensate="none").plan(bundle, Context())
    before, after = plan.decisions["before"], plan.decisions["after"]
    shares = {name: 1 - after[name]["parameters"] / before[name]["parameters"] for name in TOWERS}
    assert 0.4 <= shares["vision"] < 0.45
    assert 0.1 <= shares["text"] < 0.2


def test_target_is_what_may_be_left() -> None:
    bundle = tiny.bundle("clip")
    plan = Prune(target=70_000, score="random", compensate="none").plan(bundle, Context())
    left = sum(costs["parameters"] for costs in plan.decisions["after"].values())
    assert 68_000 < left <= 70_000
    with pytest.raises(UsageError, match=r"target 10,000 of 89,472 parameters"):
        Prune(target=10_000).check(bundle)


def test_protected_blocks_stay_whole() -> None:
    bundle = tiny.bundle("clip")
    pruned(bundle, Prune(ratio=0.2, protect=(0, -1), towers=("vision",), score="magnitude", compensate="none"))
    blocks = bundle.tower("vision").blocks
    assert [(block.attention.heads, block.mlp.neurons) for block in (blocks[0], blocks[-1])] == [(4, 96)] * 2
    with pytest.raises(UsageError, match="every block is protected"):
        Prune(protect=(0, 1, 2)).check(bundle)


def test_random_is_seeded() -> None:
    bundle = tiny.bundle("clip")
    settings = Prune(score="random", compensate="none")
    plans = [settings.plan(bundle, Context(seed=seed)).decisions for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_quantized_and_merged_models_are_refused() -> None:
    bundle = tiny.bundle("clip")
    bundle.history.append(Record("merge-tokens", {}, {}))
    Prune().check(bundle)
    with pytest.raises(UsageError, match="already merged") as caught:
        Prune(units=("blocks",)).check(bundle)
    assert caught.value.hint == "put prune before merge-tokens"
    other = torch.nn.Bilinear(64, 1, 32)
    other.in_features = 64  # type: ignore[assignment]
    bundle.replace(bundle.tower("text").blocks[0].mlp.reader, other)
    with pytest.raises(UsageError, match=r"fc2 is a Bilinear; prune cuts nn.Linear"):
        Prune().check(bundle)
