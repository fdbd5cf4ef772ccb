"""The pass sparsify: exact zeros, what is refused, what survives what follows."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory
from mmcompress.errors import UsageError
from mmcompress.jobs.sparsity import sparse_findings
from mmcompress.passes.base import Context, Work
from mmcompress.passes.sparsify import Sparsify
from mmcompress.passes.sparsify_layers import paths_of_blocks, recount
from mmcompress.recipe import Step
from mmcompress.surgery.kept_zeros import zeros_of
from tests import tiny

VLM = "llava_dinov2"
METHODS = ("sparsegpt", "wanda", "magnitude", "random")


def context(**given: Any) -> Context:
    return Context(**{"data": tiny.data("clip", 12), "num_samples": 12, "batch_size": 4, **given})


def run(bundle: Bundle, *steps: tuple[str, dict[str, Any]], **given: Any) -> Bundle:
    for name, params in steps:
        stage = pipeline.Stage(len(bundle.history) + 1, Step(name, params), passes.build(name, params))
        pipeline.run_stage(bundle, stage, context(**given))
    return bundle


def zeros(bundle: Bundle) -> dict[str, Tensor]:
    """Which weights are 0, of every layer of the blocks."""
    found = {path: zeros_of(bundle.module(path)) for tower in bundle.towers() for path in paths_of_blocks(tower)}
    return {path: mask for path, mask in found.items() if mask is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("params", [{"sparsity": 0.4}, {"pattern": "2:4"}], ids=["40%", "2:4"])
def test_every_row_has_its_zeros_and_facts_are_recounted(method: str, params: dict[str, Any]) -> None:
    bundle = run(tiny.bundle("clip"), ("sparsify", {"method": method, **params}))
    record = bundle.history[-1]
    for tower in bundle.towers():
        total = 0
        for path in paths_of_blocks(tower):
            mask, width = zeros(bundle)[path], bundle.module(path).in_features
            want = width // 2 if "pattern" in params else round(0.4 * width)
            assert record.plan["zeros"][path] == want
            assert mask.sum(1).tolist() == [want] * len(mask)
            total += want * len(mask)
        fact = record.facts["sparsity"][tower.name]
        assert fact["zeros"] == total
        assert fact["share_of_tower"] < fact["share"] == pytest.approx(total / fact["weights"], abs=1e-6)
    dense = dict(tiny.bundle("clip").model.state_dict().items())
    for name, value in bundle.model.state_dict().items():
        assert torch.equal(value, dense[name]) or name.removesuffix(".weight") in record.plan["zeros"], name


def test_methods_differ_and_only_sparsegpt_changes_what_stays() -> None:
    dense = tiny.bundle("clip")
    made = {method: run(copy.deepcopy(dense), ("sparsify", {"method": method})) for method in METHODS}
    made["auto"] = run(copy.deepcopy(dense), ("sparsify", {}))
    made["updated"] = run(copy.deepcopy(dense), ("sparsify", {"method": "random", "update": True}))
    masks = {method: zeros(bundle) for method, bundle in made.items()}
    path = next(iter(masks["auto"]))
    assert not any(
        torch.equal(masks[one][path], masks[other][path]) for one in METHODS for other in METHODS if one < other
    )
    assert same(masks["auto"], masks["sparsegpt"])
    assert same(masks["random"], masks["updated"])
    for method, bundle in made.items():
        kept = ~masks[method][path]
        stays = torch.equal(bundle.module(path).weight[kept], dense.module(path).weight[kept])
        assert stays == (method in ("wanda", "magnitude", "random")), method


def test_methods_look_at_what_layers_are_given() -> None:
    """Wanda's zeros by hand; and what each method does to the outputs on the very samples."""
    dense = tiny.bundle("clip")
    path = dense.tower("vision").blocks[1].mlp.writers[0]
    seen: list[Tensor] = []
    handle = dense.module(path).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().flatten(0, -2))
    )
    dense.embed("vision", [sample.image for sample in tiny.data("clip", 12)])
    handle.remove()
    inputs, weight = torch.cat(seen), dense.module(path).weight.detach()
    made = {
        method: run(copy.deepcopy(dense), ("sparsify", {"method": method})).module(path).weight.detach()
        for method in METHODS
    }
    scores = weight.abs() * inputs.square().sum(0).sqrt()
    smallest = scores.topk(weight.shape[1] // 2, largest=False).indices
    assert torch.equal(made["wanda"], weight.scatter(1, smallest, 0))
    lost = {method: float(((each - weight) @ inputs.T).square().sum()) for method, each in made.items()}
    assert lost["sparsegpt"] < 0.8 * lost["wanda"]
    assert lost["wanda"] < 0.8 * lost["random"]


def test_without_data_auto_is_magnitude_and_what_looks_at_data_says_what_else_there_is() -> None:
    one = run(tiny.bundle("clip"), ("sparsify", {}), data=None)
    other = run(tiny.bundle("clip"), ("sparsify", {"method": "magnitude"}))
    assert one.history[0].plan["method"] == "magnitude"
    assert same(zeros(one), zeros(other))
    with pytest.raises(UsageError, match="by wanda of the vision tower needs data"):
        run(tiny.bundle("clip"), ("sparsify", {"method": "wanda"}), data=None)
    texts = Dataset(Memory([dataclasses.replace(s, picture=None) for s in tiny.data("clip", 4)]))
    with pytest.raises(UsageError, match="nothing for the vision tower") as caught:
        run(tiny.bundle("clip"), ("sparsify", {}), data=texts)
    assert "--towers" in caught.value.hint
    assert "magnitude" in caught.value.hint


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_the_order_of_samples_and_padding_do_not_matter(method: str) -> None:
    samples = list(tiny.data("clip", 12))
    one = run(tiny.bundle("clip"), ("sparsify", {"method": method}))
    other = run(
        tiny.bundle("clip"), ("sparsify", {"method": method}), data=Dataset(Memory(samples[::-1])), batch_size=3
    )
    first, second = zeros(one), zeros(other)
    agree = sum(int((first[path] == second[path]).sum()) for path in first) / sum(m.numel() for m in first.values())
    assert agree > 0.999  # near ties fall as sums were rounded
    path = paths_of_blocks(one.tower("text"))[0]
    assert torch.equal(first[path], second[path])


def test_layers_that_samples_never_come_to_go_by_magnitude() -> None:
    """LLaVA reads its pictures behind the last block but one."""
    bundle = tiny.bundle("llava_clip")
    last = bundle.tower("vision").blocks[-1].mlp.reader
    want = run(tiny.bundle("llava_clip"), ("sparsify", {"method": "magnitude"}), data=None)
    made = run(bundle, ("sparsify", {"method": "wanda"}), data=tiny.data("llava_clip", 4))
    differ = [path for path, mask in zeros(made).items() if not torch.equal(mask, zeros(want)[path])]
    assert differ
    called: list[str] = []
    probe = bundle.module(last).register_forward_hook(lambda *_: called.append(last))
    bundle.encode("vision", bundle.example_inputs("vision", 1))
    probe.remove()
    assert (last in differ) == bool(called)


def test_layers_and_towers_choose() -> None:
    bundle = run(tiny.bundle("clip"), ("sparsify", {"layers": ["*.mlp.*"], "towers": ["text"], "method": "magnitude"}))
    sparse = {path for path, mask in zeros(bundle).items() if mask.any()}
    text = bundle.tower("text")
    assert sparse == {path for block in text.blocks for path in (*block.mlp.writers, block.mlp.reader)}
    assert list(bundle.history[0].facts["sparsity"]) == ["text"]


def test_groups_that_do_not_fit_leave_a_layer_dense_and_say_so() -> None:
    """Tiny CLIP's towers are 48 wide, its MLPs 64 or 96."""
    said: list[str] = []

    class Talk:
        def say(self, text: str) -> None:
            said.append(text)

        def start(self, label: str, total: int) -> None: ...
        def advance(self, count: int = 1, note: str = "") -> None: ...
        def finish(self) -> None: ...

    bundle = tiny.bundle("clip")
    widths = {path: bundle.module(path).in_features for path in paths_of_blocks(bundle.tower("vision"))}
    of = next(of for of in range(2, 33) if len({width % of == 0 for width in widths.values()}) == 2)
    made = Sparsify(pattern=f"1:{of}", method="magnitude", towers=("vision",))
    made.check(bundle)
    plan = made.plan(bundle, context(progress=Talk()))
    dense = [path for path, width in widths.items() if width % of]
    assert plan.decisions["dense"] == dense
    assert not set(dense) & {name.removesuffix(".weight") for name in plan.tensors}
    assert any(dense[0] in text and "stay dense" in text for text in said)
    made.apply(bundle, plan)
    made.fit(bundle, context())


def test_a_pattern_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no layer has inputs in multiples of 31 \(.* has \d+") as caught:
        Sparsify(pattern="2:31").check(tiny.bundle("clip"))
    assert "unstructured" in caught.value.hint


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1; expected 0 <= sparsity < 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "both sparsity and pattern"),
        ({"pattern": "4:2"}, "pattern is '4:2'; expected unstructured, or N:M with 1 <= N < M <= 32"),
        ({"pattern": "0:4"}, "pattern is '0:4'"),
        ({"pattern": "4:64"}, "pattern is '4:64'"),
        ({"pattern": "half"}, "pattern is 'half'"),
        ({"update": True}, "update is for method random"),
        ({"method": "magnitude", "balance": "text"}, "looks at no tokens"),
    ],
)
def test_ranges(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Sparsify(**params)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"towers": ("audio",)}, "no tower 'audio'"),
        ({"layers": ("*.mlp.*", "*.embeddings.*")}, r"'\*\.embeddings\.\*', which matches no Linear"),
        ({"balance": "modality"}, "given both image and text tokens"),
    ],
)
def test_what_matches_nothing_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sparsify(**params).check(tiny.bundle("clip"))


