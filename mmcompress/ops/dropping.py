"""Image tokens that leave a row of text and image tokens: how many, which, and where the others then stand.

Rows of a batch hold different numbers of tokens, padding on either side. What stays of a row stands at the right end of M slots,
in order; M is the length of the fullest row. A slot that is left over is padding.

Only comparisons, sums and matmuls, M known beforehand: exporters need no scatter and no loop over data.

Shapes: B batch, N tokens, M slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.ops.outliers import outliers
from mmcompress.ops.ranks import FAR, directions, earlier, rank

PRIME = 32749
"""The square of it fits 32 bits, in which some runtimes compute integers."""


def counts_kept(images: Tensor, keep: float, most: int = 0) -> Tensor:
    """Return how many of `images` (B,) image tokens stay: the share `keep`, at least one; with `most`, at most so many instead."""
    if most:
        return images.clamp(max=most)
    share = (images.double() * keep + 0.5).floor().to(images.dtype)
    return torch.minimum(share.clamp(min=1), images)


def room_for(present: Tensor, image: Tensor, keep: float, most: int = 0) -> Tensor:
    """Return (B, M) of 0s and 1s: the slots that are filled once image tokens have left.

    `present`: (B, N), where a token is and not padding; `image`: (B, N), where it is one of a picture. See `counts_kept`.
    """
    images = image.sum(dim=-1)
    left = present.sum(dim=-1) - images + counts_kept(images, keep, most)
    slots = torch.arange(int(left.max()), device=present.device)
    return (slots >= len(slots) - left[:, None]).long()


def slots_of(present: Tensor, image: Tensor, scores: Tensor, room: Tensor) -> Tensor:
    """Return (B, M, N) of 0s and 1s: which token stands in which slot; a slot that stays empty has none.

    All text stays, and of the image tokens those with the best `scores` (B, N), as many as `room` (B, M) has slots for.
    `present`, `image`: (B, N) booleans.
    """
    kept_images = room.sum(dim=-1) - (present & ~image).sum(dim=-1)  # (B,)
    place = rank(scores.float().masked_fill(~image, torch.finfo(torch.float32).min))
    kept = present & (~image | (place < kept_images[:, None]))
    behind = kept.sum(dim=-1, keepdim=True) - kept.cumsum(dim=-1)  # (B, N)
    slots = torch.arange(room.shape[1], device=room.device)
    return (kept[:, None, :] & (slots[:, None] == room.shape[1] - 1 - behind[:, None, :])).float()


def last_of(present: Tensor) -> Tensor:
    """Return (B, N), 1.0 at the last token of each row that is `present` (B, N) and 0.0 elsewhere."""
    behind = present.sum(dim=-1, keepdim=True) - present.cumsum(dim=-1)
    return (present & (behind == 0)).float()


def drawn_factors(seed: int) -> tuple[int, ...]:
    """Return what `scattered` draws by."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, PRIME, (4,), generator=generator).tolist())


def scattered(image: Tensor, factors: Sequence[int]) -> Tensor:
    """Return scores (B, N) that look drawn at random for the image tokens of `image` (B, N), the same for each row; the control.

    A polynomial of a token's number, modulo a prime: integers, so that every runtime draws the same.
    """
    number = (image.long().cumsum(dim=-1) - 1).clamp(min=0) % PRIME
    made = torch.zeros_like(number)
    for factor in factors:
        made = (made * number + factor) % PRIME
    return made.float()


def unlike_earlier(tokens: Tensor, image: Tensor) -> Tensor:
    """Return scores (B, N), better the less an image token is like the one before it that it is most like, by the cosine.

    The first token is best. What a video's frame repeats of an earlier one comes last, as do a picture's even regions.
    `tokens`: (B, N, C); `image`: (B, N) booleans, of all pictures and frames of the prompt.

    Source: LFTR, arXiv 2501.17391, whose code is not public; our reading of its abstract, with both its halves in one comparison:
    over time (what frames share) and in space (what neighbours share).
    """
    unit = directions(tokens)
    compared = image[:, None, :] & earlier(tokens.shape[1], tokens.device)
    return -(unit @ unit.mT).masked_fill(~compared, -FAR).amax(dim=-1)


