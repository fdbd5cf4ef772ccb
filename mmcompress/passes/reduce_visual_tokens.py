"""The pass `reduce-visual-tokens`: a language model is given fewer tokens of each picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.token_choice import drawn
from mmcompress.passes.base import Context, Plan, Work, require_kept_share, require_milliseconds, require_one
from mmcompress.passes.latency import SECONDS, solved
from mmcompress.surgery.merging import ledger_of
from mmcompress.surgery.reducing import SCORED, Choice, bind_connector, bind_scorer, choice_of, handed_on
from mmcompress.views import Connector, Tower


@dataclass(frozen=True)
class ReduceVisualTokens:
    """Hand fewer tokens of each picture to the language model, with no training.

    They become fewer behind the connector: the prompt, the time to the first token and the cache of keys and values shrink with
    them, the vision encoder stays as it is. Nothing is added to the weights; the choice is stored in the checkpoint and is part of
    its exported graph. Method "random" is the control that the others have to beat.
    """

    name: ClassVar[str] = "reduce-visual-tokens"

    keep: float | None = None
    """Share of a picture's tokens that is kept. Default 0.25 when nothing else says how many."""
    keep_tokens: int | None = None
    """How many tokens of a picture, or of each of its tiles, are kept, instead of `keep`."""
    latency_ms: float | None = None
    """Milliseconds that the exported model may take to the first token of an answer on this machine's processor, instead of `keep`:
    some shares are exported and timed as the recipe's `export` says (batch, runners, threads); the largest that fits is kept."""
    method: Literal[
        "divprune", "clusters", "visionzip", "prumerge", "attention", "lftr", "tome", "pool", "grid", "random"
    ] = "clusters"
    """Which tokens are kept: the most different ones (divprune), means of clusters, those the encoder looks at and means of the
    rest (visionzip, prumerge), those alone (attention), those least like all others (lftr, our reading of that paper's abstract),
    means of similar pairs (tome), means of neighbours (pool, the largest grid within what is asked for), every n-th (grid), or
    random ones (the control)."""
    tower: str = ""
    """The tower whose tokens they are; by default the one that looks at pictures for a language model."""

    def __post_init__(self) -> None:
        require_kept_share("reduce-visual-tokens.keep", self.keep, "0.25 keeps a quarter")
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise UsageError(
                f"reduce-visual-tokens.keep_tokens is {self.keep_tokens}; expected a number >= 1",
                hint="64 keeps 64 tokens of each picture",
            )
        require_one(self.name, keep=self.keep, keep_tokens=self.keep_tokens, latency_ms=self.latency_ms)
        require_milliseconds("reduce-visual-tokens.latency_ms", self.latency_ms)

    def control(self, decisions: Mapping[str, Any] | None = None) -> ReduceVisualTokens | None:
        """Return the pass that keeps as many tokens at random."""
        if self.method == "random":
            return None
        if self.latency_ms is None or decisions is None:
            return dataclasses.replace(self, method="random")
        return ReduceVisualTokens(keep_tokens=int(decisions["kept"]), method="random", tower=self.tower)

    def streams(self) -> bool:
        """Whether no weight is looked at: only a latency is that of the whole model."""
        return self.latency_ms is None

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """No sample is looked at; for a latency, some shares are exported and timed."""
        return 0.0 if self.latency_ms is None else SECONDS

    def check(self, bundle: Bundle) -> None:
        """Refuse models whose image tokens cannot become fewer, more tokens than there are, and a second reduction."""
        connector = self._connector(bundle)
        if choice_of(bundle.module(connector.path)):
            raise UsageError(
                "the language model is given fewer tokens of each picture already",
                hint="start from the checkpoint before that, with the smaller keep",
            )
        if self.keep_tokens is not None and self.keep_tokens > connector.tokens:
            raise UsageError(
                f"reduce-visual-tokens.keep_tokens is {self.keep_tokens}, but a picture has {connector.tokens} tokens",
                hint=f"keep fewer than {connector.tokens}",
            )
        if self.method in SCORED and not connector.scorer:
            raise UsageError(
                f"method {self.method} asks what the encoder looked at, and {bundle.family.name} cannot tell for its image tokens",
                hint="use clusters or divprune, which look at the tokens themselves",
            )
        asked = [block for block in self._tower(bundle).blocks if block.attention.path == connector.scorer]
        if self.method in SCORED and any(ledger_of(bundle.module(block.path)) for block in asked):
            raise UsageError(
                f"method {self.method} asks what the encoder looked at, which merges tokens before that",
                hint="use clusters or divprune, which look at the tokens themselves",
            )

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Settle how many tokens are kept and, for "random", draw them (from the run's seed)."""
        connector = self._connector(bundle)
        if self.latency_ms is not None:
            stages = (self._tower(bundle).name, "prompt")
            return solved(self.name, self.latency_ms, stages, self._keeping, 1 / connector.tokens, bundle, context)
        kept, small = self._kept(connector)
        decisions: dict[str, Any] = {"kept": kept}
        if self.method == "pool":
            decisions["small"] = list(small)
        if self.method == "random" and kept < connector.tokens:
            generator = torch.Generator().manual_seed(context.seed)
            decisions["drawn"] = drawn(connector.tokens, kept, generator).tolist()
        return Plan(decisions)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Bind the connector's forward, and that of the attention it asks; with nothing to leave out, leave the model alone."""
        connector = self._connector(bundle)
        kept = int(plan.decisions["kept"])
        if kept == connector.tokens:
            return
        rows, columns = plan.decisions.get("small", (0, 0))
        choice = Choice(
            method=self.method,
            tokens=connector.tokens,
            kept=kept,
            grid=connector.grid,
            small=(rows, columns),
            drawn=tuple(plan.decisions.get("drawn", ())),
            leading=connector.leading,
        )
        bind_connector(bundle.module(connector.path), choice)
        if self.method in SCORED:
            bind_scorer(bundle.module(connector.scorer), choice)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Change nothing; report the tokens of a picture before and after."""
        connector = self._connector(bundle)
        kept = handed_on(bundle.module(connector.path), connector.tokens)
        return {"tokens": connector.tokens, "tokens_kept": kept, "keep": round(kept / connector.tokens, 4)}

    def _connector(self, bundle: Bundle) -> Connector:
        """Return the connector of the tower meant. Raises what `_tower` raises."""
        connector = self._tower(bundle).connector
        assert connector is not None, "it is what _tower looks for"
        return connector

    def _tower(self, bundle: Bundle) -> Tower:
        """Return the tower meant. Raises UsageError where its connector may not hand on fewer tokens, or there is none."""
        towers = [bundle.tower(self.tower)] if self.tower else bundle.towers()
        for tower in towers:
            if tower.connector is not None:
                return tower
        reasons = {tower.why_no_connector for tower in towers if tower.why_no_connector}
        raise UsageError(
            f"{bundle.family.name} models cannot be given fewer image tokens: "
            f"{'; '.join(reasons) or 'nothing is handed from here to a language model'}",
            hint="mmc inspect shows what can be done",
        )

    def _keeping(self, share: float) -> ReduceVisualTokens:
        return dataclasses.replace(self, latency_ms=None, keep=share)

    def _kept(self, connector: Connector) -> tuple[int, tuple[int, int]]:
        """Return M and, for "pool", its rows and columns: the largest grid of the picture's shape within the tokens asked for.

        So the control, which keeps all that was asked for, is never at a disadvantage.
        """
        wanted = self.keep_tokens
        if wanted is None:
            wanted = max(1, round((0.25 if self.keep is None else self.keep) * connector.tokens))
        if self.method != "pool":
            return wanted, (0, 0)
        share = math.sqrt(wanted / connector.tokens)
        rows, columns = (max(1, int(round(side * share, 9))) for side in connector.grid)
        return rows * columns, (rows, columns)
