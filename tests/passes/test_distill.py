"""Distillation: it recovers a damaged model, touches only what it was asked to, and refuses what cannot work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import OutOfMemory, UsageError
from mmcompress.passes import build, schema
from mmcompress.passes.base import Context
from mmcompress.passes.distill import Distill
from mmcompress.passes.distill_job import updatable
from mmcompress.progress import Silent
from mmcompress.surgery.low_rank_updates import low_rank_updates
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {"batch_size": 8, "steps": 6, "learning_rate": 2e-3, "amp": False}


def damaged(name: str = "clip", amount: float = 0.03) -> Bundle:
    """The tiny model of a family with noise on every weight: a student whose teacher is `tiny.bundle(name)`."""
    bundle = tiny.bundle(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)
    return bundle


def context(data: Dataset | None = None, name: str = "clip", **more: Any) -> Context:
    return Context(data=data or tiny.dataset(24), teacher=lambda: tiny.bundle(name), **more)


def weights(bundle: Bundle) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in bundle.model.state_dict().items()}


def changed(before: dict[str, Tensor], bundle: Bundle) -> set[str]:
    return {name for name, value in bundle.model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_damaged_model_moves_towards_its_teacher(name: str) -> None:
    bundle = damaged(name)
    facts = Distill(steps=12, batch_size=12, learning_rate=1e-3, amp=False).fit(bundle, context(name=name))
    assert facts["loss"]["after"] < facts["loss"]["before"]
    mean = {when: sum(cosine[when] for cosine in facts["cosine"].values()) / 2 for when in ("before", "after")}
    assert mean["after"] > mean["before"]
    assert facts["steps"] == 12
    assert facts["samples_seen"] == 144
    assert facts["held_back"] == 2
    assert [point[0] for point in facts["curve"]] == list(range(1, 13))
    assert not bundle.model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in bundle.model.parameters())


def plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient descent in place of AdamW, whose first steps have one size however small the gradient is."""

    def descent(groups: list[dict[str, Any]], lr: float, **_: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", descent)


def test_a_perfect_student_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_steps(monkeypatch)
    bundle = tiny.bundle("clip")
    before = weights(bundle)
    settings = {**QUICK, "learning_rate": 1e-3, "interactive": 0.0, "logit": 1.0, "affinity": 1.0, "weight_decay": 0.0}
    facts = Distill(**settings).fit(bundle, context())
    assert facts["loss"] == {"before": pytest.approx(0.0, abs=1e-6), "after": pytest.approx(0.0, abs=1e-6)}
    assert distance(before, weights(bundle)) < 1e-6
    # the same steps move a damaged student, so it is not that they are too small to see
    assert distance(weights(damaged()), after(settings)) > 1e-4


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_that_does_not_train_is_bit_identical(tower: str) -> None:
    bundle = damaged()
    before = weights(bundle)
    Distill(**QUICK, towers=(tower,)).fit(bundle, context())
    moved = changed(before, bundle)
    assert moved
    assert all(bundle.tower(tower).owns(name) for name in moved)


def test_norms_and_biases_only() -> None:
    bundle = damaged("dual_encoder_dinov2")
    before = weights(bundle)
    Distill(**QUICK, train="norms-and-biases").fit(bundle, context(name="dual_encoder_dinov2"))
    moved = changed(before, bundle)
    assert moved
    assert all(before[name].ndim == 1 for name in moved)


def test_projection_only() -> None:
    bundle = damaged()
    before = weights(bundle)
    Distill(**QUICK, train="projection").fit(bundle, context())
    assert changed(before, bundle) == {"visual_projection.weight", "text_projection.weight"}


def test_updates_of_low_rank_become_part_of_the_weights() -> None:
    bundle = damaged()
    before = weights(bundle)
    facts = Distill(**{**QUICK, "learning_rate": 1e-2}, train="lora", rank=2).fit(bundle, context())
    assert facts["loss"]["after"] < facts["loss"]["before"]
    moved = changed(before, bundle)
    linears = {
        path for path, module in bundle.model.named_modules() if isinstance(module, nn.Linear) and "layers" in path
    }
    assert moved == {f"{path}.weight" for path in linears}
    after = bundle.model.state_dict()
    assert all(torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) in (1, 2) for name in moved)
    assert facts["trained_parameters"] == sum(2 * sum(before[name].shape) for name in moved)
    # A plain model again, whose weights train as any other's.
    assert not any(type(module).__name__.startswith("Parametrized") for module in bundle.model.modules())
    assert set(dict(bundle.model.named_parameters())) == set(dict(tiny.bundle("clip").model.named_parameters()))


def test_updates_begin_as_nothing() -> None:
    bundle = damaged()
    before = weights(bundle)
    inputs = bundle.example_inputs("vision", 2)
    with low_rank_updates(bundle.model, list(updatable(bundle, ("vision",))), rank=3, seed=0) as updates:
        assert torch.equal(bundle.encode("vision", inputs), damaged().encode("vision", inputs))
        bundle.encode("vision", inputs).sum().backward()
        # Of B A with B = 0 only B has a gradient.
        assert all(
            value.grad is not None and bool(value.grad.any()) == name.endswith("b") for name, value in updates.items()
        )
    assert not changed(before, bundle)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"epochs": 0.0}])