def recovered(tokens: Tensor, image: Tensor, words: Tensor, kept: Tensor) -> Tensor:
    """Return scores (B, N): half of the `kept` (B,) image tokens are those that stand out most, the others those nearest to words.

    A token stands out that is least like the mean of all image tokens; near is a large cosine to the mean of the words. `tokens`:
    (B, N, C); `image`, `words`: (B, N) booleans.

    Source: Recoverable Compression, arXiv 2409.01179, sections 3.2 and 3.3. Deliberate differences: pictures and words are compared
    in the language model's own states, where the paper runs the text tower that was trained with the encoder, and asks the
    encoder's class token what stands out; numbers are given, where the paper counts outliers in every picture (`needed_to_recover`
    says what it would count).
    """
    apart, near = _apart_and_near(tokens, image, words)
    first = image & (rank(apart.masked_fill(~image, -FAR)) < ((kept + 1) // 2)[:, None])
    return torch.where(first, FAR, near)


def _apart_and_near(tokens: Tensor, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return how little each token (B, N) is like the mean of the image tokens, and how much like that of the words."""
    unit = directions(tokens)
    common, asked = (directions(which[:, None, :].to(unit.dtype) @ unit) for which in (image, words))  # (B, 1, C)
    return -(unit @ common.mT)[..., 0], (unit @ asked.mT)[..., 0]


def needed_to_recover(tokens: Tensor, image: Tensor, words: Tensor) -> int:
    """Return the fewest image tokens of one prompt with which `recovered` keeps all that stand out by either of its scores.

    As many stand out as a score has outliers (`ops.outliers`), those with the best scores. Both halves have to be large enough, so
    where one score has most of the outliers this is more than the paper keeps, whose two numbers are free. `tokens`: (1, N, C);
    `image`, `words`: (1, N) booleans. At least 1, also where nothing stands out.
    """
    apart, near = (scores[image] for scores in _apart_and_near(tokens, image, words))
    places, wanted = rank(apart), rank(near) < outliers(near)
    kept = max(1, 2 * outliers(apart) - 1)
    while int((wanted & (places >= (kept + 1) // 2)).sum()) > kept // 2:
        kept += 1
    return min(kept, len(apart))


def evenly_spread(image: Tensor, kept: Tensor) -> Tensor:
    """Return scores (B, N): 1 for `kept` (B,) of the image tokens of `image` (B, N), at equal distances, 0 for the others."""
    number = image.long().cumsum(dim=-1) - 1
    count = image.long().sum(dim=-1, keepdim=True).clamp(min=1)
    kept = kept[:, None]
    return (image & (((number + 1) * kept // count) > (number * kept // count))).float()


def raters(tokens: Tensor, image: Tensor, words: Tensor) -> Tensor:
    """Return (B, N), shares that sum to 1: the words that have more to do with the picture than the mean of all words.

    For each image token a softmax over the words of ``image . word``, its mean over the image tokens, and words above the mean
    of that. `tokens`: (B, N, C), as the first block is given them; `image`, `words`: (B, N) booleans.

    Source: SparseVLM, arXiv 2410.04417, section 3.2.
    """
    tokens = tokens.float()
    alike = (tokens @ tokens.mT).masked_fill(~words[:, None, :], torch.finfo(torch.float32).min)
    shares = alike.softmax(dim=-1) * image[:, :, None]  # (B, image tokens, words)
    meant = shares.sum(dim=1) / image.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = 1 / words.sum(dim=-1, keepdim=True).clamp(min=1)  # each softmax sums to 1
    # Where no word is above the mean, all have the same share.
    chosen = (words & (meant > mean)).float()
    chosen = torch.where(chosen.sum(dim=-1, keepdim=True) > 0, chosen, words.float())
    return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)
