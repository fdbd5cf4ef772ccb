"""The laws every pass keeps on every family (design: neutral, plan, reload, batch, deepcopy, gradients, seed, one tower)."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Sample, Video
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context, Plan
from mmcompress.recipe import Step
from tests import tiny

# Parameters that ask for nothing.
NEUTRAL: dict[str, dict[str, Any]] = {
    "prune": {"ratio": 0.0},
    "search-prune": {"ratio": 0.0},
    "trim-vocabulary": {"minimum": 0},
    "factorize": {"ratio": 0.0},
    "narrow": {"ratio": 0.0},
    "rotate": {"stream": False, "values": False},
    "sparsify": {"sparsity": 0.0},
    "merge-tokens": {"keep": 1.0},
    "coarsen-tokens": {"keep": 1.0},
    "reduce-visual-tokens": {"keep": 1.0},
    "drop-visual-tokens": {"keep": 1.0},
    "merge-frames": {"stride": 1},
    "quantize": {"scheme": "W16A16"},
    "distill": {"steps": 0},
}
# Parameters that do something, by a name for the test report.
ACTIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "prune": ("prune", {"ratio": 0.3}),
    "prune-uniform": ("prune", {"ratio": 0.3, "units": ["neurons"], "score": "magnitude", "uniform": True}),
    "prune-blocks": ("prune", {"ratio": 0.3, "units": ["blocks"], "score": "block-influence", "compensate": "none"}),
    "prune-random": ("prune", {"ratio": 0.3, "score": "random", "compensate": "none"}),
    "search-prune": ("search-prune", {"ratio": 0.2, "steps": 2, "interval": 1, "batch_size": 4, "multiple": 1}),
    "trim": ("trim-vocabulary", {"tokens": 6}),
    "factorize": ("factorize", {"ratio": 0.2}),
    "narrow": ("narrow", {"ratio": 0.25}),
    "rotate": ("rotate", {}),
    "sparsify": ("sparsify", {"sparsity": 0.5}),
    "merge": ("merge-tokens", {"keep": 0.6}),
    "merge-similar": ("merge-tokens", {"keep": 0.6, "schedule": "similar"}),
    "merge-evit": ("merge-tokens", {"keep": 0.6, "method": "evit"}),
    "merge-crossget": ("merge-tokens", {"keep": 0.6, "method": "crossget", "guide": "learned", "guide_epochs": 1}),
    "coarsen": ("coarsen-tokens", {"keep": 0.4, "run": 4, "first": 1}),
    "coarsen-random": ("coarsen-tokens", {"keep": 0.4, "run": 4, "first": 1, "method": "random"}),
    "merge-random": ("merge-tokens", {"keep": 0.6, "method": "random"}),
    "reduce": ("reduce-visual-tokens", {"keep": 0.3}),
    "reduce-visionzip": ("reduce-visual-tokens", {"keep": 0.3, "method": "visionzip"}),
    "reduce-selector": ("reduce-visual-tokens", {"keep": 0.3, "method": "selector", "selector_epochs": 2}),
    "reduce-relevance": ("reduce-visual-tokens", {"keep": 0.3, "method": "relevance"}),
    "reduce-adaptive": ("reduce-visual-tokens", {"adaptive": True, "method": "prumerge"}),
    "reduce-random": ("reduce-visual-tokens", {"keep": 0.3, "method": "random"}),
    "drop": ("drop-visual-tokens", {"keep": 0.5}),
    "drop-sparsevlm": ("drop-visual-tokens", {"keep": 0.5, "method": "sparsevlm", "recycle": True}),
    "drop-adaptive": ("drop-visual-tokens", {"adaptive": True, "method": "recoverable"}),
    "drop-random": ("drop-visual-tokens", {"keep": 0.5, "method": "random"}),
    "frames": ("merge-frames", {"stride": 2}),
    "frames-convolution": ("merge-frames", {"stride": 4, "convolution": True}),
    "frames-random": ("merge-frames", {"stride": 4, "method": "random"}),
    "w8a8-cpu": ("quantize", {"scheme": "W8A8", "target": "cpu"}),
    "w8a8-tensorrt": ("quantize", {"scheme": "W8A8", "target": "tensorrt"}),
    "w8a16": ("quantize", {"scheme": "W8A16"}),
    "w4a16": ("quantize", {"scheme": "W4A16", "group_size": 16}),
    "w4a16-gptq": ("quantize", {"scheme": "W4A16", "rounding": "gptq", "min_cosine": -1.0}),
    "cache": ("quantize", {"scheme": "W16A16", "cache": "int8"}),
    "distill": ("distill", {"steps": 2, "batch_size": 4}),
}
# One of each kind, in an order that works.
CHAIN = ("prune", "merge", "reduce", "drop", "frames", "w8a8-cpu", "distill")
EVERY = tiny.EVERY
COARSENING = ("dual_encoder_vit", "dual_encoder_dinov2", "altclip", "chinese_clip", "clap", "whisper")
REDUCING = ("llava_dinov2", "llava_clip", "llava_siglip", "smolvlm", "idefics3", "paligemma")
FILMED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
DROPPING = (*REDUCING, "llava_next", *FILMED)
NARROWING = (*tiny.MERGING, *(family for family in DROPPING if family != "paligemma"))
UNMERGED = tuple(family for family in tiny.GENERATORS if family not in ("whisper", "llava_next", *REDUCING))
# What is refused: by a pass's name or a case's, the families. `check` says why, and README's matrix shows it.
REFUSED: dict[str, tuple[str, ...]] = {
    "merge-tokens": ("flava", "blip_retrieval", *tiny.HEARING, *UNMERGED, *tiny.JUDGES),
    "coarsen-tokens": tuple(family for family in EVERY if family not in COARSENING),
    "distill": ("vilt", *tiny.HEARING, *tiny.JUDGES),
    "search-prune": ("vilt", *tiny.HEARING, *tiny.JUDGES),
    "trim-vocabulary": ("blip", "blip_vqa", "vilt", *tiny.JUDGES),
    "narrow": tuple(family for family in EVERY if family not in NARROWING),
    "reduce-visual-tokens": tuple(family for family in EVERY if family not in REDUCING),
    "drop-visual-tokens": tuple(family for family in EVERY if family not in DROPPING),
    "merge-crossget": (*tiny.HEARING, *tiny.GENERATORS),
    "merge-frames": tuple(family for family in EVERY if family not in FILMED),
    "cache": tuple(family for family in EVERY if family not in DROPPING),
    "reduce-visionzip": ("smolvlm", "idefics3"),
    "reduce-adaptive": ("smolvlm", "idefics3"),
    "prune-blocks": ("clap", "blip_vqa"),
    "prune-uniform": ("clap",),
}


def applies(case: str, family: str) -> bool:
    """Whether a pass, or a case of one, applies."""
    return all(family not in REFUSED.get(name, ()) for name in (case, ACTIVE[case][0] if case in ACTIVE else case))


@functools.cache
def data(family: str) -> Any:
    return tiny.data(family, 12)


def context(family: str, seed: int = 0) -> Context:
    return Context(
        data=data(family), num_samples=8, batch_size=4, seed=seed, teacher=lambda: tiny.bundle(family, seed=1)
    )


def run(bundle: Bundle, family: str, *cases: str, seed: int = 0) -> Bundle:
    for number, case in enumerate(cases, 1):
        name, params = ACTIVE[case]
        stage = pipeline.Stage(number, Step(name, params), passes.build(name, params))
        pipeline.run_stage(bundle, stage, context(family, seed))
    return bundle


def state(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def hooks_of(bundle: Bundle) -> list[list[int]]:
    return [
        [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
        for module in bundle.model.modules()
    ]


@torch.no_grad()
def outputs(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {tower.name: bundle.encode(tower.name, bundle.example_inputs(tower.name, 3)) for tower in bundle.towers()}


@torch.no_grad()
def outputs_of_films(bundle: Bundle) -> dict[str, torch.Tensor]:
    """What models make of a video of five layers that see it as one, beside what they make of examples."""
    if not any(tower.film for tower in bundle.towers()):
        return {}
    film = Sample("film", ("a cat",), video=Video(tuple(tiny.images(9))), question="what is this ?")
    return {"film": bundle.encode("language", bundle.prepare("language", [film]))}


def same_outputs(one: Bundle, other: Bundle) -> bool:
    first, second = (outputs(bundle) | outputs_of_films(bundle) for bundle in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


# Models whose family another one stands for here: the contract and one whole chain are theirs too.
VARIANTS = (
    "chinese_clip", "llava_clip", "llava_siglip", "idefics3", "qwen2_vl", "blip_vqa", "vilt_retrieval", "layoutlm_pages",
    "layoutlm_words",
)  # fmt: skip
# Families of which all combinations are tried, of others single passes, pairs and the whole chain.
COMBINED = ("clip", "siglip2", "dual_encoder_vit", "dual_encoder_dinov2", "whisper")
LAWFUL = tuple(family for family in EVERY if family not in VARIANTS)


@dataclass(frozen=True)
class Made:
    """A case that has been run on a family's tiny model, once for all the laws: nobody may change it."""

    case: str
    family: str
    bundle: Bundle


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest) -> Made:
    case, family = request.param
    return Made(case, family, run(tiny.bundle(family), family, case, seed=3))


