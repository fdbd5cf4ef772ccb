"""narrow: the residual stream of a tower gets fewer channels, so that every Linear that reads or writes it becomes smaller.

The stream is turned into its principal directions, which changes nothing where norms are RMS norms or, once what is written has
lost its mean, LayerNorms; and the trailing ones are cut: one rotation for the whole tower, folded into the weights, so that the
result is made of the modules the model had (`ops.residual`). One for each block, with products between, is SliceGPT's way. It lost
more on SmolLM2-135M and on the mini-VLM's decoder: what one block's own directions leave out is gone for all blocks behind.

What begins the stream is turned and cut with it: tables of words and places, class tokens, patch embeddings, and the last layer of
a connector, which belongs to the vision tower. So the image tokens of a narrow language model are other numbers than the
original's, and fewer. Where the stream begins behind a norm (CLIP's pictures), a Linear (C, K) behind that norm turns and cuts it;
where it ends before something else than Linears (SigLIP's attention over all tokens), a Linear (K, C) behind the last norm gives
that what it had. What reads LayerNorms takes on their biases, and gets a bias where it had none. What blocks multiply their
additions by (DINOv2) goes into what makes these, and stays as ones.

An output layer that shares the word table's weight stays shared: a Linear (K, K) behind the last norm takes on that norm's gain,
which the table cannot. Plain transformers knows no such Linear; without sharing it loads the result where config.json can say the
width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.residual import kept_energy
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.narrow_crosscheck import crosscheck
from mmcompress.passes.narrow_cut import costs_of_cut, cut
from mmcompress.passes.narrow_fit import basis_for, look, narrow_values, readings
from mmcompress.passes.narrow_units import Stream, is_centred, known, require_narrowable, stream_of
from mmcompress.passes.prune_cut import set_parameters
from mmcompress.passes.prune_units import count_costs


@dataclass(frozen=True)
class Narrow:
    """Give the residual stream of a tower fewer channels: rotated to its principal directions, the trailing ones cut.

    For language models with RMS norms, and for encoders with LayerNorms before attention and feed-forward. Every Linear, table and
    patch embedding of the tower becomes smaller, and so does a connector's last layer. Needs data; distilling afterwards pays.
    """

    name: ClassVar[str] = "narrow"

    ratio: float = 0.2
    """Share of the stream's channels to remove; 0 changes nothing."""
    method: Literal["pca", "readers", "channels", "random"] = "pca"
    """Which directions stay: the principal ones of what the norms give out on the calibration samples (SliceGPT, with one rotation
    for the tower); those that tell most of what Linears make of it (reduced-rank regression); the channels with most energy there,
    unrotated; or those of a random rotation (the control)."""
    towers: tuple[str, ...] = ()
    """Towers to narrow; by default all whose stream is known."""
    multiple: int = 8
    """The width that stays is a multiple of this, which matrix kernels like. Plain transformers wants a Llama's width to be a
    multiple of its number of heads."""
    crosscheck: bool = False
    """Compare what belongs to the stream with torch-pruning's dependency graph first (needs torch-pruning)."""

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise UsageError(
                f"narrow.ratio is {self.ratio:g}; expected 0 <= ratio < 1", hint="it is the share of channels removed"
            )
        if self.multiple < 1:
            raise UsageError(
                f"narrow.multiple is {self.multiple}; expected at least 1", hint="8 suits most matrix kernels"
            )

    def control(self, decisions: Mapping[str, Any] | None = None) -> Narrow | None:
        """Return the pass that keeps as many random directions, with readers fitted as well as they allow."""
        return None if self.method == "random" else dataclasses.replace(self, method="random")

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """One look at the samples."""
        return work.samples * work.forward

    def check(self, bundle: Bundle) -> None:
        """Refuse towers whose stream is not known or does not rotate, and ratios that leave nothing or remove nothing."""
        for stream in self.chosen(bundle):
            require_narrowable(bundle, stream)
            self.width_of(stream)

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Look at the stream, choose the directions, and compute what reads and writes them."""
        made = Plan({"widths": {}, "mixed": {}, "before": {}, "after": {}}, {}, {"kept_energy": {}})
        streams = self.chosen(bundle)
        if self.crosscheck:
            made.facts["crosscheck"] = crosscheck(bundle, streams, context.progress)
        for stream in streams:
            width = self.width_of(stream)
            made.decisions["widths"][stream.tower] = {"before": stream.width, "after": width}
            if width == stream.width:
                continue
            tie = [stream.table, stream.tied] if stream.tied else []
            if tie:
                made.decisions["mixed"][stream.tower] = tie
            made.decisions["before"][stream.tower] = asdict(count_costs(bundle, bundle.tower(stream.tower)))
            made.decisions["after"][stream.tower] = asdict(costs_of_cut(bundle, stream, width, tie))
            moments = look(bundle, stream, context)
            read = readings(bundle, stream, moments) if self.method == "readers" else None
            basis = basis_for(self.method, moments, width, context.seed, is_centred(bundle, stream), read)
            made.facts["kept_energy"][stream.tower] = round(kept_energy(moments.pooled(), basis), 6)
            made.tensors.update(narrow_values(bundle, stream, moments, basis, context))
        return made

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Cut rows, columns, gains and tables to the new width."""
        for name, widths in plan.decisions["widths"].items():
            if widths["after"] < widths["before"]:
                cut(bundle, stream_of(bundle.tower(name)), widths["after"], plan.decisions["mixed"].get(name, ()))
        set_parameters(bundle, plan.tensors)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune nothing; recount what the towers cost now."""
        return {"recount": {s.tower: asdict(count_costs(bundle, bundle.tower(s.tower))) for s in self.chosen(bundle)}}

    def chosen(self, bundle: Bundle) -> list[Stream]:
        """Return the streams to narrow. Raises UsageError for a tower that is not there, or whose stream is not known."""
        named = [bundle.tower(name) for name in self.towers]
        return [stream_of(tower) for tower in named or known(bundle)]

    def width_of(self, stream: Stream) -> int:
        """Return the width that stays. Raises UsageError where that is none, or all though something was to go."""
        if not self.ratio:
            return stream.width
        kept = int((1 - Fraction(str(self.ratio))) * stream.width) // self.multiple * self.multiple
        least = max(2, self.multiple)  # a LayerNorm over one channel gives out 0
        if kept < least:
            largest = 1 - least / stream.width
            raise UsageError(
                f"the {stream.tower} tower's stream has {stream.width} channels; ratio {self.ratio:g} would keep {kept} in "
                f"multiples of {self.multiple}",
                hint=f"use ratio <= {int(largest * 100) / 100:g}, or a smaller multiple",
            )
        return kept
