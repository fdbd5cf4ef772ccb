"""Relevance of heads: the maps and gradients are those of transformers' own eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_relevance import relevance
from mmcompress.passes.prune_units import Group, count_tokens, list_groups
from tests import tiny


def heads_of(bundle: Bundle, name: str) -> list[Group]:
    tower = bundle.tower(name)
    return list_groups(bundle, [tower], ("heads",), (), count_tokens(bundle, tower))


def context(family: str, count: int = 3, **more: Any) -> Context:
    return Context(**{"data": tiny.data(family, count), "num_samples": count, "batch_size": 2, **more})


def said(bundle: Bundle, tower: str, sample: Sample) -> torch.Tensor:
    """What is differentiated, in plain words: a cosine, or the log-likelihood of the answer."""
    inputs = bundle.prepare(tower, bundle.items(tower, sample)[:1])
    if tower in ("decoder", "language"):
        expected = bundle.forced.next_tokens(bundle.model, inputs)[0]
        roots = bundle.encode(tower, inputs).unflatten(1, (len(expected), -1))[0]
        answered = [roots[place, token].log() for place, token in enumerate(expected.tolist()) if token >= 0]
        return 2 * torch.stack(answered).sum()
    other = "text" if tower == "vision" else "vision"
    rows = bundle.encode(tower, inputs), bundle.encode(other, bundle.prepare(other, bundle.items(other, sample)[:1]))
    return nn.functional.cosine_similarity(*rows)[0]


@pytest.mark.parametrize(
    ("family", "tower"),
    [
        ("clip", "vision"),
        ("clip", "text"),
        ("dual_encoder_dinov2", "text"),
        ("whisper", "decoder"),
        ("llava_clip", "language"),
    ],
)
def test_it_is_what_eager_attention_and_autograd_give(family: str, tower: str) -> None:
    """Heads of both attentions of a decoder, key-value groups of a language model; texts without padding."""
    bundle = tiny.bundle(family)
    groups, data = heads_of(bundle, tower), tiny.data(family, 3)
    found = relevance(bundle, groups, context(family))
    assert any(group.part == "cross" for group in groups) == (family == "whisper")
    maps: list[torch.Tensor] = []
    for group in groups:
        chooser = bundle.module(group.writers[0].rpartition(".")[0])
        chooser.register_forward_hook(lambda _, __, made: (made[1].retain_grad(), maps.append(made[1]))[1])
    bundle.model.eval()
    bundle.model.set_attn_implementation("eager")
    wanted = [torch.zeros(group.units) for group in groups]
    for sample in (data.subset(3, 0)[index] for index in range(3)):
        maps.clear()
        said(bundle, tower, sample).backward()
        for total, each in zip(wanted, maps, strict=True):
            assert each.grad is not None
            per_head = (each * each.grad).detach()[0].clamp(min=0).mean((1, 2))
            total += per_head.view(len(total), -1).mean(1) / 3
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-9)
        assert (one > 0).all()


def test_a_head_that_is_not_read_has_no_relevance_and_goes_first() -> None:
    bundle = tiny.bundle("clip")
    groups = [group for name in ("vision", "text") for group in heads_of(bundle, name)]
    with torch.no_grad():
        for group in groups[:2]:
            bundle.module(group.reader).weight[:, group.width : 2 * group.width] = 0  # type: ignore[index, operator]
    found = relevance(bundle, groups, context("clip"))
    assert [scores[1].item() for scores in found[:2]] == [0, 0]
    plan = Prune(score="relevance", units=("heads",), towers=("vision",), ratio=0.06).plan(bundle, context("clip"))
    assert plan.decisions["kept"]["heads"] == {"vision.0": "0,2-3", "vision.1": "0,2-3"}


@pytest.mark.parametrize(
    ("family", "towers", "message", "hint"),
    [
        ("whisper", (), "the audio tower of whisper models gives neither", "--towers decoder"),
        ("flava", (), "the vision tower of flava models computes by itself", "score=taylor"),
        ("layoutlm", (), "the joint tower of layoutlm models gives neither", "score=taylor"),
    ],
)
def test_where_there_are_no_maps_it_is_refused(family: str, towers: tuple[str, ...], message: str, hint: str) -> None:
    made = Prune(score="relevance", units=("heads",), towers=towers)
    with pytest.raises(UsageError, match=message) as caught:
        made.check(tiny.bundle(family))
    assert hint in caught.value.hint


def test_checking_leaves_no_gradient_and_every_config_as_it_was() -> None:
    bundle = tiny.bundle("whisper")
    attentions = [bundle.module(group.writers[0].rpartition(".")[0]) for group in heads_of(bundle, "decoder")]
    configs = [attention.config for attention in attentions]
    wanted = [parameter.requires_grad for parameter in bundle.model.parameters()]
    made = Prune(score="relevance", units=("heads",), towers=("decoder",), ratio=0.05)
    made.check(bundle)
    made.plan(bundle, context("whisper"))
    assert all(attention.config is config for attention, config in zip(attentions, configs, strict=True))
    assert [parameter.requires_grad for parameter in bundle.model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


def test_samples_without_a_partner_say_nothing() -> None:
    bundle = tiny.bundle("clip")
    texts = Dataset(Memory([Sample(key="a", texts=("a cat",))]))
    with pytest.raises(UsageError, match="no sample has what the text tower says something of"):
        relevance(bundle, heads_of(bundle, "text"), Context(data=texts))
