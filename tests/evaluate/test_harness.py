"""Tasks of lm-eval: what it asks becomes samples, what it finds becomes values; and the whole way where it is installed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mmcompress.data import Sample, Waveform
from mmcompress.errors import MissingError, UsageError
from mmcompress.evaluate import compare, read_evaluation, write_evaluation
from mmcompress.evaluate.harness import generate_until, log_likelihoods, read_results, run_harness, with_media
from mmcompress.evaluate.likelihoods import BATCH, Likelihoods, read_answers
from tests import tiny
from tests.evaluate.worlds import picture


class Noting:
    """Keeps what it was asked; answers the same to everything."""

    def __init__(self, says: str = "four\nand more") -> None:
        self.says = says
        self.samples: list[Sample] = []
        self.largest = 0

    def generate(self, samples: Sequence[Sample]) -> list[str]:
        self.samples += samples
        self.largest = max(self.largest, len(samples))
        return [self.says] * len(samples)

    def read(self, samples: Sequence[Sample]) -> Likelihoods:
        """ "four" has ln p = -1, anything else -2."""
        self.samples += samples
        self.largest = max(self.largest, len(samples))
        log = np.array([-1.0 if sample.texts == ("four",) else -2.0 for sample in samples])
        return Likelihoods(log, np.ones(len(samples), dtype=np.int64), log == -1)


def test_a_request_becomes_a_sample_with_its_picture_and_recording() -> None:
    model = Noting()
    media = {"visual": [picture(7)], "audio": [{"array": [0.0, 0.5], "sampling_rate": 8000}]}
    said = generate_until(model, [("<image> How many?\n", {"until": ["\n"]}, media), ("Why?", {})], batch=1)
    assert said == ["four", "four\nand more"]
    first, second = model.samples
    assert (first.question, first.texts) == ("How many?", ())
    assert first.image.getpixel((0, 0)) == picture(7).getpixel((0, 0))
    assert isinstance(first.audio, Waveform)
    assert (first.audio.samples.tolist(), first.audio.sampling_rate) == ([0.0, 0.5], 8000)
    assert (second.question, second.picture, second.audio) == ("Why?", None, None)
    assert model.largest == 1


def test_answers_are_cut_at_the_first_stop_string() -> None:
    for until, expected in (
        (["more", "and"], "four\n"),
        ("\n", "four"),
        ([], "four\nand more"),
        ([""], "four\nand more"),
    ):
        assert generate_until(Noting(), [("Why?", {"until": until})], batch=4) == [expected]


def test_continuations_are_scored_a_few_at_a_time() -> None:
    model = Noting()
    requests = [("How many?", " four" if i % 2 else " two") for i in range(BATCH + 3)]
    found = log_likelihoods(model.read, requests)
    assert found == [(-1.0, True) if i % 2 else (-2.0, False) for i in range(BATCH + 3)]
    assert {sample.texts for sample in model.samples} == {("four",), ("two",)}
    assert model.largest == BATCH


def test_the_end_of_a_text_is_no_part_of_a_continuation() -> None:
    bundle, samples = tiny.bundle("whisper"), list(tiny.spoken(3))
    whole, open_end = read_answers(bundle, samples), read_answers(bundle, samples, with_end=False)
    assert (whole.tokens - open_end.tokens).tolist() == [1, 1, 1]
    assert open_end.tokens.tolist() == [len(sample.texts[0].split()) for sample in samples]
    assert (whole.log < open_end.log).all()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("?", {}, {"visual": [picture(1), picture(2)]}), "2 pictures and 0 recordings"),
        (("?", {"do_sample": True}), "sampled answers"),
        (("?", {"temperature": 0.7}), "sampled answers"),
    ],
)
def test_what_cannot_be_asked_is_refused(request_: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        generate_until(Noting(), [request_], batch=4)
    assert caught.value.hint
    with pytest.raises(UsageError, match="probabilities of answers"):
        log_likelihoods(None, [("?", "four")])


def document(number: int, filtered: str = "none", **metrics: float) -> dict[str, Any]:
    return {"doc_id": number, "doc_hash": f"h{number}", "filter": filtered, "metrics": list(metrics), **metrics}


FOUND = {
    "samples": {
        "b": [document(0, acc=1.0, words=3.0, whole=(1, 2)), document(0, "strict", acc=0.0, words=3.0, whole=(1, 2))],  # type: ignore[arg-type]
        "a": [document(0, acc=0.0, words=1.0, extra=1.0), document(1, acc=1.0, words=2.0, extra=1.0)],
    },
    "results": {"b": {"acc,none": 1.0, "whole,none": 0.7, "whole_stderr,none": 0.1, "alias": "b"}},
    "higher_is_better": {leaf: {"acc": True, "words": False} for leaf in "ab"},
    "versions": {"a": 1},
}


def test_results_of_each_document_are_values_and_the_others_notes() -> None:
    found = read_results("lm-eval:both", FOUND, seed=0)
    # The tasks of a group one after the other, each document once, what is better lower with a minus.
    assert found.scene.keys == ("a/0", "a/1", "b/0")
    measured = found.results["lm-eval:both"]
    assert {name: of.values.tolist() for name, of in measured.items()} == {
        "acc": [0, 1, 1],
        "minus_words": [-1, -2, -3],
    }
    assert [finding.text for finding in found.findings] == [
        "b whole,none: 0.7000, of the whole data, without an interval"
    ]
    assert json.dumps(found.to_json(), allow_nan=False)
    whole = read_results("lm-eval:none", {**FOUND, "samples": {"b": [document(0)]}}, seed=0)
    assert whole.results == {"lm-eval:none": {}}
    assert [finding.text.split(":")[0] for finding in whole.findings] == ["b acc,none", "b whole,none"]


def test_what_lmms_eval_notes_of_a_document_is_no_metric() -> None:
    noted = {"doc_id": 4, "doc_hash": "h", "target": "a", "resps": [], "token_counts": [None], "arguments": []}
    documents = [{**noted, "exact": 1.0, "mme": {"score": 0.5, "id": "x"}, "judge": {"id": "x"}}]
    found = read_results("lmms-eval:t", {"samples": {"t": documents}}, seed=0)
    assert found.scene.keys == ("t/4",)
    assert {name: of.mean for name, of in found.results["lmms-eval:t"].items()} == {"exact": 1.0, "mme": 0.5}


def test_a_request_of_lmms_eval_names_its_document() -> None:
    sound = {"array": [0.0], "sampling_rate": 8000}
    documents = {"t": {"test": [{}, {"seen": [picture(1), sound]}]}}
    request = ("Why?", {"until": []}, lambda document: document["seen"], 1, "t", "test")
    assert with_media(request, documents) == (
        "Why?",
        {"until": []},
        {"visual": [documents["t"]["test"][1]["seen"][0]], "audio": [sound]},
    )
    assert with_media(("Why?", {}, None, 1, "t", "test"), documents) == ("Why?", {}, {"visual": [], "audio": []})


def test_two_runs_are_paired_and_kept(tmp_path: Path) -> None:
    before = read_results("lm-eval:both", FOUND, seed=0)
    worse = {**FOUND, "samples": {**FOUND["samples"], "b": [document(0, acc=0.0, words=3.0)]}}  # type: ignore[dict-item]
    after = read_results("lm-eval:both", worse, seed=0)
    assert compare(before, after)["lm-eval:both"]["acc"].value == pytest.approx(-1 / 3)
    write_evaluation(dataclasses.replace(after, differences=compare(before, after)), tmp_path / "a.npz")
    again = read_evaluation(tmp_path / "a.npz")
    assert compare(before, again) == compare(before, after) == again.differences
    other = {**FOUND, "samples": {**FOUND["samples"], "b": [{**document(0, acc=1.0, words=3.0), "doc_hash": "other"}]}}  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="the data has changed"):
        compare(before, read_results("lm-eval:both", other, seed=0))


def test_without_a_harness_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, how in (
        ("lm_eval", "lm-eval", "mmcompress[lm-eval]"),
        ("lmms_eval", "lmms-eval", "install lmms-eval"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingError, match=f"need {name}") as caught:
            run_harness(Noting(), None, f"{name}:anything")
        assert how in caught.value.hint


@pytest.mark.filterwarnings("default")  # not ours: the harnesses and datasets warn of their own dependencies
@pytest.mark.parametrize(("harness", "package"), [("lm-eval", "lm_eval"), ("lmms-eval", "lmms_eval.evaluator")])
def test_a_harness_asks_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harness: str, package: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip(package)
    rows = [{"q": f"How many legs has {i}?", "label": i % 2, "right": ["four", "two"][i % 2]} for i in range(10)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data: dict[str, Any] = {"data_files": {"test": str(tmp_path / "data.jsonl")}}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "{{q}}"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    choose = {"output_type": "multiple_choice", "doc_to_choice": ["four", "two"], "doc_to_target": "label"}
    say = {"output_type": "generate_until", "doc_to_target": "right"}
    say["generation_kwargs"] = {"until": ["\n"], "do_sample": False}  # type: ignore[assignment]
    for name, own, metric in (("choose", choose, "acc"), ("say", say, "exact_match")):
        config = {**common, **own, "task": name, "metric_list": [{"metric": metric, **mean}]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    model = Noting()
    if harness == "lm-eval":
        found = run_harness(model, model.read, "lm-eval:choose", limit=9, folder=tmp_path)
        # "four" is always the more probable one, and right for 5 of the first 9.
        assert found.results["lm-eval:choose"]["acc"].values.tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]
    else:
        with pytest.raises(UsageError, match="the task compares probabilities"):
            run_harness(model, model.read, "lmms-eval:choose", folder=tmp_path)
    found = run_harness(model, None, f"{harness}:say", folder=tmp_path)
    assert found.results[f"{harness}:say"]["exact_match"].mean == 0.5
    assert found.n == 10
    with pytest.raises(UsageError, match=f"{harness} has no task 'nonsense'"):
        run_harness(model, None, f"{harness}:nonsense")