def test_no_steps_change_nothing(settings: dict[str, Any]) -> None:
    bundle = damaged()
    before = weights(bundle)
    neutral = Distill(**settings)
    assert neutral.plan(bundle, Context()).decisions == {"steps": 0}
    assert neutral.fit(bundle, Context()) == {"steps": 0}
    assert not changed(before, bundle)


def test_plan_decides_and_changes_nothing() -> None:
    bundle = damaged()
    before = weights(bundle)
    plan = Distill(epochs=2.5, batch_size=4, accumulate=2).plan(bundle, context())
    # 24 samples, 2 held back; ceil(2.5 * 22 / 8) steps
    assert {key: plan.decisions[key] for key in ("samples", "held_back", "steps", "samples_per_step")} == {
        "samples": 22,
        "held_back": 2,
        "steps": 7,
        "samples_per_step": 8,
    }
    assert plan.decisions["towers"] == ["vision", "text"]
    assert plan.decisions["paired"] is True
    assert not changed(before, bundle)


def after(settings: dict[str, Any], student: Callable[[], Bundle] = damaged, **more: Any) -> dict[str, Tensor]:
    bundle = student()
    Distill(**settings).fit(bundle, context(**more))
    return weights(bundle)


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max((value.float() - right[name].float()).abs().max().item() for name, value in left.items())


def test_accumulated_batches_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_steps(monkeypatch)
    common = {"steps": 2, "learning_rate": 1e-2, "amp": False, "logit": 1.0, "augment": True}
    once = after({**common, "batch_size": 8})
    assert distance(once, after({**common, "batch_size": 4, "accumulate": 2})) < 1e-6
    assert distance(once, after({**common, "batch_size": 4})) > 1e-4


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    settings = {**QUICK, "augment": True, "ema": 0.9}
    first = after(settings)
    assert distance(first, after(settings)) == 0
    assert distance(first, after(settings, seed=1)) > 0
    assert distance(after({**settings, "seed": 1}), after(settings, seed=1)) == 0


def test_the_moving_average_is_what_remains() -> None:
    start, last, mean = weights(damaged()), after(QUICK), after({**QUICK, "ema": 0.99})
    assert 0 < distance(start, mean) < distance(start, last)
    # After one step the average reaches back (1 + 0) / (10 + 0) of the way, however long its memory will be.
    one = {"steps": 1, "batch_size": 8, "amp": False, "learning_rate": 1e-3, "warmup": 0.0}
    last, mean = after(one), after({**one, "ema": 0.99})
    expected = {name: value.float().lerp(last[name].float(), 0.9) for name, value in start.items()}
    assert distance(expected, mean) < 1e-6 < distance(start, last)


def test_a_frozen_model_in_half_precision_trains_in_full_and_stays_half() -> None:
    bundle = damaged()
    bundle.model.bfloat16()
    buffers = {name: value.dtype for name, value in bundle.model.state_dict().items()}
    facts = Distill(**QUICK).fit(bundle, context())
    assert facts["loss"]["after"] < facts["loss"]["before"]
    assert {name: value.dtype for name, value in bundle.model.state_dict().items()} == buffers


def test_bfloat16_reaches_about_the_same_loss() -> None:
    losses = {}
    for amp in (False, True):
        losses[amp] = Distill(**{**QUICK, "amp": amp}).fit(damaged(), context())["loss"]["after"]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


def images_only(count: int) -> Dataset:
    return Dataset(Memory([Sample(str(i), picture=image) for i, image in enumerate(tiny.images(count))]))


def test_images_alone_train_the_vision_tower_only() -> None:
    bundle = damaged()
    before = weights(bundle)
    facts = Distill(**QUICK).fit(bundle, context(images_only(24)))
    assert facts["towers"] == ["vision"]
    assert facts["paired"] is False
    assert facts["loss"]["after"] < facts["loss"]["before"]
    assert all(bundle.tower("vision").owns(name) for name in changed(before, bundle))


def test_unrelated_images_and_texts_train_both_towers() -> None:
    samples = [Sample(f"image {i}", picture=image) for i, image in enumerate(tiny.images(20))]
    samples += [Sample(f"text {i}", (text,)) for i, text in enumerate(tiny.texts(30))]
    bundle = damaged()
    facts = Distill(**QUICK).fit(bundle, context(Dataset(Memory(samples))))
    assert facts["towers"] == ["vision", "text"]
    assert facts["paired"] is False
    assert all(cosine["after"] > cosine["before"] for cosine in facts["cosine"].values())


