"""Numbers of tokens counted on data: what stands out for the encoder, or for a question, in 95 of 100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mmcompress import checkpoint, pipeline, streamed
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.ops import dropping
from mmcompress.ops.dropping import needed_to_recover, recovered
from mmcompress.ops.ranks import rank
from mmcompress.passes import build, token_counts
from mmcompress.passes.base import Context, Work
from mmcompress.recipe import Step
from mmcompress.surgery import prompt_flow
from mmcompress.surgery.reducing import SCORED, handed_on
from tests import tiny

REDUCE = {"method": "prumerge", "adaptive": True}
DROP = {"method": "recoverable", "adaptive": True}
EITHER = [("reduce-visual-tokens", REDUCE), ("drop-visual-tokens", DROP)]


def context(family: str = "llava_clip", seed: int = 0, **more: Any) -> Context:
    return Context(data=tiny.data(family, 14), num_samples=10, batch_size=4, seed=seed, **more)


class Listener:
    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, label: str, total: int | None) -> None: ...
    def advance(self, steps: int = 1, note: str = "") -> None: ...
    def finish(self) -> None: ...
    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.mark.parametrize("family", ["llava_clip", "llava_siglip", "paligemma"])
def test_what_stands_out_is_counted_in_the_encoders_own_attention(family: str) -> None:
    """Recomputed from transformers' eager attention: the class token's, or the mean of all tokens'."""
    bundle, plain = tiny.bundle(family), tiny.bundle(family)
    tower = bundle.tower("vision")
    assert tower.connector is not None
    found = token_counts._outstanding(bundle, "vision", tower.connector, context(family))
    plain.model.set_attn_implementation("eager")
    weights: list[Any] = []
    plain.module(tower.connector.scorer).register_forward_hook(lambda _, __, made: weights.append(made[1]))
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0)).tolist()
    pictures = [item for index in order for item in bundle.items("vision", tiny.data(family, 14)[index])[:1]]
    plain.embed("vision", pictures[:10])
    scores = weights[0].mean(dim=1)
    scores = (scores[:, 0] if tower.connector.leading else scores.mean(dim=1))[:, tower.connector.leading :]
    expected = []
    for row in scores.double():
        lower, upper = row.quantile(0.25), row.quantile(0.75)
        expected.append(int((row > upper + 1.5 * (upper - lower)).sum()))
    assert found == expected
    assert any(expected)


@pytest.mark.parametrize(
    ("method", "kept", "least"),
    # PruMerge needs one more for all that is left; of VisionZip's 5 tokens round(5 * 54 / 64) = 4 are dominant, of 4 3.
    [("attention", 4, 1), ("prumerge", 5, 1), ("visionzip", 5, 1)],
)
def test_almost_all_pictures_keep_what_stands_out(
    method: str, kept: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [0] * 18 + [4] * 20 + [9, 9]  # 38 of 40 are 95 in a hundred
    monkeypatch.setattr(token_counts, "_outstanding", lambda *_: counts)
    listener = Listener()
    made = build("reduce-visual-tokens", {"method": method, "adaptive": True})
    plan = made.plan(tiny.bundle("llava_clip"), context(progress=listener))
    assert plan.decisions == {"kept": kept}
    needed = plan.facts["needed"]
    assert (needed["pictures"], needed["min"], needed["median"], needed["p95"]) == (40, least, kept, kept)
    assert needed["max"] > kept
    assert needed["share_needing_more"] == 0.05
    (line,) = listener.said
    assert line.startswith("40 pictures: 0 to 9 (median 4) of 16 tokens stand out;")
    assert line.endswith("and 5.0% of the pictures need more")


def test_the_floor_holds_and_one_token_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "_outstanding", lambda *_: [0] * 20)

    def kept(**more: Any) -> Any:
        made = build("reduce-visual-tokens", {"method": "attention", "adaptive": True, **more})
        return made.plan(tiny.bundle("llava_clip"), context()).decisions["kept"]

    assert kept() == 1
    assert kept(floor=0.3) == 5  # of 16, and 4 would be a quarter
    assert kept(floor=1.0) == 16
    monkeypatch.setattr(token_counts, "_outstanding", lambda *_: [16] * 20)
    assert [
        build("reduce-visual-tokens", {"method": method, "adaptive": True})
        .plan(tiny.bundle("llava_clip"), context())
        .decisions["kept"]
        for method in SCORED
    ] == [16, 16, 16]


def test_each_picture_is_counted_once() -> None:
    """However many questions there are about it."""
    one, other = (sample.picture for sample in list(tiny.dataset(2)))
    samples = [Sample(str(n), picture=one if n else other, question="what is this ?") for n in range(8)]
    made = build("reduce-visual-tokens", REDUCE)
    plan = made.plan(tiny.bundle("llava_clip"), Context(data=Dataset(Memory(samples))))
    assert plan.facts["needed"]["pictures"] == 2


