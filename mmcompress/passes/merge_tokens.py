"""The pass `merge-tokens`: fewer tokens from block to block."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.schedule import kept_share, tokens_after
from mmcompress.ops.selection import random_selection
from mmcompress.passes.base import Context, Plan, Work, require_kept_share, require_milliseconds, require_one
from mmcompress.passes.cross_tokens import NEED, add_vectors, other_tower, trained
from mmcompress.passes.latency import SECONDS, TRIALS, solved
from mmcompress.passes.merge_alike import USUAL, merged_alike
from mmcompress.passes.merge_bind import bind_tower
from mmcompress.passes.merge_schedule import least_of, macs_kept, merging_blocks, schedule_of
from mmcompress.passes.token_counts import FLOOR, require_floor
from mmcompress.surgery.alikeness import COMPARING
from mmcompress.surgery.coarsening import coarsening_of
from mmcompress.surgery.reducing import choice_of
from mmcompress.surgery.reduction import is_reduced, tokens_left
from mmcompress.views import Tower

CROSSGET = "crossget"


@dataclass(frozen=True)
class MergeTokens:
    """Merge tokens between attention and MLP of every block (ToMe, PiToMe, CrossGET, EViT), with no training of the model.

    Pictures or sound are encoded with fewer and fewer tokens; a merged token is the mean of its members and counts as many times
    in later attention. Nothing is added to the weights but by crossget's learned guide, a vector for each block; the schedule is
    stored in the checkpoint. Method "random" drops tokens at
    random positions with the same schedule: the control that merging has to beat.
    """

    name: ClassVar[str] = "merge-tokens"

    keep: float | None = None
    """Share of the token work kept: tokens entering the MLPs, averaged over the blocks, by the tokens there were: 0.5 is
    half of the MLPs' work. Default 0.5 when nothing else says how many."""
    keep_tokens: int | None = None
    """Tokens left after the last block, instead of `keep`."""
    macs: float | None = None
    """Share of the blocks' multiply-adds kept, instead of `keep`."""
    latency_ms: float | None = None
    """Milliseconds the exported tower may take on this machine's processor, instead of `keep`: some shares are exported and
    timed as the recipe's `export` says (batch, runners, threads); the largest that fits is kept."""
    merged: tuple[int, ...] = ()
    """Tokens merged in each block, instead of `keep`: one number per block, or a single number that `schedule` spreads."""
    similarity: float | None = None
    """Instead of `keep`: each block merges as many pairs as are at least this alike, by the cosine that `method` compares, in 95 of
    100 samples of the data (tome, pitome, crossget; needs data). Keys may be very alike: 0.99 can be little."""
    floor: float = 0.05
    """For `similarity`: share of the tokens that is left behind the last block at least."""
    schedule: Literal["constant", "decreasing", "similar"] = "constant"
    """The same number in every block, a number that falls linearly to 0 at the last block, or more where more tokens are alike in
    data (similar; tome, pitome, crossget; needs data). Measured on DINOv2-S with tome, similar is worse than constant."""
    every: int = 1
    """Merge in every n-th block only, more tokens at a time. Matching has a fixed cost, so 2 to 4 is faster for small or 8-bit
    towers; accuracy is a little lower."""
    first: int = 0
    """Merge from this block on, counted from 0. What the class token looks at (evit) says little in the first blocks."""
    method: Literal["tome", "pitome", "crossget", "evit", "pool", "random"] = "tome"
    """Merge similar tokens of even and odd places (tome), those most like many others (pitome), those of little to do with the
    class token (crossget), what it looks at least into one (evit), neighbours (pool), or drop random ones (the control)."""
    guide: Literal["class", "learned"] = "class"
    """For crossget, what says which tokens matter: the class token, or the mean where there is none (class); or a cross token in
    each block that merges, which learns from pictures with their texts what the other tower would say (learned; needs data, and a
    model with a space that both share)."""
    guide_epochs: int = 3
    """For guide learned: how often the cross tokens learn from each picture."""
    tower: str = ""
    """The tower whose tokens are merged; by default the only one where they can be."""
    proportional: bool | None = None
    """Let a merged token count as often in attention as it has members. By default on, but off for evit, whose fused token counts
    once. Off for MAE-like pretraining."""

    def __post_init__(self) -> None:
        require_kept_share("merge-tokens.keep", self.keep, "0.5 halves the token work")
        require_kept_share("merge-tokens.macs", self.macs, "0.5 halves the work of the blocks")
        require_one(
            self.name,
            keep=self.keep,
            keep_tokens=self.keep_tokens,
            macs=self.macs,
            latency_ms=self.latency_ms,
            merged=self.merged,
            similarity=self.similarity,
        )
        self._require_comparable()
        require_milliseconds("merge-tokens.latency_ms", self.latency_ms)
        if self.every < 1:
            raise UsageError(
                f"merge-tokens.every is {self.every}; expected a number >= 1", hint="1 merges in every block"
            )
        if self.guide == "learned" and self.method != CROSSGET:
            raise UsageError(
                f"merge-tokens.guide is for method {CROSSGET}, and {self.method} is asked for",
                hint=f"leave it out, or give --method {CROSSGET}",
            )
        if self.guide_epochs < 1:
            raise UsageError(
                f"merge-tokens.guide_epochs is {self.guide_epochs}; expected a number >= 1",
                hint="guide class learns nothing",
            )
        if self.first < 0:
            raise UsageError(
                f"merge-tokens.first is {self.first}; expected a number >= 0", hint="0 merges from the first block on"
            )
        if len(self.merged) > 1 and (self.schedule, self.every, self.first) != ("constant", 1, 0):
            raise UsageError(
                "merge-tokens.merged says what every block merges; schedule, every and first would change nothing",
                hint="give a single number in merged, or leave schedule, every and first out",
            )
        if any(number < 0 for number in self.merged):
            raise UsageError(
                f"merge-tokens.merged has {min(self.merged)}; expected numbers >= 0", hint="0 merges nothing"
            )

    def control(self, decisions: Mapping[str, Any] | None = None) -> MergeTokens | None:
        """Return the pass that drops as many tokens at random."""
        if self.method == "random":
            return None
        if decisions is None or (self.latency_ms is None and not self._looks):
            schedule: Literal["constant", "decreasing"] = "decreasing" if self.schedule == "decreasing" else "constant"
            return dataclasses.replace(
                self, method="random", schedule=schedule, guide="class", similarity=None, floor=FLOOR
            )
        return MergeTokens(merged=tuple(decisions["merged"]), method="random", tower=self.tower)

    def streams(self, data: bool = False) -> bool:
        """Whether no weight is looked at: only a latency is that of the whole model, how alike tokens are, what is learned."""
        return self.latency_ms is None and not self._looks and self.guide == "class" and not data

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """For a latency, some shares are exported and timed; how alike tokens are takes a few runs for each of these shares.

        Cross tokens learn from what the model is shown again and again.
        """
        timed, shares = (0.0, 1) if self.latency_ms is None else (SECONDS, TRIALS + 3)
        looking = shares * USUAL * work.samples * work.forward if self._looks else 0.0
        learning = self.guide_epochs * 2 * work.dataset * work.forward if self.guide == "learned" else 0.0
        return timed + looking + learning

    def check(self, bundle: Bundle) -> None:
        """Refuse towers whose tokens cannot be merged, schedules and image sizes that do not fit, and a second merging."""
        tower = self._tower(bundle)
        if tower.stream is None:
            raise UsageError(
                f"the {tower.name} tower's tokens cannot be merged: {tower.why_no_stream}",
                hint=_mergeable(bundle),
            )
        blocks = merging_blocks(tower)
        if not all(block.attend and block.feed for block in blocks):
            raise UsageError(
                f"the {tower.name} tower's blocks are not pre-norm, and merging needs the place between attention and MLP",
                hint=_mergeable(bundle),
            )
        if any(is_reduced(bundle.module(block.path)) for block in blocks):
            raise UsageError(
                f"the {tower.name} tower merges tokens already",
                hint="start from the checkpoint before that, with the smaller keep",
            )
        if any(coarsening_of(bundle.module(block.path)) for block in blocks):
            raise UsageError(
                f"the {tower.name} tower coarsens tokens already",
                hint="start from the checkpoint before that, and use one of the two",
            )
        if any(choice_of(bundle.module(block.attention.path)) for block in blocks):
            raise UsageError(
                "the connector chooses image tokens by what the encoder looks at, each of them in its place",
                hint="use reduce-visual-tokens with another method, such as clusters",
            )
        schedule_of(self, bundle, tower)
        if self.guide == "learned":
            other_tower(bundle, tower)
        if tower.name == "vision":
            _require_own_size(bundle)

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Solve the schedule and, for "random", draw the positions (from the run's seed)."""
        tower = self._tower(bundle)
        assert tower.stream is not None, "check refuses towers without a stream"
        if self.latency_ms is not None:
            return solved(
                self.name, self.latency_ms, (tower.name,), self._keeping, least_of(self, tower), bundle, context
            )
        facts: dict[str, Any] = {}
        if self._looks:
            merged, facts = merged_alike(self, bundle, tower, context)
        else:
            merged = schedule_of(self, bundle, tower)
        if self.guide == "learned" and any(merged):
            context.require_data(NEED)
        decisions: dict[str, Any] = {"merged": merged}
        if self.method == "random":
            generator = torch.Generator().manual_seed(context.seed)
            decisions["kept"] = [
                random_selection(left + dropped, dropped, tower.stream.protected, generator).tolist()
                for dropped, left in zip(merged, tokens_after(merged, tower.stream.tokens), strict=True)
            ]
        return Plan(decisions, facts=facts)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Bind the blocks' forward; with nothing to merge, leave the model alone."""
        merged: list[int] = plan.decisions["merged"]
        tower = self._tower(bundle)
        if not any(merged):
            return
        bind_tower(bundle, tower, merged, self.method, self.proportional_attention, plan.decisions.get("kept", []))
        if self.guide == "learned":
            add_vectors(bundle, tower, merged)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Train the cross tokens, if there are some; report the tokens of each block and the multiply-adds' share that is left."""
        tower = self._tower(bundle)
        assert tower.stream is not None, "check refuses towers without a stream"
        before = tower.stream.tokens
        blocks = [bundle.module(block.path) for block in merging_blocks(tower)]
        left = [before, *(tokens_left(block, before) for block in blocks)]
        merged = [one - other for one, other in itertools.pairwise(left)]
        after = tokens_after(merged, before)
        facts: dict[str, Any] = {
            "tokens": before,
            "tokens_after_block": after,
            "keep": round(kept_share(merged, before), 4),
            "block_macs_kept": round(macs_kept(bundle, tower, merged), 4),
        }
        if self.guide == "learned" and any(merged):
            facts["cross_tokens"] = trained(bundle, tower, context, self.guide_epochs)
        return facts

    def _keeping(self, share: float) -> MergeTokens:
        return dataclasses.replace(self, latency_ms=None, keep=share)

    @property
    def proportional_attention(self) -> bool:
        """Whether a merged token counts as often as it has members."""
        return self.method != "evit" if self.proportional is None else self.proportional

    @property
    def _looks(self) -> bool:
        """Whether data says how many tokens each block merges."""
        return self.schedule == "similar" or self.similarity is not None

    def _require_comparable(self) -> None:
        """Raise UsageError where how alike tokens are cannot say what it is asked for."""
        require_floor("merge-tokens.floor", self.floor, self.similarity is not None, "similarity")
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise UsageError(
                f"merge-tokens.similarity is {self.similarity:g}; expected 0 < similarity <= 1",
                hint="0.9 merges pairs of which the cosine is at least that",
            )
        if self._looks and self.method not in COMPARING:
            what = "similarity" if self.similarity is not None else "schedule similar"
            raise UsageError(
                f"merge-tokens.{what} asks how alike the tokens are that are merged, and method {self.method} compares none",
                hint=f"give --method {' or '.join(COMPARING)}",
            )
        if self.similarity is not None and self.schedule != "constant":
            raise UsageError(
                f"merge-tokens.similarity says what every block merges; schedule {self.schedule} would change nothing",
                hint="leave schedule out, or say how many with keep",
            )
        if self.schedule == "similar" and self.merged:
            raise UsageError(
                "merge-tokens.merged says how many tokens blocks merge, and schedule similar asks the data",
                hint="give keep, keep_tokens, macs or latency_ms, or another schedule",
            )

    def _tower(self, bundle: Bundle) -> Tower:
        """Return the tower meant. Raises UsageError where none is called that, or none or several can be merged."""
        if self.tower:
            return bundle.tower(self.tower)
        towers = bundle.towers()
        found = [tower for tower in towers if tower.stream]
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(
                f"the tokens of {' or '.join(tower.name for tower in found)} can be merged", hint="say which with tower"
            )
        reasons = "; ".join(f"{tower.name}: {tower.why_no_stream}" for tower in towers)
        raise UsageError(f"the tokens of {bundle.family.name} models cannot be merged ({reasons})", hint="use prune")


def _mergeable(bundle: Bundle) -> str:
    names = [tower.name for tower in bundle.towers() if tower.stream and all(block.attend for block in tower.blocks)]
    return f"towers that can be merged: {', '.join(names)}" if names else "no tower of this model can be merged"


def _require_own_size(bundle: Bundle) -> None:
    """Raise UsageError when images are not prepared at the size that the tower's tokens are counted for.

    DINOv2 would take them all the same: its config says 518 pixels, and its usual image processor makes 224.
    """
    if bundle.processor.image is None:
        return
    images = bundle.prepare("vision", [Image.new("RGB", (64, 64))])["pixel_values"]
    expected = bundle.example_inputs("vision")["pixel_values"]
    if images.shape[-3:] != expected.shape[-3:]:  # of each tile, where there are several
        made, wanted = ("x".join(map(str, shape[-3:])) for shape in (images.shape, expected.shape))
        raise UsageError(
            f"the image processor makes {made}, config.json says {wanted}: the schedule would count tokens that are not there",
            hint="give both files one size; positions made for another have to be interpolated once and saved",
        )
