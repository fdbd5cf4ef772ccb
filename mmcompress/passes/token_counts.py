"""How many tokens pictures need, counted on data beforehand: that differs from picture to picture, and a graph's shape must not.

The number that suffices for 95 in 100 pictures is kept of all of them, at least a floor. The rest have less than they would need:
how many that are is recorded beside the number.

Shapes: R pictures or tiles, N tokens, C channels.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.dropping import needed_to_recover
from mmcompress.ops.outliers import above_fence, sufficient
from mmcompress.ops.token_choice import dominant_of
from mmcompress.passes.base import Context
from mmcompress.passes.different_pictures import different_pictures
from mmcompress.progress import Progress
from mmcompress.surgery.attention import telling_scores
from mmcompress.surgery.watch import evaluating
from mmcompress.views import Connector, Tower

FLOOR = 0.05
"""Share of the tokens that is kept at least."""
NEED = "counting how many tokens pictures need"
ASIDE: dict[str, Callable[[int], int]] = {
    "attention": lambda kept: kept,
    "prumerge": lambda kept: kept - 1,
    "visionzip": dominant_of,
}
"""How many of M tokens a method keeps for what stands out; the others are means of the rest."""


def require_floor(key: str, floor: float, calibrated: bool, by: str) -> None:
    """Raise UsageError unless `floor`, the parameter `key`, is a share, or where it is given without anything `calibrated`."""
    if not 0 < floor <= 1:
        raise UsageError(
            f"{key} is {floor:g}; expected 0 < floor <= 1",
            hint=f"{FLOOR:g} keeps at least one token in {1 / FLOOR:.0f}",
        )
    if floor != FLOOR and not calibrated:
        raise UsageError(f"{key} is for {by}, which is not asked for", hint=f"leave it out, or give {by}")


def kept_of_pictures(
    bundle: Bundle, tower: Tower, method: str, floor: float, context: Context
) -> tuple[int, dict[str, Any]]:
    """Return how many tokens of each picture suffice for 95 in 100 pictures, and what was counted.

    A picture's tokens stand out whose scores are above the fence (`ops.outliers`); it needs as many tokens as let `method` keep
    those as they are. Raises UsageError without data, and for data without pictures.
    """
    connector = tower.connector
    assert connector is not None, "only towers with one are reduced"
    outstanding = _outstanding(bundle, tower.name, connector, context)
    tokens, aside = connector.tokens, ASIDE[method]
    # All tokens are kept as they are, without means, so that the last number always suffices.
    enough = {count: next((m for m in range(1, tokens) if aside(m) >= count), tokens) for count in set(outstanding)}
    needed = [enough[count] for count in outstanding]
    kept = max(math.ceil(round(floor * tokens, 9)), int(sufficient(needed)))
    context.progress.say(
        f"{len(needed)} pictures: {_span(outstanding)} of {tokens} tokens stand out; {kept} are kept of each, "
        f"and {_wanting(needed, kept):.1%} of the pictures need more"
    )
    return kept, _facts("pictures", needed, kept)


def _outstanding(bundle: Bundle, tower: str, connector: Connector, context: Context) -> list[int]:
    """Return how many tokens stand out in each of up to `num_samples` pictures."""
    attention, counts = bundle.module(connector.scorer), list[int]()
    data = context.require_data(NEED)
    with (
        _bar(context.progress, min(context.num_samples, len(data))),
        evaluating(bundle.model),
        torch.inference_mode(),
        telling_scores(attention, class_token=connector.leading > 0) as scores,
    ):
        for inputs in different_pictures(bundle, tower, context, NEED):
            bundle.encode(tower, inputs)
            found = above_fence(scores.pop()[:, connector.leading :]).tolist()
            context.progress.advance(len(found))
            counts += found
            if len(counts) >= context.num_samples:
                break
    if not counts:
        raise UsageError(f"the data '{data.name}' has no picture to count tokens of", hint="use data with pictures")
    return counts[: context.num_samples]


def kept_of_questions(
    bundle: Bundle, tower: Tower, after: int, floor: float, context: Context
) -> tuple[float, dict[str, Any]]:
    """Return which share of a prompt's image tokens suffices for 95 in 100 questions, and what was counted.

    Counted behind `after` blocks, by what `needed_to_recover` says. Raises UsageError without data, and for data without questions
    about pictures.
    """
    shares = _shares_needed(bundle, tower, after, context)
    kept = max(floor, sufficient(shares))
    context.progress.say(
        f"{len(shares)} questions need {_span(shares)} of their image tokens; {kept:.3g} of them are kept, "
        f"and {_wanting(shares, kept):.1%} of the questions need more"
    )
    return kept, _facts("questions", shares, kept)


def _shares_needed(bundle: Bundle, tower: Tower, after: int, context: Context) -> list[float]:
    """Return the share of image tokens that each of up to `num_samples` questions needs."""
    data, prompt = context.require_data(NEED), tower.prompt
    assert prompt is not None, "only towers that are given image tokens drop any"
    chosen = data.subset(context.num_samples, context.seed)
    images = torch.tensor(prompt.image_tokens, device=bundle.device)
    states, shares = list[Tensor](), list[float]()

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    hook = bundle.module(tower.blocks[after].path).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with _bar(context.progress, len(chosen)), evaluating(bundle.model), torch.inference_mode():
            for sample in chosen:
                # One at a time: then no token is padding.
                for item in bundle.items(tower.name, sample)[:1]:
                    inputs = bundle.prepare(tower.name, [item])
                    image = torch.isin(inputs["input_ids"], images)
                    if not image.any():
                        continue
                    bundle.encode(tower.name, inputs)
                    places = torch.arange(image.shape[1], device=image.device)
                    words = ~image & (places <= inputs["answer_positions"][:, :1])
                    shares.append(needed_to_recover(states.pop(), image, words) / int(image.sum()))
                context.progress.advance(1)
    finally:
        hook.remove()
    if not shares:
        raise UsageError(
            f"of {len(chosen)} samples of '{data.name}' none has a question about a picture",
            hint="give data with both, or keep",
        )
    return shares


def _facts(what: str, needed: Sequence[float], kept: float) -> dict[str, Any]:
    """Return what is recorded of the numbers `needed`, of which `kept` are given."""
    return {
        "needed": {
            what: len(needed),
            "min": round(min(needed), 4),
            "median": round(statistics.median(needed), 4),
            "p95": round(sufficient(needed), 4),
            "max": round(max(needed), 4),
            "share_needing_more": round(_wanting(needed, kept), 4),
        }
    }


def _wanting(needed: Sequence[float], kept: float) -> float:
    return sum(number > kept for number in needed) / len(needed)


def _span(numbers: Sequence[float]) -> str:
    return f"{min(numbers):.3g} to {max(numbers):.3g} (median {statistics.median(numbers):.3g})"


@contextlib.contextmanager
def _bar(progress: Progress, total: int) -> Iterator[None]:
    progress.start(NEED, total)
    try:
        yield
    finally:
        progress.finish()