def test_what_a_question_needs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 image tokens that are all the same, but for one that points elsewhere, and some that lean to the words."""
    tokens = torch.zeros(1, 26, 3)
    tokens[0, :, 0] = 1
    tokens[0, 24:] = torch.tensor([0, 0, 1.0])
    image = torch.arange(26)[None] < 24

    def needed() -> int:
        return needed_to_recover(tokens, image, ~image)

    assert needed() == 1  # nothing stands out
    tokens[0, 3] = torch.tensor([0, 1.0, 0])
    assert needed() == 1  # only 3 does
    tokens[0, 7] = torch.tensor([1, 0, 0.5])
    # 3 and 7 stand out from the mean, so the larger half of those kept are two; 7 does by the words as well.
    assert needed() == 3
    tokens[0, [9, 11]] = tokens[0, 7].clone()
    assert needed() == 7
    # Were it one from the mean and three by the words: of four the first half are 3 and 7, the others 9 and 11.
    monkeypatch.setattr(dropping, "outliers", lambda scores: 1 if scores.min() < 0 else 3)
    assert needed() == 4
    kept = recovered(tokens, image, ~image, torch.tensor([4])).masked_fill(~image, -9)
    assert set(rank(kept)[0].argsort()[:4].tolist()) == {3, 7, 9, 11}


@pytest.mark.parametrize("family", ["llava_clip", "smolvlm", "paligemma", "qwen2_vl", "llava_next"])
def test_counting_looks_at_what_the_pass_will_choose_by(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states, image tokens and words of each prompt are those that the bound model is given, its answer not among them."""
    seen: list[Any] = []
    bound: list[Any] = []

    def counting(*given: Any) -> int:
        seen.append(given)
        return needed_to_recover(*given)

    def choosing(tokens: Any, image: Any, words: Any, kept: Any) -> Any:
        bound.append((tokens, image, words))
        return recovered(tokens, image, words, kept)

    monkeypatch.setattr(token_counts, "needed_to_recover", counting)
    monkeypatch.setattr(prompt_flow, "recovered", choosing)
    bundle, made = tiny.bundle(family), build("drop-visual-tokens", DROP)
    plan = made.plan(bundle, context(family))
    made.apply(bundle, plan)
    with torch.inference_mode():
        for sample in tiny.data(family, 14).subset(10, 0):
            for item in bundle.items("language", sample)[:1]:
                bundle.encode("language", bundle.prepare("language", [item]))
    bound = [given for given in bound if given[1].any()]
    assert len(seen) == len(bound) == plan.facts["needed"]["questions"]
    for counted, chosen in zip(seen, bound, strict=True):
        for one, other in zip(counted, chosen, strict=True):
            torch.testing.assert_close(one, other)


def test_the_recorded_share_keeps_what_stands_out_of_every_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "_shares_needed", lambda *_: [0.25] * 38 + [0.5, 1.0])
    listener = Listener()
    plan = build("drop-visual-tokens", DROP).plan(tiny.bundle("llava_clip"), context(progress=listener))
    assert plan.decisions["keep"] == 0.25
    assert plan.decisions["drops"] == [{"after": 1, "keep": 0.25, "most": 0}]
    assert plan.facts["needed"]["share_needing_more"] == 0.05
    assert listener.said == [
        "40 questions need 0.25 to 1 (median 0.25) of their image tokens; 0.25 of them are kept, "
        "and 5.0% of the questions need more"
    ]
    floored = build("drop-visual-tokens", {**DROP, "floor": 0.4}).plan(tiny.bundle("llava_clip"), context())
    assert floored.decisions["keep"] == 0.4


@pytest.mark.parametrize(("name", "params"), EITHER)
def test_all_tokens_as_the_floor_leave_the_model_alone(name: str, params: dict[str, Any]) -> None:
    bundle, made = tiny.bundle("llava_clip"), build(name, {**params, "floor": 1.0})
    made.apply(bundle, made.plan(bundle, context()))
    assert not any("forward" in vars(module) for module in bundle.model.modules())


@pytest.mark.parametrize(("name", "params"), EITHER)
def test_the_same_seed_counts_the_same_and_decisions_alone_make_the_model(
    name: str, params: dict[str, Any], tmp_path: Path
) -> None:
    made = [build(name, params).plan(tiny.bundle("llava_clip"), context(seed=2)) for _ in range(2)]
    assert made[0] == made[1]
    bundle = tiny.bundle("llava_clip")
    record = pipeline.run_stage(bundle, pipeline.Stage(1, Step(name, params), build(name, params)), context())
    assert record.facts["needed"]["max"] > 0
    assert record.facts["keep"] < 1
    checkpoint.save(bundle, tmp_path / "out")
    again = checkpoint.load(tmp_path / "out")
    samples = list(tiny.asked(3, turns=False))
    assert again.generate(samples) == bundle.generate(samples)
    assert again.history[-1].plan == record.plan