def test_quantized_layers_are_refused() -> None:
    bundle = run(tiny.bundle("clip"), ("quantize", {"scheme": "W8A16", "towers": ["text"]}))
    Sparsify(towers=("vision",)).check(bundle)
    with pytest.raises(UsageError, match="is a QuantizedLinear") as caught:
        Sparsify().check(bundle)
    assert caught.value.hint == "put sparsify before quantize"


def test_the_control_is_random_and_updated_where_sparsegpt_is() -> None:
    assert Sparsify(method="random").control() is None
    assert Sparsify(sparsity=0.0).control() is None
    assert Sparsify(method="wanda", pattern="2:4").control() == Sparsify(method="random", pattern="2:4")
    updated = Sparsify(method="random", update=True)
    assert Sparsify(method="sparsegpt").control() == updated
    assert Sparsify().control({"method": "sparsegpt"}) == updated
    assert Sparsify().control({"method": "magnitude"}) == Sparsify(method="random")
    assert Sparsify(balance="text").control({"method": "sparsegpt"}) == dataclasses.replace(updated, balance="text")
    assert Sparsify(balance="text", method="wanda").control() == Sparsify(method="random")


def test_image_and_text_tokens_count_as_balance_says() -> None:
    made = {
        kind: run(
            tiny.bundle("llava_dinov2"),
            ("sparsify", {"towers": ["language"], "balance": kind}),
            data=tiny.data("llava_dinov2", 4),
        )
        for kind in ("none", "text")
    }
    assert not same(zeros(made["none"]), zeros(made["text"]))


