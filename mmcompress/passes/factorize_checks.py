"""Which parameters of `factorize` go together, and which models it can work on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError, closest
from mmcompress.passes.base import require_one
from mmcompress.passes.factorize_ranks import layer_paths
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.low_rank import LowRankLinear
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.factorize import Factorize

KINDS = ("attention", "mlp")


def require_sensible(settings: Factorize) -> None:
    """Raise UsageError for a value that is out of range, or asks for what another one rules out."""
    for key, value in {"ratio": settings.ratio, **{f"ratios.{k}": v for k, v in settings.ratios.items()}}.items():
        if not 0 <= value < 1:
            raise UsageError(f"factorize.{key} is {value}; expected 0 <= ratio < 1", hint="it is the share removed")
    if settings.target is not None and not 1 <= settings.target < math.inf:
        raise UsageError(f"factorize.target is {settings.target}; expected at least 1", hint="it counts parameters")
    require_one("factorize", target=settings.target, ratios=settings.ratios or None)
    if not 0 <= settings.min_keep <= 1:
        raise UsageError(f"factorize.min_keep is {settings.min_keep}; expected 0..1", hint="it is the share that stays")
    if settings.multiple < 1:
        raise UsageError(f"factorize.multiple is {settings.multiple}; expected at least 1", hint="8 suits most kernels")
    if not 0 <= settings.alpha <= 1:
        raise UsageError(f"factorize.alpha is {settings.alpha}; expected 0..1", hint="0.5 is the default")
    unknown = [kind for kind in settings.layers if kind not in KINDS]
    if unknown or not settings.layers:
        raise UsageError(
            f"factorize.layers is {list(settings.layers)}", hint=closest(unknown[0] if unknown else "", KINDS)
        )


def require_factorizable(settings: Factorize, bundle: Bundle, towers: Sequence[Tower]) -> None:
    """Raise UsageError where layers of `towers` are no plain Linears any more."""
    for tower in towers:
        for path in layer_paths(tower, settings.layers):
            module = bundle.module(path)
            if isinstance(module, LowRankLinear):
                raise UsageError(
                    f"{path} has two factors already",
                    hint="start from the checkpoint before that with a larger ratio, or name other towers with --towers",
                )
            if not isinstance(module, nn.Linear) or is_float_coded(module):
                raise UsageError(
                    f"{path} is a {type(module).__name__}; factorize replaces nn.Linear",
                    hint="put factorize before quantize",
                )