every_case = pytest.mark.parametrize(
    "made",
    [
        pytest.param((case, family), id=f"{case}-{family}")
        for case in ACTIVE
        for family in LAWFUL
        if applies(case, family)
    ],
    indirect=True,
)
every_pass = pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name in NEUTRAL for family in LAWFUL if applies(name, family)]
)
every_chain = pytest.mark.parametrize(
    ("cases", "family"),
    [
        pytest.param(cases, family, id=f"{'+'.join(cases)}-{family}")
        for family in EVERY
        for n in range(1, len(CHAIN) + 1)
        for cases in itertools.combinations(CHAIN, n)
        if all(applies(case, family) for case in cases)
        and (
            family in COMBINED
            or n == sum(applies(case, family) for case in CHAIN)
            or (n < 3 and family not in VARIANTS)
        )
    ],
)


@pytest.mark.parametrize(("case", "family"), [(c, f) for c in ACTIVE for f in EVERY if not applies(c, f)])
def test_what_is_refused_is_refused_with_a_reason_and_a_hint(case: str, family: str) -> None:
    name, params = ACTIVE[case]
    with pytest.raises(UsageError, match=r"\w+") as caught:
        passes.build(name, params).check(tiny.bundle(family))
    assert caught.value.hint


def test_every_pass_is_under_the_laws() -> None:
    assert set(NEUTRAL) == set(passes.PASSES)
    assert {name for name, _ in ACTIVE.values()} == set(passes.PASSES)