@pytest.mark.parametrize(("name", "params"), EITHER)
def test_the_control_keeps_as_many_at_random(name: str, params: dict[str, Any]) -> None:
    made = build(name, params)
    decisions = made.plan(tiny.bundle("llava_clip"), context()).decisions
    twin = made.control(decisions)
    assert twin is not None
    drawn = twin.plan(tiny.bundle("llava_clip"), Context()).decisions
    assert "drawn" in drawn
    number = "kept" if name == "reduce-visual-tokens" else "keep"
    assert drawn[number] == decisions[number]
    early = made.control()
    assert early is not None
    early.plan(tiny.bundle("llava_clip"), Context())


@pytest.mark.parametrize(("name", "params"), EITHER)
def test_data_and_weights_are_needed_and_said_to_be(name: str, params: dict[str, Any]) -> None:
    made, bundle = build(name, params), tiny.bundle("llava_clip")
    made.check(bundle)
    assert not streamed.can_stream(made)
    assert made.seconds(bundle, Work(samples=10, dataset=100, forward=0.5)) == 10 * 0.5
    with pytest.raises(UsageError, match="counting how many tokens pictures need needs data"):
        made.plan(bundle, Context())
    with pytest.raises(UsageError, match="has no picture to count|none has a question about a picture") as raised:
        made.plan(bundle, Context(data=Dataset(Memory([Sample("1", ("a cat",), question="what is this ?")]))))
    assert raised.value.hint


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_the_graph_hands_on_the_number_that_was_counted(tmp_path: Path) -> None:
    bundle, made = tiny.bundle("llava_clip"), build("reduce-visual-tokens", REDUCE)
    plan = made.plan(bundle, context())
    made.apply(bundle, plan)
    assert 1 < plan.decisions["kept"] < 16
    artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
    graph = onnx.load(artifact.path("vision"), load_external_data=False).graph
    shape = [dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim]
    assert plan.decisions["kept"] in shape
    connector = bundle.tower("vision").connector
    assert connector is not None
    assert handed_on(bundle.module(connector.path), 16) == plan.decisions["kept"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("reduce-visual-tokens", {"adaptive": True}, "and clusters asks for none"),
        ("reduce-visual-tokens", {"adaptive": True, "method": "random"}, "and random asks for none"),
        ("reduce-visual-tokens", {**REDUCE, "keep": 0.5}, "both keep and adaptive"),
        ("reduce-visual-tokens", {**REDUCE, "keep_tokens": 5}, "both keep_tokens and adaptive"),
        ("reduce-visual-tokens", {**REDUCE, "latency_ms": 5.0}, "both latency_ms and adaptive"),
        ("reduce-visual-tokens", {**REDUCE, "floor": 0.0}, "floor is 0; expected 0 < floor <= 1"),
        ("reduce-visual-tokens", {"floor": 0.3}, "floor is for adaptive, which is not asked for"),
        ("drop-visual-tokens", {"adaptive": True}, "of method recoverable's scores, and fastv is asked for"),
        ("drop-visual-tokens", {**DROP, "keep": 0.5}, "both keep and adaptive"),
        ("drop-visual-tokens", {**DROP, "macs": 0.5}, "both macs and adaptive"),
        ("drop-visual-tokens", {**DROP, "keep_tokens": 5}, "both keep_tokens and adaptive"),
        ("drop-visual-tokens", {**DROP, "latency_ms": 5.0}, "both latency_ms and adaptive"),
        ("drop-visual-tokens", {**DROP, "recycle": True}, "both adaptive and recycle"),
        ("drop-visual-tokens", {**DROP, "floor": 1.5}, "floor is 1.5; expected 0 < floor <= 1"),
        ("drop-visual-tokens", {"floor": 0.3}, "floor is for adaptive"),
        (
            "drop-visual-tokens",
            {**DROP, "after": (1, 2)},
            "adaptive counts at one place, and tokens would leave 2 times",
        ),
    ],
)
def test_refusals_say_what_and_why(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        build(name, settings).check(tiny.bundle("llava_clip"))
    assert raised.value.hint


def test_an_encoder_that_cannot_tell_is_refused() -> None:
    with pytest.raises(UsageError, match="asks what the encoder looked at"):
        build("reduce-visual-tokens", REDUCE).check(tiny.bundle("smolvlm"))


def test_one_prompt_at_a_time_needs_no_padding() -> None:
    """Questions of different lengths are counted alike whatever the batch size of the run."""

    def counted(batch: int) -> Any:
        bundle: Bundle = tiny.bundle("llava_clip")
        given = Context(data=tiny.data("llava_clip", 14), num_samples=10, batch_size=batch)
        return build("drop-visual-tokens", DROP).plan(bundle, given)

    assert counted(1) == counted(8)
