"""Channels of heads as units of `prune`: turning changes nothing, cutting is what it says, and what is refused."""

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
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_cut import cut_dims, set_parameters
from mmcompress.passes.prune_dims import by_width, displacements, ladder, narrowed_heads, turned
from mmcompress.passes.prune_units import Group, count_tokens, list_groups, read_ranges
from mmcompress.recipe import Step
from mmcompress.surgery.linears import in_every_head
from mmcompress.surgery.watch import evaluating
from mmcompress.views import Attention
from tests import tiny

DIMS: dict[str, Any] = {"units": ("head-dims",), "multiple": 1, "min_keep": 0.0}
TURNING = [
    ("clip", "vision"),
    ("siglip2", "text"),
    ("dual_encoder_vit", "vision"),
    ("dual_encoder_dinov2", "text"),
    ("altclip", "text"),
    ("flava", "vision"),
    ("clap", "audio"),
    ("whisper", "decoder"),
    ("blip_vqa", "text"),
    ("vilt", "joint"),
]
"""Every class of attention that has a width of its own heads, once."""


def context(family: str) -> Context:
    return Context(data=tiny.data(family, 8), num_samples=8, batch_size=4)


def dims(bundle: Bundle, tower: str) -> list[Group]:
    owner = bundle.tower(tower)
    return list_groups(bundle, [owner], ["head-dims"], (), count_tokens(bundle, owner))


def attention_of(bundle: Bundle, group: Group) -> Attention:
    block = bundle.tower(group.tower).blocks[group.block]
    found = block.cross if group.part else block.attention
    assert found is not None
    return found


@torch.no_grad()
def output(bundle: Bundle, tower: str) -> Tensor:
    return bundle.encode(tower, bundle.example_inputs(tower, 3)).double()


def run(bundle: Bundle, family: str, name: str, **params: Any) -> dict[str, Any]:
    stage = pipeline.Stage(1, Step(name, params), passes.build(name, params))
    return pipeline.run_stage(bundle, stage, context(family)).facts


@pytest.mark.parametrize(("family", "tower"), TURNING)
def test_turning_changes_nothing_and_the_recount_is_what_was_promised(family: str, tower: str) -> None:
    bundle = tiny.bundle(family)
    whole = output(bundle, tower)
    groups = dims(bundle, tower)
    every = {group: range(group.units) for group in groups}
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    values = narrowed_heads(bundle, every, context(family), turn=True, method="none", ridge=0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bundle.model.state_dict().items())
    set_parameters(bundle, values)
    moved = [name for name, value in values.items() if not torch.allclose(value, before[name], atol=1e-3)]
    assert len(moved) > 3 * len(groups)
    torch.testing.assert_close(output(bundle, tower), whole, rtol=2e-4, atol=2e-4 * float(whole.abs().max()))

    settings = Prune(ratio=0.1, score="magnitude", compensate="none", towers=(tower,), **DIMS)
    settings.check(bundle)
    plan = settings.plan(bundle, Context())
    settings.apply(bundle, plan)
    promised = plan.decisions["after"]
    assert settings.fit(bundle, Context())["recount"] == promised
    assert promised[tower]["parameters"] <= 0.9 * plan.decisions["before"][tower]["parameters"]
    assert promised[tower]["macs"] < plan.decisions["before"][tower]["macs"]
    assert output(bundle, tower).isfinite().all()


@pytest.mark.parametrize(("family", "tower"), [("clip", "vision"), ("whisper", "decoder"), ("vilt", "joint")])
def test_slicing_equals_masking(family: str, tower: str) -> None:
    """Without turning: the rows of queries and the reader's columns of what goes are zero."""
    bundle = tiny.bundle(family)
    settings = Prune(ratio=0.1, score="random", compensate="none", towers=(tower,), **DIMS)
    plan = settings.plan(bundle, Context())
    masked = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model))
    for group in dims(masked, tower):
        text = plan.decisions["kept"]["head-dims"].get(group.key)
        if text is None:
            continue
        gone = torch.tensor(sorted(set(range(group.units)) - set(read_ranges(text))))
        channels = in_every_head(gone, group.width, group.units)
        queries, reader = masked.module(group.writers[0]), masked.module(group.reader)
        with torch.no_grad():
            queries.get_parameter("weight")[channels] = 0
            queries.get_parameter("bias")[channels] = 0
            reader.get_parameter("weight")[:, channels] = 0
    settings.apply(bundle, plan)
    assert len(set(plan.decisions["kept"]["head-dims"].values())) > 1
    torch.testing.assert_close(output(bundle, tower), output(masked, tower), rtol=1e-4, atol=1e-5)


