"""Tokens solved for a budget: tokens left, multiply-adds, milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.jobs.compress import compress, follow
from mmcompress.jobs.stopwatch import stopwatch
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.ops.budget import largest_within
from mmcompress.ops.schedule import largest_merge, solve_left, tokens_after
from mmcompress.passes import build
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.merge_tokens import MergeTokens
from mmcompress.recipe import Export, parse
from mmcompress.surgery.reducing import handed_on
from mmcompress.surgery.reduction import tokens_left
from tests import tiny
from tests.passes.timing import timed_by


def test_the_largest_share_within_a_budget_by_hand() -> None:
    asked: list[float] = []

    def cost(share: float) -> float:
        asked.append(share)
        return 10 * share

    assert largest_within(cost, 6.0, 0.0, 3) == 0.5
    assert asked == [1.0, 0.0, 0.5, 0.75, 0.625]
    assert largest_within(cost, 10.0, 0.2, 3) == 1.0
    assert largest_within(cost, 1.9, 0.2, 3) is None
    assert largest_within(cost, 2.0, 0.2, 8) == 0.2


def test_tokens_left_by_hand() -> None:
    assert solve_left(20, 50, 1, 3) == [10, 10, 10]
    assert solve_left(20, 50, 1, 3, "decreasing") == [20, 10, 0]
    assert solve_left(40, 50, 1, 3, first=1) == [0, 5, 5]
    assert solve_left(50, 50, 1, 3) == [0, 0, 0]
    # A third is 14, but of the 36 that leaves two halvings make 10 (18 // 2 of 19). 21 is the least the first must remove.
    assert solve_left(8, 50, 1, 3) == [21, 14, 7]
    with pytest.raises(UsageError, match="7 tokens cannot be left of 50: merging in 3 of 3 blocks leaves 8 at least"):
        solve_left(7, 50, 1, 3)
    with pytest.raises(UsageError, match="51 tokens cannot be left of 50"):
        solve_left(51, 50, 1, 3)


@pytest.mark.parametrize("shape", ["constant", "decreasing"])
@pytest.mark.parametrize(("every", "first"), [(1, 0), (2, 1), (3, 0)])
def test_as_many_tokens_are_left_as_asked_and_no_block_removes_more_than_half(
    shape: Any, every: int, first: int
) -> None:
    for tokens in (9, 50, 65):
        for left in range(tokens + 1):
            try:
                made = solve_left(left, tokens, 1, 7, shape, every, first)
            except UsageError:
                continue
            assert sum(made) == tokens - left
            before = [tokens, *tokens_after(made, tokens)]
            assert all(0 <= removed <= largest_merge(now, 1) for removed, now in zip(made, before, strict=False))


def merged(bundle: Bundle, context: Context | None = None, **settings: Any) -> Plan:
    made = build("merge-tokens", settings)
    made.check(bundle)
    plan = made.plan(bundle, context or Context())
    made.apply(bundle, plan)
    return plan


def test_keep_tokens_of_a_tower() -> None:
    bundle = tiny.bundle("clip")
    merged(bundle, keep_tokens=20)
    assert tokens_left(bundle.module(bundle.tower("vision").blocks[-1].path), 0) == 20


@pytest.mark.parametrize("share", [0.9, 0.6, 0.5])
def test_multiply_adds_are_what_was_asked_at_most(share: float) -> None:
    bundle = tiny.bundle("clip")
    plan = merged(bundle, macs=share)
    kept = build("merge-tokens", {"macs": share}).fit(bundle, Context())["block_macs_kept"]
    assert share - 0.03 < kept <= share
    looser = build("merge-tokens", {"macs": 1.0}).plan(tiny.bundle("clip"), Context())
    assert looser.decisions["merged"] == [0, 0, 0] != plan.decisions["merged"]


def timer(bundle: Bundle, stages: tuple[str, ...]) -> float:
    """A machine on which a token behind the last block takes a tenth of a millisecond, and so does a picture's in a prompt."""
    if stages == ("vision",):
        return tokens_left(bundle.module(bundle.tower("vision").blocks[-1].path), 50) / 10
    assert stages == ("vision", "prompt")
    connector = bundle.tower("vision").connector
    assert connector is not None
    return handed_on(bundle.module(connector.path), connector.tokens) / 10


