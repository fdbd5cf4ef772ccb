"""Experts as units of `prune`: what routers say of them, what goes with one, and what stays the same without it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3VLMoeForConditionalGeneration

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_ranking import ranked
from mmcompress.passes.prune_units import count_costs, count_tokens, list_groups, read_ranges
from mmcompress.recipe import Step
from mmcompress.surgery.routing import through_every_expert, watch_routing
from mmcompress.views import Block
from tests import tiny

MODEL = "qwen3_vl_moe"
EXPERTS: dict[str, Any] = {"units": ("experts",), "towers": ("language",)}


def context(seed: int = 0) -> Context:
    return Context(data=tiny.data(MODEL, 8), num_samples=8, batch_size=3, seed=seed)


def settings(**more: Any) -> Prune:
    return Prune(**{"ratio": 0.1, **EXPERTS, **more})


def run(bundle: Bundle, name: str, **params: Any) -> Bundle:
    stage = pipeline.Stage(1, Step(name, params), passes.build(name, params))
    pipeline.run_stage(bundle, stage, context())
    return bundle


def mixtures(bundle: Bundle) -> list[Block]:
    return [block for block in bundle.tower("language").blocks if block.experts]


@torch.no_grad()
def output(bundle: Bundle) -> Tensor:
    return bundle.encode("language", bundle.example_inputs("language", 3))


def state(bundle: Bundle) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_belongs_to_an_expert_and_what_it_costs() -> None:
    """32 channels, 24 neurons: gate and up 48 x 32, down 32 x 24, a row of 32 of the router; 80 tokens meet that row."""
    bundle = tiny.bundle(MODEL)
    tower = bundle.tower("language")
    groups = list_groups(bundle, [tower], ["experts"], (), count_tokens(bundle, tower))
    assert [(group.key, group.units, group.least) for group in groups] == [("language.0", 4, 2), ("language.2", 4, 2)]
    assert {group.cost.parameters for group in groups} == {48 * 32 + 32 * 24 + 32}
    assert {group.cost.macs for group in groups} == {80 * 32}


def test_macs_are_those_of_the_experts_a_token_goes_through() -> None:
    """Of all four, and of the two that are left: the router's two rows less, and nothing else."""
    bundle = tiny.bundle(MODEL)
    tower = bundle.tower("language")
    before = count_costs(bundle, tower)
    first, middle, last = list_groups(bundle, [tower], ["blocks"], (), count_tokens(bundle, tower))
    attention = 80 * (2 * 32 * 32 + 2 * 16 * 32) + 2 * 80 * 80 * 32
    assert first.cost.macs == last.cost.macs == attention + 80 * (2 * (48 * 32 + 32 * 24) + 4 * 32)
    answers = 8 * 32 * 48  # places whose next word is asked for, and words
    assert before.macs == first.cost.macs + middle.cost.macs + last.cost.macs + answers
    made = settings(ratio=0.2, score="random")
    made.apply(bundle, made.plan(bundle, Context()))
    after = count_costs(bundle, bundle.tower("language"))
    assert [block.experts.experts for block in mixtures(bundle)] == [2, 2]  # type: ignore[union-attr]
    assert before.macs - after.macs == 2 * 2 * 80 * 32
    assert before.parameters - after.parameters == 4 * (48 * 32 + 32 * 24 + 32)


def test_removing_nothing_changes_nothing_and_needs_no_data() -> None:
    bundle = tiny.bundle(MODEL)
    before, given = state(bundle), output(bundle)
    made = settings(ratio=0.0)
    made.check(bundle)
    plan = made.plan(bundle, Context())
    made.apply(bundle, plan)
    assert same_state(state(bundle), before)
    assert torch.equal(output(bundle), given)
    assert plan.decisions["before"] == plan.decisions["after"]


def never(router: nn.Module, gone: list[int]) -> None:
    """Let `router` choose none of `gone`: their logits are -inf."""

    def after(module: nn.Module, args: tuple[Tensor], made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = made[0].clone()
        logits[:, gone] = -torch.inf
        weights, indices = logits.softmax(-1, dtype=torch.float32).topk(module.top_k)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), indices

    router.register_forward_hook(after)


