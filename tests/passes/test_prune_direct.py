"""What units themselves say of right answers, recomputed from the plain model's hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_direct import direct_effects
from mmcompress.passes.prune_units import Group, count_tokens, list_groups
from tests import tiny


def groups_of(bundle: Bundle) -> list[Group]:
    tower = bundle.tower("language")
    return list_groups(bundle, [tower], ("heads", "neurons"), (), count_tokens(bundle, tower))


def context(family: str, count: int = 3, **more: Any) -> Context:
    return Context(**{"data": tiny.data(family, count), "num_samples": count, "batch_size": 2, **more})


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_vl"])
def test_it_is_the_activation_times_what_it_adds_to_the_likelihood(family: str) -> None:
    """One sample at a time, from the states behind the last block: the plain model's own norm and output layer."""
    bundle = tiny.bundle(family)
    tower = bundle.tower("language")
    assert tower.residual is not None
    groups, data = groups_of(bundle), context(family)
    found = direct_effects(bundle, groups, data)
    seen: dict[str, torch.Tensor] = {}
    for path in [tower.blocks[-1].path, *(group.reader for group in groups)]:
        module = bundle.module(path)
        module.register_forward_hook(
            lambda _, given, made, path=path: seen.update(
                {path: made[0] if isinstance(made, tuple) else made, f"in {path}": given[0] if given else None}
            )
        )
    wanted = [torch.zeros(group.units) for group in groups]
    assert data.data is not None
    for index in range(3):
        inputs = bundle.prepare("language", bundle.items("language", data.data[index])[:1])
        expected = bundle.forced.next_tokens(bundle.model, inputs)[0]
        places = inputs["answer_positions"][0]
        with torch.no_grad():
            bundle.model.eval()
            bundle.encode("language", inputs)
        states = seen[tower.blocks[-1].path].detach().requires_grad_()
        states = states.view(-1, states.shape[-1])
        words = bundle.module(tower.residual.readers[0])(bundle.module(tower.residual.norm)(states)).log_softmax(-1)
        said = [(int(place), int(token)) for place, token in zip(places, expected, strict=True) if token >= 0]
        slopes = torch.autograd.grad(sum(words[place, token] for place, token in said), states)[0]
        for total, group in zip(wanted, groups, strict=True):
            weight: Any = bundle.module(group.reader).weight
            inside = seen[f"in {group.reader}"].view(len(states), -1)
            for place, _ in said:
                moved = inside[place] * (slopes[place] @ weight)
                total += moved.view(group.units, -1).sum(1).abs().detach() / len(said) / 3
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-8)
        assert (one > 0).any()


def test_a_unit_that_writes_nothing_goes_first() -> None:
    bundle = tiny.bundle("llava_clip")
    group = next(group for group in groups_of(bundle) if group.kind == "neurons")
    weight: Any = bundle.module(group.reader).weight
    with torch.no_grad():
        weight[:, :8] = 0
    plan = Prune(score="direct-effect", units=("neurons",), towers=("language",), ratio=0.02).plan(
        bundle, context("llava_clip")
    )
    assert direct_effects(bundle, [group], context("llava_clip"))[0][:8].tolist() == [0.0] * 8
    assert plan.decisions["kept"]["neurons"]["language.0"].startswith("8-")


@pytest.mark.parametrize(
    ("family", "towers", "message"),
    [
        ("llava_clip", (), "the vision tower of llava models says nothing"),
        ("clip", ("text",), "the text tower of clip models says nothing"),
        ("whisper", ("decoder",), "follows the residual stream of the decoder tower"),
    ],
)
def test_what_says_nothing_is_refused(family: str, towers: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Prune(score="direct-effect", towers=towers).check(tiny.bundle(family))


def test_blocks_are_no_units_that_write() -> None:
    with pytest.raises(UsageError, match="direct-effect does not rank blocks"):
        Prune(score="direct-effect", units=("blocks",))