def test_the_most_tokens_within_a_latency_are_kept() -> None:
    bundle = tiny.bundle("clip")
    plan = merged(bundle, Context(stopwatch=timed_by(timer)), latency_ms=3.0)
    left = tokens_left(bundle.module(bundle.tower("vision").blocks[-1].path), 50)
    assert 27 <= left <= 30
    assert plan.decisions["tried_ms"]["1.0000"] == 5.0
    assert len(plan.decisions["tried_ms"]) == 7
    twin = build("merge-tokens", {"latency_ms": 3.0}).control(plan.decisions)
    assert twin is not None
    control = twin.plan(tiny.bundle("clip"), Context())
    assert control.decisions["merged"] == plan.decisions["merged"]
    assert "kept" in control.decisions


def test_the_most_image_tokens_within_a_latency_are_kept() -> None:
    bundle = tiny.bundle("llava_clip")
    made = build("reduce-visual-tokens", {"latency_ms": 1.0})
    made.check(bundle)
    plan = made.plan(bundle, Context(stopwatch=timed_by(timer)))
    made.apply(bundle, plan)
    assert timer(bundle, ("vision", "prompt")) <= 1.0
    assert plan.decisions["kept"] in (9, 10)
    twin = made.control(plan.decisions)
    assert twin is not None
    assert twin.plan(tiny.bundle("llava_clip"), Context()).decisions["kept"] == plan.decisions["kept"]


@pytest.mark.parametrize(
    ("name", "family", "settings", "message"),
    [
        (
            "merge-tokens",
            "clip",
            {"latency_ms": 0.5},
            r"with the least that can stay \(keep 0.320\) vision take 0.80 ms",
        ),
        (
            "reduce-visual-tokens",
            "llava_clip",
            {"latency_ms": 0.05},
            r"the least that can stay \(keep 0.062\) vision and prompt take 0.10 ms",
        ),
        ("merge-tokens", "clip", {"macs": 0.01}, "macs 0.01 is too small: merging all that can be merged leaves 0.4"),
        ("merge-tokens", "clip", {"keep_tokens": 3}, "3 tokens cannot be left of 50"),
        ("merge-tokens", "clip", {"latency_ms": -1.0}, "latency_ms is -1; expected a number > 0"),
        ("merge-tokens", "clip", {"macs": 0.5, "keep": 0.5}, "both keep and macs"),
        ("reduce-visual-tokens", "llava_clip", {"latency_ms": 1.0, "keep": 0.5}, "both keep and latency_ms"),
    ],
)
def test_refusals_say_what_there_can_be(name: str, family: str, settings: dict[str, Any], message: str) -> None:
    def plan() -> None:
        bundle, made = tiny.bundle(family), build(name, settings)
        made.check(bundle)
        made.plan(bundle, Context(stopwatch=timed_by(timer)))

    with pytest.raises(UsageError, match=message) as raised:
        plan()
    assert raised.value.hint


def test_without_a_machine_to_try_on_a_latency_is_refused() -> None:
    with pytest.raises(UsageError, match="merge-tokens.latency_ms needs a run that may export and time"):
        merged(tiny.bundle("clip"), latency_ms=3.0)


def test_the_control_of_a_run_follows_what_was_solved_also_behind_earlier_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write_pairs(tmp_path / "data", 6)
    pruned = parse({"steps": [{"prune": {"ratio": 0.1, "score": "magnitude", "compensate": "none"}}]})
    compress(tiny.bundle("clip"), pruned, tmp_path / "pruned")
    monkeypatch.setattr("mmcompress.jobs.compress.stopwatch", lambda export: timed_by(timer))
    solved: list[Any] = []
    plan = MergeTokens.plan

    def spied(self: MergeTokens, bundle: Bundle, context: Context) -> Plan:
        made = plan(self, bundle, context)
        solved.append((self.method, self.latency_ms, made.decisions["merged"]))
        return made

    monkeypatch.setattr(MergeTokens, "plan", spied)
    recipe = {
        "steps": [{"merge-tokens": {"latency_ms": 3.0}}],
        "tasks": ["retrieval"],
        "data": {"evaluation": str(folder)},
    }
    result = compress(tmp_path / "pruned", parse(recipe), tmp_path / "out")
    assert [row["stage"] for row in result.rows] == ["original", "merge-tokens", "merge-tokens (random)"]
    assert solved[-1][:2] == ("random", None)
    assert solved[-1][2] == result.manifest.records[-1].plan["merged"]
    assert any(solved[-1][2])


