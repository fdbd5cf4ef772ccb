"""Where in a picture the tokens are that a model's answers have to do with: attention relevance, averaged over questions.

See `ops.relevance`. It takes a backward pass for each question, so it is found out beforehand, place by place, and not for each
picture: what it says is where to look in pictures like those it was measured on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.bundle import Bundle, TeacherForced
from mmcompress.errors import UsageError
from mmcompress.ops.losses import token_log_likelihoods
from mmcompress.ops.relevance import after_attention, looked
from mmcompress.passes.base import Context
from mmcompress.surgery.attention import telling_weights
from mmcompress.surgery.watch import evaluating
from mmcompress.views import Prompt, Tower

NEED = "finding what answers have to do with"


def require_answers(bundle: Bundle) -> tuple[Tower, Prompt]:
    """Return the tower that answers and what it is given. Raises UsageError for a model without questions and answers."""
    if isinstance(bundle.family, TeacherForced):
        tower = bundle.tower(bundle.family.answering)
        if tower.prompt is not None:
            return tower, tower.prompt
    raise UsageError(
        f"method relevance follows answers back to the picture, and {bundle.family.name} models do not answer in words",
        hint="use clusters or divprune, which look at the tokens themselves",
    )


def relevance_by_place(bundle: Bundle, tokens: int, context: Context) -> Tensor:
    """Return how relevant each of a picture's `tokens` places (N,) is on average, each question counting the same.

    Raises UsageError without data, and for data in which no sample has question, answer and picture.
    """
    data = context.require_data(NEED)
    tower, prompt = require_answers(bundle)
    total, count = torch.zeros(tokens, dtype=torch.float64), 0
    most = min(context.num_samples, len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(context.seed))[:most].tolist()
    context.progress.start(NEED, most)
    try:
        with evaluating(bundle.model):
            for index in order:
                for item in bundle.items(tower.name, data[index])[:1]:
                    found = _of_picture(bundle, tower, prompt, bundle.prepare(tower.name, [item]), tokens)
                    if found is not None:
                        total, count = total + found, count + 1
                context.progress.advance(1)
    finally:
        context.progress.finish()
    if not count:
        raise UsageError(
            f"of {most} samples of '{data.name}' none has a picture, a question and an answer",
            hint="give data with all three, or use clusters, which needs none",
        )
    return total / count


def _of_picture(bundle: Bundle, tower: Tower, prompt: Prompt, inputs: dict[str, Tensor], tokens: int) -> Tensor | None:
    """Return (N,), shares that sum to 1, of the mean picture of one sample; None without a picture or an answer."""
    image = torch.isin(inputs["input_ids"][0], torch.tensor(prompt.image_tokens, device=bundle.device))
    expected = bundle.forced.next_tokens(bundle.model, inputs)
    places = expected >= 0
    if not places.any() or not image.any():
        return None
    attentions = [bundle.module(block.attention.path) for block in tower.blocks]
    with torch.enable_grad(), telling_weights(attentions) as weights:
        roots = bundle.encode(tower.name, inputs).unflatten(1, (expected.shape[1], -1))[places]
        score = token_log_likelihoods(roots, expected[places]).sum()
        gradients = torch.autograd.grad(score, weights)
    known = torch.eye(len(image), device=bundle.device)[None]
    for each, gradient in zip(weights, gradients, strict=True):
        known = after_attention(known, looked(each.detach(), gradient))
    asking = inputs["answer_positions"][places]
    found = known[0, asking].mean(dim=0)[image].unflatten(0, (-1, tokens)).mean(dim=0).double().cpu()
    total = float(found.sum())
    return found / total if total > 0 else torch.full_like(found, 1 / tokens)
