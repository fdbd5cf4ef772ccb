"""Method selector: what it learns, what it is made of, and that it stays part of the model through all that follows."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory
from mmcompress.errors import UsageError
from mmcompress.measure.cost import cost_of
from mmcompress.ops.token_autoencoder import normalised
from mmcompress.ops.token_choice import best_scored
from mmcompress.passes import build, selector_train
from mmcompress.passes.base import Context, Work
from mmcompress.passes.selector_train import Autoencoder, collected, learn, macs_a_picture, seconds_a_picture
from mmcompress.progress import Silent
from mmcompress.recipe import Step
from mmcompress.surgery.reducing import handed_on, selector_of
from mmcompress.surgery.selector import TokenTransformer, sines_of_places
from tests import tiny
from tests.passes.timing import timed_by

PROJECTOR = "model.multi_modal_projector"
ASKED: dict[str, Any] = {"method": "selector", "keep": 0.3, "selector_epochs": 2, "selector_width": 16}


def context(seed: int = 0, count: int = 12, **more: Any) -> Context:
    return Context(
        data=tiny.data("llava_clip", count),
        batch_size=4,
        seed=seed,
        teacher=lambda: tiny.bundle("llava_clip", seed=1),
        **more,
    )


def run(bundle: Bundle, *steps: tuple[str, dict[str, Any]], seed: int = 0) -> Bundle:
    for number, (name, params) in enumerate(steps, 1):
        pipeline.run_stage(bundle, pipeline.Stage(number, Step(name, params), build(name, params)), context(seed))
    return bundle


def selecting(seed: int = 0) -> Bundle:
    return run(tiny.bundle("llava_clip"), ("reduce-visual-tokens", ASKED), seed=seed)


def twins(pictures: int, pairs: int, channels: int = 12, seed: int = 0) -> Tensor:
    """Tokens (P, N, C) of which every second one is a copy of the one before."""
    drawn = torch.randn(pictures, pairs, channels, generator=torch.Generator().manual_seed(seed))
    return drawn.repeat_interleave(2, dim=1)


def autoencoder(tokens: int, channels: int = 12, width: int = 32, layers: int = 1) -> Autoencoder:
    grid = (1, tokens)
    return Autoencoder(TokenTransformer(channels, 1, width, layers, grid), grid)


class Watching(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, label: str, total: int | None) -> None:
        self.said.append(f"{label}: {total}")

    def say(self, line: str) -> None:
        self.said.append(line)


def test_of_twins_one_is_kept() -> None:
    """Of pictures never seen: with the place for half of the tokens, each pair keeps exactly one."""
    made = autoencoder(8)
    learn(made, twins(512, 4), kept=4, epochs=30, seed=0, progress=Silent())
    unseen = twins(64, 4, seed=1)
    scores = made.scores(unseen).detach()
    kept = (scores > 0).float()
    assert kept.mean() == pytest.approx(0.5, abs=0.05)
    for chosen in (kept, best_scored(scores, 4).sum(dim=1)):
        assert (chosen.unflatten(1, (-1, 2)).sum(dim=2) >= 1).float().mean() > 0.95
    assert made.error(unseen, 4).mean() < 0.25 * made.error(unseen, 4, torch.Generator().manual_seed(0)).mean()


def test_where_all_are_kept_it_learns_to_keep_all() -> None:
    made = autoencoder(6)
    features = torch.randn(128, 6, 12, generator=torch.Generator().manual_seed(0))
    learn(made, features, kept=6, epochs=30, seed=0, progress=Silent())
    assert (made.scores(features) > 0).all()


def test_what_stands_for_dropped_tokens_learns() -> None:
    made = autoencoder(6)
    made.start(0)
    made.loss(torch.ones(4, 6, 12), torch.zeros(4, 6) - 9, 0.5).backward()
    assert made.shared.grad is not None
    assert made.shared.grad.any()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_learning_does_not_depend_on_other_random_numbers() -> None:
    def states(noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        made = autoencoder(6)
        learn(made, twins(40, 3), kept=3, epochs=2, seed=5, progress=Silent())
        return made.selector.state_dict()

    one, other = states(1), states(2)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_places_begin_as_sines_of_row_and_column() -> None:
    table = sines_of_places((2, 3), 8)
    assert table.shape == (6, 8)
    row, column = torch.tensor(1.0), torch.tensor(2.0)
    angles = torch.stack([row, row / 10, column, column / 10])
    torch.testing.assert_close(table[5], torch.cat([angles.sin(), angles.cos()]))


def test_each_picture_is_looked_at_once() -> None:
    bundle = selecting()
    data = context().data
    assert data is not None
    pictures = [sample for sample in data if sample.picture]
    again = [replace(sample, key=f"again {sample.key}") for sample in pictures]
    doubled = replace(context(), data=Dataset(Memory([*pictures, *again])))
    found = collected(bundle, "vision", selector_of(bundle.module(PROJECTOR)), 16, doubled, 100)
    assert found.shape == (len(pictures), 16, 32)
    assert found.dtype == torch.float16
    few = collected(bundle, "vision", selector_of(bundle.module(PROJECTOR)), 16, doubled, 5)
    assert torch.equal(few, found[:5])


def test_features_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector_train, "FEATURE_BYTES", 3 * 16 * 32 * 2)
    bundle, watching = selecting(), Watching()
    found = collected(
        bundle, "vision", selector_of(bundle.module(PROJECTOR)), 16, replace(context(), progress=watching), 100
    )
    assert len(found) == 3
    assert any("learning from 3 pictures" in line for line in watching.said)


def test_what_is_recorded_is_what_is_there() -> None:
    bundle = selecting()
    facts, plan = bundle.history[0].facts["selector"], bundle.history[0].plan
    selector = selector_of(bundle.module(PROJECTOR))
    added = {name for name in bundle.model.state_dict() if ".selector." in name}
    assert added == set(bundle.model.state_dict()) - set(tiny.bundle("llava_clip").model.state_dict())
    assert facts["parameters"] == sum(parameter.numel() for parameter in selector.parameters())
    assert plan["selector"] == {"channels": 32, "outputs": 1, "width": 16, "layers": 3}
    drawn = run(tiny.bundle("llava_clip"), ("reduce-visual-tokens", {"method": "random", "keep": 0.3}))
    more = cost_of(bundle).towers["vision"].macs - cost_of(drawn).towers["vision"].macs
    # As everywhere, products are counted: the one that hands tokens on is there in both.
    assert facts["macs"] == more
    assert all(parameter.grad is None and parameter.requires_grad for parameter in bundle.model.parameters())


def test_towers_are_not_touched() -> None:
    before, after = tiny.bundle("llava_clip").model.state_dict(), selecting().model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_tokens_go_on_as_they_are_in_order() -> None:
    bundle, plain = selecting(), tiny.bundle("llava_clip")
    inputs = bundle.example_inputs("vision", 2)
    with torch.no_grad():
        full = plain.family.image_tokens(plain.model, inputs)  # type: ignore[attr-defined]
        fewer = bundle.family.image_tokens(bundle.model, inputs)  # type: ignore[attr-defined]
    for every, some in zip(full, fewer, strict=True):
        places = (every[None] == some[:, None]).all(dim=-1).float().argmax(dim=1)
        assert torch.equal(every[places], some)
        assert (places.diff() > 0).all()


def test_tokens_are_scored_as_they_were_learned_from() -> None:
    """Normalised: a connector that gives out all tokens a hundred times as long hands on the same ones."""
    bundle, plain = selecting(), tiny.bundle("llava_clip")
    inputs = bundle.example_inputs("vision", 2)
    with torch.no_grad():
        full = torch.stack(plain.family.image_tokens(plain.model, inputs))  # type: ignore[attr-defined]
        fewer = torch.stack(bundle.family.image_tokens(bundle.model, inputs))  # type: ignore[attr-defined]
        scores = selector_of(bundle.module(PROJECTOR))(normalised(full))[..., 0]
        torch.testing.assert_close(fewer, best_scored(scores, 5) @ full)
        last = bundle.module(PROJECTOR).linear_2
        last.weight.mul_(100)
        last.bias.mul_(100)
        longer = torch.stack(bundle.family.image_tokens(bundle.model, inputs))  # type: ignore[attr-defined]
    torch.testing.assert_close(longer, 100 * fewer)


def test_the_seed_decides() -> None:
    one, again, other = (selecting(seed).model.state_dict() for seed in (3, 3, 4))
    names = [name for name in one if ".selector." in name]
    assert all(torch.equal(one[name], again[name]) for name in names)
    assert any(not torch.equal(one[name], other[name]) for name in names)


FOLLOWING: dict[str, dict[str, Any]] = {
    "quantize": {"scheme": "W8A8"},
    "prune": {"ratio": 0.3, "towers": ["vision"]},
    "distill": {"steps": 2, "batch_size": 4},
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_later_passes_keep_it(name: str, tmp_path: Path) -> None:
    bundle = run(tiny.bundle("llava_clip"), ("reduce-visual-tokens", ASKED), (name, FOLLOWING[name]))
    written = checkpoint.save(bundle, tmp_path / "out")
    assert not written.plain_transformers
    assert "load with mmcompress.load" in written.why
    again = checkpoint.load(tmp_path / "out")
    samples = list(tiny.asked(3, turns=False))
    assert again.generate(samples) == bundle.generate(samples)
    assert copy.deepcopy(again).generate(samples) == bundle.generate(samples)


def test_within_a_latency_untrained_ones_are_timed() -> None:
    def timer(trial: Bundle, stages: tuple[str, ...]) -> float:
        return handed_on(trial.module(PROJECTOR), 16) / 10

    bundle, given = tiny.bundle("llava_clip"), replace(context(), stopwatch=timed_by(timer))
    made = build("reduce-visual-tokens", {"method": "selector", "latency_ms": 0.8, "selector_epochs": 1})
    plan = made.plan(bundle, given)
    made.apply(bundle, plan)
    assert plan.decisions["kept"] in (7, 8)
    assert made.fit(bundle, given)["selector"]["steps"] == 1


def test_a_dry_run_knows_how_long_learning_takes() -> None:
    made = build("reduce-visual-tokens", {"method": "selector", "selector_epochs": 5, "selector_pictures": 40})
    step = seconds_a_picture(TokenTransformer(32, 1, 64, 3, (4, 4)), 16)
    assert step > 0
    bundle = tiny.bundle("llava_clip")
    assert made.seconds(bundle, Work(samples=8, dataset=100, forward=0.5)) == pytest.approx(40 * (0.5 + 5 * step))
    assert made.seconds(bundle, Work(samples=8, dataset=10, forward=0.5)) == pytest.approx(10 * (0.5 + 5 * step))


def test_multiply_adds_by_hand() -> None:
    made = TokenTransformer(channels=10, outputs=1, width=16, layers=2, grid=(3, 3))
    block = 12 * 16 * 16 + 2 * 9 * 16  # projections and feed-forward, attention
    assert macs_a_picture(made, 9) == 9 * (10 * 16 + 2 * block + 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "selector", "selector_epochs": 0}, "selector_epochs is 0; expected a number >= 1"),
        (
            {"method": "clusters", "selector_epochs": 3},
            "selector_epochs is for method selector, and clusters is asked for",
        ),
        ({"method": "selector", "selector_pictures": 0}, "selector_pictures is 0; expected a number >= 1"),
        ({"method": "selector", "selector_layers": 0}, "selector_layers is 0; expected a number >= 1"),
        ({"method": "selector", "selector_width": 20}, "selector_width is 20; expected a multiple of 16"),
        ({"method": "selector", "selector_width": 0}, "selector_width is 0; expected a multiple of 16"),
    ],
)
def test_parameters_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        build("reduce-visual-tokens", settings)
    assert raised.value.hint


def test_it_needs_pictures() -> None:
    bundle, made = tiny.bundle("llava_clip"), build("reduce-visual-tokens", ASKED)
    with pytest.raises(UsageError, match="learning which tokens to keep needs data") as raised:
        made.plan(bundle, Context())
    assert raised.value.hint
    data = context().data
    assert data is not None
    blind = Context(data=Dataset(Memory([replace(sample, picture=None) for sample in data]), "words"))
    made.apply(bundle, made.plan(bundle, blind))
    with pytest.raises(UsageError, match="'words' has no picture to learn from"):
        made.fit(bundle, blind)


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match="loss is nan at step 1 of 1"):
        learn(autoencoder(6), twins(4, 3) * torch.nan, kept=3, epochs=1, seed=0, progress=Silent())
