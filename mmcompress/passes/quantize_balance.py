"""How much image tokens count beside text tokens where a language model is rounded to calibration samples (see `ops.balance`).

What an error at a token does to the answer is learned from one backward pass of the answers' loss over the samples, one sample at a
time: of every block, how large the gradient is of what its attention and its MLP give out. No weight needs a gradient.

Shape alphabet: B batch, N tokens, T tokens that are not padding, C channels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.balance import floored_ratios, token_weights
from mmcompress.ops.losses import token_log_likelihoods
from mmcompress.passes.base import Context
from mmcompress.passes.quantize_calibrate import Inputs, batches
from mmcompress.surgery.low_rank import layer_of
from mmcompress.surgery.watch import evaluating, padding_mask, watch_gradients
from mmcompress.views import Tower

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["none", "modality", "text"]


@dataclass
class Balance:
    """How often each token of a batch counts, for each Linear."""

    image_tokens: tuple[int, ...] = ()
    """The ids that stand for a picture's tokens."""
    weights: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Linear -> how often an image and a text token count; once, where it is not named."""
    ratios: dict[str, list[float]] = field(default_factory=dict)
    """For the report: how much image tokens count beside text, by part, one for each block."""
    _image: Tensor | None = None

    def begin(self, inputs: Inputs) -> None:
        """Be told what the model is given next."""
        if self.weights:
            self._image = image_places(inputs, self.image_tokens)

    def counts(self, path: str, tokens: Tensor) -> Tensor | None:
        """Return how often each of the `tokens` (T, C) of the batch counts for a Linear: (T,); None where all count once.

        Raises UsageError where it is given other tokens than the prompt has.
        """
        own = self.weights.get(layer_of(path))
        if own is None:
            return None
        image, text = own
        assert self._image is not None, "begin was not called"
        if len(tokens) != len(self._image):
            raise UsageError(
                f"balance cannot tell image tokens from text: {path} is given {len(tokens)} tokens, the prompts have "
                f"{len(self._image)}",
                hint="do this before tokens are dropped on their way, or leave balance out",
            )
        return torch.where(self._image, image, text).to(tokens.device)


def image_places(inputs: Inputs, image_tokens: Sequence[int]) -> Tensor:
    """Return whether each token that is not padding stands for a piece of a picture: (T,)."""
    ids, mask = inputs["input_ids"], padding_mask(inputs)
    image = torch.isin(ids, torch.tensor(image_tokens, device=ids.device))
    return image.flatten() if mask is None else image[mask.bool()]


def balance_for(kind: Kind, bundle: Bundle, tower: Tower, context: Context) -> Balance:
    """Return how much tokens count in `tower`: all once where it is given no pictures, or the samples have none.

    Raises UsageError without data for this tower.
    """
    if kind == "none" or tower.prompt is None:
        return Balance()
    parts = {
        f"{block.path}.{part}": (*owner.writers, owner.reader)
        for part in ("attention", "mlp")
        for block in tower.blocks
        for owner in (block.attention if part == "attention" else block.mlp,)
        if owner
    }
    if kind == "text":
        weights = {path: (0.0, 1.0) for paths in parts.values() for path in paths}
        return Balance(tower.prompt.image_tokens, weights)
    found = gradients(bundle, tower, tower.prompt.image_tokens, context)
    if not found.image or not found.text:
        context.progress.say(f"{tower.name}: the samples show no pictures, all tokens count the same")
        return Balance()
    made = Balance(tower.prompt.image_tokens)
    for part in ("attention", "mlp"):
        names = [name for name in parts if name.endswith(part)]
        sizes = torch.tensor([found.sizes[name] for name in names], dtype=torch.float64)
        ratios = floored_ratios(sizes[:, 0] / found.image, sizes[:, 1] / found.text).tolist()
        made.ratios[part] = [round(ratio, 4) for ratio in ratios]
        for name, ratio in zip(names, ratios, strict=True):
            made.weights |= dict.fromkeys(parts[name], token_weights(ratio, found.image, found.text))
    return made


@dataclass
class Gradients:
    """What a backward pass over the samples told."""

    sizes: dict[str, list[float]]
    """Part of a block -> the sum of the mean |gradient| of its output's channels, over image tokens and over text tokens."""
    image: int = 0
    text: int = 0


def gradients(bundle: Bundle, tower: Tower, image_tokens: Sequence[int], context: Context) -> Gradients:
    """Return how large the gradients of the answers' loss are at each block's outputs. Raises UsageError without data."""
    readers = {block.attention.reader: f"{block.path}.attention" for block in tower.blocks}
    readers |= {block.mlp.reader: f"{block.path}.mlp" for block in tower.blocks if block.mlp}
    found = Gradients({name: [0.0, 0.0] for name in readers.values()})
    image = torch.empty(0)

    def record(path: str, states: Tensor, gradient: Tensor) -> None:
        sizes = gradient.float().abs().mean(-1).flatten()
        if len(sizes) != len(image):
            raise UsageError(
                f"balance cannot tell image tokens from text: {path} is given {len(sizes)} tokens, the prompt has "
                f"{len(image)}",
                hint="do this before tokens are dropped on their way, or leave balance out",
            )
        both = found.sizes[readers[path]]
        both[0] += float(sizes[image].sum(dtype=torch.float64))
        both[1] += float(sizes[~image].sum(dtype=torch.float64))

    modules = {path: bundle.module(path) for path in readers}
    # One at a time, a sample has no padding, and only its own graph is kept.
    single = dataclasses.replace(context, batch_size=1)
    with evaluating(bundle.model), watch_gradients(modules, record, "outputs"):
        for inputs in batches(
            bundle, tower.name, single, context.num_samples, "balance", "weighing the tokens", "leave balance out"
        ):
            image = image_places(inputs, image_tokens)
            with torch.enable_grad():
                answer_loss(bundle, tower.name, inputs).backward()
            found.image += int(image.sum())
            found.text += int((~image).sum())
    return found


def answer_loss(bundle: Bundle, tower: str, inputs: Inputs) -> Tensor:
    """Return the mean negative log-likelihood of the answers' tokens."""
    wanted = bundle.forced.next_tokens(bundle.model, inputs)
    roots = bundle.encode(tower, inputs).unflatten(1, (wanted.shape[1], -1))
    return -token_log_likelihoods(roots[wanted >= 0], wanted[wanted >= 0]).mean()
