"""What routers of experts decide while a model runs.

Shape alphabet: T tokens, E experts, K experts that a token goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmcompress.surgery.watch import Watch


@contextmanager
def watch_routing(routers: Mapping[str, nn.Module], record: Callable[[str, Tensor, Tensor], None]) -> Iterator[Watch]:
    """Call `record(name, weights (T, K), indices (T, K))` for the tokens that count, each time a router has chosen."""
    watch = Watch()

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            _, weights, indices = output
            # Routers are given the tokens of all samples in one row.
            if watch.mask is not None and watch.mask.numel() == len(weights):
                counts = watch.mask.flatten().bool()
                weights, indices = weights[counts], indices[counts]
            record(name, weights.detach(), indices)

        return after

    handles = [router.register_forward_hook(hook(name)) for name, router in routers.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
