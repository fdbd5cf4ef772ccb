"""The pass `drop-visual-tokens`: image tokens leave a language model on their way through its blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.budget import largest_within
from mmcompress.ops.dropping import counts_kept, drawn_factors
from mmcompress.passes.base import Context, Plan, Work, require_kept_share, require_milliseconds, require_one
from mmcompress.passes.latency import SECONDS, solved
from mmcompress.passes.merge_schedule import CLOSE, block_macs
from mmcompress.passes.token_counts import FLOOR, kept_of_questions, require_floor
from mmcompress.surgery.dropping import bind, dropping_of
from mmcompress.surgery.prompt_flow import Drop, Dropping
from mmcompress.views import Prompt, Tower

AFTER = {
    "fastv": (2,),
    "pyramiddrop": (0.25, 0.5, 0.75),
    "sparsevlm": (2 / 32, 6 / 32, 15 / 32),
    "recoverable": (1,),
    "lftr": (1,),
}
"""Where tokens leave, as the papers have it: behind so many blocks, or behind shares of the blocks."""
RECYCLING = ("sparsevlm", "recoverable")
"""Methods whose papers bring some of what leaves back as means."""
FINEST = 1 / 64


@dataclass(frozen=True)
class DropVisualTokens:
    """Let image tokens leave a language model on their way through its blocks, with no training.

    What they had to say has then been read by the words of the question; the words choose which stay, so that it depends on what
    is asked. The prompt's time and the cache of keys and values shrink from there on. Nothing is added to the weights; the places
    are stored in the checkpoint and are part of its exported graph. Methods "random" and "grid" are the controls that the others
    have to beat.
    """

    name: ClassVar[str] = "drop-visual-tokens"

    keep: float | None = None
    """Share of the image tokens that is left at the end. Default 0.5 when nothing else says how many."""
    keep_tokens: int | None = None
    """How many image tokens of a prompt are left at the end, instead of `keep`."""
    macs: float | None = None
    """Share of the blocks' multiply-adds that reading the model's example prompt keeps, its words included, instead of `keep`."""
    latency_ms: float | None = None
    """Milliseconds that the exported model may take to the first token of an answer on this machine's processor, instead of `keep`:
    some shares are exported and timed as the recipe's `export` says (batch, runners, threads); the largest that fits is kept."""
    adaptive: bool = False
    """Count on data what stands out, by Recoverable Compression's rule, instead of `keep`: the share of image tokens is kept that
    suffices for 95 in 100 questions (recoverable; needs questions about pictures)."""
    floor: float = 0.05
    """For `adaptive`: share of the image tokens that is kept at least."""
    method: Literal["fastv", "pyramiddrop", "sparsevlm", "recoverable", "lftr", "grid", "random"] = "fastv"
    """Which tokens stay: those that the question's last token looks at, chosen once (fastv) or again and again (pyramiddrop),
    those that the words look at that have to do with the picture (sparsevlm), those that stand out and those nearest to the
    question's words, half each (recoverable), those least like any before them, in the same frame or an earlier one (lftr), every
    n-th (grid), or random ones (the control). The papers of sparsevlm and recoverable also `recycle`."""
    place: Literal["blocks", "mlp", "cache"] = "blocks"
    """What they leave: the blocks that follow, with their caches (blocks); the feed-forwards of those blocks, and once the prompt
    has been read their caches (mlp, Skip-Vision): words can look at all tokens until then; or those caches alone (cache): reading
    takes as long as before, and the answer is written with a smaller cache."""
    after: tuple[int, ...] = ()
    """How many blocks the tokens have been through when they leave; several numbers let them leave in equal steps. Default: 2 for
    fastv and the controls, 1 for recoverable and lftr, a quarter, half and three quarters of the blocks for pyramiddrop, 2, 6 and
    15 of 32 for sparsevlm."""
    recycle: bool = False
    """For sparsevlm and recoverable: of the tokens that leave, the best 3 in 10 come back as means of about ten, which count among
    those kept."""
    tower: str = ""
    """The tower they leave; by default the one that is given image tokens among its words."""

    def __post_init__(self) -> None:
        require_kept_share("drop-visual-tokens.keep", self.keep, "0.5 keeps half")
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise UsageError(
                f"drop-visual-tokens.keep_tokens is {self.keep_tokens}; expected a number >= 1", hint="64 keeps 64"
            )
        require_milliseconds("drop-visual-tokens.latency_ms", self.latency_ms)
        require_kept_share("drop-visual-tokens.macs", self.macs, "0.5 keeps half of the blocks' multiply-adds")
        amounts = {"keep": self.keep, "keep_tokens": self.keep_tokens, "macs": self.macs, "latency_ms": self.latency_ms}
        require_one("drop-visual-tokens", **amounts, adaptive=self.adaptive or None)
        require_floor("drop-visual-tokens.floor", self.floor, self.adaptive, "adaptive")
        if self.adaptive and self.method != "recoverable":
            raise UsageError(
                f"drop-visual-tokens.adaptive counts outliers of method recoverable's scores, and {self.method} is asked for",
                hint="give --method recoverable, or say how many with keep",
            )
        if self.adaptive and self.recycle:
            raise UsageError(
                "drop-visual-tokens has both adaptive and recycle, whose means would take the places of tokens that were counted",
                hint="leave recycle out, or say how many with keep",
            )
        if self.place == "cache" and (self.latency_ms is not None or self.macs is not None):
            what = "macs is the work" if self.latency_ms is None else "latency_ms is the time"
            raise UsageError(
                f"drop-visual-tokens.{what} to read a prompt, which place cache does not change",
                hint="use place blocks, or give keep",
            )
        if self.recycle and (self.method not in RECYCLING or self.place != "blocks"):
            raise UsageError(
                f"drop-visual-tokens.recycle is for methods {' and '.join(RECYCLING)}, where tokens leave the blocks",
                hint=f"leave it out, or give --method {RECYCLING[0]}",
            )
        if list(self.after) != sorted(set(self.after)):
            raise UsageError(
                f"drop-visual-tokens.after is {', '.join(map(str, self.after))}; expected numbers that grow",
                hint="8,16,24 lets tokens leave three times",
            )

    def control(self, decisions: Mapping[str, Any] | None = None) -> DropVisualTokens | None:
        """Return the pass that keeps as many tokens at random in the same places."""
        if self.method == "random":
            return None
        if decisions is None:
            return dataclasses.replace(self, method="random", recycle=False, adaptive=False, floor=FLOOR)
        places = tuple(int(drop["after"]) for drop in decisions["drops"])
        keep = None if self.keep_tokens else float(decisions["keep"])
        plain = dataclasses.replace(self, method="random", recycle=False, adaptive=False, floor=FLOOR)
        return dataclasses.replace(plain, keep=keep, macs=None, latency_ms=None, after=places)

    def streams(self, data: bool = False) -> bool:
        """Whether no weight is looked at: only a latency is that of the whole model, and what stands out is seen by it."""
        return self.latency_ms is None and not self.adaptive and not data

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Counting sees each question once; for a latency, some shares are exported and timed."""
        if self.adaptive:
            return work.samples * work.forward
        return 0.0 if self.latency_ms is None else SECONDS

    def check(self, bundle: Bundle) -> None:
        """Refuse models without a prompt of image tokens, places that are not there, and a second time."""
        tower, prompt = self._language(bundle)
        if dropping_of(bundle.module(prompt.path)):
            raise UsageError(
                "image tokens leave this model's blocks already",
                hint="start from the checkpoint before that, with the smaller keep",
            )
        windows = [block.attention.window for block in tower.blocks if block.attention.window]
        if windows:
            raise UsageError(
                f"blocks of this {bundle.family.name} model see {windows[0]} tokens each; with some gone they would see others",
                hint="use reduce-visual-tokens, which gives it fewer from the start",
            )
        first, blocks = _earliest(prompt), len(tower.blocks)
        wrong = [after for after in self._after(tower) if not first <= after < blocks]
        if wrong:
            raise UsageError(
                f"drop-visual-tokens.after is {wrong[0]}; in this {bundle.family.name} model tokens can leave after "
                f"{first} to {blocks - 1} of the {blocks} blocks",
                hint=f"give --after {min(max(2, first), blocks - 1)}; reduce-visual-tokens works before the first block",
            )
        if self.place != "blocks" and len(self._after(tower)) > 1:
            raise UsageError(
                f"tokens leave the {self.place} once, and with method {self.method} they would leave "
                f"{len(self._after(tower))} times",
                hint="use fastv, or give one number after",
            )
        if self.adaptive and len(self._after(tower)) > 1:
            raise UsageError(
                f"drop-visual-tokens.adaptive counts at one place, and tokens would leave {len(self._after(tower))} times",
                hint="give one number after",
            )
        if self.keep_tokens is not None and len(self._after(tower)) > 1:
            raise UsageError(
                f"drop-visual-tokens.keep_tokens is {self.keep_tokens}, but tokens leave {len(self._after(tower))} times, and how "
                "many stay each time depends on how many a prompt has",
                hint="give keep, or one number after",
            )

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Settle where tokens leave and which share stays each time; for "random", draw."""
        tower, _ = self._language(bundle)
        if self.latency_ms is not None:
            return solved(self.name, self.latency_ms, ("prompt",), self._keeping, FINEST, bundle, context)
        places = self._after(tower)
        keep = 0.5 if self.keep is None else self.keep
        if self.macs is not None:
            keep = self._within_macs(self.macs, bundle, tower)
        facts: dict[str, Any] = {}
        if self.adaptive:
            keep, facts = kept_of_questions(bundle, tower, places[0], self.floor, context)
        each = keep ** (1 / len(places))
        drops = [{"after": after, "keep": each, "most": self.keep_tokens or 0} for after in places]
        decisions: dict[str, Any] = {"keep": keep, "drops": drops}
        if self.recycle:
            decisions["recycle"] = True
        if self.method == "random":
            decisions["drawn"] = list(drawn_factors(context.seed))
        return Plan(decisions, facts=facts)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Bind the blocks from the first place on; with nothing to leave out, leave the model alone."""
        if plan.decisions["keep"] == 1 and not self.keep_tokens:
            return
        tower, prompt = self._language(bundle)
        block = tower.blocks[0]
        attention, mlp = (path.removeprefix(f"{block.path}.") for path in (block.attention.path, block.feeding.path))
        how = Dropping(
            method=self.method,
            drops=tuple(
                Drop(int(drop["after"]), float(drop["keep"]), int(drop["most"])) for drop in plan.decisions["drops"]
            ),
            attention=attention,
            mlp=mlp if self.place == "mlp" else "",
            in_cache=self.place != "blocks",
            drawn=tuple(plan.decisions.get("drawn", ())),
            recycles=bool(plan.decisions.get("recycle", False)),
            both_ways=prompt.both_ways,
        )
        bind(
            bundle.module(prompt.path), [bundle.module(block.path) for block in tower.blocks], prompt.image_tokens, how
        )

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Change nothing; report how many of an example's tokens are left behind each place."""
        tower, prompt = self._language(bundle)
        how = dropping_of(bundle.module(prompt.path))
        count, _ = self._example(bundle, tower)
        left, places = count, {}
        for drop in how.drops if how else ():
            left = counts_kept(left, drop.keep, drop.most)
            places[str(drop.after)] = int(left)
        return {"tokens": int(count), "tokens_kept_after": places, "keep": round(int(left) / int(count), 4)}

    def _language(self, bundle: Bundle) -> tuple[Tower, Prompt]:
        """Return the language model's tower and its prompt. Raises UsageError where there is none."""
        for tower in [bundle.tower(self.tower)] if self.tower else bundle.towers():
            if tower.prompt is not None:
                return tower, tower.prompt
        raise UsageError(
            f"{f'the {self.tower} tower' if self.tower else bundle.family.name + ' models'} cannot drop image tokens: that needs a "
            "language model which is given them among its words",
            hint="mmc inspect shows what can be done",
        )

    def _after(self, tower: Tower) -> tuple[int, ...]:
        """Return how many blocks tokens have been through each time they leave."""
        if self.after:
            return self.after
        assert tower.prompt is not None
        blocks, earliest = len(tower.blocks), _earliest(tower.prompt)
        wanted = AFTER.get(self.method, AFTER["fastv"])
        places = (int(place) if place >= 1 else round(place * blocks) for place in wanted)
        return tuple(sorted({min(max(earliest, place), blocks - 1) for place in places}))

    def _example(self, bundle: Bundle, tower: Tower) -> tuple[Tensor, int]:
        """Return how many image tokens (1,), and how many others, the example prompt has."""
        assert tower.prompt is not None, "_language says so"
        ids = bundle.example_inputs(tower.name)["input_ids"]
        images = torch.isin(ids, torch.tensor(tower.prompt.image_tokens)).sum(dim=-1)
        return images, ids.shape[-1] - int(images)

    def _within_macs(self, share: float, bundle: Bundle, tower: Tower) -> float:
        """Return the largest share of image tokens with which the blocks keep this share of their multiply-adds."""
        images, words = self._example(bundle, tower)
        places = self._after(tower)
        every = int(images) + words
        whole = block_macs(bundle, tower, [(every, every)] * len(tower.blocks))

        def kept(keep: float) -> float:
            left, counts = images, []
            for index in range(len(tower.blocks)):
                left = counts_kept(left, keep ** (1 / len(places))) if index in places else left
                counts.append(int(left) + words)
            looking = [every if self.place == "mlp" else count for count in counts]
            return block_macs(bundle, tower, list(zip(looking, counts, strict=True))) / whole

        least = 1 / int(images)
        found = largest_within(kept, share, least, CLOSE)
        if found is None:
            limit = kept(least)
            raise UsageError(
                f"drop-visual-tokens.macs {share:g} is too small: with one image token left, {limit:.3f} are",
                hint=f"use macs >= {limit + 0.0005:.3f}, or let tokens leave earlier",
            )
        return found

    def _keeping(self, share: float) -> DropVisualTokens:
        return dataclasses.replace(self, latency_ms=None, keep=share)


def _earliest(prompt: Prompt) -> int:
    """Return how many blocks must see all tokens: at least one, by whose cache transformers counts (see `cache_lengths`)."""
    return max(prompt.first, 1)