@pytest.mark.parametrize(
    "params",
    [
        {"scheme": "W8A8", "min_cosine": -1.0},
        {"scheme": "W8A16"},
        {"scheme": "W4A16", "group_size": 16},
        {"scheme": "W4A16", "group_size": 16, "rounding": "hqq"},
        {"scheme": "W4A16", "group_size": 16, "rounding": "gptq", "scaling": "awq", "clip": True, "min_cosine": -1.0},
        {"scheme": "FP8", "target": "cuda", "min_cosine": -1.0},
    ],
    ids=lambda params: "-".join(str(value) for value in params.values()),
)
def test_quantizing_keeps_zeros(params: dict[str, Any]) -> None:
    bundle = run(tiny.bundle("clip"), ("sparsify", {"pattern": "2:4"}))
    before = zeros(bundle)
    run(bundle, ("quantize", params))
    after = zeros(bundle)
    assert not any(isinstance(bundle.module(path), nn.Linear) for path in before)
    assert all(bool((after[path] | ~before[path]).all()) for path in before)


@pytest.mark.parametrize("train", ["all", "lora", "quantized-weights"])
def test_training_keeps_zeros(train: str) -> None:
    bundle = run(tiny.bundle("clip"), ("sparsify", {"pattern": "2:4", "method": "magnitude"}))
    if train == "quantized-weights":
        run(bundle, ("quantize", {"scheme": "W8A16"}))
    before, weights = zeros(bundle), {p: bundle.module(p).weight.detach().clone() for p in zeros(bundle)}
    params = {
        "steps": 3,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "keep_worse": True,
        "train": train,
        "ema": 0.5 if train == "all" else 0.0,
    }
    run(bundle, ("distill", params), teacher=lambda: tiny.bundle("clip", seed=1))
    after = zeros(bundle)
    for path, mask in before.items():
        assert bool(after[path][mask].all()), path
        assert not torch.equal(bundle.module(path).weight, weights[path]), path
    assert bundle.history[-1].facts.get("zeros_kept", 0) >= (
        0 if train == "lora" else sum(int(m.sum()) for m in before.values())
    )