def test_costs_by_hand() -> None:
    """48 channels, 4 heads of 12, biases everywhere; 17 tokens: a row of q, k and v and a column, in each head."""
    bundle = tiny.bundle("clip")
    group = dims(bundle, "vision")[0]
    tokens = count_tokens(bundle, bundle.tower("vision"))[group.reader]
    assert (group.units, group.width, group.kind, group.key) == (12, 4, "head-dims", "vision.0")
    assert group.cost.parameters == 4 * (3 * 49 + 48)
    assert group.cost.macs == tokens * 4 * 4 * 48 + 2 * tokens * tokens * 4


def unsettled(family: str) -> Bundle:
    """A model whose biases are not 0."""
    bundle = tiny.bundle(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return bundle


def test_turned_logits_and_values_vary_as_they_should() -> None:
    """By what the Linears give out on the samples: queries and keys as much, each by itself; values by 1."""
    bundle, made = unsettled("clip"), context("clip")
    group = dims(bundle, "vision")[0]
    turns, read = turned(bundle, [group], made)
    turn, seen = turns[group], dict[str, list[Tensor]]()
    handles = [
        bundle.module(path).register_forward_hook(
            lambda module, args, given, path=path: seen.setdefault(path, []).append(given.detach().flatten(0, 1))
        )
        for path in group.writers[:2]
    ]
    images = [bundle.items("vision", sample)[0] for sample in tiny.data("clip", 8)]
    with evaluating(bundle.model), torch.no_grad():
        bundle.encode("vision", bundle.prepare("vision", images))
    for handle in handles:
        handle.remove()

    def of_heads(path: str) -> Tensor:
        return torch.cat(seen[path]).double().unflatten(1, (group.width, group.units)).transpose(0, 1)  # (H, T, D)

    queries, keys = of_heads(group.writers[0]), of_heads(group.writers[1])
    keys = keys - keys.mean(1, keepdim=True)
    sizes = turn.queries @ (queries.mT @ queries / queries.shape[1]) @ turn.queries.mT
    other = turn.keys @ (keys.mT @ keys / keys.shape[1]) @ turn.keys.mT
    scale = float(sizes.diagonal(dim1=1, dim2=2).max())
    torch.testing.assert_close(sizes, torch.diag_embed(sizes.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(other, sizes, rtol=0, atol=1e-4 * scale)

    moments = read[group]
    mean = moments.mean().double()
    covariance = moments.second_moment().double() - mean[:, None] * mean
    for head in range(group.width):
        own = slice(head * group.units, (head + 1) * group.units)
        value = turn.values[head] @ covariance[own, own] @ turn.values[head].T
        torch.testing.assert_close(value, torch.eye(group.units, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "tower", "multiple"), [("clip", "vision", 1), ("clip", "text", 4), ("whisper", "decoder", 4)]
)
def test_what_goes_is_worth_what_the_embeddings_then_move(family: str, tower: str, multiple: int) -> None:
    """Cut for real, one attention at a time; where a width is no corner of the hull, it is worth no more than that."""
    bundle = unsettled(family)
    made = context(family)
    groups = dims(bundle, tower)
    samples = [bundle.items(tower, sample)[0] for sample in tiny.data(family, 8)]
    inputs = bundle.prepare(tower, samples)

    @torch.no_grad()
    def rows(model: Bundle) -> Tensor:
        return nn.functional.normalize(model.encode(tower, inputs).double(), dim=-1)

    whole, state = rows(bundle), {name: value.clone() for name, value in bundle.model.state_dict().items()}
    scores = displacements(bundle, groups, made, multiple, 8, means=True)
    assert all(torch.equal(value, state[name]) for name, value in bundle.model.state_dict().items())
    corners = 0
    for group, score in zip(groups, scores, strict=True):
        assert (score.diff() <= 0).all()
        for width in ladder(group.units, multiple):
            cut = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model))
            values = narrowed_heads(cut, {group: range(width)}, made, turn=True, method="bias", ridge=0.01)
            cut_dims(cut, attention_of(cut, group), range(width))
            set_parameters(cut, values)
            moved = float((rows(cut) - whole).square().sum(-1).mean())
            promised = float(score[width:].sum())
            assert promised <= moved * 1.01 + 1e-9
            corners += promised >= moved * 0.99
    assert corners >= len(groups)


def test_means_that_stay_are_not_missed() -> None:
    """Values that hardly vary around a large mean: with it all directions are worth little."""
    bundle = unsettled("clip")
    group = dims(bundle, "vision")[0]
    with torch.no_grad():
        bundle.module(group.writers[2]).get_parameter("weight").mul_(0.01)
        bundle.module(group.writers[2]).get_parameter("bias").add_(3.0)
    (left,), (gone,) = (displacements(bundle, [group], context("clip"), 4, 8, means) for means in (True, False))
    assert left.sum() < 0.01 * gone.sum()


def test_few_samples_are_tried() -> None:
    bundle = tiny.bundle("clip")
    group = dims(bundle, "vision")[0]
    seen: list[int] = []
    reader = bundle.module(group.reader)
    handle = reader.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    displacements(bundle, [group], context("clip"), 4, 3, means=True)
    handle.remove()
    # Directions are those of all; then the whole is run, and the widths 8 and 4.
    assert seen[-4] != 3
    assert seen[-3:] == [3, 3, 3]


def test_ladders_and_what_they_say_by_hand() -> None:
    assert ladder(64, 8) == [56, 48, 32, 16]
    assert ladder(64, 1) == [56, 48, 32, 16]
    assert ladder(80, 8) == [64, 56, 40, 16]
    assert ladder(12, 8) == [8]
    assert ladder(12, 4) == [8, 4]
    assert ladder(8, 8) == []
    # 10 of 2: 1 each for the last 2; 2 for the next 4 of 0.5 each, less, so all six share (2 + 2) / 6; then 12 for 4, below too.
    found = by_width([2.0, 4.0, 16.0], [8, 4, 2], 10)
    torch.testing.assert_close(found, torch.tensor([6.0] * 4 + [4 / 6] * 6))
    assert by_width([], [], 8).tolist() == [0.0] * 8


def plant(bundle: Bundle, tower: str, rank: int) -> None:
    """Let queries, keys and values of every head lie in `rank` directions across its channels."""
    generator = torch.Generator().manual_seed(0)
    for group in dims(bundle, tower):
        for path in group.writers:
            linear = bundle.module(path)
            mixed = torch.linalg.qr(torch.randn(group.units, rank, generator=generator)).Q
            with torch.no_grad():
                for parameter in linear.parameters():
                    rows = parameter.unflatten(0, (group.width, group.units))
                    own = rows[:, :rank] if parameter.dim() == 2 else rows[:, :rank, None]
                    parameter.copy_((mixed @ own).reshape(parameter.shape))


def test_heads_that_are_narrow_already_lose_nothing() -> None:
    bundle = tiny.bundle("clip")
    plant(bundle, "vision", 6)
    whole = output(bundle, "vision")
    cost = sum(6 * group.cost.parameters for group in dims(bundle, "vision"))
    total = Prune(towers=("vision",)).survey(bundle, [bundle.tower("vision")])[0]["vision"].parameters
    lost: dict[str, float] = {}
    for score in ("taylor", "magnitude"):
        cut = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model), history=[])
        settings = Prune(target=total - cost, score=score, towers=("vision",), compensate="none", **DIMS)  # type: ignore[arg-type]
        plan = settings.plan(cut, context("clip"))
        settings.apply(cut, plan)
        lost[score] = float((output(cut, "vision") - whole).norm() / whole.norm())
        if score == "taylor":
            assert set(plan.decisions["kept"]["head-dims"].values()) == {"0-5"}
    assert lost["taylor"] < 1e-3
    assert lost["magnitude"] > 0.1


