"""Merges by how alike tokens are in data: what is decided is what the merged model itself shows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress import checkpoint, pipeline, streamed
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.ops.pairs import bipartite_pairs
from mmcompress.passes import build
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.merge_tokens import MergeTokens
from mmcompress.recipe import Step
from mmcompress.surgery.attention import give_keys
from mmcompress.surgery.reduction import tokens_left
from tests import tiny

SAMPLES = 10


def context(family: str = "clip", seed: int = 0, **more: Any) -> Context:
    return Context(data=tiny.data(family, 14), num_samples=SAMPLES, batch_size=4, seed=seed, **more)


def planned(family: str = "clip", **settings: Any) -> tuple[Bundle, Plan]:
    bundle, made = tiny.bundle(family), build("merge-tokens", settings)
    made.check(bundle)
    plan = made.plan(bundle, context(family))
    made.apply(bundle, plan)
    return bundle, plan


def least_alike(bundle: Bundle, merged: list[int]) -> list[Tensor]:
    """How alike the least alike pair is that each block of a merged CLIP merges, (S,), from the keys it computes with."""
    blocks = bundle.tower("vision").blocks
    attentions = [bundle.module(block.attention.path) for block in blocks]
    give_keys(attentions)
    keys: list[Tensor] = []
    hooks = [attention.register_forward_hook(lambda _, __, made: keys.append(made[1])) for attention in attentions]
    items = [item for sample in tiny.data("clip", 14).subset(SAMPLES, 0) for item in bundle.items("vision", sample)]
    bundle.embed("vision", items)
    for hook in hooks:
        hook.remove()
    found = []
    for of_block, removed in zip(keys, merged, strict=True):
        unit = of_block[:, 1:] / of_block[:, 1:].norm(dim=-1, keepdim=True)
        best = (unit[:, 1::2] @ unit[:, ::2].mT).amax(dim=-1).sort(descending=True).values
        found.append(best[:, removed - 1] if removed else torch.ones(len(best)))
    return found


@pytest.mark.parametrize("settings", [{"similarity": 0.9}, {"similarity": 0.8}, {"keep": 0.6, "schedule": "similar"}])
def test_what_is_recorded_is_what_the_merged_model_shows(settings: dict[str, Any]) -> None:
    bundle, plan = planned(**settings)
    merged, facts = plan.decisions["merged"], plan.facts["alike"]
    assert facts["settled"]
    assert facts["samples"] == SAMPLES
    shown = least_alike(bundle, merged)
    for index, numbers in enumerate(shown):
        if merged[index]:
            assert facts["least_alike"]["min"][index] == pytest.approx(float(numbers.min()), abs=1e-3)
            assert facts["least_alike"]["median"][index] == pytest.approx(float(numbers.quantile(0.5)), abs=1e-3)
        else:
            assert facts["least_alike"]["min"][index] is None


@pytest.mark.parametrize("similarity", [0.9, 0.8, 0.7])
def test_as_many_are_merged_as_are_alike_and_no_more(similarity: float) -> None:
    bundle, plan = planned(similarity=similarity)
    merged = plan.decisions["merged"]
    assert sum(merged) > 0
    # Of ten samples none may lose a less alike pair: 5 in 100 are not one.
    assert all(numbers.min() >= similarity - 1e-6 for numbers in least_alike(bundle, merged))
    assert plan.facts["alike"]["share_less_alike"] == 0
    for index, removed in enumerate(merged):
        # One more would be less alike in some sample, as the blocks before leave the tokens.
        more = [*merged[:index], removed + 1, *[0] * (len(merged) - index - 1)]
        trial = tiny.bundle("clip")
        try:
            build("merge-tokens", {"merged": more}).check(trial)
        except UsageError:
            continue  # half of them is the most there can be
        build("merge-tokens", {"merged": more}).apply(trial, Plan({"merged": more}))
        assert least_alike(trial, more)[index].min() < similarity


def test_a_share_is_met_and_more_is_merged_where_more_is_alike() -> None:
    bundle, plan = planned(keep=0.6, schedule="similar")
    made = build("merge-tokens", {"keep": 0.6, "schedule": "similar"})
    assert made.fit(bundle, context())["keep"] == pytest.approx(0.6, abs=0.51 / 150)
    constant = build("merge-tokens", {"keep": 0.6}).plan(tiny.bundle("clip"), Context()).decisions["merged"]
    assert plan.decisions["merged"] != constant
    worst = [min(float(numbers.mean()) for numbers in least_alike(bundle, plan.decisions["merged"]))]
    plain = tiny.bundle("clip")
    build("merge-tokens", {"keep": 0.6}).apply(plain, Plan({"merged": constant}))
    assert worst > [min(float(numbers.mean()) for numbers in least_alike(plain, constant))]


@pytest.mark.parametrize("family", ["clip", "siglip2", "dual_encoder_dinov2", "whisper", "llava_clip"])
@pytest.mark.parametrize("method", ["tome", "pitome", "crossget"])
def test_every_budget_holds(family: str, method: str) -> None:
    tower = "audio" if family == "whisper" else "vision"
    for budget in ({"keep": 0.75}, {"macs": 0.8}, {"keep_tokens": 13}, {"keep": 0.9, "every": 2, "first": 1}):
        if family == "llava_clip" and "every" in budget:
            continue  # two blocks can merge
        bundle, plan = planned(family, method=method, schedule="similar", **budget)
        facts = build("merge-tokens", {"method": method, "schedule": "similar", **budget}).fit(bundle, context(family))
        blocks, merged = bundle.tower(tower).blocks, plan.decisions["merged"]
        if "keep" in budget:
            assert abs(facts["keep"] - budget["keep"]) * facts["tokens"] < 1
        elif "macs" in budget:
            assert facts["block_macs_kept"] <= budget["macs"]
        else:
            assert facts["tokens_after_block"][-1] == budget["keep_tokens"]
            assert tokens_left(bundle.module(blocks[len(merged) - 1].path), 0) == budget["keep_tokens"]
        if "every" in budget:
            assert [index for index, removed in enumerate(merged) if removed] in ([1], [])


def test_the_floor_is_respected_by_merging_what_is_most_alike() -> None:
    free, _ = planned(similarity=0.3)
    bundle, plan = planned(similarity=0.3, floor=0.5)
    last = bundle.tower("vision").blocks[-1].path
    assert tokens_left(free.module(last), 0) < 25 <= tokens_left(bundle.module(last), 0) <= 30
    assert min(float(numbers.min()) for numbers in least_alike(bundle, plan.decisions["merged"])) > 0.6


@pytest.mark.parametrize(
    "settings", [{"keep": 1.0, "schedule": "similar"}, {"similarity": 1.0}, {"similarity": 0.2, "floor": 1.0}]
)
def test_neutral_numbers_leave_the_model_alone(settings: dict[str, Any]) -> None:
    bundle, plan = planned(**settings)
    assert plan.decisions["merged"] == [0, 0, 0]
    assert not any("forward" in vars(module) for module in bundle.model.modules())


def test_padding_has_no_influence() -> None:
    """What SigLIP 2's padding holds is never alike to anything."""
    keys, sizes = torch.randn(2, 49, 12, generator=torch.Generator().manual_seed(0)), torch.ones(2, 49)
    sizes[:, 25:] = 0
    found = bipartite_pairs(keys, 0, sizes)
    keys[:, 25:] = keys[:, :1]
    assert torch.equal(bipartite_pairs(keys, 0, sizes), found)
    bundle, plan = planned("siglip2", similarity=0.5)
    assert sum(plan.decisions["merged"]) > 0
    assert bundle.encode("vision", bundle.example_inputs("vision", 2)).isfinite().all()


