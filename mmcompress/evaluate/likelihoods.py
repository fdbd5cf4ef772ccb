"""How probable a model finds the right answers, led through each of them token by token.

Shape alphabet: B batch, N samples, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Sample, batches
from mmcompress.errors import UsageError
from mmcompress.ops.losses import token_log_likelihoods
from mmcompress.progress import Progress, Silent, track

BATCH = 8
"""Answers at once at most: their distributions are T * V wide, 7 MB an answer for the vocabulary of Whisper."""


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """Of N samples' first texts."""

    log: NDArray[np.float64]
    """(N,) ln p of the text's tokens and, where it was not cut, of ending there."""
    tokens: NDArray[np.int64]
    """(N,) how many tokens that is."""
    greedy: NDArray[np.bool_]
    """(N,) whether each token is the most probable one: the text is what the model would answer, as far as it goes."""


def read_dataset(bundle: Bundle, dataset: Dataset, batch: int = 32, progress: Progress | None = None) -> Likelihoods:
    """Lead the model through the first text of every sample. Raises what `read_answers` raises."""
    size = min(batch, BATCH)
    total = -(-len(dataset) // size)
    shown = track(batches(dataset, size), progress or Silent(), "reading the answers", total)
    parts = [read_answers(bundle, samples) for samples in shown]
    return Likelihoods(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("log", "tokens", "greedy"))
    )


@torch.inference_mode()
def read_answers(bundle: Bundle, samples: Sequence[Sample], with_end: bool = True) -> Likelihoods:
    """Lead the model through the first text of a few samples, all at once; `with_end`: and see whether it would end there.

    Raises UsageError where the family gives no probabilities, for a sample without a text or what it is about, and for a text
    without a token.
    """
    family = bundle.forced
    items = [bundle.items(family.answering, sample) for sample in samples]
    for sample, found in zip(samples, items, strict=True):
        if not found:
            raise UsageError(
                f"sample '{sample.key}' lacks a text, or what it is about",
                hint="every sample needs both for perplexity",
            )
    bundle.model.eval()
    inputs = bundle.prepare(family.answering, [found[0] for found in items])
    tokens = family.next_tokens(bundle.model, inputs)
    if not with_end:
        special = torch.tensor(bundle.processor.tokenizer.all_special_ids, device=tokens.device)
        tokens = tokens.masked_fill(torch.isin(tokens, special), -1)
    counts = (tokens >= 0).sum(1)
    if not counts.all():
        key = samples[int(counts.argmin())].key
        raise UsageError(f"the text of sample '{key}' has no tokens", hint="leave the sample out")
    roots = bundle.encode(family.answering, inputs).unflatten(1, (tokens.shape[1], -1))
    greedy = ((roots.argmax(2) == tokens) | (tokens < 0)).all(1)
    said = tokens >= 0
    each = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
    each[said] = token_log_likelihoods(roots[said], tokens[said]).double()
    return Likelihoods(each.sum(1).cpu().numpy(), counts.cpu().numpy(), greedy.cpu().numpy())
