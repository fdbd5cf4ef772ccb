"""What families share whose models write text: how next-token distributions become the rows that passes judge a decoder by."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.utils import logging

from mmcompress.errors import NotExportable

FORCED_TOKENS = 32
"""How many tokens of a reference answer a decoder is led through: its rows are T * vocabulary wide."""


def next_token_roots(logits: Tensor, mask: Tensor) -> Tensor:
    """Return sqrt(p) of the next-token distributions p of `logits` (B, T, V) as (B, T * V), zero where `mask` (B, T) is.

    A cosine of two models' rows is then the mean Bhattacharyya coefficient of their distributions, and 1 - cosine is, to leading
    order, a quarter of their mean KL divergence. A small change moves the normalised row by a squared distance of a quarter of the
    mean Fisher information: that is what Taylor scores in this space are.
    """
    return (roots(logits) * mask[:, :, None]).flatten(1)


def roots(logits: Tensor) -> Tensor:
    """Return sqrt(p) of the distributions p over the last dimension of `logits`."""
    # exp(log p / 2), because sqrt has no gradient where p underflows to 0.
    return (logits.float().log_softmax(-1) / 2).exp()


def greedy(settings: Any, max_new_tokens: int) -> Any:
    """Return a copy of a generation config that always takes the likeliest token.

    `max_new_tokens` holds where the settings name no other.
    """
    made = copy.deepcopy(settings)
    made.do_sample, made.num_beams = False, 1
    made.temperature = made.top_p = made.top_k = None
    made.max_length, made.max_new_tokens = None, made.max_new_tokens or max_new_tokens
    return made


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' remarks on generation settings that are meant: no mask (Whisper reads silence), both length limits."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


UNKNOWN = (
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "forced_eos_token_id",
    "forced_bos_token_id", "min_length", "min_new_tokens", "exponential_decay_length_penalty", "no_speech_threshold",
    "guidance_scale", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
)  # fmt: skip
"""Settings of transformers' generation that change what is written and that the exported loop does not know."""


def require_known_settings(settings: Any) -> None:
    """Raise NotExportable where a generation config says what the loop around exported graphs does not do."""
    for name in UNKNOWN:
        value = getattr(settings, name, None)
        if value not in (None, 0, 1.0, [], {}):
            raise NotExportable(
                f"generation_config.json sets {name} to {value}, which exported models do not know",
                hint="remove it, or answer with the checkpoint",
            )
