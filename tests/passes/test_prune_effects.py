"""Three summaries of one look at first-order effects, and the likelihood of answers as what they are of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_effects import SUMMARIES, Effects, effects, taylor
from mmcompress.passes.prune_ranking import normalised
from mmcompress.passes.prune_units import Costs, Group, count_tokens, list_groups
from tests import tiny
from tests.passes import decoding
from tests.passes.test_prune_scores import context, groups_of


def test_summaries_by_hand() -> None:
    """Two samples, one token, two units: effects (2, 3) and (-2, 5)."""
    group = Group("vision", 0, "neurons", 2, Costs(1, 1), reader="reader")
    found = Effects([group])
    found.add("reader", torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 1.0]]]))
    found.add("reader", torch.tensor([[[1.0, 5.0]]]), torch.tensor([[[-2.0, 1.0]]]))
    wanted = {"taylor": [4, 17], "taylor-signed": [0, 4], "taylor-absolute": [2, 4]}
    assert {score: found.summary(score)[0].tolist() for score in SUMMARIES} == wanted


def test_one_look_gives_what_each_score_alone_gives() -> None:
    bundle = tiny.bundle("clip")
    groups = groups_of(bundle)
    together = effects(bundle, groups, context(), "contrastive")
    for score in SUMMARIES:
        alone = taylor(bundle, groups, context(), "contrastive", score)
        assert all(torch.equal(*pair) for pair in zip(together.summary(score), alone, strict=True))
    for squared, signed, absolute in zip(*(together.summary(score) for score in SUMMARIES), strict=True):
        assert (signed <= absolute * (1 + 1e-5)).all()
        assert (absolute.square() <= squared * (1 + 1e-5)).all()
        assert (signed < 0.9 * absolute).any()


def mean_loss(bundle: Bundle, inputs: dict[str, Tensor]) -> Tensor:
    """Each sample's mean negative log-likelihood of the tokens of its transcript."""
    expected = bundle.forced.next_tokens(bundle.model, inputs)
    probabilities = bundle.encode("decoder", inputs).unflatten(1, (expected.shape[1], -1)).double().square()
    losses = []
    for row, tokens in zip(probabilities, expected, strict=True):
        said = [row[place, token].log() for place, token in enumerate(tokens.tolist()) if token >= 0]
        losses.append(-torch.stack(said).mean())
    return torch.stack(losses)


def test_signed_effects_on_answers_are_how_the_loss_changes() -> None:
    """Turning a unit down a little, in a batch of answers of different lengths."""
    bundle = decoding.bundle()
    tower = bundle.tower("decoder")
    groups = list_groups(bundle, [tower], ("heads", "neurons"), (), count_tokens(bundle, tower))
    data = decoding.context(3)
    found = taylor(bundle, groups, data, "answers", "taylor-signed")
    assert data.data is not None
    items = [item for index in range(3) for item in bundle.items("decoder", data.data[index])]
    inputs = bundle.prepare("decoder", items)
    step = 0.02
    with torch.no_grad():
        for group, scores in zip(groups, found, strict=True):
            weight: Any = bundle.module(group.reader).weight
            kept, losses = weight[:, : group.width].clone(), []
            for gate in (1 + step, 1 - step):
                weight[:, : group.width] = kept * gate
                losses.append(mean_loss(bundle, inputs).mean())
            weight[:, : group.width] = kept
            change = float(losses[0] - losses[1]) / (2 * step)
            assert float(scores[0]) == pytest.approx(abs(change), rel=0.02, abs=2e-5)


@pytest.mark.parametrize(
    ("params", "message", "hint"),
    [
        ({"score": "taylor-signed"}, "draws its sign at random", "objective=contrastive"),
        ({"score": "relevance"}, "relevance ranks heads", "units=heads"),
        ({"score": "relevance", "units": ("neurons",)}, "relevance ranks heads", "units=heads"),
        ({"score": "obs", "units": ("blocks",)}, "obs does not rank blocks", "taylor"),
        ({"balance": True}, "the score is obs", "score=activation"),
        ({"allocate": "even", "units": ("blocks",)}, "whole blocks are to go", "knapsack"),
        ({"allocate": "evolutionary", "latency_ms": 3.0}, "search anew", "even"),
        ({"evaluations": 1}, "prune.evaluations is 1", "more"),
        ({"judging_samples": 0}, "prune.judging_samples is 0", "more"),
    ],
)
def test_what_does_not_go_together_is_refused(params: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Prune(**params)
    assert hint in caught.value.hint


def test_answers_are_given_by_one_tower() -> None:
    made = Prune(objective="answers", score="taylor-signed")
    with pytest.raises(UsageError, match="the audio tower of whisper models gives none") as caught:
        made.check(decoding.bundle())
    assert "--towers decoder" in caught.value.hint
    with pytest.raises(UsageError, match="the vision tower of clip models gives none"):
        made.check(tiny.bundle("clip"))
    Prune(objective="answers", score="taylor-signed", towers=("decoder",)).check(decoding.bundle())
    Prune(objective="answers", score="magnitude").check(tiny.bundle("clip"))
    with pytest.raises(UsageError, match="whisper models embed nothing into a shared space") as caught:
        Prune(objective="contrastive", score="taylor-signed", towers=("decoder",)).check(decoding.bundle())
    assert "objective=answers" in caught.value.hint


def test_signed_and_absolute_effects_are_compared_within_their_layer() -> None:
    """Scaling one reader's effects changes nothing of what goes."""
    assert normalised(Prune(score="taylor-absolute")) == "norm"
    assert normalised(Prune(score="taylor-signed", objective="contrastive")) == "norm"
    assert [normalised(Prune(score=score)) for score in ("taylor", "obs")] == ["none", "none"]  # type: ignore[arg-type]