def test_the_same_seed_decides_the_same_and_decisions_alone_make_the_model(tmp_path: Path) -> None:
    params = {"keep": 0.6, "schedule": "similar"}
    made = [build("merge-tokens", params).plan(tiny.bundle("clip"), context(seed=3)) for _ in range(2)]
    assert made[0] == made[1]
    bundle = tiny.bundle("clip")
    stage = pipeline.Stage(1, Step("merge-tokens", params), build("merge-tokens", params))
    record = pipeline.run_stage(bundle, stage, context())
    assert record.facts["alike"]["samples"] == SAMPLES
    assert record.facts["tokens"] == 50
    checkpoint.save(bundle, tmp_path / "out")
    inputs = bundle.example_inputs("vision", 2)
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(again.encode("vision", inputs), bundle.encode("vision", inputs))
    assert again.history[-1].facts == record.facts


def test_planning_holds_no_second_copy_of_the_weights_and_leaves_the_model_as_it_was() -> None:
    bundle = tiny.bundle("clip")
    bundle.model.train()
    next(bundle.model.parameters()).requires_grad_(False)
    before = copy.deepcopy(bundle.model.state_dict())
    wanted = [parameter.requires_grad for parameter in bundle.model.parameters()]
    build("merge-tokens", {"similarity": 0.8}).plan(bundle, context())
    assert bundle.model.training
    assert [parameter.requires_grad for parameter in bundle.model.parameters()] == wanted
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())
    assert not any("reduction" in vars(module) or "forward" in vars(module) for module in bundle.model.modules())
    assert "mmc_keys" not in str([getattr(m, "config", "") for m in bundle.model.modules()])