def test_least_squares_makes_up_for_what_the_reader_is_no_longer_given() -> None:
    for score in ("random", "taylor"):
        lost: dict[str, float] = {}
        for compensate in ("none", "bias", "least-squares"):
            bundle = tiny.bundle("clip")
            whole = output(bundle, "vision")
            settings = Prune(ratio=0.1, score=score, compensate=compensate, towers=("vision",), **DIMS)  # type: ignore[arg-type]
            settings.apply(bundle, settings.plan(bundle, context("clip")))
            lost[compensate] = float((output(bundle, "vision") - whole).norm())
        assert lost["least-squares"] < lost["bias"] < lost["none"], (score, lost)


def test_the_mean_of_what_goes_stays_in_the_bias() -> None:
    """Turned values whose mean is most of them: what is left out of it stays, all but how it varies."""
    lost: dict[str, float] = {}
    for compensate in ("none", "bias"):
        bundle = unsettled("clip")
        for group in dims(bundle, "vision"):
            with torch.no_grad():
                bundle.module(group.writers[2]).get_parameter("bias").add_(3.0)
        whole = output(bundle, "vision")
        settings = Prune(ratio=0.1, compensate=compensate, towers=("vision",), **DIMS)  # type: ignore[arg-type]
        settings.apply(bundle, settings.plan(bundle, context("clip")))
        lost[compensate] = float((output(bundle, "vision") - whole).norm())
    assert lost["bias"] < lost["none"] / 2, lost


