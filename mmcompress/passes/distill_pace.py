"""What else changes in a student from step to step, while its weights train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


class Pace:
    """Hears of every step before and after it; this one changes nothing."""

    def before(self, step: int, steps: int) -> None:
        """Get the student ready for step `step` of `steps`. Gradients that were computed only to be timed are forgotten here."""

    def after(self, step: int, steps: int) -> None:
        """Take note of what the gradients of step `step` of `steps` were; the weights have moved."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a resumed run needs, by name; it is read once before training, and then written over."""
        return {}


@dataclass(frozen=True)
class Annealing(Pace):
    """A student that merges tokens comes down to its merges in the first `share` of the steps."""

    share: float
    to: Callable[[float], None]
    """Sets how much of the annealing is over, 0 to 1."""

    def before(self, step: int, steps: int) -> None:
        """Merge as many tokens as step `step` should."""
        self.to(step / (self.share * steps))
