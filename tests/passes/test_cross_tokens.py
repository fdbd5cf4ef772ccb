"""Cross tokens (method crossget, guide learned): what they are, what they change, what they learn, and that they stay."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.ops.complete_matching import guided_matching
from mmcompress.ops.losses import mutual
from mmcompress.passes import build
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.cross_tokens import _Lesson, _replacing_output
from mmcompress.passes.merge_tokens import MergeTokens
from mmcompress.recipe import Step
from mmcompress.surgery.cross_tokens import NAME, cross_vector
from mmcompress.surgery.ledger import watching
from mmcompress.surgery.reduction import ledger_of
from tests import tiny

ASKED: dict[str, Any] = {"method": "crossget", "keep": 0.6, "guide": "learned", "guide_epochs": 2}
FAMILIES = ("clip", "siglip", "dual_encoder_dinov2")
"""With a class token, with a pooling attention and no class token, with registers or none and a projection of its own."""


def context(family: str = "clip", **more: Any) -> Context:
    return Context(data=tiny.data(family, 24), batch_size=4, **more)


def run(bundle: Bundle, params: dict[str, Any] = ASKED, **more: Any) -> Bundle:
    stage = pipeline.Stage(1, Step("merge-tokens", params), build("merge-tokens", params))
    pipeline.run_stage(bundle, stage, context(**more))
    return bundle


def untrained(family: str, guide: str) -> Bundle:
    bundle, made = tiny.bundle(family), MergeTokens(method="crossget", keep=0.6, guide=guide)  # type: ignore[arg-type]
    made.apply(bundle, made.plan(bundle, context(family)))
    return bundle


def vectors(bundle: Bundle) -> list[nn.Parameter]:
    found = (cross_vector(bundle.module(block.path)) for block in bundle.tower("vision").blocks)
    return [vector for vector in found if vector is not None]


@torch.no_grad()
def merges(bundle: Bundle) -> tuple[Tensor, list[Tensor | None]]:
    ledger = ledger_of(bundle.module(bundle.tower("vision").blocks[0].path))
    assert ledger is not None
    with watching(ledger) as found:
        rows = bundle.encode("vision", bundle.example_inputs("vision", 3))
    return rows, list(found)


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None)


def test_mutual_golden() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4), mean (1/2, 1/2): each KL is 1/2 log(1/2 : 3/4) + 1/2 log(1/2 : 1/4)."""
    one, other = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert mutual(one, other).item() == pytest.approx(expected, rel=1e-6)
    assert mutual(one, one + 5).item() == pytest.approx(0.0, abs=1e-7)


def test_the_guide_decides_who_goes() -> None:
    """Of friends at 0 and 10 degrees and of those at 90 and 95, the pair that the guide does not look at loses one."""
    radians = torch.tensor([0.0, 10.0, 90.0, 95.0]).double().deg2rad()
    keys = torch.stack([radians.cos(), radians.sin()], dim=-1)[None]
    for towards, gone in ((0.0, {2, 3}), (93.0, {0, 1})):
        angle = torch.tensor(towards).double().deg2rad()
        rows, weights = guided_matching(keys, 1, guide=torch.stack([angle.cos(), angle.sin()])[None, None])
        (merged,) = [set(row.nonzero()[:, 0].tolist()) for row in rows[0] if row.sum() > 1]
        assert merged == gone
        assert torch.allclose(weights[0].log(), (radians - angle).cos())


@pytest.mark.parametrize("family", FAMILIES)
def test_before_it_learns_the_cross_token_is_the_class_token_or_the_mean(family: str) -> None:
    ours, theirs = untrained(family, "learned"), untrained(family, "class")
    assert all(not vector.any() for vector in vectors(ours))
    (one, merged), (other, expected) = merges(ours), merges(theirs)
    # Without a class token the guide is the key of the mean token, with one it is the mean of the keys.
    if ours.tower("vision").stream.protected:  # type: ignore[union-attr]
        assert same(merged, expected)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_looks_at_a_cross_token_but_merges_depend_on_it(family: str) -> None:
    bundle = untrained(family, "learned")
    before, merged = merges(bundle)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for vector in vectors(bundle):
            vector.copy_(20 * torch.randn(vector.shape, generator=generator))
    after, others = merges(bundle)
    assert not same(merged, others)
    assert not torch.allclose(before, after)
    # With the first block's choice alone the same, so is what it computes: only the choice tells.
    with torch.no_grad():
        for vector in vectors(bundle):
            vector.mul_(2.0**-40)
    again, back = merges(bundle)
    assert same(merged, back)
    torch.testing.assert_close(before, again)