def test_a_machine_that_is_busy_now_and_then_is_asked_again_and_one_that_always_is_refused() -> None:
    calls: list[float] = []

    def disturbed(bundle: Bundle, stages: tuple[str, ...]) -> float:
        calls.append(timer(bundle, stages) + (10.0 if len(calls) in (2, 3) else 0.0))
        return calls[-1]

    plan = merged(tiny.bundle("clip"), Context(stopwatch=timed_by(disturbed)), latency_ms=3.0)
    assert (
        plan.decisions["merged"]
        == merged(tiny.bundle("clip"), Context(stopwatch=timed_by(timer)), latency_ms=3.0).decisions["merged"]
    )
    assert len(calls) == 9

    def contrary(bundle: Bundle, stages: tuple[str, ...]) -> float:
        return 10.0 - timer(bundle, stages)

    with pytest.raises(
        UsageError, match=r"cannot be solved: keep 0\.\d+ takes 9.\d+ ms, and with more kept it took 5.00 ms"
    ):
        merged(tiny.bundle("clip"), Context(stopwatch=timed_by(contrary)), latency_ms=3.0)


def test_what_is_timed_prepares_prompts_with_as_few_tokens(tmp_path: Path) -> None:
    """The exported trial is asked about as many image tokens as it hands on; else the prompt would stay as long as it was."""
    asked: list[tuple[int, int]] = []

    def counting(bundle: Bundle, stages: tuple[str, ...]) -> float:
        if len(asked) < 3:
            exported = export_onnx(bundle, tmp_path / str(len(asked)), batches=(1,)).artifact
            answerer = artifact_answerer(exported, "onnxruntime", threads=1)
            ids = answerer.asked([next(one for one in tiny.asked(4, turns=False) if one.picture)])["input_ids"]
            asked.append((int((ids == bundle.model.config.image_token_id).sum()), round(10 * timer(bundle, stages))))
        return timer(bundle, stages)

    build("reduce-visual-tokens", {"latency_ms": 1.0}).plan(
        tiny.bundle("llava_clip"), Context(stopwatch=timed_by(counting))
    )
    assert asked == [(16, 16), (1, 1), (8, 8)]


def test_several_processes_cannot_solve_for_a_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = parse({"steps": [{"merge-tokens": {"latency_ms": 3.0}}]})
    for run in (compress, follow):
        with pytest.raises(UsageError, match="merge-tokens.latency_ms cannot be solved by 2 processes at once"):
            run("nowhere", recipe, tmp_path / "out")


def test_a_latency_is_checked_against_the_least_that_can_be_kept() -> None:
    build("merge-tokens", {"latency_ms": 5.0, "first": 2}).check(tiny.bundle("clip"))


def test_a_run_times_the_exported_tower(tmp_path: Path) -> None:
    """Far more than the tiny tower takes keeps every token; far less is refused, and what it takes is told."""
    watch = stopwatch(Export(runners=("onnxruntime",), threads=1))("")
    whole = watch.model(tiny.bundle("clip"), ("vision",))
    assert 0 < whole < 1000
    first_token = watch.model(tiny.bundle("llava_clip"), ("vision", "prompt"))
    assert 0 < first_token < 1000
    with pytest.raises(UsageError, match="has no tower 'audio'"):
        watch.model(tiny.bundle("clip"), ("audio",))
    recipe: dict[str, Any] = {
        "steps": [{"merge-tokens": {"latency_ms": 1000.0}}],
        "export": {"runners": ["onnxruntime"]},
    }
    result = compress(tiny.bundle("clip"), parse(recipe), tmp_path / "out")
    assert result.manifest.records[0].plan["merged"] == [0, 0, 0]
    recipe["steps"] = [{"merge-tokens": {"latency_ms": 1e-6}}]
    # So small a tower may take longer to merge than merging saves, and then that is what is told.
    told = r"latency_ms (is 1e-06, but with the least .* \(keep 0.320\) vision take|cannot be solved: keep 0.320 takes) \d+"
    with pytest.raises(UsageError, match=told):
        compress(tiny.bundle("clip"), parse(recipe), tmp_path / "none")
    assert not (tmp_path / "none").exists()