def test_training_what_nobody_made_sparse_moves_zeros_too() -> None:
    bundle = tiny.bundle("clip")
    path = paths_of_blocks(bundle.tower("vision"))[0]
    with torch.no_grad():
        bundle.module(path).weight[:, ::2] = 0
    run(
        bundle,
        ("distill", {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "keep_worse": True}),
        teacher=lambda: tiny.bundle("clip", seed=1),
    )
    assert not (bundle.module(path).weight == 0).any()
    assert "zeros_kept" not in bundle.history[-1].facts


def test_it_is_said_that_nothing_is_gained_and_what_was_lost_again() -> None:
    bundle = run(tiny.bundle("clip"), ("sparsify", {"pattern": "2:4", "towers": ["vision"]}))
    run(bundle, ("sparsify", {"sparsity": 0.25, "towers": ["text"]}))
    (said,) = sparse_findings(bundle)
    assert said.level == "bad"
    assert "NEITHER SMALLER NOR FASTER" in said.text
    assert "vision 50.0%, text 25.0% are zero" in said.text
    assert "kernels for 2:4" in said.text
    assert not sparse_findings(bundle, earlier=2)  # that was another run
    run(bundle, ("prune", {"ratio": 0.1, "towers": ["vision"], "multiple": 1}))
    lost, broken = sparse_findings(bundle, earlier=2)
    assert lost.level == broken.level == "bad"
    assert "the vision tower has LOST zeros: 50.0% of its blocks' weights were zero" in lost.text
    assert "after prune" in lost.text
    assert "more layers are 2:4 NO MORE, after prune" in broken.text
    assert not sparse_findings(run(tiny.bundle("clip"), ("sparsify", {"sparsity": 0.0})))


def test_plain_transformers_loads_it_and_zeros_are_in_the_file(tmp_path: Path) -> None:
    bundle = run(tiny.bundle("clip"), ("sparsify", {}))
    written = checkpoint.save(bundle, tmp_path / "model")
    assert written.plain_transformers, written.why
    plain = type(bundle.model).from_pretrained(tmp_path / "model").eval()
    again = Bundle(plain, bundle.processor, bundle.family, bundle.source)
    assert same(zeros(bundle), zeros(again))
    assert recount(again, again.tower("text")) == bundle.history[0].facts["sparsity"]["text"]


@pytest.mark.parametrize(
    ("params", "looks"),
    [
        ({}, 1),
        ({"method": "wanda"}, 1),
        ({"method": "magnitude"}, 0),
        ({"method": "random", "update": True}, 1),
        ({"sparsity": 0.0}, 0),
    ],
)
def test_time_is_that_of_the_looks_at_samples(params: dict[str, Any], looks: int) -> None:
    found = Sparsify(**params).seconds(tiny.bundle("clip"), Work(samples=10, dataset=100, forward=0.5))
    assert found == looks * 10 * 0.5
