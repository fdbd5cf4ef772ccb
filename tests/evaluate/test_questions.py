"""Questions about pictures and captions: scores by hand, what is scored without looking, slices, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmcompress.data import Dataset, Memory, Sample, Video
from mmcompress.data.sample import seen
from mmcompress.errors import UsageError
from mmcompress.evaluate import Evaluation, compare, evaluate, read_evaluation, write_evaluation
from mmcompress.evaluate.answer_controls import _with_blank_pictures, _with_other_pictures, _without_pictures
from mmcompress.evaluate.answers import picture_of
from mmcompress.evaluate.tasks import usual_tasks
from tests import tiny
from tests.evaluate.recordings import speech
from tests.evaluate.worlds import number_of, picture, world

COLOURS = ("red", "green", "blue", "yellow")


class Asked:
    """Answers by a rule from the picture's number (-1: blank, None: there is none) and the question."""

    def __init__(self, rule: Callable[[int | None, str], str], needs_pictures: bool = False) -> None:
        self.rule, self.needs_pictures = rule, needs_pictures
        self.largest_batch = 0

    def generate(self, samples: Sequence[Sample]) -> list[str]:
        self.largest_batch = max(self.largest_batch, len(samples))
        return [self.rule(self._seen(sample), sample.question) for sample in samples]

    def _seen(self, sample: Sample) -> int | None:
        return number_of(sample.image) if sample.picture is not None or self.needs_pictures else None


def questions(n: int) -> Dataset:
    """Two questions about each picture: its colour (every fourth the same) and, later in the talk, how many (1, 2, 1, 3, ...)."""
    samples = []
    for i in range(n):
        seen, colour, count = picture(i), COLOURS[i % 4], ("1", "2", "1", "3")[i % 4]
        first = ("What colour is it?", colour)
        samples.append(Sample(f"c{i}", (colour,), group="colour", picture=seen, question=first[0]))
        second = Sample(f"n{i}", (count, f"{count} of them"), group="count", picture=seen, question="How many?")
        samples.append(replace(second, turns=(first,)))
    return Dataset(Memory(samples), "questions")


def knows(number: int | None, question: str) -> str:
    if number is None or number < 0:
        return "I cannot see"
    return f"{COLOURS[number % 4].title()}." if "colour" in question else ("one", "two", "one", "three")[number % 4]


def value(found: Evaluation, metric: str, task: str = "vqa") -> float:
    return found.estimates[task][metric].value


def control(found: Evaluation, name: str) -> tuple[float, float | None]:
    """The score of a control, and what is lost by it."""
    (one,) = [control for control in found.controls if control.name == name]
    return one.estimate.value, one.lost.value if one.lost else None


def test_answers_by_hand() -> None:
    data = questions(4)

    def half(number: int | None, question: str) -> str:
        return knows(number, question) if "colour" in question else "There are 2 of them"

    found = evaluate(Asked(half), data)
    assert found.config["tasks"] == ["vqa"]
    assert found.results["vqa"]["accuracy"].values.tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    # "2 of them" is an accepted answer of the second picture, and occurs in what is said.
    assert found.results["vqa"]["keyword"].values.tolist() == [1, 0, 1, 1, 1, 0, 1, 0]
    # Two questions about one picture are not independent: 4 pictures.
    assert found.estimates["vqa"]["accuracy"].n == 4


def test_ten_peoples_answers_count_as_far_as_they_agree() -> None:
    people = ("red",) * 2 + ("blue",) * 8
    data = Dataset(Memory([Sample("a", people, picture=picture(0), question="What colour is it?")]))
    assert value(evaluate(Asked(knows), data), "accuracy") == pytest.approx(0.6)


def test_a_model_that_looks_loses_without_the_picture() -> None:
    model = Asked(knows)
    found = evaluate(model, questions(40), batch=7)
    assert value(found, "accuracy") == 1
    assert control(found, "blank image") == (0, 1)
    assert control(found, "text only: the question without a picture") == (0, 1)
    # A random other picture of 32 has the same colour in 7 of 31 cases, the same count in 7 (of "2", "3") or 15 (of "1").
    scored, lost = control(found, "another sample's picture")
    assert scored == pytest.approx((7 / 31 + (7 / 31 + 15 / 31) / 2) / 2, abs=0.1)
    assert lost == pytest.approx(1 - scored)
    assert model.largest_batch == 7
    assert not [finding for finding in found.findings if "DOES NOT LOOK" in finding.text]


