"""Every sentence of the verdict has its trigger, its number with n and interval, and its place."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from mmcompress.data import Dataset, Memory
from mmcompress.errors import UsageError
from mmcompress.evaluate import Evaluation, Facts, Finding, Speed, evaluate, verdict
from mmcompress.evaluate.verdict import LEVELS, random_findings
from mmcompress.ops.statistics import Estimate
from tests.evaluate.recordings import Hearing, speech
from tests.evaluate.worlds import Constant, Guessing, Seeing, world

FASTER, SLOWER = Estimate(2.0, 1.8, 2.2, 50), Estimate(0.5, 0.4, 0.6, 50)
INTERVAL = re.compile(r"\[[-+\d.]+, [-+\d.]+\].* n=\d+")


@cache
def seen(noise: float, seed: int = 0, reference: bool = True) -> Evaluation:
    original = None if noise == 0 or not reference else seen(0)
    return evaluate(Seeing(noise, seed), world(200), tasks=["retrieval"], reference=original)


def said(facts: Facts, start: str) -> Finding:
    found = [finding for finding in verdict(facts) if finding.text.startswith(start)]
    assert found, [finding.text for finding in verdict(facts)]
    return found[0]


def test_slower_than_the_original_is_the_first_line_whatever_else_is_good() -> None:
    speeds = [Speed("vision, batch 1", FASTER), Speed("text, batch 1", SLOWER)]
    facts = Facts(seen(0.1), seen(0), [seen(3.0, 1)], speeds=speeds, bytes_before=100 * 2**20, bytes_after=25 * 2**20)
    first = verdict(facts)[0]
    assert (first.level, first.text) == (
        "bad", "SLOWER than the original: text, batch 1, speed ×0.50 [0.40, 0.60] n=50",
    )  # fmt: skip
    assert said(facts, "faster than the original: vision, batch 1, speed ×2.00 [1.80, 2.20] n=50").level == "good"


@pytest.mark.parametrize("value", [0.98, 1.0, 1.02])
def test_a_speed_whose_interval_holds_one_is_neither(value: float) -> None:
    facts = Facts(speeds=[Speed("vision", Estimate(value, value - 0.04, value + 0.04, 50), "the original in bf16")])
    assert said(facts, "not measurably faster than the original in bf16: vision").level == "note"


def test_one_measurement_proves_no_speed() -> None:
    alone = Estimate(3.0, float("-inf"), float("inf"), 1)
    assert said(Facts(speeds=[Speed("vision", alone)]), "not measurably faster").level == "note"


def test_no_better_than_random_when_random_is_as_good() -> None:
    facts = Facts(seen(2.0, 1), seen(0), [seen(2.0, 2), seen(2.0, 3)])
    finding = said(facts, "no better than random selection at the same ratio: retrieval image_to_text_r1")
    assert finding.level == "bad"
    assert finding.text.endswith("2 random seeds")
    assert INTERVAL.search(finding.text)


def test_worse_and_better_than_random() -> None:
    worse = Facts(seen(3.0, 1), seen(0), [seen(1.0, 2)])
    assert said(worse, "WORSE than random selection at the same ratio").level == "bad"
    better = Facts(seen(1.0, 1), seen(0), [seen(3.0, 2)])
    assert said(better, "better than random selection at the same ratio").level == "good"
    assert said(better, "better than random").text.endswith("1 random seed")


def test_a_step_alone_can_be_set_beside_random() -> None:
    alone = random_findings([seen(3.0, 2)], seen(1.0, 1))
    assert [(finding.level, finding.text[:18]) for finding in alone] == [("good", "better than random")] * 2
    with_all = verdict(Facts(seen(1.0, 1), seen(0), [seen(3.0, 2)]))
    assert set(alone) <= set(with_all)


def test_an_accuracy_drop_beyond_its_interval_gives_both_levels_and_points() -> None:
    finding = said(
        Facts(seen(2.0), seen(0)), "accuracy drop beyond its interval: retrieval image_to_text_r1 1.000 → 0."
    )
    assert finding.level == "bad"
    assert re.search(r"-\d+\.\d points \[-\d+\.\d, -\d+\.\d\] n=200$", finding.text)


def test_a_tolerated_drop_is_a_note_and_a_larger_one_is_not() -> None:
    facts = Facts(seen(2.0), seen(0))
    for tolerated, start, level in (
        (1.0, "accuracy drop within the tolerated 100.0", "note"),
        (0.001, "accuracy drop beyond", "bad"),
    ):
        asked = replace(facts, tolerated={"retrieval.image_to_text_r1": tolerated})
        found = [f for f in verdict(asked) if "image_to_text_r1" in f.text and f.text.startswith(start)]
        assert [finding.level for finding in found] == [level]


def test_no_drop_seen_says_what_is_not_excluded() -> None:
    finding = said(
        Facts(seen(0.01), seen(0)), "no accuracy drop seen: retrieval image_to_text_r1 1.000 → 1.000, +0.0 points"
    )
    assert finding.level == "note"
    # 200 unchanged samples exclude a rate above 1 - 0.025 ** (1 / 200) = 1.8 %.
    assert finding.text.endswith("n=200; a drop of up to 1.8 points is not excluded")


def test_a_gain_is_called_one() -> None:
    assert said(Facts(seen(0), seen(2.0, reference=False)), "accuracy gain: retrieval").level == "good"


def test_guessing_is_called_guessing() -> None:
    guess = evaluate(Guessing(), world(200), tasks=["retrieval"])
    assert said(Facts(guess), "no better than guessing: retrieval image_to_text_r1").level == "bad"
    assert not [finding for finding in verdict(Facts(seen(0))) if "guessing" in finding.text]
    # Three of four samples are of one class: naming it always is right three times in four without looking.
    uneven = Dataset(Memory([replace(s, label="kind 0" if i % 4 < 3 else s.label) for i, s in enumerate(world(200))]))
    blind = Facts(evaluate(Seeing(), uneven, tasks=["zero-shot"]))
    assert re.search(r"zero-shot top1 0\.[4-7].*, without looking 0\.75", said(blind, "no better than guessing").text)
    # Above chance, but not by more than the interval.
    barely = {"retrieval": {**guess.estimates["retrieval"], "image_to_text_r1": Estimate(0.01, 0.004, 0.02, 200)}}
    assert said(Facts(replace(guess, estimates=barely)), "no better than guessing: retrieval image_to_text_r1 0.010")


def test_broken_embeddings_come_before_everything() -> None:
    broken = evaluate(Constant(float("nan")), world(200), tasks=["retrieval"])
    found = verdict(Facts(broken, seen(0), [seen(2.0)], speeds=[Speed("vision", SLOWER)]))
    assert [finding.text.split(":")[0] for finding in found[:3]] == ["BROKEN", "BROKEN", "SLOWER than the original"]
    assert said(Facts(seen(0), broken), "in the original: BROKEN").level == "bad"


def test_damage_in_one_slice_is_not_hidden_by_the_average() -> None:
    original = evaluate(Seeing(), world(200), tasks=["retrieval"])
    half_blind = evaluate(Seeing(blind=range(0, 200, 2)), world(200), tasks=["retrieval"], reference=original)
    finding = said(Facts(half_blind, original), "damage is concentrated: ")
    assert finding.level == "bad"
    assert "tag=even" in finding.text
    assert "on all (the worst of" in finding.text
    evenly = Facts(seen(2.0), seen(0))
    assert not [finding for finding in verdict(evenly) if "concentrated" in finding.text]


def test_even_damage_is_hardly_ever_called_concentrated() -> None:
    alarms = 0
    for seed in range(20):
        facts = Facts(evaluate(Seeing(1.5, seed), world(200), tasks=["retrieval"], reference=seen(0)), seen(0))
        alarms += any("concentrated" in finding.text for finding in verdict(facts))
    assert alarms <= 3  # 2.5 % of 20 are expected at most


def test_a_smaller_sibling_that_is_as_good_is_said() -> None:
    as_good = Facts(seen(1.5, 1), seen(0), sibling=seen(1.5, 2), sibling_name="CLIP-tiny")
    assert said(as_good, "no better than CLIP-tiny: retrieval").level == "bad"
    assert said(replace(as_good, sibling=seen(3.0, 2)), "better than CLIP-tiny: retrieval").level == "good"


@pytest.mark.parametrize(
    ("after", "start", "level"),
    [
        (25, "smaller by a factor of 4.00: 100.0 → 25.0 MiB on disk, exact", "good"),
        (100, "as large as the original", "note"),
        (99.8, "as large as the original", "note"),
        (120, "LARGER than the original: 100.0 → 120.0 MiB", "bad"),
    ],
)
def test_size(after: float, start: str, level: str) -> None:
    assert said(Facts(bytes_before=100 * 2**20, bytes_after=int(after * 2**20)), start).level == level


def test_what_was_not_measured_is_said() -> None:
    assert [finding.text for finding in verdict(Facts())] == [
        "accuracy was not measured", "speed was not measured", "size was not measured",
    ]  # fmt: skip
    texts = [finding.text for finding in verdict(Facts(seen(0)))]
    assert "the original was not evaluated, so the loss of accuracy is unknown" in texts
    assert "random selection at the same ratio was not evaluated for comparison" in texts
    quantized = verdict(Facts(seen(0.1), seen(0), random_expected=False))
    assert not [finding for finding in quantized if "random" in finding.text]


def test_agreement_is_reported() -> None:
    original = evaluate(Seeing(), world(50))
    found = evaluate(Seeing(2.0), world(50), reference=original)
    assert said(Facts(found, original), "names the same nearest text as the original: share 0.").level == "note"


def test_the_worst_comes_first_and_every_claim_has_n_and_interval() -> None:
    facts = Facts(
        seen(2.0), seen(0), [seen(2.0, 5)], sibling=seen(1.0, 6), speeds=[Speed("vision", FASTER), Speed("text", SLOWER)],
        bytes_before=100, bytes_after=120,
    )  # fmt: skip
    found = verdict(facts)
    places = [LEVELS[finding.level] for finding in found]
    assert places == sorted(places)
    assert found[1].text.startswith("no better than random")
    for finding in found:
        assert INTERVAL.search(finding.text) or "exact" in finding.text, finding.text
        assert "\n" not in finding.text


def test_evaluations_of_other_samples_are_refused() -> None:
    other = evaluate(Seeing(), world(100), tasks=["retrieval"])
    for facts in (Facts(seen(1.0), other), Facts(seen(1.0), seen(0), [other]), Facts(seen(1.0), sibling=other)):
        with pytest.raises(UsageError, match="100 samples"):
            verdict(facts)


def test_same_facts_same_verdict() -> None:
    facts = Facts(seen(2.0), seen(0), [seen(2.0, 5)])
    assert verdict(facts, seed=1) == verdict(facts, seed=1)
    assert np.all([finding.to_json().keys() == {"level", "text"} for finding in verdict(facts)])


def test_agreeing_by_chance_is_not_called_guessing() -> None:
    found = evaluate(Guessing(), world(60), reference=evaluate(Seeing(), world(60)))
    guessed = [finding.text for finding in verdict(Facts(found)) if "guessing" in finding.text]
    assert guessed
    assert not [text for text in guessed if "agreement" in text]


def test_word_accuracy_has_the_same_verdict() -> None:
    data = speech(150)
    original = evaluate(Hearing(0.05), data)
    compressed = evaluate(Hearing(0.2, 1, silence="you"), data, reference=original)
    random = [evaluate(Hearing(0.5, seed), data) for seed in (2, 3)]
    facts = Facts(compressed, original, random)
    before, after = (e.estimates["transcription"]["word_accuracy"].value for e in (original, compressed))
    drop = said(facts, f"accuracy drop beyond its interval: transcription word_accuracy {before:.3f} → {after:.3f}, -")
    assert drop.level == "bad"
    assert INTERVAL.search(drop.text)
    # Both sides as they stand in the tables: over all words, not over recordings.
    rivals = np.mean([control.estimates["transcription"]["word_accuracy"].value for control in random])
    better = (
        f"better than random selection at the same ratio: transcription word_accuracy {after:.3f} against {rivals:.3f}"
    )
    assert said(facts, better).level == "good"
    assert said(facts, "gives the same answer as the original: share 0.").level == "note"
    assert said(facts, "word error rate 0.").level == "note"
    assert said(facts, "in the original: word error rate 0.0").level == "note"
    assert said(facts, "HALLUCINATES").level == "bad"
    assert not [finding for finding in verdict(facts) if "guessing" in finding.text]
    lost = evaluate(Hearing(deaf=range(150)), data, reference=original)
    assert said(Facts(lost, original), "no better than guessing: transcription word_accuracy 0.000").level == "bad"


def test_values_of_other_weights_are_not_paired() -> None:
    found = evaluate(Hearing(), speech(20)).results["transcription"]["word_accuracy"]
    other = replace(found, weights=found.weights + 1)  # type: ignore[operator]
    with pytest.raises(ValueError, match="differ in weight"):
        found.difference(other, 0)
