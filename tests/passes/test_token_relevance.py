"""Places that answers have to do with: the gradients are the model's own, whichever way its attentions compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory
from mmcompress.errors import UsageError
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.passes.token_relevance import relevance_by_place
from mmcompress.surgery.attention import telling_weights
from tests import tiny

FAMILIES = ("llava_clip", "smolvlm", "paligemma")


def places(bundle: Bundle) -> int:
    return next(tower.connector.tokens for tower in bundle.towers() if tower.connector)


def attentions(bundle: Bundle) -> list[Any]:
    return [bundle.module(block.attention.path) for block in bundle.tower("language").blocks]


@pytest.mark.parametrize("family", FAMILIES)
def test_telling_changes_nothing_and_weights_are_those_of_eager_attention(family: str) -> None:
    bundle = tiny.bundle(family)
    inputs = bundle.prepare("language", bundle.items("language", tiny.data(family, 1)[0]))
    before = [attention.config for attention in attentions(bundle)]
    with torch.no_grad():
        plain = bundle.encode("language", inputs)
        with telling_weights(attentions(bundle)) as weights:
            torch.testing.assert_close(bundle.encode("language", inputs), plain)
    assert all(one is other for one, other in zip(before, (each.config for each in attentions(bundle)), strict=True))
    seen: list[Any] = []
    for attention in attentions(bundle):
        attention.register_forward_hook(lambda _, __, made: seen.append(made[1]))
    bundle.model.set_attn_implementation("eager")
    with torch.no_grad():
        bundle.encode("language", inputs)
    for one, other in zip(weights, seen, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))


def test_relevance_follows_the_gradient_of_the_answer() -> None:
    bundle = tiny.bundle("llava_clip")
    data, tokens = tiny.data("llava_clip", 1), places(bundle)
    found = relevance_by_place(bundle, tokens, Context(data=data))
    assert found.shape == (tokens,)
    torch.testing.assert_close(found.sum(), torch.tensor(1.0, dtype=torch.float64))
    expected = by_eager(bundle, tokens)
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-3)


def by_eager(bundle: Bundle, tokens: int) -> torch.Tensor:
    """The same from transformers' own eager attention and a backward pass."""
    item = bundle.items("language", tiny.data("llava_clip", 1)[0])[0]
    inputs = bundle.prepare("language", [item])
    kept: list[Any] = []
    for attention in attentions(bundle):
        attention.register_forward_hook(lambda _, __, made: (made[1].retain_grad(), kept.append(made[1]))[1])
    bundle.model.set_attn_implementation("eager")
    expected = bundle.forced.next_tokens(bundle.model, inputs)[0]
    roots = bundle.encode("language", inputs).unflatten(1, (len(expected), -1))[0]
    answered = [(place, int(token)) for place, token in enumerate(expected) if token >= 0]
    sum(roots[place, token].log() * 2 for place, token in answered).backward()  # type: ignore[union-attr]
    known = torch.eye(inputs["input_ids"].shape[1])
    for weights in kept:
        known = known + (weights * weights.grad)[0].clamp(min=0).mean(dim=0) @ known
    image = inputs["input_ids"][0] == bundle.model.config.image_token_id
    rows = (
        torch.stack([known[inputs["answer_positions"][0, place]][image] for place, _ in answered]).mean(dim=0).detach()
    )
    rows = rows.unflatten(0, (-1, tokens)).mean(dim=0)
    return rows / rows.sum()


def test_the_places_kept_are_the_most_relevant_ones() -> None:
    bundle = tiny.bundle("llava_clip")
    context = Context(data=tiny.data("llava_clip", 6), num_samples=4)
    plan = build("reduce-visual-tokens", {"method": "relevance", "keep_tokens": 5}).plan(bundle, context)
    relevance = relevance_by_place(bundle, places(bundle), context)
    assert plan.decisions["drawn"] == sorted(relevance.topk(5).indices.tolist())
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


def test_what_it_needs_is_said() -> None:
    made = build("reduce-visual-tokens", {"method": "relevance"})
    bundle = tiny.bundle("llava_clip")
    with pytest.raises(UsageError, match="needs data"):
        made.plan(bundle, Context())
    with pytest.raises(UsageError, match="none has a picture, a question and an answer"):
        made.plan(bundle, Context(data=Dataset(Memory([]))))
