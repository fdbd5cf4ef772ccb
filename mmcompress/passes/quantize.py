"""The pass `quantize`: 8-bit weights, and 8-bit activations where the scheme says so."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError, closest
from mmcompress.ops.rounding import INT8, UINT8, WEIGHT_INT7, WEIGHT_INT8, Levels
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.quantize_calibrate import Grid, Judge, calibrate, groups_of, offers
from mmcompress.progress import track
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.surgery.quantized import QUANTIZED, can_quantize, drop_ties, quantized
from mmcompress.views import Tower

SCHEMES = {"W8A8": (True, True), "W8A16": (True, False), "W16A16": (False, False)}
"""Name -> (weights in 8 bits, activations in 8 bits)."""

SMALL_TABLE = 0.01
"""Embedding tables below this share of a tower's bytes stay float: they save nothing and cost a multiplication."""


@dataclass(frozen=True)
class Quantize:
    """Store weights as 8-bit integers and, with W8A8, compute with 8-bit activations, per tower.

    Weights get one scale per output channel, activations one per tensor, from calibration samples. What stays float is decided by
    measurement: every group of layers is quantized alone and the change of the embeddings recorded; groups are given back to
    float, worst first, until the tower keeps `min_cosine`.
    """

    name: ClassVar[str] = "quantize"

    scheme: str = "W8A8"
    """W8A8 (weights and activations; calibrated, so it needs data), W8A16 (weights only: smaller, not faster) or W16A16 (off)."""
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
    embeddings: bool = True
    """Quantize large embedding tables too, one scale per row. A table that shares its weight with a Linear shares its integers with
    it: both are quantized, or neither."""
    keep_float: tuple[str, ...] = ()
    """Layers to leave alone, as path patterns such as "vision_model.encoder.layer.0.*"."""
    min_cosine: float = 0.99
    """Give groups of layers back to float until a tower's embeddings keep this mean cosine to the unquantized model's."""
    sensitivity_samples: int = 16
    """Samples for measuring sensitivity, each run once per group of layers; 0 skips the measurement (and `min_cosine`)."""
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
        if self.sensitivity_samples < 0:
            raise UsageError(
                f"quantize.sensitivity_samples is {self.sensitivity_samples}; expected 0 or more",
                hint="0 skips the measurement",
            )

    def control(self, decisions: Mapping[str, Any] | None = None) -> None:
        """Return None: nothing is selected."""

    def streams(self) -> bool:
        """Whether weights alone are rounded: each layer's by itself."""
        return all(scheme.upper() in ("W8A16", "W16A16") for scheme in (self.scheme, *self._own_schemes.values()))

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Two looks at the samples for the ranges; then each part of a block is judged, in rounded arithmetic."""
        towers = [tower for tower in bundle.towers() if self._scheme(tower.name) != "W16A16"]
        if not towers:
            return 0.0
        ranges = 2 * work.samples if any(self._scheme(tower.name) == "W8A8" for tower in towers) else 0
        parts = max(sum(2 + (block.cross is not None) for block in tower.blocks) for tower in towers)
        judged = 2 * (parts + 3) * min(self.sensitivity_samples, work.samples)
        return (ranges + judged) * work.forward

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
            if self._scheme(tower.name) == "W16A16":
                continue
            done = [
                path
                for path, module in bundle.model.named_modules()
                if tower.owns(path) and isinstance(module, QUANTIZED)
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
        """Choose layers, calibrate, measure sensitivity; the grids of the inputs travel as tensors."""
        layers: dict[str, str] = {}
        tied: dict[str, str] = {}
        report: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for tower in bundle.towers():
            scheme = self._scheme(tower.name)
            if scheme == "W16A16":
                continue
            chosen, report[tower.name] = self._plan_tower(bundle, tower, scheme == "W8A8", context, tensors)
            if not chosen:
                raise UsageError(
                    f"no layer of the {tower.name} tower can be quantized within min_cosine {self.min_cosine:g}",
                    hint="lower min_cosine, use scheme W8A16, or keep_float fewer layers",
                )
            layers |= chosen
            tied |= {linear: table for table, linear in tower.tied if linear in chosen}
        return Plan({"target": self.target, "layers": layers, "tied": tied, "towers": report}, tensors)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Replace the layers one by one; each float weight is released before the next is rounded."""
        layers, tied = plan.decisions["layers"], plan.decisions.get("tied", {})
        # A table, then at once the Linear that shares its weight.
        for path in sorted(layers, key=lambda path: (tied.get(path, path), path in tied)):
            module, scheme = bundle.layer(path), layers[path]
            gain = plan.tensors.get(f"{path}.gain")
            if gain is None and path not in tied and self._smooths(module, scheme):
                gain = torch.ones(module.in_features, device="meta")
            table = bundle.module(tied[path]) if path in tied else None
            made = quantized(module, self._inputs if scheme == "W8A8" else None, self._weights, gain, table)
            if f"{path}.scale" in plan.tensors:
                made.set_input_grid(plan.tensors[f"{path}.scale"], plan.tensors[f"{path}.zero_point"])
            del module  # where layers are written as they are made, its floats are gone before a file is
            bundle.replace(path, made)
            give_back_freed()
        drop_ties(bundle.model)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Change nothing; report the bytes each tower now takes, recounted."""
        return {"bytes": {tower.name: _bytes(bundle, tower) for tower in bundle.towers()}}

    @property
    def _inputs(self) -> Levels:
        return UINT8 if self.target == "cpu" else INT8

    @property
    def _weights(self) -> Levels:
        return WEIGHT_INT7 if self.reduce_range else WEIGHT_INT8

    def _smooths(self, module: nn.Module, scheme: str) -> TypeGuard[nn.Linear]:
        return self.smooth > 0 and scheme == "W8A8" and isinstance(module, nn.Linear)

    def _scheme(self, tower: str) -> str:
        if self.towers and tower not in self.towers:
            return "W16A16"
        return self._own_schemes.get(tower, self.scheme).upper()

    @property
    def _own_schemes(self) -> dict[str, str]:
        """Tower -> its own scheme, where one is given."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_scheme")}
        return {name.removesuffix("_scheme"): scheme for name, scheme in given.items() if scheme is not None}

    def _candidates(self, bundle: Bundle, tower: Tower) -> list[str]:
        total = sum(p.nbytes for name, p in bundle.model.named_parameters() if tower.owns(name))
        tables = {table for table, _ in tower.tied}
        found = []
        for path, module in bundle.model.named_modules():
            if not tower.owns(path) or path in tower.uncalled or not can_quantize(module):
                continue
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in self.keep_float):
                continue
            small = isinstance(module, nn.Embedding) and module.weight.nbytes < SMALL_TABLE * total
            if isinstance(module, nn.Embedding) and (not self.embeddings or (small and path not in tables)):
                continue
            found.append(path)
        return _whole_ties(found, tower)

    def _plan_tower(
        self, bundle: Bundle, tower: Tower, activations: bool, context: Context, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Return {path: scheme of the layer} and what to report; adds what `apply` sets to `tensors`."""
        paths = self._candidates(bundle, tower)
        report: dict[str, Any] = {"scheme": self._scheme(tower.name), "bytes_before": _bytes(bundle, tower)}
        linears = [path for path in paths if not isinstance(bundle.module(path), nn.Embedding)]
        grids: dict[str, Grid] = {}
        if activations:
            grids = calibrate(
                bundle,
                tower,
                linears,
                self._inputs,
                context,
                method=self.observer,
                percentile=self.percentile,
                smooth=self.smooth,
            )
            # Read by their owner without being called: their input cannot be rounded, nor their weight replaced safely.
            paths = _whole_ties([path for path in paths if path in grids or path not in linears], tower)
        schemes = {path: "W8A8" if path in grids else "W8A16" for path in paths}
        for path in [path for path in paths if path in grids]:
            grid = grids[path]
            tensors[f"{path}.scale"], tensors[f"{path}.zero_point"] = grid.scale, grid.zero_point
            if grid.gain is not None:
                tensors[f"{path}.gain"] = grid.gain
        if paths and self.sensitivity_samples and offers(bundle, context, tower.name, self.sensitivity_samples):
            tables = {linear: table for table, linear in tower.tied}
            made: dict[str, nn.Module] = {}
            for path in sorted(paths, key=tables.__contains__):
                made[path] = self._made(bundle, path, grids.get(path), made.get(tables.get(path, "")))
            report |= self._judge(bundle, tower, made, context)
            for path in report["kept_float"]:
                schemes.pop(path)
        return schemes, report

    def _made(self, bundle: Bundle, path: str, grid: Grid | None, table: nn.Module | None) -> nn.Module:
        """Return the quantized layer as `apply` will make it."""
        if grid is None:
            return quantized(bundle.module(path), None, self._weights, None, table)
        made = quantized(bundle.module(path), self._inputs, self._weights, grid.gain, table)
        made.set_input_grid(grid.scale, grid.zero_point)
        return made

    def _judge(self, bundle: Bundle, tower: Tower, made: dict[str, nn.Module], context: Context) -> dict[str, Any]:
        """Measure each group alone and all together; give groups back to float, worst first, until `min_cosine` holds."""
        judge = Judge(bundle, tower.name, context, self.sensitivity_samples)
        groups = groups_of(tower, list(made))
        alone = {
            name: judge.cosine({path: made[path] for path in paths})
            for name, paths in track(groups.items(), context.progress, f"{tower.name} sensitivity", len(groups))
        }
        kept: list[str] = []
        left = dict(made)
        reached = judge.cosine(left)
        everything = reached
        for name in sorted(groups, key=lambda name: alone[name]):
            if reached >= self.min_cosine:
                break
            kept.extend(groups[name])
            left = {path: module for path, module in left.items() if path not in groups[name]}
            reached = judge.cosine(left)
        if kept:
            context.progress.say(
                f"{tower.name}: cosine {everything:.4f} with everything quantized, below {self.min_cosine:g}; "
                f"{len(kept)} of {len(made)} layers stay float, cosine {reached:.4f}"
            )
        return {
            "cosine": round(reached, 6),
            "cosine_all_quantized": round(everything, 6),
            "sensitivity": {name: round(1 - value, 7) for name, value in alone.items()},
            "kept_float": kept,
            "judged_on": {"samples": judge.samples, "runs": judge.runs},
        }


def _bytes(bundle: Bundle, tower: Tower) -> int:
    """Return what a tower's tensors take, shared ones once."""
    state = bundle.model.state_dict(keep_vars=True)
    return sum(value.nbytes for value in {id(v): v for name, v in state.items() if tower.owns(name)}.values())


def _whole_ties(paths: Sequence[str], tower: Tower) -> list[str]:
    """Return `paths` without the layers that share their weight with one that is not among them."""
    halves = {path for pair in tower.tied if not set(pair) <= set(paths) for path in pair}
    return [path for path in paths if path not in halves]
