"""Distilling models that answer in text: what is learned of the teacher, by which tower, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.evaluate.likelihoods import read_dataset
from mmcompress.passes.base import Context
from mmcompress.passes.distill import Distill
from mmcompress.progress import Silent
from tests import tiny
from tests.passes import fitting
from tests.passes.test_distill import changed, distance, plain_steps, weights

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {"batch_size": 4, "steps": 6, "learning_rate": 1e-3, "amp": False}


def damaged(amount: float = 0.03) -> Bundle:
    """The tiny Whisper with noise on every weight: a student whose teacher is `tiny.bundle("whisper")`."""
    bundle = tiny.bundle("whisper")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)
    return bundle


def context(data: Dataset | None = None, **more: Any) -> Context:
    return Context(data=data or tiny.spoken(24), teacher=lambda: tiny.bundle("whisper"), **more)


def after(settings: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    bundle = damaged()
    Distill(**{**QUICK, **settings}).fit(bundle, context(**more))
    return weights(bundle)


def loss(settings: dict[str, Any]) -> float:
    """The loss of the damaged model on the held-back samples."""
    found = Distill(**{**QUICK, "steps": 1, **settings}).fit(damaged(), context())["loss"]["before"]
    return float(found)


def test_a_damaged_model_moves_towards_its_teacher_in_what_it_hears_and_in_what_it_writes() -> None:
    bundle = damaged()
    facts = Distill(**{**QUICK, "steps": 20}).fit(bundle, context())
    assert facts["loss"]["after"] < 0.5 * facts["loss"]["before"]
    assert set(facts["cosine"]) == {"audio", "decoder"}
    assert all(cosine["after"] > cosine["before"] for cosine in facts["cosine"].values())
    assert (facts["samples"], facts["held_back"], facts["samples_seen"]) == (22, 2, 80)
    assert not bundle.model.training
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


def test_a_perfect_student_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_steps(monkeypatch)
    bundle = tiny.bundle("whisper")
    before = weights(bundle)
    settings = {**QUICK, "weight_decay": 0.0}
    facts = Distill(**settings).fit(bundle, context())
    assert facts["loss"] == {"before": pytest.approx(0.0, abs=1e-6), "after": pytest.approx(0.0, abs=1e-6)}
    assert facts["cosine"]["decoder"]["before"] == pytest.approx(1.0)
    assert distance(before, weights(bundle)) < 1e-6
    assert distance(weights(damaged()), after(settings)) > 1e-4


def test_what_the_model_holds_constant_stays_so() -> None:
    bundle = damaged()
    before = weights(bundle)
    Distill(**QUICK).fit(bundle, context())
    sines = {name for name, parameter in bundle.model.named_parameters() if not parameter.requires_grad}
    assert sines == {"model.encoder.embed_positions.weight"}
    assert not sines & changed(before, bundle)


@pytest.mark.parametrize("tower", ["audio", "decoder"])
def test_a_tower_that_does_not_train_is_bit_identical(tower: str) -> None:
    bundle = damaged()
    before = weights(bundle)
    Distill(**QUICK, towers=(tower,)).fit(bundle, context())
    moved = changed(before, bundle)
    assert moved
    assert all(bundle.tower(tower).owns(name) for name in moved)


def test_losses_add_up_by_their_weights() -> None:
    audio, decoder = (loss({"towers": (name,)}) for name in ("audio", "decoder"))
    assert loss({}) == pytest.approx(audio + decoder, abs=3e-6)
    assert loss({"hidden": 2.0, "answer": 0.5}) == pytest.approx(2 * audio + 0.5 * decoder, abs=3e-6)


def test_cross_entropy_is_what_perplexity_says_of_the_same_answers() -> None:
    # Below ten samples all of them serve for measuring; every answer counts the same, however long it is.
    data = tiny.spoken(6)
    found = read_dataset(damaged(), data)
    settings = {**QUICK, "steps": 1, "towers": ("decoder",), "answer": 0.0, "cross_entropy": 1.0}
    facts = Distill(**settings).fit(damaged(), context(data))
    assert facts["loss"]["before"] == pytest.approx(-(found.log / found.tokens).mean(), abs=1e-5)


def test_cross_entropy_raises_the_probability_of_the_answers() -> None:
    data, bundle = tiny.spoken(8), damaged()
    before = read_dataset(bundle, data).log.sum()
    Distill(**{**QUICK, "steps": 20}, towers=("decoder",), answer=0.0, cross_entropy=1.0).fit(bundle, context(data))
    assert read_dataset(bundle, data).log.sum() > before + 5


def test_accumulated_batches_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_steps(monkeypatch)
    common = {"steps": 2, "learning_rate": 1e-2, "cross_entropy": 0.5}
    once = after({**common, "batch_size": 8})
    assert distance(once, after({**common, "batch_size": 4, "accumulate": 2})) < 1e-6
    assert distance(once, after({**common, "batch_size": 4})) > 1e-5


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    first = after({"ema": 0.9})
    assert distance(first, after({"ema": 0.9})) == 0
    assert distance(first, after({"ema": 0.9}, seed=1)) > 0


def test_samples_that_lack_something_are_left_out_and_mentioned() -> None:
    class Said(Silent):
        def say(self, line: str) -> None:
            lines.append(line)

    lines: list[str] = []
    data = [*tiny.spoken(12), *(dataclasses.replace(s, key=f"x{s.key}", texts=()) for s in tiny.spoken(3))]
    plan = Distill(**QUICK).plan(damaged(), context(Dataset(Memory(data)), progress=Said()))
    assert plan.decisions["samples"] == 11  # one of the twelve is held back
    assert lines == ["3 samples lack what audio or decoder needs, and are left out of distill"]
    # The encoder needs no text.
    plan = Distill(**QUICK, towers=("audio",)).plan(damaged(), context(Dataset(Memory(data))))
    assert plan.decisions["samples"] == 14


def test_recordings_without_texts_train_what_hears() -> None:
    bundle = damaged()
    before = weights(bundle)
    data = Dataset(Memory([dataclasses.replace(sample, texts=()) for sample in tiny.spoken(12)]))
    facts = Distill(**QUICK).fit(bundle, context(data))
    assert facts["towers"] == ["audio"]
    assert all(bundle.tower("audio").owns(name) for name in changed(before, bundle))


def test_a_teacher_that_prepares_its_inputs_otherwise_does_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a student has fewer image tokens: its prompts have fewer placeholders."""
    longer = Dataset(Memory([*tiny.spoken(4)]))
    alike = Distill(**QUICK).fit(damaged(), context(longer))
    monkeypatch.setattr("mmcompress.passes.distill_answers._takes_the_same", lambda *_: False)
    assert Distill(**QUICK).fit(damaged(), context(longer))["curve"] == alike["curve"]