@every_pass
def test_neutral_parameters_change_nothing(name: str, family: str) -> None:
    bundle = tiny.bundle(family)
    before, embeddings = state(bundle), outputs(bundle) | outputs_of_films(bundle)
    made = passes.build(name, NEUTRAL[name])
    made.check(bundle)
    made.apply(bundle, made.plan(bundle, context(family)))
    made.fit(bundle, context(family))
    assert same_state(before, state(bundle))
    after = outputs(bundle) | outputs_of_films(bundle)
    assert all(torch.equal(value, after[tower]) for tower, value in embeddings.items())


@every_case
def test_plan_changes_no_tensor_and_leaves_no_hook(made: Made) -> None:
    bundle = tiny.bundle(made.family)
    outputs(bundle)  # transformers puts hooks of its own where hidden states are asked for, and leaves them
    before, modules, hooks = state(bundle), dict(bundle.model.named_modules()), hooks_of(bundle)
    name, params = ACTIVE[made.case]
    settings = passes.build(name, params)
    settings.check(bundle)
    settings.plan(bundle, context(made.family))
    assert same_state(before, state(bundle))
    assert dict(bundle.model.named_modules()) == modules
    assert hooks_of(bundle) == hooks
    assert not any("forward" in vars(module) for module in bundle.model.modules())
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