def test_no_sample_keeps_its_picture_when_they_are_exchanged() -> None:
    class Watched(Asked):
        pairs: list[tuple[str, int | None]] = []

        def generate(self, samples: Sequence[Sample]) -> list[str]:
            self.pairs += [(sample.key, self._seen(sample)) for sample in samples]
            return super().generate(samples)

    model = Watched(knows)
    evaluate(model, questions(5))
    own, exchanged = dict(model.pairs[:10]), dict(model.pairs[10:20])
    assert own.keys() == exchanged.keys()
    assert all(own[key] != exchanged[key] for key in own)
    assert sorted(map(str, own.values())) == sorted(map(str, exchanged.values()))
    assert exchanged["c3"] == exchanged["n3"]  # questions about one picture stay together


def test_a_model_that_does_not_look_is_called_out() -> None:
    found = evaluate(Asked(lambda _, question: "red" if "colour" in question else "1"), questions(40))
    assert value(found, "accuracy") == pytest.approx(0.25 / 2 + 0.5 / 2)
    (finding,) = [finding for finding in found.findings if "DOES NOT LOOK" in finding.text]
    assert finding.level == "bad"
    few = evaluate(Asked(lambda *_: "red"), questions(4))
    assert [finding.level for finding in few.findings if "not seen to look (few samples)" in finding.text] == ["note"]


def test_a_model_that_needs_a_picture_has_no_control_without() -> None:
    found = evaluate(Asked(knows, needs_pictures=True), questions(4))
    assert not [control for control in found.controls if control.name.startswith("text only: the question")]


def test_questions_without_a_picture_are_asked_once_and_no_control_of_pictures() -> None:
    data = [*questions(4), Sample("text", ("4",), question="What is two and two?")]
    model = Asked(lambda number, question: "4" if "two" in question else knows(number, question))
    found = evaluate(model, Dataset(Memory(data[::-1])))
    assert value(found, "accuracy") == 1
    assert {control.estimate.n for control in found.controls if control.lost} == {4}  # pictures
    assert control(found, "blank image") == (0, 1)


def test_the_commonest_answer_is_scored_on_the_whole_and_on_each_group() -> None:
    found = evaluate(Asked(knows), questions(40))
    # "1" and "1 of them" are accepted of 20 of 80; no colour of more than 10.
    assert control(found, "text only: always the commonest answer") == (0.25, None)
    assert control(found, "text only: always the commonest answer of group=colour") == (0.25, None)
    assert control(found, "text only: always the commonest answer of group=count") == (0.5, None)


def test_slices_are_groups_turns_and_long_prompts() -> None:
    before = evaluate(Asked(knows), questions(40))
    after = evaluate(Asked(lambda n, q: knows(n, q) if "colour" in q else "?"), questions(40), reference=before)
    by_name = {part.part: part for part in after.slices if part.task == "vqa"}
    assert {"group=colour", "group=count", "multi-turn", "first turn"} <= set(by_name)
    assert [part for part in by_name if part.startswith("prompt")]
    assert by_name["group=count"].estimate.value == by_name["multi-turn"].estimate.value == 0
    assert by_name["first turn"].difference is not None
    assert by_name["first turn"].difference.value == 0
    assert by_name["multi-turn"].difference == by_name["group=count"].difference
    assert value(after, "accuracy") == 0.5


def captions(n: int) -> Dataset:
    return world(n, captions=lambda i: (f"a {COLOURS[i % 4]} thing number {i}", f"number {i}"))