def test_cutting_equals_never_choosing() -> None:
    """In float64, but for the router's softmax; the weights of those left sum to 1 again."""
    bundle = tiny.bundle(MODEL)
    bundle.model.double().set_experts_implementation("eager")  # the other ways take no float64
    whole = output(bundle)
    plan = settings(ratio=0.2, score="random").plan(bundle, Context())
    masked = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model))
    for block in mixtures(masked):
        kept = read_ranges(plan.decisions["kept"]["experts"][f"language.{block.index}"])
        never(masked.module(block.experts.router), sorted({0, 1, 2, 3} - set(kept)))  # type: ignore[union-attr]
    settings(ratio=0.2).apply(bundle, plan)
    torch.testing.assert_close(output(bundle), output(masked), rtol=0, atol=1e-12)
    assert not torch.allclose(output(bundle), whole, rtol=0, atol=1e-4)
    sums: list[Tensor] = []
    routers = {block.path: bundle.module(block.experts.router) for block in mixtures(bundle)}  # type: ignore[union-attr]
    with watch_routing(routers, lambda _, weights, indices: sums.append(weights.sum(-1))):
        output(bundle)
    torch.testing.assert_close(torch.cat(sums), torch.ones_like(torch.cat(sums)))


def test_the_score_is_the_mean_weight_over_tokens_that_count() -> None:
    """Recomputed from the routers' inputs: padding does not count."""
    bundle = tiny.bundle(MODEL)
    made = settings(score="routing")
    _, groups, _, _ = made.survey(bundle, made.chosen(bundle))
    found = ranked(made, bundle, groups, context())
    wanted = [torch.zeros(4, dtype=torch.float64) for _ in groups]
    counts, mask = [0, 0], torch.empty(0)

    def before(number: int, module: Any, states: Tensor) -> None:
        shares = (states.double() @ module.weight.double().t()).softmax(-1)
        top = shares.sort(-1, descending=True).indices[:, 2:]
        shares.scatter_(1, top, 0)
        wanted[number] += (shares / shares.sum(-1, keepdim=True))[mask].sum(0)
        counts[number] += int(mask.sum())

    for number, group in enumerate(groups):
        bundle.module(group.reader).register_forward_pre_hook(
            lambda module, args, number=number: before(number, module, args[0])
        )
    data = tiny.data(MODEL, 8)
    for start in (0, 3, 6):
        items = [item for sample in list(data)[start : start + 3] for item in bundle.items("language", sample)]
        inputs = bundle.prepare("language", items)
        mask = inputs["attention_mask"].flatten().bool()
        with torch.no_grad():
            bundle.encode("language", inputs)
    assert not mask.all()
    for own, total, count in zip(found, wanted, counts, strict=True):
        torch.testing.assert_close(own.double(), total / count, rtol=0, atol=1e-6)
        assert float(own.sum()) == pytest.approx(1, abs=1e-5)


def test_experts_no_token_is_sent_to_go_first_and_take_nothing_along() -> None:
    """With one expert a token, and rows a, -a and twice 0, one of the first two always has the largest logit."""
    bundle = tiny.bundle(MODEL)
    for block in mixtures(bundle):
        router = bundle.module(block.experts.router)  # type: ignore[union-attr]
        router.top_k = 1
        with torch.no_grad():
            router.weight[[0, 2]] = 0
            router.weight[3] = -router.weight[1]
    made = settings(ratio=0.2)
    data = list(tiny.data(MODEL, 8))
    inputs = bundle.prepare("language", [bundle.items("language", sample)[0] for sample in data])
    with torch.no_grad():
        before, given, said = bundle.encode("language", inputs), output(bundle), bundle.generate(data)
    made.check(bundle)
    plan = made.plan(bundle, context())
    assert plan.decisions["kept"]["experts"] == {"language.0": "1,3", "language.2": "1,3"}
    assert plan.facts["score"] == "routing"
    made.apply(bundle, plan)
    with torch.no_grad():
        assert torch.equal(bundle.encode("language", inputs), before)
    assert torch.equal(output(bundle), given)
    assert bundle.generate(data) == said