@every_case
def test_apply_makes_the_same_structure_on_meta_tensors(made: Made) -> None:
    name, params = ACTIVE[made.case]
    with torch.device("meta"):
        model = type(made.bundle.model)(tiny.bundle(made.family).model.config)
    shell = Bundle(model, made.bundle.processor, made.bundle.family, made.bundle.source)
    passes.build(name, params).apply(shell, Plan(made.bundle.history[-1].plan))
    real = {key: (tensor.shape, tensor.dtype) for key, tensor in made.bundle.model.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in shell.model.state_dict().items()} == real


@every_case
def test_active_parameters_change_the_output(made: Made) -> None:
    assert not same_outputs(made.bundle, tiny.bundle(made.family))


@every_chain
def test_every_combination_reloads_bit_equal(cases: tuple[str, ...], family: str, tmp_path: Path) -> None:
    bundle = run(tiny.bundle(family), family, *cases)
    written = checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert same_state(state(bundle), state(again))
    assert same_outputs(bundle, again)
    checkpoint.save(again, tmp_path / "again")
    for file in ("model.safetensors", "config.json", "mmc.json"):
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    if written.plain_transformers:
        plain = Bundle(
            type(bundle.model).from_pretrained(tmp_path / "model").eval(),
            bundle.processor,
            bundle.family,
            bundle.source,
        )
        assert same_outputs(bundle, plain)


@every_case
def test_one_pass_reloads_bit_equal(made: Made, tmp_path: Path) -> None:
    checkpoint.save(made.bundle, tmp_path / "model")
    assert same_outputs(made.bundle, checkpoint.load(tmp_path / "model"))


# What the configs of these cannot say: SigLIP has one MLP width for the blocks and the pooling head, BLIP one for question
# encoder and answer decoder; DINOv2 and Qwen2-VL know only whole ratios.
UNSAYABLE = {
    ("prune-uniform", family) for family in ("siglip", "siglip2", "dual_encoder_dinov2", "llava_dinov2", "blip_vqa")
}


@pytest.mark.parametrize(
    ("case", "family"),
    [
        (case, family)
        for case in ("prune-uniform", "prune-blocks", "distill")
        for family in EVERY
        if applies(case, family)
    ],
)
def test_plain_transformers_loads_uniform_widths_and_depths(case: str, family: str, tmp_path: Path) -> None:
    bundle = run(tiny.bundle(family), family, case)
    written = checkpoint.save(bundle, tmp_path / "model")
    assert same_outputs(bundle, checkpoint.load(tmp_path / "model"))
    if (case, family) in UNSAYABLE:
        assert not written.plain_transformers
        assert "config.json cannot say" in written.why
        return
    assert written.plain_transformers, written.why
    plain = type(bundle.model).from_pretrained(tmp_path / "model").eval()
    assert same_outputs(bundle, Bundle(plain, bundle.processor, bundle.family, bundle.source))


@pytest.mark.parametrize("family", ["dual_encoder_vit", "dual_encoder_dinov2"])
def test_plain_transformers_loads_uniform_heads_where_the_config_has_a_head_size(family: str, tmp_path: Path) -> None:
    params = {"ratio": 0.05, "units": ["heads"], "score": "magnitude", "uniform": True, "towers": ["vision"]}
    bundle = tiny.bundle(family)
    pipeline.run_stage(bundle, pipeline.Stage(1, Step("prune", params), passes.build("prune", params)), context(family))
    heads = {block.attention.heads for block in bundle.tower("vision").blocks}
    assert heads < {1, 2, 3}
    written = checkpoint.save(bundle, tmp_path / "model")
    assert written.plain_transformers, written.why
    plain = type(bundle.model).from_pretrained(tmp_path / "model").eval()
    assert same_outputs(bundle, Bundle(plain, bundle.processor, bundle.family, bundle.source))


