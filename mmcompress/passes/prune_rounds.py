"""Iterative pruning: a cut in several rounds, with training between them: the last round sees what the first ones left, healed."""

from __future__ import annotations

import math
from typing import Any

from mmcompress.errors import UsageError
from mmcompress.passes.prune import Prune


def of_each_round(whole: Prune, rounds: int) -> dict[str, Any]:
    """Return the shares that each round removes of what is left, which together are those of `whole`: (1 - r_i)^rounds = 1 - r.

    Rounded up in the sixth place, so that no less goes in the end. Raises UsageError where no share is what is asked for.
    """
    for name in ("target", "latency_ms"):
        if getattr(whole, name) is not None:
            raise UsageError(f"rounds share out a ratio, and prune.{name} is given", hint="use ratio or ratios")

    def part(share: float) -> float:
        return share and math.ceil((1 - (1 - share) ** (1 / rounds)) * 1e6) / 1e6

    ratios = {tower: part(share) for tower, share in whole.ratios.items()}
    return {"ratio": part(whole.ratio), **({"ratios": ratios} if ratios else {})}
