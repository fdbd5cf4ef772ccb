"""How alike the tokens are that the blocks of a tower could merge, seen while it runs.

For blocks bound by `merging.bind_block`, which may merge already: what is seen of a block are the tokens that those before it left.

Shapes: B batch, N tokens, D key width, K pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from mmcompress.ops.pairs import bipartite_pairs, energy_pairs, guided_pairs
from mmcompress.surgery.attention import give_keys
from mmcompress.surgery.reduction import ATTRIBUTE, MARGIN, Method, Reduction

COMPARING: tuple[Method, ...] = ("tome", "pitome", "crossget")
"""Methods that merge by how alike tokens are."""


@contextlib.contextmanager
def watching_pairs(blocks: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """While it is open, each call of a block adds its pairs (B, K), see `ops.pairs`, to its list.

    The attentions go on giving keys afterwards: for models that are thrown away. Raises UsageError for one that cannot give any.
    """
    found: list[list[Tensor]] = [[] for _ in blocks]
    owns: list[Reduction] = [getattr(block, ATTRIBUTE) for block in blocks]
    attentions = [block.get_submodule(own.attention) for block, own in zip(blocks, owns, strict=True)]
    give_keys(attentions)
    hooks = [
        attention.register_forward_hook(_hook(own, rows))
        for attention, own, rows in zip(attentions, owns, found, strict=True)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _hook(own: Reduction, found: list[Tensor]) -> Callable[..., None]:
    def after(_: nn.Module, __: Any, made: tuple[Tensor, Tensor]) -> None:
        flow = own.ledger.flow
        found.append(_pairs(own, made[1].detach(), flow.sizes if flow is not None and own.ledger.padded else None))

    return after


def _pairs(own: Reduction, keys: Tensor, sizes: Tensor | None) -> Tensor:
    """Return (B, K) of `keys` (B, N, D); `sizes`: (B, N), where some are padding."""
    match own.method:
        case "tome":
            return bipartite_pairs(keys, own.protected, sizes)
        case "pitome":
            return energy_pairs(keys, own.protected, MARGIN * (1 - own.depth), sizes)
        case "crossget":
            return guided_pairs(keys, own.protected, sizes)
    raise AssertionError(f"{own.method} compares no tokens; the pass refuses it")
