"""Training the selector of `reduce-visual-tokens`: features are collected once, then an autoencoder learns on them alone.

Features are the tokens that the connector gives out, so that a tower and its connector stay as they are, and neither runs while the
selector learns. They are kept normalised, in float16: a normalised value is at most sqrt(N * C), which float16 holds for every
model there is.

Shapes: P pictures (or tiles), R pictures of a step, N tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.token_autoencoder import (
    autoencoding_loss,
    drawn_mask,
    logistic_noise,
    masked,
    normalised,
    reconstruction_error,
)
from mmcompress.ops.token_choice import best_scored
from mmcompress.passes.base import Context
from mmcompress.passes.different_pictures import different_pictures
from mmcompress.passes.distill_train import deterministic
from mmcompress.progress import Progress
from mmcompress.surgery.counting import macs_within
from mmcompress.surgery.reducing import choice_of, selector_of
from mmcompress.surgery.selector import TokenTransformer
from mmcompress.surgery.watch import evaluating, watch_blocks, watch_inputs
from mmcompress.views import Tower

NEED = "learning which tokens to keep"
FEATURE_BYTES = 2**30
"""The most memory that collected features take; of more pictures, none are looked at."""
BATCH = 16
"""Pictures of a step."""
LEARNING_RATE = 3e-3
"""At its height; the paper names none. High, because thousands of pictures are looked at and not 100 000."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""
TEMPERATURE = 0.3
"""Of the soft choice whose gradient a mask has: below the usual 1 it concerns tokens near the edge, and is less biased."""
HELD_BACK = 10
"""One picture in so many is not learned from: what was learned is judged on these."""


MACS_A_SECOND = 1e10
"""Of small matrix products with gradients; measured on 2 cores."""


def channels_given_out(bundle: Bundle, tower: Tower) -> int:
    """Return C of the tokens that the connector of `tower` gives out."""
    assert tower.connector is not None, "only towers with one are reduced"
    found: list[int] = []
    connector = {"": bundle.module(tower.connector.path)}
    with torch.inference_mode(), watch_blocks(connector, lambda _, before, after: found.append(after.shape[-1])):
        bundle.encode(tower.name, bundle.example_inputs(tower.name, 1))
    return found[0]


def macs_a_picture(selector: TokenTransformer, tokens: int) -> int:
    """Return the multiply-adds that `selector` takes, counted."""
    example = torch.zeros(1, tokens, selector.enter.in_features, device=selector.places.device)
    return macs_within([selector], lambda: selector(example))


def seconds_a_picture(selector: TokenTransformer, tokens: int) -> float:
    """Return about how long a picture takes in one epoch: selector and reconstructor, forwards and twice as long backwards."""
    return 2 * 3 * macs_a_picture(selector, tokens) / MACS_A_SECOND


def trained(bundle: Bundle, tower: Tower, context: Context, pictures: int, epochs: int) -> dict[str, Any]:
    """Train the selector that the connector of `tower` was given; return what it costs and what it learned."""
    assert tower.connector is not None, "only towers with one are reduced"
    connector = bundle.module(tower.connector.path)
    choice, selector = choice_of(connector), selector_of(connector)
    assert choice is not None, "apply bound it"
    assert isinstance(selector, TokenTransformer), "and put it there"
    parameters = sum(parameter.numel() for parameter in selector.parameters())
    macs = macs_a_picture(selector, choice.tokens)
    context.progress.say(f"the selector adds {parameters:,} parameters and {macs / 1e6:.1f} M multiply-adds a picture")
    features = collected(bundle, tower.name, selector, choice.tokens, context, pictures)
    found = learn(Autoencoder(selector, choice.grid), features, choice.kept, epochs, context.seed, context.progress)
    context.progress.say(
        f"pictures made of {choice.kept} of {choice.tokens} tokens are wrong by {found['error']:.3f} of their size with the "
        f"selector's tokens, by {found['random_error']:.3f} with random ones"
    )
    return {"parameters": parameters, "macs": macs, **found}