def wider() -> Bundle:
    """A Whisper of the same family with other sizes."""
    bundle = tiny.bundle("whisper")
    config = type(bundle.model.config)(**{**bundle.model.config.to_dict(), "d_model": 32, "vocab_size": 30})
    bundle.model = type(bundle.model)(config)
    return bundle


NOTHING = Dataset(Memory([Sample("a", ("red",))]))


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({}, {"data": None}, "distill needs data"),
        ({}, {"teacher": None}, "distill has no teacher"),
        ({}, {"data": NOTHING}, "no sample of the data has what audio or decoder needs"),
        ({"towers": ("audio",)}, {"data": NOTHING}, "distill.towers names 'audio', but no sample"),
        ({"logit": 1.0}, {}, "distill.logit is 1.0, which is for models that embed"),
        ({"augment": True}, {}, "distill.augment is True, which is for models that embed"),
        ({"cache_teacher": True}, {}, "what a teacher answers is too much to keep"),
        ({"answer": 0.0}, {}, "no loss of distill has a weight for decoder"),
        ({"hidden": 0.0}, {}, "no loss of distill has a weight for audio"),
        ({}, {"teacher": lambda: tiny.bundle("clip")}, "the student is a whisper model, the teacher a clip model"),
        ({"towers": ("audio",)}, {"teacher": wider}, "audio has 2400 values in its hidden states, the teacher's 1600"),
        ({"towers": ("decoder",)}, {"teacher": wider}, "decoder has 25 words of the vocabulary, the teacher's 30"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Distill(**{**QUICK, **settings}).fit(damaged(), dataclasses.replace(context(), **given))
    assert error.value.hint


def test_a_loss_of_answers_is_refused_for_a_model_that_embeds() -> None:
    given = Context(data=tiny.dataset(12), teacher=lambda: tiny.bundle("clip"))
    with pytest.raises(UsageError, match=r"cross_entropy is 1\.0, but clip models do not answer in text"):
        Distill(cross_entropy=1.0).plan(tiny.bundle("clip"), given)


def test_the_connector_alone_learns_to_give_the_language_model_what_the_teacher_gives() -> None:
    bundle, data = tiny.bundle("llava_clip"), tiny.data("llava_clip", 12)
    with torch.no_grad():
        for parameter in bundle.model.model.multi_modal_projector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    before = weights(bundle)
    given = Context(data=data, teacher=lambda: tiny.bundle("llava_clip"))
    facts = Distill(**{**QUICK, "steps": 30}, towers=("vision",), train="projection").fit(bundle, given)
    assert {name.split(".")[1] for name in changed(before, bundle)} == {"multi_modal_projector"}
    assert facts["loss"]["after"] < 0.5 * facts["loss"]["before"]


def test_a_language_model_learns_from_a_teacher_that_sees_more_image_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of the answer's tokens differ then, and what stands at them is compared all the same."""
    taken: list[tuple[int, ...]] = []
    data = tiny.data("llava_clip", 6)

    def teacher() -> Bundle:
        made = tiny.bundle("llava_clip")
        prepare = type(made.family).prepare

        def shifted(self: Any, model: Any, processor: Any, tower: str, items: Any) -> dict[str, Tensor]:
            inputs = prepare(self, model, processor, tower, items)
            if model is made.model and tower == "language":
                # One more token of text in front, as more image tokens would stand there.
                inputs = {**inputs, "answer_positions": inputs["answer_positions"] + 1}
                for name in ("input_ids", "attention_mask"):
                    inputs[name] = torch.cat([inputs[name][:, :1], inputs[name]], dim=1)
                taken.append(tuple(inputs["input_ids"].shape))
            return inputs

        monkeypatch.setattr(type(made.family), "prepare", shifted)
        return made

    monkeypatch.setattr("mmcompress.passes.distill_answers._takes_the_same", lambda *_: False)
    settings = {**QUICK, "steps": 10}
    facts = Distill(**settings, towers=("language",)).fit(
        tiny.bundle("llava_clip", seed=1), Context(data, teacher=teacher)
    )
    assert taken
    assert facts["loss"]["after"] < facts["loss"]["before"]


@pytest.mark.parametrize("train", ["all", "lora", "quantized-weights"])
def test_a_student_that_got_worse_gets_its_weights_back(train: Any) -> None:
    class Said(Silent):
        def say(self, line: str) -> None:
            lines.append(line)

    def student() -> Bundle:
        bundle = tiny.bundle("whisper")
        if train == "quantized-weights":
            fitting.run(bundle, Context(), scheme="W8A16")
        return bundle

    def state(bundle: Bundle) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in bundle.model.state_dict().items()}

    lines: list[str] = []
    settings = {**QUICK, "train": train, "learning_rate": 3e-2}
    bundle = student()
    before = state(bundle)
    facts = Distill(**settings).fit(bundle, context(progress=Said()))
    assert facts["undone"]["loss"] > facts["loss"]["before"] == facts["loss"]["after"]
    assert all(cosine["before"] == cosine["after"] for cosine in facts["cosine"].values())
    assert {name for name, value in state(bundle).items() if not torch.equal(value, before[name])} == set()
    kept = Distill(**settings, keep_worse=True).fit(bundle, context(progress=Said()))
    assert kept["loss"]["after"] == pytest.approx(facts["undone"]["loss"])
    assert "undone" not in kept
    assert any(not torch.equal(value, before[name]) for name, value in state(bundle).items())
    for line, what in zip(lines, ("the weights from before are back", "kept as asked"), strict=True):
        assert line.startswith("distill raised the loss on held-back samples from ")
        assert line.endswith(f", {what}; lower distill.learning_rate (now 0.03), or make more steps")


def test_a_student_that_got_better_is_not_mentioned() -> None:
    class Said(Silent):
        def say(self, line: str) -> None:
            raise AssertionError(line)

    assert "undone" not in Distill(**QUICK).fit(damaged(), context(progress=Said()))