@every_case
def test_a_copy_is_the_same_model_and_independent(made: Made) -> None:
    twin = copy.deepcopy(made.bundle)
    assert same_outputs(made.bundle, twin)
    before = outputs(made.bundle)
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.zero_()
    after = outputs(made.bundle)
    assert all(torch.equal(value, after[tower]) for tower, value in before.items())


@every_case
def test_gradients_flow_to_every_tower(made: Made) -> None:
    bundle = copy.deepcopy(made.bundle)
    for tower in bundle.towers():
        bundle.encode(tower.name, bundle.example_inputs(tower.name, 2)).square().sum().backward()
        grads = [p.grad for n, p in bundle.model.named_parameters() if tower.owns(n) and p.requires_grad]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)
        assert all(torch.isfinite(grad).all() for grad in grads if grad is not None)


@every_case
def test_the_same_seed_gives_the_same_bytes(made: Made) -> None:
    again = run(tiny.bundle(made.family), made.family, made.case, seed=3)
    assert same_state(state(made.bundle), state(again))


@every_case
def test_a_batch_equals_its_single_samples(made: Made) -> None:
    for tower in made.bundle.towers():
        items = [item for sample in data(made.family).take(3) for item in made.bundle.items(tower.name, sample)]
        together = torch.from_numpy(made.bundle.embed(tower.name, items))
        # int8 activations, and keys, may round the last bit of a sum to the next step.
        tolerance = 2e-2 if "a8" in made.case or made.case == "cache" else 2e-5
        for row, item in zip(together, items, strict=True):
            alone = torch.from_numpy(made.bundle.embed(tower.name, [item])[0])
            # A decoder's rows are as wide as the longest text of the batch; the rest is zero.
            torch.testing.assert_close(alone, row[: len(alone)], rtol=tolerance, atol=tolerance)
            assert not row[len(alone) :].any()


@pytest.mark.parametrize(
    ("name", "params", "family"),
    [
        (name, params, family)
        for family in tiny.FAMILIES
        for name, params in (
            ("prune", {"ratio": 0.3, "towers": ["vision"]}),
            ("narrow", {"ratio": 0.25, "towers": ["vision"]}),
            ("rotate", {"towers": ["vision"]}),
            ("merge-tokens", {"keep": 0.6}),
            ("quantize", {"scheme": "W8A8", "text_scheme": "W16A16"}),
            ("distill", {"steps": 2, "batch_size": 4, "towers": ["vision"]}),
        )
        if applies(name, family)
    ]
    + [
        (name, {**params, "towers": [tower]}, family)
        for family, towers in tiny.TOWERS.items()
        for tower in towers
        for name, params in (("prune", {"ratio": 0.25}), ("quantize", {"scheme": "W8A8"}))
    ],
)
def test_touching_one_tower_leaves_the_other_bit_identical(name: str, params: dict[str, Any], family: str) -> None:
    bundle = tiny.bundle(family)
    before = outputs(bundle)
    pipeline.run_stage(bundle, pipeline.Stage(1, Step(name, params), passes.build(name, params)), context(family))
    after = outputs(bundle)
    touched = params.get("towers", ["vision"])
    for tower in before:
        assert torch.equal(before[tower], after[tower]) == (tower not in touched)


@pytest.mark.parametrize(("name", "params"), [("prune", {"towers": ["audio"]}), ("merge-tokens", {"tower": "audio"})])
def test_a_tower_that_is_not_there_is_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no tower 'audio'"):
        passes.build(name, params).check(tiny.bundle("clip"))
