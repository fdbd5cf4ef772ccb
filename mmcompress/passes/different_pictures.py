"""The pictures of a dataset, each once, in an order that the seed says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context


def different_pictures(bundle: Bundle, tower: str, context: Context, what: str) -> Iterator[dict[str, Tensor]]:
    """Yield prepared pictures, a few at a time, each once however many samples show it.

    Raises UsageError without data, saying that `what` needs some.
    """
    data = context.require_data(what)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(context.seed)).tolist()
    seen: set[bytes] = set()
    waiting: list[Any] = []
    for index in order:
        for item in bundle.items(tower, data[index])[:1]:
            digest = _digest(bundle.prepare(tower, [item]))
            if digest not in seen:
                seen.add(digest)
                waiting.append(item)
        if len(waiting) == context.batch_size:
            yield bundle.prepare(tower, waiting)
            waiting = []
    if waiting:
        yield bundle.prepare(tower, waiting)


def _digest(inputs: dict[str, Tensor]) -> bytes:
    whole = hashlib.sha256()
    for value in inputs.values():
        whole.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.digest()
