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
from mmcompress.passes.selector_train import NEED, channels_given_out, seconds_a_picture, trained
from mmcompress.passes.token_counts import kept_of_pictures, require_floor
from mmcompress.passes.token_relevance import relevance_by_place, require_answers
from mmcompress.surgery.picture_places import bind_places
from mmcompress.surgery.reducing import LEARNED, SCORED, Choice, bind_connector, bind_scorer, choice_of, handed_on
from mmcompress.surgery.reduction import ledger_of
from mmcompress.surgery.selector import HEAD_WIDTH, TokenTransformer
from mmcompress.views import Connector, Tower

RELEVANCE = "relevance"


@dataclass(frozen=True)
class ReduceVisualTokens:
    """Hand fewer tokens of each picture to the language model, which is not trained for it.

    They become fewer behind the connector: the prompt, the time to the first token and the cache of keys and values shrink with
    them, the vision encoder stays as it is. The choice is stored in the checkpoint and is part of its exported graph. Nothing is
    added to the weights, except by method "selector": a small network that learns from pictures alone which tokens the others can
    stand in for. Method "random" is the control that the others have to beat.
    """

    name: ClassVar[str] = "reduce-visual-tokens"

    keep: float | None = None
    """Share of a picture's tokens that is kept. Default 0.25 when nothing else says how many."""
    keep_tokens: int | None = None
    """How many tokens of a picture, or of each of its tiles, are kept, instead of `keep`."""
    latency_ms: float | None = None
    """Milliseconds that the exported model may take to the first token of an answer on this machine's processor, instead of `keep`:
    some shares are exported and timed as the recipe's `export` says (batch, runners, threads); the largest that fits is kept."""
    adaptive: bool = False
    """Count on data what stands out among the encoder's scores, by PruMerge's rule, instead of `keep`: as many tokens are kept of
    every picture as suffice for 95 in 100 of them (visionzip, prumerge, attention; needs pictures)."""
    floor: float = 0.05
    """For `adaptive`: share of a picture's tokens that is kept at least."""
    method: Literal[
        "divprune",
        "clusters",
        "visionzip",
        "prumerge",
        "attention",
        "lftr",
        "tome",
        "selector",
        "relevance",
        "pool",
        "grid",
        "random",
    ] = "clusters"
    """Which tokens are kept: the most different ones (divprune), means of clusters, those the encoder looks at and means of the
    rest (visionzip, prumerge), those alone (attention), those least like all others (lftr, our reading of that paper's abstract),
    means of similar pairs (tome), those that a small network learned to keep from pictures alone (selector; needs data), those at
    the places that answers had to do with (relevance, Chefer's; needs questions with pictures and answers), means of neighbours
    (pool, the largest grid within what is asked for), every n-th (grid), or random ones (the control)."""
    positions: Literal["original", "counted"] = "original"
    """Where the tokens that are left stand for the language model: where they were in the picture, a mean in the middle of its
    members (original), as it was trained with all of them; or one behind the other (counted)."""
    tower: str = ""
    """The tower whose tokens they are; by default the one that looks at pictures for a language model."""
    selector_epochs: int = 10
    """For method selector: how often it learns from each picture."""
    selector_pictures: int = 2000
    """For method selector: how many pictures of the data it learns from at most."""
    selector_width: int = 64
    """For method selector: channels inside its blocks, whatever those of the tokens; a multiple of 16."""
    selector_layers: int = 3
    """For method selector: its blocks."""

    def __post_init__(self) -> None:
        require_kept_share("reduce-visual-tokens.keep", self.keep, "0.25 keeps a quarter")
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise UsageError(
                f"reduce-visual-tokens.keep_tokens is {self.keep_tokens}; expected a number >= 1",
                hint="64 keeps 64 tokens of each picture",
            )
        counting = self.adaptive or None
        require_one(
            self.name, keep=self.keep, keep_tokens=self.keep_tokens, latency_ms=self.latency_ms, adaptive=counting
        )
        require_floor("reduce-visual-tokens.floor", self.floor, self.adaptive, "adaptive")
        if self.adaptive and self.method not in SCORED:
            raise UsageError(
                f"reduce-visual-tokens.adaptive counts what the encoder's scores make stand out, and {self.method} asks for none",
                hint=f"give --method {' or '.join(SCORED)}, or say how many with keep",
            )
        require_milliseconds("reduce-visual-tokens.latency_ms", self.latency_ms)
        for key in ("selector_epochs", "selector_pictures", "selector_layers"):
            if getattr(self, key) < 1:
                raise UsageError(
                    f"reduce-visual-tokens.{key} is {getattr(self, key)}; expected a number >= 1",
                    hint=f"leave it out for {getattr(ReduceVisualTokens, key)}",
                )
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        unused = [key for key in plain if key.startswith("selector_") and getattr(self, key) != plain[key]]
        if unused and self.method != LEARNED:
            raise UsageError(
                f"reduce-visual-tokens.{unused[0]} is for method {LEARNED}, and {self.method} is asked for",
                hint=f"leave it out, or give --method {LEARNED}",
            )
        if self.selector_width < HEAD_WIDTH or self.selector_width % HEAD_WIDTH:
            raise UsageError(
                f"reduce-visual-tokens.selector_width is {self.selector_width}; expected a multiple of {HEAD_WIDTH}",
                hint="64 and 128 are usual",
            )

    def control(self, decisions: Mapping[str, Any] | None = None) -> ReduceVisualTokens | None:
        """Return the pass that keeps as many tokens at random."""
        if self.method == "random":
            return None
        if decisions is None or (self.latency_ms is None and not self.adaptive):
            amount = {"keep": self.keep, "keep_tokens": self.keep_tokens, "latency_ms": self.latency_ms}
        else:
            amount = {"keep_tokens": int(decisions["kept"])}
        return ReduceVisualTokens(**amount, method="random", positions=self.positions, tower=self.tower)  # type: ignore[arg-type]

    def streams(self, data: bool = False) -> bool:
        """Whether no weight is looked at: only a latency is that of the whole model, and features and scores are made by it."""
        return self.latency_ms is None and not self.adaptive and self.method not in (LEARNED, RELEVANCE) and not data

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """For a latency, some shares are exported and timed; a selector sees each picture once, then learns from its features.

        Counting sees each picture once.
        """
        timed = 0.0 if self.latency_ms is None else SECONDS
        if self.adaptive:
            return work.samples * work.forward
        if self.method == RELEVANCE:
            return timed + 4 * work.samples * work.forward
        if self.method != LEARNED:
            return timed
        connector = self._connector(bundle)
        selector = TokenTransformer(grid=connector.grid, **self._shape(bundle))
        learned = self.selector_epochs * seconds_a_picture(selector, connector.tokens)
        return timed + min(work.dataset, self.selector_pictures) * (work.forward + learned)

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
        if self.method == RELEVANCE:
            require_answers(bundle)
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
        """Settle how many tokens are kept, for "random" draw them (from the run's seed), for "selector" settle its shape."""
        connector = self._connector(bundle)
        if self.latency_ms is not None:
            stages = (self._tower(bundle).name, "prompt")
            return solved(self.name, self.latency_ms, stages, self._keeping, 1 / connector.tokens, bundle, context)
        kept, small = self._kept(connector)
        facts: dict[str, Any] = {}
        if self.adaptive:
            kept, facts = kept_of_pictures(bundle, self._tower(bundle), self.method, self.floor, context)
        decisions: dict[str, Any] = {"kept": kept}
        if self.method == "pool":
            decisions["small"] = list(small)
        if self.method == "random" and kept < connector.tokens:
            generator = torch.Generator().manual_seed(context.seed)
            decisions["drawn"] = drawn(connector.tokens, kept, generator).tolist()
        if self.method == RELEVANCE and kept < connector.tokens:
            relevance = relevance_by_place(bundle, connector.tokens, context)
            decisions["drawn"] = sorted(relevance.argsort(descending=True, stable=True)[:kept].tolist())
        if self.method == LEARNED and kept < connector.tokens:
            context.require_data(NEED)
            decisions["selector"] = self._shape(bundle)
        return Plan(decisions, facts=facts)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Bind the connector's forward, and that of the attention it asks; with nothing to leave out, leave the model alone.

        A selector joins the connector untrained.
        """
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
            apart=self.positions == "original",
        )
        shape = plan.decisions.get("selector")
        with bundle.device:
            selector = TokenTransformer(grid=connector.grid, **shape) if shape else None
        bind_connector(bundle.module(connector.path), choice, selector)
        if self.method in SCORED:
            bind_scorer(bundle.module(connector.scorer), choice)
        if choice.apart:
            language, prompt = next((tower, tower.prompt) for tower in bundle.towers() if tower.prompt is not None)
            bind_places(bundle.module(prompt.path), bundle.module(language.path), prompt.image_tokens, choice)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Train the selector, if there is one; report the tokens of a picture before and after."""
        connector = self._connector(bundle)
        module = bundle.module(connector.path)
        kept = handed_on(module, connector.tokens)
        facts: dict[str, Any] = {
            "tokens": connector.tokens,
            "tokens_kept": kept,
            "keep": round(kept / connector.tokens, 4),
        }
        if self.method == LEARNED and kept < connector.tokens:
            facts["selector"] = trained(
                bundle, self._tower(bundle), context, self.selector_pictures, self.selector_epochs
            )
        return facts

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

    def _shape(self, bundle: Bundle) -> dict[str, int]:
        """Return what shape a selector of this model's tokens has."""
        channels = channels_given_out(bundle, self._tower(bundle))
        return {"channels": channels, "outputs": 1, "width": self.selector_width, "layers": self.selector_layers}

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
