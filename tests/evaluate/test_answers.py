"""Models that answer in text: word accuracy by hand and its interval, pairing, agreement, slices, silence, and the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.evaluate import TASKS, Evaluation, compare, evaluate, read_evaluation, write_evaluation
from mmcompress.evaluate.answer_findings import loop
from mmcompress.evaluate.answers import Answers, answer_dataset, wording_of
from mmcompress.evaluate.scene import Scene
from mmcompress.evaluate.words import Wording
from tests import tiny
from tests.evaluate.recordings import Hearing, Saying, recording, speech, spoken, transcript
from tests.evaluate.worlds import Seeing, picture, world

SPOKEN = spoken("Red green blue cat.", "House, tree!", "Car", "A dog, a river, a stone.")
HEARD = Saying("red green blue dog", "", "car car car", "A dog a river a stone")


def accuracy(evaluation: Evaluation) -> float:
    return evaluation.estimates["transcription"]["word_accuracy"].value


def texts_of(evaluation: Evaluation) -> list[str]:
    return [finding.text for finding in evaluation.findings]


def test_word_accuracy_by_hand() -> None:
    # 1 substitution in 4 words, 2 deletions in 2, 2 insertions to 1, none in 6: 5 errors in 13 words.
    found = evaluate(HEARD, SPOKEN)
    measured = found.results["transcription"]["word_accuracy"]
    assert measured.values.tolist() == [0.75, 0, -1, 1]
    assert measured.weights is not None
    assert measured.weights.tolist() == [4, 2, 1, 6]
    assert accuracy(found) == pytest.approx(1 - 5 / 13)
    assert found.n == 4
    # The worst and the best that can be drawn.
    estimate = found.estimates["transcription"]["word_accuracy"]
    assert -1 <= estimate.low < estimate.value < estimate.high <= 1
    (rate,) = [text for text in texts_of(found) if text.startswith("word error rate")]
    assert rate.startswith("word error rate 0.3846 [")
    assert rate.endswith("n=4: of 13 words 1 substituted, 2 left out, 2 added")


def test_it_is_that_of_the_whole_data_not_the_mean_of_the_recordings() -> None:
    found = evaluate(Saying("wrong", "house tree car dog cat"), spoken("red", "house tree car dog cat"))
    assert accuracy(found) == pytest.approx(5 / 6)


def test_hearing_everything_scores_one_but_not_for_certain() -> None:
    # 0 of 40 recordings with an error exclude a share of such recordings above 1 - 0.025 ** (1 / 40).
    found = evaluate(Hearing(), speech(40))
    estimate = found.estimates["transcription"]["word_accuracy"]
    assert (estimate.value, estimate.high, estimate.n) == (1.0, 1.0, 40)
    assert estimate.low == pytest.approx(0.025 ** (1 / 40))
    assert len(found.findings) == 1  # the word error rate alone
    again = compare(found, found)["transcription"]["word_accuracy"]
    assert (again.value, again.high) == pytest.approx((0, 1 - 0.025 ** (1 / 40)))


def test_saying_nothing_scores_nothing_and_is_called_out() -> None:
    found = evaluate(Saying(*[""] * 20), speech(20))
    assert accuracy(found) == 0
    assert found.results["transcription"]["word_accuracy"].chance == 0
    assert found.findings[0].level == "bad"
    assert found.findings[0].text == "EMPTY: 20 of 20 answers have no words"


def test_misheard_words_are_counted_whatever_the_batch() -> None:
    data = speech(100)
    found = evaluate(Hearing(0.3), data, batch=64)
    expected = 1 - sum(text.split().count("wrong") for text in found.scene.answers.texts) / sum(
        len(transcript(i).split()) for i in range(100)
    )
    assert accuracy(found) == pytest.approx(expected)
    model = Hearing(0.3)
    small = evaluate(model, data, batch=3)
    assert small.scene.answers.texts == found.scene.answers.texts
    assert model.largest_batch == 3


def test_paired_differences_are_after_minus_before_over_all_words() -> None:
    data = speech(100)
    before = evaluate(Hearing(0.1), data)
    after = evaluate(Hearing(0.2, seed=1), data, reference=before)
    difference = after.differences["transcription"]["word_accuracy"]
    assert difference.value == pytest.approx(accuracy(after) - accuracy(before))
    assert difference.high < 0
    assert difference.n == 100
    assert compare(before, after) == after.differences
    # How much both agree with a third is nothing to compare.
    third = evaluate(Hearing(0.1), data, reference=after)
    assert set(third.differences) == {"transcription"}
    assert not [part for part in third.slices if part.task == "answer-agreement" and part.difference]
    # The same words misheard in both: pairing sees that nothing but one recording changed.
    many = evaluate(Hearing(0.4), data)
    one = evaluate(Hearing(0.4, deaf=[3]), data, reference=many).differences["transcription"]["word_accuracy"]
    whole = many.estimates["transcription"]["word_accuracy"]
    assert one.high - one.low < (whole.high - whole.low) / 2


def test_agreement_by_hand() -> None:
    data = spoken("red", "blue", "green", "cat", "dog", "car")
    before = evaluate(Saying("one red car", "Two cats.", "", "the stone fell down", "River", "bread"), data)
    now = Saying("one red car", "two cats", "you", "the stone went", "river", "bread and water")
    found = evaluate(now, data, reference=before).results["answer-agreement"]
    # Letter by letter only the first is the same; as words the second and the fifth too.
    assert found["identical"].values.tolist() == [1, 0, 0, 0, 0, 0]
    # Of 4 words one is another and one is missing; of 3 words two are new.
    assert found["edit_similarity"].values.tolist() == pytest.approx([1, 1, 0, 0.5, 1, 1 / 3])
    # The last begins with all the words there were.
    assert found["first_divergence"].values.tolist() == [1, 1, 0, 0.5, 1, 1]
    same = evaluate(Hearing(0.2), speech(30), reference=evaluate(Hearing(0.2), speech(30)))
    assert all(estimate.value == 1 for estimate in same.estimates["answer-agreement"].values())


def test_tasks_default_to_what_model_and_data_allow() -> None:
    found = evaluate(Hearing(), speech(5))
    assert found.config["tasks"] == ["transcription"]
    assert found.config["wording"] == "whisper en"
    assert evaluate(Hearing(), speech(5), reference=found).config["tasks"] == ["transcription", "answer-agreement"]
    untold = Dataset(Memory([replace(sample, texts=()) for sample in speech(5)]))
    with pytest.raises(UsageError, match="has not a recording with one text or a question"):
        evaluate(Hearing(), untold)

    class Both(Hearing, Seeing):
        def __init__(self) -> None:
            Hearing.__init__(self)
            Seeing.__init__(self)

    films = [replace(s, audio=recording(i), label=None, texts=(f"thing {i}",)) for i, s in enumerate(world(5))]
    assert evaluate(Both(), Dataset(Memory(films))).config["tasks"] == ["retrieval", "transcription"]
    assert set(TASKS) == {
        "retrieval", "zero-shot", "agreement", "transcription", "vqa", "captioning", "perplexity", "answer-agreement",
    }  # fmt: skip


def test_what_cannot_be_done_is_said_before_the_model_runs() -> None:
    class Never(Hearing):
        def generate(self, samples: Sequence[Sample]) -> list[str]:
            raise AssertionError("answered")

    seen = Dataset(Memory([replace(sample, picture=picture(i), audio=None) for i, sample in enumerate(speech(4))]))
    several = Dataset(Memory([replace(sample, texts=("a", "b")) for sample in speech(4)]))
    embedded = evaluate(Seeing(), Dataset(Memory([replace(s, texts=(f"thing {i}",)) for i, s in enumerate(seen)])))
    for data, tasks, reference, words in (
        (speech(4), ["retrieval"], None, "retrieval needs embeddings, and this model gives answers"),
        (seen, ["transcription"], None, "'s0000' has no recording"),
        (several, ["transcription"], None, "'s0000' has 2 texts"),
        (spoken("red", "(Um...)"), ["transcription"], None, r"transcript of sample 's1' has no words: '\(Um\.\.\.\)'"),
        (spoken("red", ""), None, None, "transcript of sample 's1' has no words"),
        (speech(4), ["answer-agreement"], None, "answer-agreement needs a reference"),
        (speech(4), ["answer-agreement"], embedded, "answer-agreement needs a reference"),
        (speech(4), None, evaluate(Hearing(), speech(5)), "on 5 samples, this one on 4"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            evaluate(Never(), data, tasks=tasks, reference=reference)
        assert caught.value.hint
    with pytest.raises(UsageError, match="transcription needs answers, and this model gives embeddings"):
        evaluate(Seeing(), speech(4), tasks=["transcription"])
    with pytest.raises(UsageError, match="neither embeddings nor answers"):
        evaluate(object(), speech(4))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'klingon' is not a language code"):
        evaluate(Hearing(), speech(4), language="Klingon")


def test_a_model_that_breaks_its_promise_is_named() -> None:
    class Short(Hearing):
        def generate(self, samples: Sequence[Sample]) -> list[str]:
            return super().generate(samples)[:-1]

    with pytest.raises(ValueError, match="returned 3 answers to 4 samples"):
        evaluate(Short(), speech(4))


def test_error_rates_over_other_words_are_not_paired() -> None:
    data = speech(6)
    english = evaluate(Hearing(), data)
    with pytest.raises(UsageError, match="'whisper en', these by 'whisper de'"):
        evaluate(Hearing(), data, reference=english, language="de")
    with pytest.raises(UsageError, match="told apart"):
        compare(english, evaluate(Hearing(), data, language="German"))


def test_slices_show_where_the_damage_is() -> None:
    data = speech(100)
    before = evaluate(Hearing(0.05), data)
    long = [i for i in range(100) if len(transcript(i).split()) > 5]
    after = evaluate(Hearing(0.05, deaf=long), data, reference=before)
    by_name = {part.part: part for part in after.slices if part.task == "transcription"}
    assert {"group=half 0", "group=half 1"} < set(by_name)
    lengths = sorted(len(transcript(i).split()) for i in range(100))
    median = (lengths[49] + lengths[50]) / 2
    longer = by_name[f"transcript longer than {median:.3g} words"]
    shorter = by_name[f"transcript up to {median:.3g} words"]
    assert longer.estimate.n == sum(length > median for length in lengths)
    assert longer.estimate.n + shorter.estimate.n == 100
    assert longer.difference is not None
    assert shorter.difference is not None
    assert longer.difference.value < -0.5 < shorter.difference.value
    # The recordings are as long as their transcripts, at 100 samples a word.
    heard = by_name[f"recording longer than {median * 100 / 16000:.3g} s"]
    assert heard.estimate == longer.estimate


def test_words_heard_in_silence_are_a_finding_and_more_of_them_a_bad_one() -> None:
    data = speech(40)
    before = evaluate(Hearing(), data)
    assert [(c.name, c.metric, c.estimate.value, c.leaks) for c in before.controls] == [
        ("silence", "answered", 0.0, False)
    ]
    thanks = evaluate(Hearing(silence="Thank you."), data)
    (control,) = thanks.controls
    assert (control.estimate.value, control.estimate.n) == (1.0, 32)
    (finding,) = [finding for finding in thanks.findings if finding.text.startswith("HALLUCINATES")]
    assert finding.level == "note"
    worse = evaluate(Hearing(silence="Thank you."), data, reference=before)
    (finding,) = [finding for finding in worse.findings if finding.text.startswith("HALLUCINATES")]
    assert finding.level == "bad"
    assert finding.text.endswith("n=32, the reference 0.000")
    as_before = evaluate(Hearing(silence="Thank you."), data, reference=thanks)
    assert all(finding.level == "note" for finding in as_before.findings)


def test_silence_is_as_long_as_the_recordings_and_keeps_to_the_batch_size() -> None:
    class Listening(Hearing):
        heard: list[int] = []

        def generate(self, samples: Sequence[Sample]) -> list[str]:
            self.heard += [len(s.waveform(16000)) for s in samples if not s.waveform(16000).any()]
            return super().generate(samples)

    model = Listening()
    evaluate(model, speech(9), batch=4)
    assert model.heard == [100 * len(transcript(i).split()) for i in range(9)]
    assert model.largest_batch == 4


def test_one_answer_to_everything_is_a_collapse_unless_the_data_asks_for_it() -> None:
    found = evaluate(Saying(*["I don't know."] * 20), speech(20))
    assert (found.findings[0].level, found.findings[0].text) == (
        "bad", "COLLAPSED: 20 of 20 answers are 'i do not know'",
    )  # fmt: skip
    wanted = evaluate(Saying(*["red"] * 20), spoken(*["red"] * 20))
    assert not [text for text in texts_of(wanted) if "COLLAPSED" in text]


def test_answers_caught_in_a_loop_are_named() -> None:
    answers = [transcript(i) for i in range(40)]
    answers[7] = "and the " * 9
    found = evaluate(Saying(*answers), speech(40))
    (finding,) = [finding for finding in found.findings if finding.text.startswith("LOOPS")]
    assert (finding.level, finding.text) == (
        "note",
        "LOOPS: 1 of 40 answers repeat themselves, such as 'and the' 5 times",
    )
    answers[8] = "no no no no no"
    found = evaluate(Saying(*answers), speech(40))
    assert [finding.level for finding in found.findings if finding.text.startswith("LOOPS")] == ["bad"]
    meant = evaluate(Saying("no no no no no"), spoken("no, no, no, no, no"))
    assert not [text for text in texts_of(meant) if "LOOPS" in text]


@pytest.mark.parametrize(
    ("words", "expected"),
    [("a b a b a b a b", ""), ("x a b a b a b a b a b y", "a b"), ("a a a a", ""), ("a a a a a", "a"), ("", "")],
)
def test_a_loop_is_a_phrase_five_times_in_a_row(words: str, expected: str) -> None:
    assert loop(words.split()) == expected


def test_an_evaluation_of_answers_survives_the_disk_byte_by_byte(tmp_path: Path) -> None:
    data = speech(50)
    before = evaluate(Hearing(0.1), data)
    after = evaluate(Hearing(0.3, silence="You."), data, reference=before, seed=3)
    write_evaluation(after, tmp_path / "a.npz")
    again = read_evaluation(tmp_path / "a.npz")
    assert again.to_json() == after.to_json()
    assert json.dumps(again.to_json(), allow_nan=False)
    assert compare(before, again) == compare(before, after)
    assert again.scene.answers.words == after.scene.answers.words
    write_evaluation(again, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    third = evaluate(Hearing(0.3), data, reference=again)
    assert third.estimates["answer-agreement"]["identical"].value == 1


def test_an_evaluation_without_answers_is_written_as_before(tmp_path: Path) -> None:
    write_evaluation(evaluate(Seeing(), world(5)), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        document = json.loads(archive["document"].tobytes())
    assert document["schema"] == 1
    assert "answers" not in document


def test_whisper_is_evaluated_like_any_model_that_answers(tmp_path: Path) -> None:
    bundle, data = tiny.bundle("whisper"), tiny.spoken(6)
    before = evaluate(bundle, data, batch=4)
    assert before.config["tasks"] == ["transcription", "perplexity"]
    assert before.scene.answers.texts == tuple(text for sample in data for text in bundle.generate([sample]))
    assert [control.name for control in before.controls] == ["silence"]
    with pytest.raises(UsageError, match="retrieval needs embeddings, and this model gives answers"):
        evaluate(bundle, data, tasks=["retrieval"])
    other = tiny.bundle("whisper", seed=1)
    after = evaluate(other, data, reference=before)
    assert set(after.results) == {"transcription", "perplexity", "answer-agreement"}
    write_evaluation(after, tmp_path / "a.npz")
    assert compare(before, read_evaluation(tmp_path / "a.npz")) == after.differences


def test_agreement_in_tokens_is_that_of_the_models_own_tokenizer() -> None:
    bundle = tiny.bundle("whisper")
    tokenise = answer_dataset(bundle, tiny.spoken(2), Wording()).tokenise
    assert tokenise is not None
    assert tokenise("red cat") == bundle.processor.tokenizer.convert_tokens_to_ids(["red", "cat"])
    was, now = (
        Answers(texts, (), Wording(), tokenise=list_of_bytes) for texts in (("abcd", "", "ab"), ("abxd", "", "abc"))
    )
    scene = Scene(("1", "2", "3"), answered=now, reference=Scene(("1", "2", "3"), answered=was))
    found = TASKS["answer-agreement"].measure(scene)
    # Of four tokens one is another one, at the third place; nothing and nothing; one more at the end.
    assert found["token_edit_similarity"].values.tolist() == pytest.approx([0.75, 1, 2 / 3])
    assert found["token_first_divergence"].values.tolist() == [0.5, 1, 1]
    assert found["first_divergence"].values.tolist() == [0, 1, 0]
    again = evaluate(bundle, tiny.spoken(4), reference=evaluate(bundle, tiny.spoken(4)))
    assert again.estimates["answer-agreement"]["token_edit_similarity"].value == 1


def list_of_bytes(text: str) -> list[int]:
    return list(text.encode())


def test_a_bundle_brings_its_language_and_its_spellings() -> None:
    bundle = tiny.bundle("whisper")
    assert wording_of(bundle) == Wording("en")
    bundle.processor.files = {"normalizer.json": b'{"colour": "color"}'}
    assert wording_of(bundle).name == "whisper en, 1 spellings"
    assert evaluate(bundle, tiny.spoken(2)).config["wording"] == "whisper en, 1 spellings"
    bundle.model.generation_config.language = "<|de|>"
    assert wording_of(bundle).name == "whisper de"
    assert wording_of(bundle, "English").name == "whisper en, 1 spellings"
    for damaged, words in ((b"[]", "holds no table"), (b"{", "is not JSON")):
        bundle.processor.files = {"normalizer.json": damaged}
        with pytest.raises(UsageError, match=words):
            evaluate(bundle, tiny.spoken(2))