def test_pairs_that_do_not_count_as_such_are_mentioned() -> None:
    class Said(Silent):
        def say(self, line: str) -> None:
            lines.append(line)

    lines: list[str] = []
    whole = list(tiny.dataset(12))
    for samples in (whole, [*whole, Sample("text", ("a cat",))], [Sample("text", ("a cat",)), *images_only(3)]):
        Distill(**QUICK).plan(damaged(), context(Dataset(Memory(samples)), progress=Said()))
    (line,) = lines
    assert line.startswith("12 of 13 samples have an image and a text")


def test_a_live_teacher_sees_the_changed_image(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    teacher = tiny.bundle("clip")
    encode = type(teacher.family).encode

    def counted(self: Any, model: nn.Module, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        if model is teacher.model:
            calls.append((tower, len(next(iter(inputs.values())))))
        return encode(self, model, tower, inputs)

    monkeypatch.setattr(type(teacher.family), "encode", counted)
    settings = {**QUICK, "augment": True}
    seen = {}
    for cached in (None, True):
        calls.clear()
        given = dataclasses.replace(context(), teacher=lambda: teacher)
        Distill(**settings, cache_teacher=cached).fit(damaged(), given)
        seen[cached] = sum(count for tower, count in calls if tower == "vision")
    # one image to learn the width; live: 2 held back and 6 steps of 8; cached: each of the 24 once
    assert seen == {None: 1 + 2 + 48, True: 1 + 24}


def test_a_time_limit_lowers_the_steps_and_says_so() -> None:
    facts = Distill(batch_size=8, steps=100_000, max_minutes=1e-4, amp=False).fit(damaged(), context())
    assert facts["steps"] == 1


def test_divergence_is_reported() -> None:
    bundle = damaged()
    with torch.no_grad():
        bundle.model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(UsageError, match="the loss is nan at step 1 of 6"):
        Distill(**QUICK).fit(bundle, context())


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmcompress.passes.distill_state.save_file", full)
    with pytest.raises(OutOfMemory, match="No space left on device") as error:
        Distill(**QUICK).fit(damaged(), context(workdir=tmp_path))
    assert "--resume" in error.value.hint


def frozen_everywhere() -> Bundle:
    bundle = tiny.bundle("clip")
    for module in list(bundle.model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return bundle


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({}, {"data": None}, "distill needs data"),
        ({}, {"teacher": None}, "distill has no teacher"),
        ({"pairing": "paired"}, {"data": images_only(12)}, "12 of 12 samples lack an image or a text"),
        ({"towers": ("text",)}, {"data": images_only(12)}, "the data has no texts"),
        ({"interactive": 1.0}, {"data": images_only(12)}, "interactive is 1.0, but the data is not paired"),
        ({"affinity": 1.0}, {"data": images_only(12)}, "one modality only"),
        ({"feature": 0.0, "relational": 0.0}, {"data": images_only(12)}, "no loss of distill has a weight"),
        ({}, {"teacher": lambda: tiny.bundle("siglip")}, "24 channels, the teacher's 32"),
        ({}, {"data": Dataset(Memory([]))}, "no images and no texts"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Distill(**{**QUICK, **settings}).fit(damaged(), dataclasses.replace(context(), **given))
    assert error.value.hint


def test_a_teacher_of_another_width_teaches_similarities() -> None:
    def teacher() -> Bundle:
        bundle = tiny.bundle("siglip")
        with torch.no_grad():
            bundle.model.logit_scale.fill_(3.0)
        return bundle

    settings = {**QUICK, "feature": 0.0, "interactive": 0.0, "steps": 20}
    facts = Distill(**settings).fit(damaged(), dataclasses.replace(context(), teacher=teacher))
    losses = [loss for _, loss in facts["curve"]]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert facts["cosine"] == {}


def test_check_refuses_unknown_towers_and_nothing_to_train() -> None:
    with pytest.raises(UsageError, match="no tower 'audio'"):
        Distill(towers=("audio",)).check(tiny.bundle("clip"))
    with pytest.raises(UsageError, match="nothing can train"):
        Distill().check(frozen_everywhere())
    with pytest.raises(UsageError, match=r"nothing can train: distill\.train is 'projection'"):
        Distill(train="projection", towers=("vision",)).check(tiny.bundle("siglip"))
    Distill().check(tiny.bundle("clip"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1.0}, "distill.epochs is -1.0; expected epochs >= 0"),
        ({"batch_size": 0}, "distill.batch_size is 0; expected batch_size > 0"),
        ({"learning_rate": float("nan")}, "distill.learning_rate is nan"),
        ({"warmup": 1.0}, "distill.warmup is 1.0; expected 0 <= warmup < 1"),
        (
            {"feature": 0.0, "interactive": 0.0, "relational": 0.0, "affinity": 0.0, "answer": 0.0, "hidden": 0.0},
            "all losses of distill have weight 0",
        ),
    ],
)
def test_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Distill(**settings)


def test_every_parameter_has_help_and_can_be_given_as_text() -> None:
    assert all(parameter.help for parameter in schema("distill").parameters)
    made = build("distill", {"steps": "12", "towers": "vision", "interactive": "none", "cache-teacher": "true"})
    assert made == Distill(steps=12, towers=("vision",), cache_teacher=True)
