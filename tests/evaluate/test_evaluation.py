"""Evaluations: what perfect, guessing and collapsed embedders score, pairing, slices, controls and the file format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.evaluate import Evaluation, compare, evaluate, read_evaluation, write_evaluation
from tests.evaluate.worlds import CHANNELS, Constant, Guessing, Seeing, number_of, world


def value(evaluation: Evaluation, name: str) -> float:
    task, metric = name.split(".")
    return evaluation.estimates[task][metric].value


class Never(Seeing):
    """What is refused is refused before it embeds."""

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        raise AssertionError("embedded")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        raise AssertionError("embedded")


def test_perfect_embeddings_score_one_and_agree_with_themselves() -> None:
    first = evaluate(Seeing(), world(60))
    second = evaluate(Seeing(), world(60), reference=first)
    for name in (
        "retrieval.image_to_text_r1",
        "retrieval.text_to_image_r1",
        "agreement.top1",
        "agreement.top10_overlap",
    ):
        assert value(second, name) == 1.0
    assert value(second, "agreement.image_cosine") == pytest.approx(1.0, abs=1e-6)
    assert value(second, "agreement.text_cosine") == pytest.approx(1.0, abs=1e-6)
    assert value(second, "zero-shot.top1") > 0.8
    assert not second.findings


def test_guessing_is_at_chance_within_the_interval() -> None:
    found = evaluate(Guessing(), world(400))
    for by_metric in found.results.values():
        for metric, measured in by_metric.items():
            assert measured.chance is not None
            # Four standard errors of a share of n independent guesses.
            slack = 4 * (measured.chance * (1 - measured.chance) / 400) ** 0.5
            assert measured.values.mean() == pytest.approx(measured.chance, abs=slack), metric
    assert found.results["retrieval"]["image_to_text_r10"].chance == pytest.approx(10 / 400)
    assert found.results["zero-shot"]["top1"].chance == pytest.approx(1 / 4)


@pytest.mark.parametrize("level", [1.0, 0.0, float("nan")])
def test_constant_embeddings_score_nothing_and_are_called_out(level: float) -> None:
    found = evaluate(Constant(level), world(50))
    assert all(measured.values.max() == 0 for by_metric in found.results.values() for measured in by_metric.values())
    words = "COLLAPSED" if level == 1 else "BROKEN"
    assert [finding.level for finding in found.findings] == ["bad"] * 3  # images, texts, class prompts
    assert all(words in finding.text for finding in found.findings)
    json.dumps(found.to_json(), allow_nan=False)


def test_recall_grows_with_k_for_any_embedder() -> None:
    found = evaluate(Seeing(noise=2.0), world(150))
    for way in ("image_to_text_r", "text_to_image_r"):
        assert 0 < value(found, f"retrieval.{way}1") < value(found, f"retrieval.{way}5")
        assert value(found, f"retrieval.{way}5") <= value(found, f"retrieval.{way}10")


def test_permuting_the_samples_changes_no_score() -> None:
    data = world(80)
    order = np.random.default_rng(0).permutation(80)
    moved = Dataset(data.source, data.name, data.zero_shot, tuple(int(i) for i in order))
    first, second = evaluate(Seeing(noise=1.5), data), evaluate(Seeing(noise=1.5), moved)
    for task, by_metric in first.results.items():
        for metric, measured in by_metric.items():
            assert second.results[task][metric].values.sum() == measured.values.sum()


def test_metrics_that_cannot_fail_are_left_out() -> None:
    for n, depths in ((6, (1, 5)), (5, (1,)), (10, (1, 5)), (11, (1, 5, 10))):
        found = evaluate(Seeing(), world(n), tasks=["retrieval"])
        ways = ("image_to_text_r", "text_to_image_r")
        assert list(found.results["retrieval"]) == [f"{way}{k}" for way in ways for k in depths]


def test_a_shared_caption_is_right_for_each_of_its_images() -> None:
    data = world(10, captions=lambda i: (f"thing {i % 5}",))

    class Halved(Seeing):
        def meaning(self, number: int) -> np.ndarray:
            return super().meaning(number % 5)

    found = evaluate(Halved(), data, tasks=["retrieval"])
    assert value(found, "retrieval.image_to_text_r1") == 1.0
    assert value(found, "retrieval.text_to_image_r1") == 1.0
    assert found.estimates["retrieval"]["image_to_text_r1"].n == 10
    assert found.estimates["retrieval"]["text_to_image_r1"].n == 5


def test_captions_of_one_image_count_as_one_independent_sample() -> None:
    data = world(30, captions=lambda i: tuple(f"{word} thing {i}" for word in ("a", "the", "one")))
    found = evaluate(Seeing(noise=1.5), data, tasks=["retrieval"])
    measured = found.results["retrieval"]["text_to_image_r1"]
    assert len(measured.values) == 90
    assert found.estimates["retrieval"]["text_to_image_r1"].n == 30


def test_tasks_default_to_what_the_data_allows() -> None:
    plain = Dataset(Memory([Sample(s.key, s.texts, picture=s.picture) for s in world(4)]))
    labelled = Dataset(Memory([Sample(s.key, label=s.label, picture=s.picture) for s in world(4)]))
    assert evaluate(Seeing(), plain).config["tasks"] == ["retrieval"]
    found = evaluate(Seeing(), labelled)
    assert (found.config["tasks"], found.config["classes"]) == (["zero-shot"], 4)
    assert evaluate(Seeing(), labelled, reference=found).config["tasks"] == ["zero-shot", "agreement"]


def test_what_the_data_lacks_is_said_before_anything_is_embedded() -> None:
    samples = [Sample(s.key, s.texts if s.key != "k0002" else (), picture=s.picture) for s in world(4)]
    data = Dataset(Memory(samples))
    reference = evaluate(Seeing(), world(5))
    other = evaluate(Seeing(), Dataset(Memory([Sample(f"x{s.key}", s.texts, picture=s.picture) for s in world(4)])))
    for tasks, ref, words in (
        (["retrieval"], None, "'k0002' has no text"),
        (["zero-shot"], None, "0 labels"),
        (["agreement"], None, "needs a reference"),
        (["retreival"], None, "no task 'retreival'"),
        (None, None, "neither texts nor labels"),
        (["agreement"], reference, "on 5 samples, this one on 4"),
        (["agreement"], other, "sample 0 is 'k0000' here but 'xk0000'"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            evaluate(Never(), data, tasks=tasks, reference=ref)
        assert caught.value.hint
    with pytest.raises(UsageError, match="needs 2 samples"):
        evaluate(Seeing(), world(1), tasks=["retrieval"])


def test_paired_differences_are_after_minus_before() -> None:
    data = world(200)
    before = evaluate(Seeing(noise=1.0), data)
    after = evaluate(Seeing(noise=3.0), data, reference=before)
    difference = after.differences["retrieval"]["image_to_text_r1"]
    gap = value(after, "retrieval.image_to_text_r1") - value(before, "retrieval.image_to_text_r1")
    assert difference.value == pytest.approx(gap)
    assert difference.high < 0
    assert difference.n == 200
    assert compare(before, after) == after.differences
    assert compare(after, before)["retrieval"]["image_to_text_r1"].value == pytest.approx(-gap)
    assert "agreement" not in after.differences


def test_no_change_is_an_interval_too() -> None:
    # 0 changes in 100 samples exclude a rate of change above 1 - 0.025 ** (1 / 100) = 0.0362.
    before = evaluate(Seeing(), world(100))
    difference = compare(before, before)["retrieval"]["image_to_text_r1"]
    assert (difference.value, difference.n) == (0.0, 100)
    assert (difference.low, difference.high) == pytest.approx((-0.0362, 0.0362), abs=1e-4)


def test_other_texts_cannot_be_paired() -> None:
    with pytest.raises(UsageError, match="different texts"):
        compare(evaluate(Seeing(), world(9)), evaluate(Seeing(), world(9, captions=lambda i: (f"a thing {i}",))))


def test_a_narrower_embedding_still_agrees_by_its_neighbours() -> None:
    class Narrow(Seeing):
        def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
            return super().embed_images(images)[:, :24]

        def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
            return super().embed_texts(texts)[:, :24]

    data = world(40)
    found = evaluate(Narrow(), data, tasks=["agreement"], reference=evaluate(Seeing(), data))
    assert list(found.results["agreement"]) == ["top1", "top10_overlap"]
    assert value(found, "agreement.top1") == 1.0


def test_slices_show_where_the_damage_is() -> None:
    data = world(100, captions=lambda i: ("very " * (i % 2) + f"thing {i}",))
    before = evaluate(Seeing(), data)
    after = evaluate(Seeing(blind=range(50)), data, reference=before)
    by_name = {(part.part, part.metric): part for part in after.slices}
    lost, kept = by_name["group=half 1", "image_to_text_r1"], by_name["group=half 0", "image_to_text_r1"]
    assert (lost.estimate.n, kept.estimate.n) == (50, 50)
    assert lost.difference is not None
    assert lost.difference.value == pytest.approx(-1.0, abs=0.021)
    assert (kept.estimate.value, kept.difference and kept.difference.value) == (1.0, 0.0)
    assert by_name["tag=even", "image_to_text_r1"].estimate.value == pytest.approx(0.5, abs=0.021)
    longer = by_name["text longer than 10 characters", "text_to_image_r1"]
    assert longer.estimate.n == 50
    assert by_name["label=kind 0", "top1"].estimate.n == 25


def test_slices_too_small_to_say_anything_are_left_out() -> None:
    assert {part.part for part in evaluate(Seeing(), world(39)).slices} == {"group=half 0", "tag=even"}


def test_data_that_changed_under_the_same_names_cannot_be_paired() -> None:
    data = world(20)
    redrawn = [replace(sample, picture=Image.new("RGB", (3, 2))) for sample in data]
    changed = replace(data, source=Memory(redrawn))
    reference = evaluate(Seeing(), data)
    with pytest.raises(UsageError, match="data has changed"):
        evaluate(Never(), changed, reference=reference)
    with pytest.raises(UsageError, match="data has changed"):
        compare(reference, evaluate(Seeing(), changed))


def test_accuracies_over_other_classes_are_not_paired() -> None:
    four, two = world(40), world(40, classes=2)
    reference = evaluate(Seeing(), four, tasks=["zero-shot"])
    with pytest.raises(UsageError, match=r"other zero-shot classes \(4 there, 2 here\)"):
        evaluate(Never(), two, tasks=["zero-shot"], reference=reference)
    with pytest.raises(UsageError, match="other zero-shot classes"):
        compare(reference, evaluate(Seeing(), two, tasks=["zero-shot"]))


def test_controls_keep_to_the_batch_size_too() -> None:
    embedder = Seeing()
    evaluate(embedder, world(32), tasks=["retrieval"], batch=7)
    assert embedder.largest_batch == 7


def test_blank_pictures_score_nothing_and_the_commonest_answer_is_known() -> None:
    found = evaluate(Seeing(), world(64))
    controls = {(control.name, control.task): control for control in found.controls}
    assert controls["blank image", "retrieval"].estimate.value <= 1 / 32
    assert controls["text only: always the commonest answer", "zero-shot"].estimate.value == 0.25
    assert not any(control.leaks for control in found.controls)


def test_an_embedder_that_does_not_look_at_the_picture_is_found_out() -> None:
    class Counting(Seeing):
        """Knows the order of the samples instead of their pictures."""

        def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
            return np.array([self.meaning(number) for number in range(len(images))])

    found = evaluate(Counting(), world(32), tasks=["retrieval"], batch=32)
    assert value(found, "retrieval.image_to_text_r1") == 1.0
    assert [finding.level for finding in found.findings] == ["bad"]
    assert found.findings[0].text.startswith("LEAK: the blank image control of retrieval")


def test_an_evaluation_survives_the_disk_byte_by_byte(tmp_path: Path) -> None:
    data = world(50)
    before = evaluate(Seeing(noise=0.5), data)
    after = evaluate(Seeing(noise=2.5), data, reference=before, seed=3)
    write_evaluation(after, tmp_path / "a.npz")
    again = read_evaluation(tmp_path / "a.npz")
    assert again.to_json() == after.to_json()
    assert compare(before, again) == compare(before, after)
    write_evaluation(again, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    third = evaluate(Seeing(noise=2.5), data, reference=again)
    assert value(third, "agreement.top1") == 1.0


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "other", "newer"])
def test_damaged_evaluations_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.npz"
    write_evaluation(evaluate(Seeing(), world(5)), path)
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("hello")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "other":
        np.savez(path, x=np.zeros(3))
    else:
        np.savez(path, document=np.frombuffer(b'{"schema": 99}', dtype=np.uint8))
    with pytest.raises(UsageError, match=r"a\.npz") as caught:
        read_evaluation(path)
    assert caught.value.hint


def test_the_document_names_what_was_done() -> None:
    found = evaluate(Seeing(), world(30), seed=5, batch=7).to_json()
    assert found["n"] == 30
    config = found["config"]
    assert (config["data"], config["seed"], config["samples"], config["classes"]) == ("world", 5, 30, 4)
    assert config["templates"] == ["a {}", "the {}"]
    assert set(found["results"]["retrieval"]["image_to_text_r1"]) == {"value", "low", "high", "n", "chance"}
    assert number_of(world(300)[299].image) == 299
    assert Seeing().embed_texts(["thing 1"]).shape == (1, CHANNELS)