def test_every_block_that_merges_has_one_and_no_other() -> None:
    bundle = run(tiny.bundle("clip"), {**ASKED, "keep": None, "merged": [9, 0, 5]})
    blocks = [bundle.module(block.path) for block in bundle.tower("vision").blocks]
    assert [cross_vector(block) is not None for block in blocks] == [True, False, True]
    assert sum(NAME in name for name in bundle.model.state_dict()) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_training_changes_the_vectors_alone_and_comes_nearer_to_the_texts(family: str) -> None:
    bundle = tiny.bundle(family)
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    stage = pipeline.Stage(
        1, Step("merge-tokens", {**ASKED, "guide_epochs": 8}), build("merge-tokens", {**ASKED, "guide_epochs": 8})
    )
    record = pipeline.run_stage(bundle, stage, context(family))
    after = bundle.model.state_dict()
    assert {name for name in after if NAME in name} == set(after) - set(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(vector.any() for vector in vectors(bundle))
    facts = record.facts["cross_tokens"]
    assert facts["loss"]["after"] < facts["loss"]["before"]
    assert facts["parameters"] == sum(vector.numel() for vector in vectors(bundle))


def test_what_a_cross_token_says_is_what_the_block_would_make_of_a_class_token_that_nobody_sees() -> None:
    """Set beside a block of the original model that is given the token among the others, hidden from them by a mask."""
    bundle, plain = untrained("clip", "learned"), tiny.bundle("clip")
    with torch.no_grad():
        vectors(bundle)[0].copy_(torch.linspace(-1, 1, vectors(bundle)[0].numel()))
    inputs = bundle.example_inputs("vision", 2)
    seen: list[Tensor] = []
    first = plain.module(plain.tower("vision").blocks[0].path)
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain.encode("vision", inputs)
        hook.remove()
        tokens = seen[0]
        guide = tokens[:, :1] + vectors(bundle)[0]
        mask = torch.zeros(2, 1, 1, tokens.shape[1] + 1)
        mask[..., -1] = torch.finfo(torch.float32).min
        expected = first(torch.cat([tokens, guide], dim=1), mask)[:, -1]
        blocks = [bundle.module(block.path) for block in bundle.tower("vision").blocks]
        told: list[Tensor] = []
        with _replacing_output(bundle, bundle.tower("vision")):
            hook = blocks[-1].register_forward_hook(lambda _, __, made: told.append(made))
            rows = bundle.encode("vision", inputs)
            hook.remove()
    assert told[0].shape == (2 * len(vectors(bundle)), 1, tokens.shape[-1])
    assert len(rows) == 2 * len(vectors(bundle))
    torch.testing.assert_close(told[0][:2, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.passes.cross_tokens.BATCH", 8)
    whole = run(tiny.bundle("clip"), workdir=tmp_path / "whole")
    monkeypatch.setattr("mmcompress.passes.cross_tokens.SAVE_MINUTES", 0.0)
    steps = 0
    gradients = _Lesson.gradients

    def dying(self: Any, batch: Any, step: int) -> float:
        nonlocal steps
        steps += 1
        if steps == 2:
            raise KeyboardInterrupt
        return gradients(self, batch, step)

    monkeypatch.setattr(_Lesson, "gradients", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tiny.bundle("clip"), workdir=tmp_path / "killed")
    monkeypatch.setattr(_Lesson, "gradients", gradients)
    resumed: list[int] = []
    monkeypatch.setattr(_Lesson, "gradients", lambda *given: resumed.append(given[2]) or gradients(*given))
    again = run(tiny.bundle("clip"), workdir=tmp_path / "killed")
    assert resumed[0] == 1
    assert all(torch.equal(one, other) for one, other in zip(vectors(whole), vectors(again), strict=True))


def test_saved_loaded_and_exported(tmp_path: Path) -> None:
    bundle = run(tiny.bundle("clip"))
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert all(torch.equal(one, other) for one, other in zip(vectors(bundle), vectors(again), strict=True))
    assert torch.equal(merges(bundle)[0], merges(again)[0])
    export_onnx(again, tmp_path / "exported", towers=("vision",), batches=(1, 2))  # raises where parity fails


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="guide is for method crossget"):
        MergeTokens(guide="learned")
    with pytest.raises(UsageError, match="guide_epochs is 0"):
        MergeTokens(method="crossget", guide="learned", guide_epochs=0)
    made = MergeTokens(**{**ASKED, "keep": 0.6})
    with pytest.raises(UsageError, match="a space that both share"):
        made.check(tiny.bundle("llava_clip"))
    with pytest.raises(UsageError, match="learning cross tokens needs data"):
        made.plan(tiny.bundle("clip"), Context())
    bundle = tiny.bundle("clip")
    made.apply(bundle, Plan({"merged": [3, 3, 3]}))
    first, *others = tiny.data("clip", 4)
    with pytest.raises(UsageError, match="1 of 4 samples lack an image or a text"):
        made.fit(bundle, Context(data=Dataset(Memory([replace(first, texts=()), *others]))))


def test_the_control_learns_nothing_and_time_is_asked_for() -> None:
    made = MergeTokens(**ASKED)
    control = made.control()
    assert control is not None
    assert (control.method, control.guide) == ("random", "class")
    assert not made.streams()
    assert made.seconds(tiny.bundle("clip"), Work(samples=8, dataset=100, forward=0.01)) > 0
