"""A student that merges tokens comes down to them step by step while it is distilled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.schedule import annealed
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.passes.distill import Distill
from tests import tiny

MERGED = 3
SETTINGS: dict[str, Any] = {"batch_size": 8, "steps": 6, "amp": False, "towers": ("vision",), "cache_teacher": True}


def student(method: str = "tome") -> Bundle:
    bundle = tiny.bundle("clip")
    made = build("merge-tokens", {"merged": (MERGED,), "method": method, "tower": "vision"})
    made.apply(bundle, made.plan(bundle, Context()))
    return bundle


def context() -> Context:
    return Context(data=tiny.dataset(24), teacher=lambda: tiny.bundle("clip"))


def counts(bundle: Bundle) -> list[int]:
    """How many tokens leave the last block, call by call, from now on."""
    found: list[int] = []
    tower = bundle.tower("vision")
    bundle.module(tower.blocks[-1].path).register_forward_hook(lambda _, __, made: found.append(made.shape[1]))
    return found


def left(bundle: Bundle) -> int:
    seen = counts(bundle)
    bundle.embed_images(tiny.images(1))
    return seen[-1]


def test_merges_grow_along_half_a_cosine() -> None:
    # (1 - cos(pi / 3)) / 2 is a quarter, at a half it is a half.
    assert [annealed(12, progress) for progress in (0.0, 1 / 3, 0.5, 2 / 3, 1.0, 1.5)] == [0, 3, 6, 9, 12, 12]
    assert [annealed(3, progress) for progress in (0.0, 1 / 3, 2 / 3, 1.0)] == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["tome", "pitome", "crossget", "evit", "pool"])
def test_the_student_comes_down_to_what_it_was_made_with(method: str) -> None:
    bundle = student(method)
    tower = bundle.tower("vision")
    assert tower.stream is not None
    tokens, blocks, final = tower.stream.tokens, len(tower.blocks), left(bundle)
    seen = counts(bundle)
    facts = Distill(**SETTINGS, anneal=0.5).fit(bundle, context())
    assert facts["steps"] == 6
    # Steps 1 to 3 anneal: no merges, a quarter of them, three quarters. The held-back samples are judged with all of them.
    by_step = [tokens - blocks * annealed(MERGED, progress) for progress in (0.0, 1 / 3, 2 / 3)]
    first = next(index for index, count in enumerate(seen) if count != final)
    assert seen[first : first + 3] == by_step
    assert {*seen[:first], *seen[first + 3 :]} == {final}
    assert len(seen) - first >= 6
    assert left(bundle) == final


def test_a_run_that_fails_leaves_all_merges_in_force() -> None:
    bundle = student()
    final = left(bundle)
    with pytest.raises(UsageError, match="the loss is"):
        Distill(**SETTINGS | {"learning_rate": 1e30, "clip": 0.0, "warmup": 0.0}, anneal=1.0).fit(bundle, context())
    with torch.no_grad():
        assert left(bundle) == final


@pytest.mark.parametrize(
    ("bundle", "said"),
    [
        (lambda: tiny.bundle("clip"), "a student that merges tokens; vision of this one do not"),
        (lambda: student("random"), "dropped at fixed places"),
    ],
)
def test_nothing_to_anneal_is_refused(bundle: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        Distill(**SETTINGS, anneal=0.5).plan(bundle(), context())
    assert raised.value.hint
    with pytest.raises(UsageError, match="0 <= anneal <= 1"):
        Distill(anneal=1.5)
