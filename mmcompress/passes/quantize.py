"""The pass `quantize`: weights of 8 or 4 bits, and 8-bit activations where the scheme says so."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError, closest
from mmcompress.ops.grouped import GROUP_SIZES, nearest
from mmcompress.ops.half_quadratic import half_quadratic
from mmcompress.ops.rounding import INT8, UINT8, WEIGHT_INT7, WEIGHT_INT8
from mmcompress.passes import quantize_moments
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.quantize_layers import bytes_of, candidates, group_sizes
from mmcompress.passes.quantize_make import Maker
from mmcompress.passes.quantize_plan import plan_tower
from mmcompress.passes.quantize_schemes import OFF, SCHEMES
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.surgery.quantized import drop_ties
from mmcompress.surgery.quantized_base import Quantized


@dataclass(frozen=True)
class Quantize:
    """Store weights as 8-bit or 4-bit integers and, with W8A8, compute with 8-bit activations, per tower.

    8-bit weights get one scale per output channel, activations one per tensor, from calibration samples. 4-bit weights, of Linears
    alone, get a scale and a zero point for each group of inputs; everything else takes 8 bits there. What stays more precise is
    decided by measurement: where a tower's embeddings change by more than `min_cosine` allows, every group of layers is quantized
    alone, and groups are given back, worst first, until it holds: from 4 bits to 8, then to float.
    """

    name: ClassVar[str] = "quantize"

    scheme: str = "W8A8"
    """W8A8 (weights and activations; calibrated, so it needs data), W8A16 (weights only: smaller, not faster), W4A16 (4-bit weights
    of Linears: smallest, and in onnxruntime fastest where tokens come one by one) or W16A16 (off)."""
    vision_scheme: str | None = None
    """The vision tower's scheme, instead of `scheme`."""
    text_scheme: str | None = None
    """The text tower's scheme, instead of `scheme`."""
    audio_scheme: str | None = None
    """The audio tower's scheme, instead of `scheme`."""
    decoder_scheme: str | None = None
    """The decoder's scheme, instead of `scheme`."""
    language_scheme: str | None = None
    """The language model's scheme, instead of `scheme`."""
    towers: tuple[str, ...] = ()
    """Towers to quantize; empty means all."""
    target: Literal["cpu", "openvino", "cuda", "tensorrt"] = "cpu"
    """Where it will run: cpu gives unsigned activations with a zero point (fast in onnxruntime and in OpenVINO), the others signed
    ones with zero point 0, which TensorRT demands and OpenVINO multiplies a little faster, at some loss of accuracy."""
    observer: Literal["min-max", "percentile", "mse"] = "min-max"
    """How an activation's range is chosen: cover everything, cut off rare outliers, or least squared error. Vision
    transformers keep what matters in a few huge values, which clipping destroys."""
    percentile: float = 99.99
    """For observer percentile: the percent of values inside the range."""
    group_size: int = 32
    """For W4A16: how many neighbouring inputs share a scale (16, 32, 64 or 128; 0: all of a row). Where it does not divide them,
    the largest that does; Linears that none divides take 8 bits."""
    rounding: Literal["nearest", "hqq", "gptq"] = "hqq"
    """For W4A16: to the nearest place of a grid that covers a group; of the grid that suits most of its weights (HQQ); or so that
    outputs change least on the calibration samples (GPTQ, on HQQ's grids; it needs data). 8-bit weights go to the nearest."""
    embeddings: bool = True
    """Quantize large embedding tables too, one scale per row. A table that shares its weight with a Linear shares its integers with
    it: both are quantized, or neither."""
    keep_float: tuple[str, ...] = ()
    """Layers to leave alone, as path patterns such as "vision_model.encoder.layer.0.*"."""
    min_cosine: float = 0.99
    """Give groups of layers back (to 8 bits, then to float) until a tower's embeddings keep this mean cosine to the unquantized
    model's."""
    sensitivity_samples: int = 16
    """Samples on which a tower is judged, and each group of its layers where some have to be given back; 0 judges nothing (and
    leaves `min_cosine` unheeded)."""
    sensitivity: bool = False
    """Judge every group of layers alone even where none has to be given back: the report then shows what costs how much."""
    smooth: float = 0.75
    """For W8A8: how much of the spread between an activation's channels moves into the weights (SmoothQuant); 0 is off."""
    reduce_range: bool = False
    """Use 7 of the 8 bits of weights: for x86 CPUs without VNNI or AMX, whose 16-bit sums of u8*s8 products overflow."""

    def __post_init__(self) -> None:
        for field, given in {"scheme": self.scheme, **{f"{k}_scheme": v for k, v in self._own_schemes.items()}}.items():
            if given.upper() not in SCHEMES:
                known = ", ".join(SCHEMES)
                raise UsageError(f"quantize.{field} is '{given}'; known schemes: {known}", hint=closest(given, SCHEMES))
        if not 0 < self.percentile <= 100:
            raise UsageError(
                f"quantize.percentile is {self.percentile:g}; expected 0 < percentile <= 100",
                hint="99.9 to 99.999 are usual",
            )
        if not -1 <= self.min_cosine < 1:
            raise UsageError(
                f"quantize.min_cosine is {self.min_cosine:g}; expected -1 <= min_cosine < 1",
                hint="0.99 is a usual limit; 1 would allow no rounding at all",
            )
        if not 0 <= self.smooth <= 1:
            raise UsageError(
                f"quantize.smooth is {self.smooth:g}; expected 0 <= smooth <= 1", hint="0.5 to 0.85 are usual"
            )
        if self.group_size not in (0, *GROUP_SIZES):
            raise UsageError(
                f"quantize.group_size is {self.group_size}; expected 0 or one of {', '.join(map(str, sorted(GROUP_SIZES)))}",
                hint="32 is usual; larger groups are a little smaller and faster, and less accurate",
            )
        if self._uses("W4A16") and self.target == "tensorrt":
            raise UsageError(
                "quantize.scheme W4A16 does not go to tensorrt, which cannot read its 4-bit layers",
                hint="use W8A8 or W8A16, or another target",
            )
        if self.sensitivity_samples < 0:
            raise UsageError(
                f"quantize.sensitivity_samples is {self.sensitivity_samples}; expected 0 or more",
                hint="0 skips the measurement",
            )

    def control(self, decisions: Mapping[str, Any] | None = None) -> None:
        """Return None: nothing is selected."""

    def streams(self) -> bool:
        """Whether weights alone are rounded: each layer's by itself."""
        used = {name: SCHEMES[name] for name in {self.scheme.upper(), *map(str.upper, self._own_schemes.values())}}
        static = any(scheme.inputs == "static" for scheme in used.values())
        fitted = self.rounding == "gptq" and any(scheme.weights == "int4" for scheme in used.values())
        return not static and not fitted

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Looks at the samples for ranges or moments; then a tower is judged, or each part of its blocks, in rounded arithmetic."""
        towers = [tower for tower in bundle.towers() if self.scheme_of(tower.name) != OFF]
        if not towers:
            return 0.0
        looks = 0
        for tower in towers:
            scheme = self.scheme_of(tower.name)
            if SCHEMES[scheme].weights == "int4" and self.rounding == "gptq":
                sizes = group_sizes(
                    bundle, tower, candidates(bundle, tower, self.embeddings, self.keep_float), self.group_size
                )
                looks = max(looks, quantize_moments.looks(bundle, tower, sizes))
            looks = max(looks, 2 if SCHEMES[scheme].inputs == "static" else 0)
        parts = max(sum(2 + (block.cross is not None) for block in tower.blocks) for tower in towers)
        judged = 2 * (parts + 3 if self.sensitivity else 2) * min(self.sensitivity_samples, work.samples)
        return (looks * work.samples + judged) * work.forward

    def check(self, bundle: Bundle) -> None:
        """Refuse schemes for towers that are not there, towers quantized already, broken ties, and patterns that match nothing."""
        towers = {tower.name: tower for tower in bundle.towers()}
        for name in (*self.towers, *self._own_schemes):
            bundle.tower(name)
        unlisted = [name for name in self._own_schemes if self.towers and name not in self.towers]
        if unlisted:
            raise UsageError(
                f"quantize has a scheme for the {unlisted[0]} tower, which quantize.towers does not name",
                hint="name it in both or neither",
            )
        for tower in towers.values():
            if self.scheme_of(tower.name) == OFF:
                continue
            done = [
                path
                for path, module in bundle.model.named_modules()
                if tower.owns(path) and isinstance(module, Quantized)
            ]
            if done:
                raise UsageError(
                    f"the {tower.name} tower is quantized already ({done[0]} and {len(done) - 1} more)",
                    hint=f"start from the checkpoint before that, or leave it alone with --{tower.name}-scheme W16A16",
                )
            for table, linear in tower.tied:
                if bundle.module(table).weight is not bundle.module(linear).weight:
                    raise UsageError(
                        f"{table} and {linear} hold different weights, and config.json says they share one",
                        hint="set tie_word_embeddings to false in config.json",
                    )
        for pattern in self.keep_float:
            if not any(fnmatch.fnmatchcase(path, pattern) for path, _ in bundle.model.named_modules()):
                raise UsageError(
                    f"quantize.keep_float has '{pattern}', which matches no layer",
                    hint="mmc inspect MODEL names the towers; patterns are such as 'text_model.*'",
                )

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Choose layers, calibrate, measure sensitivity; what was computed of samples travels as tensors."""
        made = Plan({"target": self.target, "layers": {}, "groups": {}, "tied": {}, "towers": {}})
        for tower in bundle.towers():
            if self.scheme_of(tower.name) != OFF:
                plan_tower(self, bundle, tower, context, made)
        if not made.decisions["groups"]:
            del made.decisions["groups"]
        return made

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Replace the layers one by one; each float weight is released before the next is rounded."""
        layers, tied = plan.decisions["layers"], plan.decisions.get("tied", {})
        # A table, then at once the Linear that shares its weight.
        for path in sorted(layers, key=lambda path: (tied.get(path, path), path in tied)):
            module = bundle.layer(path)
            made = self.maker.made(module, path, plan, bundle.module(tied[path]) if path in tied else None)
            del module  # where layers are written as they are made, its floats are gone before a file is
            bundle.replace(path, made)
            give_back_freed()
        drop_ties(bundle.model)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Change nothing; report the bytes each tower now takes, recounted."""
        return {"bytes": {tower.name: bytes_of(bundle, tower) for tower in bundle.towers()}}

    @property
    def maker(self) -> Maker:
        return Maker(
            inputs=UINT8 if self.target == "cpu" else INT8,
            weights=WEIGHT_INT7 if self.reduce_range else WEIGHT_INT8,
            smooth=self.smooth > 0,
            rounding=nearest if self.rounding == "nearest" else half_quadratic,
            rounds_inputs=self.target == "cpu",
        )

    def scheme_of(self, tower: str) -> str:
        """Return the name of the scheme a tower gets."""
        if self.towers and tower not in self.towers:
            return OFF
        return self._own_schemes.get(tower, self.scheme).upper()

    def _uses(self, scheme: str) -> bool:
        return scheme in (given.upper() for given in (self.scheme, *self._own_schemes.values()))

    @property
    def _own_schemes(self) -> dict[str, str]:
        """Tower -> its own scheme, where one is given."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_scheme")}
        return {name.removesuffix("_scheme"): scheme for name, scheme in given.items() if scheme is not None}