def test_shares_of_blocks_with_few_and_with_many_experts_compare_as_they_are() -> None:
    """0.247 of a block of four goes before 0.45 of a block of two, which is less beside the mean of its block."""
    bundle = run(tiny.bundle(MODEL), "prune", **EXPERTS, ratio=0.09, score="magnitude", protect=(2,))
    for block in mixtures(bundle):
        bundle.module(block.experts.router).top_k = 1  # type: ignore[union-attr]
    shares = [torch.tensor([0.55, 0.45]), torch.tensor([0.26, 0.24667, 0.24667, 0.24666])]
    made = settings(ratio=0.03)
    assert made.planned(bundle, context(), shares).decisions["kept"]["experts"] == {"language.2": "0-2"}


def test_the_magnitude_of_an_expert_is_that_of_all_its_weights() -> None:
    bundle = tiny.bundle(MODEL)
    made = settings(score="magnitude")
    _, groups, _, _ = made.survey(bundle, made.chosen(bundle))
    first = bundle.model.model.language_model.layers[0].mlp
    own = [first.experts.gate_up_proj[2], first.experts.down_proj[2], first.gate.weight[2]]
    wanted = torch.cat([part.detach().flatten() for part in own]).norm()
    torch.testing.assert_close(ranked(made, bundle, groups, Context())[0][2], wanted)


def test_the_control_removes_as_much_at_random() -> None:
    made = settings(score="routing").control()
    assert made is not None
    assert (made.ranking, made.units, made.ratio) == ("random", ("experts",), 0.1)
    bundle = tiny.bundle(MODEL)
    plans = [each.plan(bundle, context()).decisions["after"] for each in (settings(score="routing"), made)]
    assert plans[0] == plans[1] == settings(score="random").plan(bundle, context(seed=3)).decisions["after"]


@pytest.mark.parametrize("uniform", [False, True])
def test_it_reloads_bit_equal_and_costs_what_was_promised(tmp_path: Path, uniform: bool) -> None:
    """Uneven numbers of experts are the plan's; equal ones config.json says, and plain transformers answers the same."""
    bundle = tiny.bundle(MODEL)
    run(
        bundle,
        "prune",
        **EXPERTS,
        **({"ratio": 0.15, "uniform": True} if uniform else {"ratio": 0.09, "protect": (2,)}),
    )
    numbers = [block.experts.experts for block in mixtures(bundle)]  # type: ignore[union-attr]
    assert numbers == ([2, 2] if uniform else [2, 4])
    record = bundle.history[-1]
    recount = record.facts["recount"]["language"]
    assert recount == record.plan["after"]["language"]  # type: ignore[index,call-overload]
    written = checkpoint.save(bundle, tmp_path / "small")
    again = checkpoint.load(tmp_path / "small")
    assert same_state(state(again), state(bundle))
    assert torch.equal(output(again), output(bundle))
    samples = list(tiny.data(MODEL, 4))
    assert again.generate(samples) == bundle.generate(samples)
    assert written.plain_transformers == uniform
    with through_every_expert(again.model.config.text_config):  # as it is exported
        torch.testing.assert_close(output(again), output(bundle), rtol=0, atol=1e-6)
    if uniform:
        plain = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "small")
        assert plain.config.text_config.num_experts == 2
        assert torch.equal(output(dataclasses.replace(again, model=plain.eval())), output(bundle))
    else:
        assert "cannot say the shapes" in written.why


