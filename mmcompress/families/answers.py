"""What families share whose models write text: how next-token distributions become the rows that passes judge a decoder by."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.utils import logging

from mmcompress.errors import UsageError
from mmcompress.parts import Decoding

FORCED_TOKENS = 32
"""How many tokens of a reference answer a decoder is led through: its rows are T * vocabulary wide."""


UNKNOWN = (
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "forced_eos_token_id",
    "forced_bos_token_id", "min_length", "min_new_tokens", "exponential_decay_length_penalty", "no_speech_threshold",
    "guidance_scale", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
)  # fmt: skip
"""Settings of transformers' generation that change what is written and that the exported loop does not know."""


def next_token_roots(logits: Tensor, mask: Tensor) -> Tensor:
    """Return sqrt(p) of the next-token distributions p of `logits` (B, T, V) as (B, T * V), zero where `mask` (B, T) is.

    A cosine of two models' rows is then the mean Bhattacharyya coefficient of their distributions, and 1 - cosine is, to leading
    order, a quarter of their mean KL divergence. A small change moves the normalised row by a squared distance of a quarter of the
    mean Fisher information: that is what Taylor scores in this space are.
    """
    # exp(log p / 2), because sqrt has no gradient where p underflows to 0.
    roots = (logits.float().log_softmax(-1) / 2).exp()
    return (roots * mask[:, :, None]).flatten(1)


def greedy(settings: Any, max_new_tokens: int) -> Any:
    """Return a copy of a generation config that always takes the likeliest token.

    `max_new_tokens` holds where the settings name no other.
    """
    made = copy.deepcopy(settings)
    made.do_sample, made.num_beams = False, 1
    made.temperature = made.top_p = made.top_k = None
    made.max_length, made.max_new_tokens = None, made.max_new_tokens or max_new_tokens
    return made


def decoding(
    settings: Any,
    limit: int,
    padding: int,
    start: tuple[tuple[int, ...], ...] = (),
    image_token: int | None = None,
) -> Decoding:
    """Return how transformers' own greedy generation writes with a generation config.

    Raises UsageError for settings that the loop around exported parts does not cover.
    """
    for name in UNKNOWN:
        value = getattr(settings, name, None)
        if value not in (None, 0, 1.0, [], {}):
            raise UsageError(
                f"generation_config.json sets {name} to {value}, which exported models do not know",
                hint="remove it, or answer with the checkpoint",
            )
    end = settings.eos_token_id
    return Decoding(
        end=() if end is None else tuple(end if isinstance(end, list) else [end]),
        padding=padding,
        limit=limit,
        start=start,
        suppressed=tuple(settings.suppress_tokens or ()),
        suppressed_first=tuple(settings.begin_suppress_tokens or ()),
        image_token=image_token,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' remarks on generation settings that are meant: no mask (Whisper reads silence), both length limits."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