def collected(bundle: Bundle, tower: str, selector: nn.Module, tokens: int, context: Context, most: int) -> Tensor:
    """Return normalised features (P, N, C) in float16 of different pictures of the data, in an order that the seed says.

    `selector` is what the connector calls with them. P is `most` pictures at the most, fewer where they would take more than
    FEATURE_BYTES. Raises UsageError without data, and for data without pictures.
    """
    data = context.require_data(NEED)
    found: list[Tensor] = []

    def record(_: str, features: Tensor) -> None:
        found.append(normalised(features.unflatten(0, (-1, tokens))).to("cpu", torch.float16))

    looked, limit = 0, most
    with (
        _bar(context.progress, "collecting features", min(most, len(data))),
        evaluating(bundle.model),
        torch.inference_mode(),
        watch_inputs({"": selector}, record),
    ):
        for inputs in different_pictures(bundle, tower, context, NEED):
            bundle.encode(tower, inputs)
            context.progress.advance(len(found[-1]))
            looked += len(found[-1])
            limit = min(most, FEATURE_BYTES // found[0][0].nbytes)
            if looked >= limit:
                break
    if not found:
        raise UsageError(f"the data '{data.name}' has no picture to learn from", hint="use data with pictures")
    if looked >= limit < most:
        context.progress.say(
            f"learning from {limit} pictures: more would take over {FEATURE_BYTES >> 20} MiB of memory"
        )
    return torch.cat(found)[:limit]


class Autoencoder(nn.Module):
    """A selector with what it needs to learn: a reconstructor of its own size, and the vector that stands for dropped tokens."""

    def __init__(self, selector: TokenTransformer, grid: tuple[int, int]) -> None:
        super().__init__()
        channels, width, layers = selector.enter.in_features, selector.enter.out_features, len(selector.blocks)
        self.selector = selector
        self.reconstructor = TokenTransformer(channels, channels, width, layers, grid)
        self.shared = nn.Parameter(torch.zeros(channels))
        self.to(selector.places.device)

    def start(self, seed: int) -> None:
        """Give all parameters their first values."""
        generator = torch.Generator().manual_seed(seed)
        self.selector.start(generator)
        self.reconstructor.start(generator)

    def scores(self, features: Tensor) -> Tensor:
        """Return the logits (R, N) of normalised `features` (R, N, C)."""
        logits: Tensor = self.selector(features)[..., 0]
        return logits

    def reconstructed(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return what becomes of `features` (R, N, C) where `mask` (R, N) is 0.

        The reconstructor says what to add: tokens that are kept need not fit through its width.
        """
        given = masked(features, mask, self.shared)
        made: Tensor = given + self.reconstructor(given)
        return made

    def loss(self, features: Tensor, noise: Tensor, floor: float) -> Tensor:
        """Return the loss of masks drawn with `noise` (R, N)."""
        mask = drawn_mask(self.scores(features), noise, TEMPERATURE)
        return autoencoding_loss(self.reconstructed(features, mask), features, mask, floor)

    @torch.no_grad()
    def error(self, features: Tensor, kept: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the reconstruction error (R,) where the best `kept` tokens stay; with a `generator`, random ones."""
        if generator is None:
            scores = self.scores(features)
        else:
            scores = torch.rand(features.shape[:2], generator=generator).to(features.device)
        mask = best_scored(scores, kept).sum(dim=1)
        return reconstruction_error(self.reconstructed(features, mask), features)


def learn(
    autoencoder: Autoencoder, features: Tensor, kept: int, epochs: int, seed: int, progress: Progress
) -> dict[str, float | int]:
    """Train on `features` (P, N, C) so that `kept` tokens say as much as can be; return what came of it.

    The errors are of pictures that were held back, of the best tokens and of random ones. Raises UsageError when the loss stops
    being a number.
    """
    device, (pictures, tokens, _) = autoencoder.shared.device, features.shape
    held_back = pictures // HELD_BACK
    # Of very few pictures none can be spared.
    judged, learned = features[:held_back] if held_back else features, features[held_back:]
    autoencoder.start(seed)
    autoencoder.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=LEARNING_RATE)
    steps = epochs * math.ceil(len(learned) / BATCH)
    loss = math.nan
    with deterministic(device), _bar(progress, NEED, steps):
        for step, chosen in enumerate(_order(len(learned), epochs, generator), 1):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * _rate(step, steps)
            noise = logistic_noise((len(chosen), tokens), generator).to(device)
            made = autoencoder.loss(learned[chosen].to(device, torch.float32), noise, kept / tokens)
            optimizer.zero_grad()
            made.backward()
            optimizer.step()
            loss = made.item()
            if not math.isfinite(loss):
                raise UsageError(
                    f"the selector's loss is {loss} at step {step} of {steps}",
                    hint="the model's own features may not be finite: look at it with mmc eval",
                )
            progress.advance(1, f"loss {loss:.3f}")
    optimizer.zero_grad()
    return {
        "pictures": pictures,
        "steps": steps,
        "loss": round(loss, 4),
        "error": _mean_error(autoencoder, judged, kept),
        "random_error": _mean_error(autoencoder, judged, kept, generator.manual_seed(seed)),
    }


def _order(pictures: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of each step's pictures, all once an epoch."""
    for _ in range(epochs):
        yield from torch.randperm(pictures, generator=generator).split(BATCH)


def _mean_error(
    autoencoder: Autoencoder, features: Tensor, kept: int, generator: torch.Generator | None = None
) -> float:
    device = autoencoder.shared.device
    parts = [autoencoder.error(some.to(device, torch.float32), kept, generator) for some in features.split(BATCH)]
    return round(float(torch.cat(parts).mean()), 4)


@contextmanager
def _bar(progress: Progress, label: str, total: int) -> Iterator[None]:
    progress.start(label, total)
    try:
        yield
    finally:
        progress.finish()


def _rate(step: int, steps: int) -> float:
    """Return a linear rise, then half a cosine."""
    rise = min(1.0, step / max(1, round(WARM_UP * steps)))
    return rise * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