def test_blocks_that_go_leave_those_with_experts_where_config_json_says(tmp_path: Path) -> None:
    """Of experts, one feed-forward, experts the first goes."""
    bundle = tiny.bundle(MODEL)
    made = Prune(units=("blocks",), score="random", towers=("language",), ratio=0.2)
    kept = {"heads": {}, "neurons": {}, "blocks": {"language": "1-2"}}
    made.apply(bundle, Plan({"kept": kept}))
    written = checkpoint.save(bundle, tmp_path / "small")
    assert written.plain_transformers
    plain = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "small").eval()
    assert plain.config.text_config.mlp_only_layers == [0]
    assert torch.equal(output(dataclasses.replace(bundle, model=plain)), output(bundle))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("prune", {"ratio": 0.2, "score": "magnitude", "compensate": "none"}),
        ("prune", {"ratio": 0.1, "towers": ("language",)}),
        ("quantize", {"scheme": "W8A8", "keep_float": ("*.experts",)}),
        ("factorize", {"ratio": 0.1}),
        ("sparsify", {}),
        ("drop-visual-tokens", {"keep": 0.5}),
    ],
    ids=["prune-magnitude", "prune-obs", "w8a8", "factorize", "sparsify", "drop"],
)
def test_other_passes_leave_experts_as_they_are(tmp_path: Path, name: str, params: dict[str, Any]) -> None:
    bundle = tiny.bundle(MODEL)
    before = state(bundle)
    run(bundle, name, **params)
    assert all(torch.equal(value, before[key]) for key, value in state(bundle).items() if ".experts." in key)
    assert not torch.equal(output(bundle), output(tiny.bundle(MODEL)))
    left = bundle.history[-1].facts.get("experts_left")
    assert left == (
        {"language": 2 * 4 * (48 * 32 + 32 * 24)} if name in ("quantize", "factorize", "sparsify") else None
    )
    checkpoint.save(bundle, tmp_path / "small")
    again = checkpoint.load(tmp_path / "small")
    assert same_state(state(again), state(bundle))
    assert torch.equal(output(again), output(bundle))


def test_experts_learn() -> None:
    bundle = tiny.bundle(MODEL)
    before = state(bundle)
    made = passes.build("distill", {"steps": 2, "batch_size": 4})
    given = dataclasses.replace(context(), teacher=lambda: tiny.bundle(MODEL, seed=1))
    made.check(bundle)
    made.apply(bundle, made.plan(bundle, given))
    made.fit(bundle, given)
    changed = [not torch.equal(value, before[key]) for key, value in state(bundle).items() if ".experts." in key]
    assert len(changed) == 4
    assert all(changed)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"units": ("experts", "heads")}, "mixes experts with others"),
        ({"score": "taylor"}, "taylor does not rank experts"),
        ({"score": "obs"}, "obs does not rank experts"),
        ({"score": "block-influence"}, "block-influence does not rank experts"),
        ({"units": ("heads",), "score": "routing"}, "routing does not rank heads"),
        ({"units": ("blocks",), "score": "routing"}, "routing does not rank blocks"),
        ({"ratio": 0.0, "latency_ms": 5.0}, "a token still goes through as many"),
        ({"allocate": "evolutionary"}, "experts have no channels"),
        ({"crosscheck": True}, "knows no experts"),
    ],
)
def test_what_does_not_go_together_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        settings(**params)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("model", "params", "message"),
    [
        ("clip", {"towers": ()}, "there are no experts: every block has one feed-forward"),
        (MODEL, {"towers": ("vision",)}, "there are no experts"),
        (MODEL, {"ratio": 0.3}, r"at most 9,344 can go within the lower bounds \(a token goes through 2 experts"),
        (MODEL, {"ratio": 0.01, "budget": "macs"}, "at most 10,240 can go"),
    ],
)
def test_models_that_cannot_lose_so_many_are_refused(model: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        settings(score="magnitude", **params).check(tiny.bundle(model))
    assert caught.value.hint


def test_uniform_wants_equal_numbers_and_search_has_no_gates_for_experts() -> None:
    bundle = run(tiny.bundle(MODEL), "prune", **EXPERTS, ratio=0.09, score="magnitude", protect=(2,))
    with pytest.raises(UsageError, match="2 to 4 experts; uniform needs equal ones"):
        settings(uniform=True, score="magnitude").check(bundle)
    with pytest.raises(UsageError, match="experts have none"):
        passes.build("search-prune", {"units": ("experts",)})


def test_where_every_block_has_experts_there_are_no_neurons() -> None:
    bundle = tiny.bundle(MODEL)
    passes.build("prune", {"ratio": 0.01, "units": ("neurons",), "score": "magnitude"}).check(bundle)
    made = Prune(units=("blocks",), score="random", towers=("language",))
    made.apply(bundle, Plan({"kept": {"heads": {}, "neurons": {}, "blocks": {"language": "0,2"}}}))
    with pytest.raises(UsageError, match="every block has experts"):
        Prune(ratio=0.01, units=("neurons",), score="magnitude", towers=("language",)).check(bundle)