def test_captions_are_scored_by_cider_and_by_their_words() -> None:
    said = Asked(
        lambda number, _: f"A {COLOURS[number % 4]} thing, number {number}!" if number in range(8) else "thing"
    )
    found = evaluate(said, captions(8))
    assert found.config["tasks"] == ["captioning"]
    assert value(found, "exact", "captioning") == 1
    assert value(found, "keyword", "captioning") == 1
    # Equal to one of two references: 10 for it, and less than 10 for the other.
    assert 5 < value(found, "cider", "captioning") < 10
    assert control(found, "blank image")[0] < 1
    worse = evaluate(Asked(lambda number, _: f"here is number {number}"), captions(8), reference=found)
    assert value(worse, "exact", "captioning") == 0
    assert value(worse, "keyword", "captioning") == 1
    assert worse.differences["captioning"]["cider"].high < 0


def test_the_usual_task_is_what_the_data_is_made_for() -> None:
    answers = frozenset({"answers", "likelihoods"})
    assert usual_tasks(answers, speech(3)) == ("transcription",)
    assert usual_tasks(answers, questions(3)) == ("vqa",)
    assert usual_tasks(answers, captions(3)) == ("captioning",)
    assert usual_tasks({"embeddings"}, captions(3)) == ("retrieval",)


@pytest.mark.parametrize(
    ("data", "task", "words"),
    [
        (captions(3), "vqa", "'k0000' has no question"),
        (questions(3), "captioning", "'c0' has a question"),
        (speech(3), "captioning", "'s0000' has no image"),
        (Dataset(Memory([replace(s, texts=()) for s in questions(3)])), "vqa", "'c0' has no text"),
        (world(3, captions=lambda _: ("thing",)), "captioning", "2 samples with different captions"),
        (captions(3), "perplexity", "perplexity needs likelihoods, and this model gives answers"),
    ],
)
def test_what_the_data_lacks_is_said(data: Dataset, task: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        evaluate(Asked(knows), data, tasks=[task])
    assert caught.value.hint


def test_it_survives_the_disk(tmp_path: Path) -> None:
    before = evaluate(Asked(knows), questions(30))
    after = evaluate(Asked(lambda *_: "red"), questions(30), reference=before)
    write_evaluation(after, tmp_path / "a.npz")
    again = read_evaluation(tmp_path / "a.npz")
    assert again.to_json() == after.to_json()
    assert compare(before, again) == compare(before, after)
    assert again.scene.answers.references == after.scene.answers.references
    write_evaluation(again, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_right_answers_about_one_picture_are_not_independent_either(tmp_path: Path) -> None:
    shown = tiny.images(3)
    data = [
        Sample(f"{i}{word}", (word,), picture=image, question="what is this ?")
        for i, image in enumerate(shown)
        for word in ("red cat", "blue dog")
    ]
    before, after = (evaluate(tiny.bundle("llava_clip", seed), Dataset(Memory(data)), batch=4) for seed in (0, 1))
    assert before.estimates["perplexity"]["answer_log_likelihood"].n == 3
    write_evaluation(after, tmp_path / "a.npz")
    assert compare(before, read_evaluation(tmp_path / "a.npz")) == compare(before, after)


def test_controls_change_all_that_a_sample_shows() -> None:
    """Two pictures, the same first one alone, and a video of both: three things to look at, not one or two."""
    first, second = (Image.new("RGB", (3, 2), colour) for colour in ("red", "blue"))
    two = Sample("two", picture=first, further=(second,))
    shown = [two, Sample("one", picture=first), Sample("video", video=Video((first, second), 4.0))]
    assert len({picture_of(sample) for sample in shown}) == 3
    assert picture_of(replace(two, key="again")) == picture_of(two)
    others = _with_other_pictures(shown, seed=0)
    assert [sample.key for sample in others] == ["two", "one", "video"]
    assert {picture_of(sample) for sample in others} == {picture_of(sample) for sample in shown}
    assert all(picture_of(after) != picture_of(before) for before, after in zip(shown, others, strict=True))
    blank = _with_blank_pictures(shown)
    assert [len(sample.pictures) for sample in blank] == [2, 1, 0]
    video = blank[2].video
    assert video is not None
    assert (len(video.frames), video.rate) == (2, 4.0)
    assert all(seen(one.picture).getpixel((0, 0)) == (255, 255, 255) for sample in blank for one in sample.one_by_one())
    assert not any(sample.shown for sample in _without_pictures(shown))