def test_reloads_bit_equal_and_goes_on(tmp_path: Path) -> None:
    bundle = tiny.bundle("whisper")
    facts = run(bundle, "whisper", "prune", ratio=0.1, units=["head-dims", "neurons"], multiple=1)
    assert {row["kind"] for row in facts["split"]} == {"head-dims", "cross head-dims", "neurons"}
    run(bundle, "whisper", "prune", ratio=0.1, units=["heads"])
    run(bundle, "whisper", "quantize", scheme="W8A8")
    checkpoint.save(bundle, tmp_path / "made")
    again = checkpoint.load(tmp_path / "made")
    widths = {a.head_dim for b in again.tower("decoder").blocks for a in (b.attention, b.cross) if a}
    assert min(widths) < 12
    for tower in ("audio", "decoder"):
        assert torch.equal(output(again, tower), output(bundle, tower))


def test_plain_transformers_loads_equally_narrow_heads_where_the_config_can_say_it(tmp_path: Path) -> None:
    bundle = tiny.bundle("dual_encoder_vit")
    run(
        bundle, "dual_encoder_vit", "prune", ratio=0.1, units=["head-dims"], towers=["vision"], uniform=True, multiple=1
    )
    (width,) = {block.attention.head_dim for block in bundle.tower("vision").blocks}
    assert width < 12
    manifest = checkpoint.save(bundle, tmp_path / "made")
    assert manifest.plain_transformers
    plain = bundle.family.model_class(bundle.model.config).from_pretrained(tmp_path / "made").eval()
    again = dataclasses.replace(bundle, model=plain)
    assert torch.equal(output(again, "vision"), output(bundle, "vision"))

    ragged = tiny.bundle("dual_encoder_vit")
    run(ragged, "dual_encoder_vit", "prune", ratio=0.1, units=["head-dims"], multiple=1)
    assert not checkpoint.save(ragged, tmp_path / "ragged").plain_transformers


def test_the_factor_of_the_logits_follows_the_width() -> None:
    bundle = tiny.bundle("clip")
    settings = Prune(ratio=0.1, score="random", compensate="none", towers=("vision",), **DIMS)
    settings.apply(bundle, settings.plan(bundle, Context()))
    for block in bundle.tower("vision").blocks:
        attention: Any = bundle.module(block.attention.path)
        assert attention.scale == block.attention.head_dim**-0.5
        assert isinstance(attention.q_proj, nn.Linear)
        assert attention.q_proj.out_features == 4 * block.attention.head_dim


def test_the_control_takes_as_many_channels_at_random() -> None:
    control = Prune(units=("head-dims", "neurons")).control()
    assert control is not None
    assert (control.ranking, control.units, control.compensate) == ("random", ("head-dims", "neurons"), "least-squares")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"units": ["heads", "head-dims"]}, "has heads and head-dims"),
        ({"units": ["head-dims"], "score": "obs"}, "obs does not rank head-dims"),
        ({"units": ["neurons", "head-dims"], "score": "activation"}, "activation does not rank neurons and head-dims"),
        ({"units": ["head-dims"], "allocate": "evolutionary"}, "narrower heads are turned"),
        ({"units": ["head-dims"], "crosscheck": True}, "head-dims are directions"),
        ({"units": ["head-dims", "blocks"]}, "mixes blocks"),
        ({"units": ["head-dims"], "score": "taylor-absolute"}, "taylor-absolute does not rank head-dims"),
        ({"units": ["head-dims"], "objective": "contrastive"}, "judged by what the embeddings move"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        passes.build("prune", params)


@pytest.mark.parametrize(
    ("family", "tower", "why"), [("qwen2_vl", "language", "in pairs"), ("blip_vqa", "vision", "BLIP computes")]
)
def test_heads_that_cannot_become_narrower(family: str, tower: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"heads of the {tower} tower cannot become narrower: .*{why}"):
        Prune(units=("head-dims",), towers=(tower,)).check(tiny.bundle(family))


def test_uniform_needs_equal_widths() -> None:
    bundle = tiny.bundle("clip")
    made = Prune(ratio=0.1, score="random", compensate="none", towers=("vision",), **DIMS)
    made.apply(bundle, made.plan(bundle, Context()))
    with pytest.raises(UsageError, match=r"blocks of \d+ to \d+ head-dims; uniform needs equal ones"):
        dataclasses.replace(made, uniform=True).check(bundle)


def test_planning_twice_decides_the_same_and_the_last_go() -> None:
    """Also of those between two widths that were tried, which are worth the same."""
    bundle = tiny.bundle("clip")
    settings = Prune(ratio=0.13, towers=("vision",), **DIMS)
    first, second = (settings.plan(bundle, context("clip")) for _ in range(2))
    assert first.decisions == second.decisions
    kept = [read_ranges(text) for text in first.decisions["kept"]["head-dims"].values()]
    assert all(list(own) == list(range(len(own))) for own in kept)
    assert any(len(own) not in ladder(12, 1) for own in kept)
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
