"""The pass `merge-frames`: a language model is given fewer layers of a video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.frames import drawn_places
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.surgery.frames import FrameMerging, bind, merging_of, new_stages, stages_of
from mmcompress.views import Film

STRIDES = (1, 2, 4, 8)


@dataclass(frozen=True)
class MergeFrames:
    """Hand fewer layers of a video to the language model: neighbours in time become one (STE), with no training.

    For models that see frames as a video and not as pictures. Prompt, time to the first token and cache shrink with them; pictures
    go through as they are. The layers left stand at the mean of their members' times. Stored in the checkpoint and part of its
    exported graphs. No weights are added but by `convolution`. Method "random" is the control that the others have to beat.
    """

    name: ClassVar[str] = "merge-frames"

    stride: int = 2
    """How many layers become one: 1, 2, 4 or 8. Where there are not enough, the last one stands in for those that are missing."""
    method: Literal["mean", "first", "random"] = "mean"
    """What a layer left is: the mean of its members, the first of them, or a random one (the control)."""
    convolution: bool = False
    """Add to the mean what a small convolution over time makes of neighbouring layers, for each token by itself. It begins with
    adding nothing and is for `distill` to train, on videos, with the language tower."""
    tower: str = ""
    """The tower that is given videos; by default the only one."""

    def __post_init__(self) -> None:
        if self.stride not in STRIDES:
            raise UsageError(
                f"merge-frames.stride is {self.stride}; expected one of {', '.join(map(str, STRIDES))}",
                hint="2 makes one layer of two",
            )
        if self.convolution and self.method != "mean":
            raise UsageError(
                f"merge-frames.convolution adds to means, and method {self.method} makes none",
                hint="leave it out, or give --method mean",
            )

    def control(self, decisions: Mapping[str, Any] | None = None) -> MergeFrames | None:
        """Return the pass that keeps a random layer of as many."""
        return None if self.method == "random" else MergeFrames(self.stride, "random", tower=self.tower)

    def streams(self, data: bool = False) -> bool:
        """Whether no weight is looked at: none is, but new ones have values."""
        return not self.convolution and not data

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Nothing is looked at."""
        return 0.0

    def check(self, bundle: Bundle) -> None:
        """Refuse models that see no videos, and a second merging."""
        if merging_of(bundle.module(self._film(bundle).path)):
            raise UsageError(
                "the language model is given fewer layers of a video already",
                hint="start from the checkpoint before that, with the larger stride",
            )

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Nothing is left to decide; for "random", draw."""
        decisions: dict[str, Any] = {"stride": self.stride}
        if self.method == "random":
            decisions["drawn"] = list(drawn_places(self.stride, context.seed))
        return Plan(decisions)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Bind the methods that make and place image tokens; with a stride of 1 leave the model alone."""
        stride = int(plan.decisions["stride"])
        if stride == 1:
            return
        film = self._film(bundle)
        how = FrameMerging(stride, self.method, tuple(plan.decisions.get("drawn", ())))
        with bundle.device:
            stages = new_stages(film, stride) if self.convolution else None
        if stages is not None:
            stages.to(next(bundle.model.parameters()).dtype)
        bind(bundle.module(film.path), film, how, stages)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Change nothing; report which share of a long video's layers is left, and how many parameters came."""
        stages = stages_of(bundle.module(self._film(bundle).path))
        added = sum(parameter.numel() for stage in stages for parameter in stage.parameters())
        return {"stride": self.stride, "keep": 1 / self.stride, "parameters_added": added}

    def _film(self, bundle: Bundle) -> Film:
        """Return the view of what is given of a video. Raises UsageError where there is none."""
        towers = [bundle.tower(self.tower)] if self.tower else bundle.towers()
        for tower in towers:
            if tower.film is not None:
                return tower.film
        reasons = {tower.why_no_film for tower in towers if tower.why_no_film}
        raise UsageError(
            f"frames of a video cannot be merged in {'this tower' if self.tower else bundle.family.name + ' models'}: "
            f"{'; '.join(sorted(reasons)) or 'no language model is given a video there'}",
            hint="mmc inspect shows what can be done",
        )
