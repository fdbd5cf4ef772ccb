"""The pass `coarsen-tokens`: blocks compute with runs of tokens as one where nobody looks closely."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.coarsening import PARTS, tokens_left
from mmcompress.ops.dropping import drawn_factors
from mmcompress.passes.base import Context, Plan, Work, require_kept_share
from mmcompress.surgery.coarsening import Coarsening, bind, coarsening_of
from mmcompress.surgery.reduction import is_reduced
from mmcompress.views import Tower

WHOLE = 3
"""One block of so many sees all tokens before the others begin, as in the paper (4 of 12)."""


@dataclass(frozen=True)
class CoarsenTokens:
    """Let an encoder's blocks compute with runs of neighbouring tokens as one where little is looked at (Vcc), with no training.

    For long texts and recordings, whatever their length. Which runs are coarse is chosen anew before every block; what a block says
    of a run is said to each of its tokens, so all of them come out. Nothing is added to the weights; the choice is stored in the
    checkpoint and is part of its exported graph. Method "random" makes runs coarse at random: the control.
    """

    name: ClassVar[str] = "coarsen-tokens"

    keep: float = 0.5
    """Share of a sample's tokens that each of these blocks computes with; one for each run is the least."""
    run: int = 16
    """How many neighbouring tokens can stand as one."""
    first: int | None = None
    """How many blocks see all tokens before that, at least 1. Default: a third of them."""
    method: Literal["vcc", "random"] = "vcc"
    """Which runs are coarse: those that the class token, or where there is none all tokens, looked at least in the block before
    (vcc), or random ones (the control)."""
    tower: str = ""
    """The tower whose tokens they are; by default the only one where they stand in a line."""

    def __post_init__(self) -> None:
        require_kept_share("coarsen-tokens.keep", self.keep, "0.5 computes with half of the tokens")
        if self.run < 2:
            raise UsageError(f"coarsen-tokens.run is {self.run}; expected a number >= 2", hint="16 is the paper's")

    def control(self, decisions: Mapping[str, Any] | None = None) -> CoarsenTokens | None:
        """Return the pass that makes as many tokens coarse at random."""
        return None if self.method == "random" else dataclasses.replace(self, method="random")

    def streams(self, data: bool = False) -> bool:
        """Whether no weight is looked at: none is."""
        return not data

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Nothing is looked at."""
        return 0.0

    def check(self, bundle: Bundle) -> None:
        """Refuse towers whose tokens do not stand in a line, too few blocks, and a second time."""
        tower = self._tower(bundle)
        first = self._first(tower)
        if not 1 <= first < len(tower.blocks):
            raise UsageError(
                f"coarsen-tokens.first is {first}, of {len(tower.blocks)} blocks of the {tower.name} tower; "
                "at least one sees all tokens, and one does not",
                hint=f"use 1 <= first <= {len(tower.blocks) - 1}" if len(tower.blocks) > 1 else "use prune or quantize",
            )
        if any(coarsening_of(bundle.module(block.path)) for block in tower.blocks):
            raise UsageError(
                f"the {tower.name} tower coarsens tokens already",
                hint="start from the checkpoint before that, with the smaller keep",
            )
        if any(is_reduced(bundle.module(block.path)) for block in tower.blocks):
            raise UsageError(
                f"the {tower.name} tower merges tokens, and a merged one has no neighbours of its own",
                hint="start from the checkpoint before that, and use one of the two",
            )

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Settle the parts of 1000 that are kept and where it begins; for "random", draw."""
        decisions: dict[str, Any] = {"keep": round(self.keep * PARTS), "first": self._first(self._tower(bundle))}
        if self.method == "random":
            decisions["drawn"] = list(drawn_factors(context.seed))
        return Plan(decisions)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Bind the blocks, and the attentions that say what is looked at; with all kept, leave the model alone."""
        keep = int(plan.decisions["keep"])
        if keep == PARTS:
            return
        tower = self._tower(bundle)
        assert tower.line is not None, "it is what _tower looks for"
        how = Coarsening(keep, self.run, tower.line.protected, tuple(plan.decisions.get("drawn", ())))
        names = [block.attention.path.removeprefix(f"{block.path}.") for block in tower.blocks]
        bind([bundle.module(block.path) for block in tower.blocks], names, int(plan.decisions["first"]), how)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Change nothing; report what blocks compute with of some lengths."""
        tower = self._tower(bundle)
        assert tower.line is not None, "it is what _tower looks for"
        keep, protected = round(self.keep * PARTS), tower.line.protected
        lengths = (64, 256, 1024)
        return {
            "keep": self.keep,
            "first": self._first(tower),
            "rows_of_tokens": {str(count): int(tokens_left(count, keep, self.run, protected)) for count in lengths},
        }

    def _tower(self, bundle: Bundle) -> Tower:
        """Return the tower meant. Raises UsageError where none is called that, or its tokens do not stand in a line."""
        towers = [bundle.tower(self.tower)] if self.tower else bundle.towers()
        found = [tower for tower in towers if tower.line is not None]
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(
                f"the tokens of {' or '.join(tower.name for tower in found)} can be coarsened",
                hint="say which with tower",
            )
        where = f"the {self.tower} tower's tokens" if self.tower else f"the tokens of {bundle.family.name} models"
        raise UsageError(
            f"{where} cannot be coarsened: that needs an encoder of texts or sounds whose tokens all look at one another and which "
            "takes them in any number",
            hint="use merge-tokens for pictures; mmc inspect shows what can be done",
        )

    def _first(self, tower: Tower) -> int:
        """Return how many blocks see all tokens."""
        return max(1, len(tower.blocks) // WHOLE) if self.first is None else self.first