def test_the_control_drops_as_many_by_the_solved_schedule() -> None:
    for params in ({"keep": 0.6, "schedule": "similar"}, {"similarity": 0.8}):
        made = build("merge-tokens", params)
        decisions = made.plan(tiny.bundle("clip"), context()).decisions
        twin = made.control(decisions)
        assert isinstance(twin, MergeTokens)
        drawn = twin.plan(tiny.bundle("clip"), Context()).decisions
        assert drawn["merged"] == decisions["merged"]
        assert "kept" in drawn
        early = made.control()
        assert early is not None
        early.plan(tiny.bundle("clip"), Context())


def test_data_and_weights_are_needed_and_said_to_be() -> None:
    for params in ({"schedule": "similar"}, {"similarity": 0.8}):
        made = build("merge-tokens", params)
        assert not streamed.can_stream(made)
        assert made.seconds(tiny.bundle("clip"), Work(samples=10, dataset=100, forward=0.5)) == 4 * 10 * 0.5
        with pytest.raises(UsageError, match="comparing the tokens of the vision tower needs data"):
            made.plan(tiny.bundle("clip"), Context())
        with pytest.raises(UsageError, match="has nothing for the vision tower") as raised:
            made.plan(tiny.bundle("clip"), Context(data=Dataset(Memory([Sample("1", ("a cat",))]))))
        assert "schedule constant" in raised.value.hint
        made.check(tiny.bundle("clip"))
    assert streamed.can_stream(build("merge-tokens", {"keep": 0.5}))


def test_progress_is_said_in_one_line() -> None:
    said: list[str] = []

    class Listener:
        def start(self, label: str, total: int | None) -> None: ...
        def advance(self, steps: int = 1, note: str = "") -> None: ...
        def finish(self) -> None: ...
        def say(self, line: str) -> None:
            said.append(line)

    plan = build("merge-tokens", {"similarity": 0.8}).plan(tiny.bundle("clip"), context(progress=Listener()))
    numbers = " ".join(map(str, plan.decisions["merged"]))
    assert len(said) == 1
    assert said[0].startswith(
        f"10 samples: blocks merge {numbers} tokens; each one's least alike pair has a cosine of 0.8"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity": 1.5}, "similarity is 1.5; expected 0 < similarity <= 1"),
        ({"similarity": 0.0}, "similarity is 0; expected"),
        ({"similarity": 0.8, "keep": 0.5}, "both keep and similarity"),
        ({"similarity": 0.8, "merged": [3]}, "both merged and similarity"),
        ({"similarity": 0.8, "method": "evit"}, "similarity asks how alike .* and method evit compares none"),
        ({"schedule": "similar", "method": "pool"}, "schedule similar asks how alike .* and method pool compares none"),
        ({"schedule": "similar", "method": "random"}, "method random compares none"),
        ({"similarity": 0.8, "schedule": "decreasing"}, "schedule decreasing would change nothing"),
        ({"schedule": "similar", "merged": [3]}, "schedule similar asks the data"),
        ({"schedule": "similar", "merged": [3, 2, 1]}, "schedule, every and first would change nothing|asks the data"),
        ({"floor": 0.2}, "floor is for similarity, which is not asked for"),
        ({"similarity": 0.8, "floor": 0.0}, "floor is 0; expected 0 < floor <= 1"),
        ({"schedule": "similar", "keep": 0.05}, "keep 0.05 is too small"),
        ({"schedule": "similar", "keep_tokens": 3}, "3 tokens cannot be left of 50"),
        ({"similarity": 0.8, "first": 3}, "first is 3, but in the vision tower 3 blocks can merge"),
    ],
)
def test_refusals_say_what_and_why(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        build("merge-tokens", settings).check(tiny.bundle("clip"))
    assert raised.value.hint
