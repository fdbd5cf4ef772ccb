"""What `quantize` decides for one tower: which layers become what, what of the samples `apply` is given, and what to report."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.kept import Kept, write_atomically
from mmcompress.ops.float4 import BLOCKS
from mmcompress.ops.float8 import FLOAT8
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.distill_ranks import world_size
from mmcompress.passes.quantize_calibrate import calibrate, grids_of, offers
from mmcompress.passes.quantize_equalize import add_equalized
from mmcompress.passes.quantize_fit import fit_weights
from mmcompress.passes.quantize_folds import add_folds
from mmcompress.passes.quantize_judge import Judge, judge_tower
from mmcompress.passes.quantize_layers import (
    by_token,
    bytes_of,
    candidates,
    float_blocks,
    float_codable,
    group_sizes,
    mixtures_of,
    told,
    whole_ties,
)
from mmcompress.passes.quantize_logits import of_layers, pairs_of
from mmcompress.passes.quantize_schemes import FLOAT_CODES, SCHEMES, Scheme, with_activations
from mmcompress.passes.quantize_smooth import USUAL, seen_and_strength
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize


DECISIONS = "decisions.json"


def begun(target: str, context: Context) -> Plan:
    """Return a plan without towers, or with those that a killed run had finished, and what it had computed for others."""
    sections: dict[str, Any] = {
        name: {} for name in ("layers", "groups", "scaled", "folds", "logits", "tied", "towers")
    }
    made = Plan({"target": target, **sections})
    place = _place(context)
    if place is None:
        return made
    tensors = Kept(place)
    without: list[str] = []
    if (place / DECISIONS).exists():
        found = json.loads((place / DECISIONS).read_text())
        made.decisions.update(found["decisions"])
        without = found["without"]
    # What layers are judged without: folds come after that.
    without += [name for name in tensors if name.endswith(".fold") and name[:-5] not in made.decisions["folds"]]
    for name in without:
        tensors.pop(name, None)
    return replace(made, tensors=tensors)


def finished(made: Plan, context: Context) -> None:
    """Keep what is decided so far: of whole towers."""
    place = _place(context)
    if place is not None:
        assert isinstance(made.tensors, Kept), "the plan was not begun here"
        found = {"decisions": made.decisions, "without": sorted(made.tensors.deleted)}
        write_atomically(place / DECISIONS, json.dumps(found))


def _place(context: Context) -> Path | None:
    # Of several processes each computes all of it; none waits for another's files.
    return context.workdir / "quantize" if context.workdir and world_size() == 1 else None


def plan_tower(settings: Quantize, bundle: Bundle, tower: Tower, context: Context, made: Plan) -> None:
    """Add to `made` the schemes of a tower's layers, the tensors they are made of, and the tower's report.

    Raises UsageError where it needs data and has none, or where nothing of the tower can be quantized.
    """
    name = settings.scheme_of(tower.name)
    scheme = with_activations(name, settings.activations)
    paths = candidates(bundle, tower, settings.tables, settings.keep_float)
    report: dict[str, Any] = {"scheme": name, "bytes_before": bytes_of(bundle, tower)}
    if name in FLOAT_CODES:
        paths = float_codable(bundle, tower, paths)
        context.progress.say(f"{tower.name}: {len(paths)} Linears take {name}, all else stays float")
    if scheme.inputs == "static":
        called, smoothed = input_grids(settings, bundle, tower, paths, scheme, context, made.tensors)
        report |= smoothed
        schemes = {path: name if f"{path}.scale" in made.tensors else scheme.otherwise for path in called}
        if settings.rounds_logits:
            made.decisions["logits"] |= of_layers(pairs_of(bundle, tower, called), schemes)
    else:
        schemes = dict.fromkeys(paths, scheme.otherwise or name)
        if scheme.inputs == "dynamic" and scheme.weights != "int4":
            rounded = by_token(bundle, tower, paths, scheme.weights)
            schemes |= dict.fromkeys(rounded, name)
            strength = USUAL if settings.smooth is None else settings.smooth
            smooths = strength > 0 and scheme.weights == "int8"
            if smooths and offers(bundle, context, tower.name, context.num_samples):
                gains = _gains(settings, bundle, tower, rounded, strength, context)
                made.tensors.update({f"{path}.gain": gain for path, gain in gains.items()})
                made.decisions["scaled"] |= dict.fromkeys(gains, strength)
    if scheme.weights == "int4" or scheme.weights in BLOCKS:
        if scheme.weights == "int4":
            sizes = group_sizes(bundle, tower, paths, settings.group_size)
        else:
            sizes = float_blocks(bundle, tower, paths, BLOCKS[scheme.weights])
        schemes |= dict.fromkeys(sizes, name)
        report["eight_bit"] = eight = [path for path in paths if path not in sizes]
        context.progress.say(f"{tower.name}: {told(sizes, eight)}")
        made.decisions["groups"] |= sizes
    report |= _experts_report(settings, tower, schemes, context)
    if scheme.inputs != "static":
        if settings.scaling == "equalize":
            add_equalized(settings, bundle, tower, schemes, made)
        report |= fit_weights(settings, bundle, tower, schemes, context, made)
    made.decisions["layers"] |= schemes
    made.decisions["tied"] |= {linear: table for table, linear in tower.tied if linear in schemes}
    if schemes and settings.sensitivity_samples and offers(bundle, context, tower.name, settings.sensitivity_samples):
        judge = Judge(bundle, tower.name, context, settings.sensitivity_samples)
        report |= judge_tower(
            judge, tower, list(schemes), made, settings.maker, settings.min_cosine, settings.sensitivity
        )
    if not any(path in made.decisions["layers"] for path in schemes):
        raise UsageError(
            f"no layer of the {tower.name} tower can be quantized within min_cosine {settings.min_cosine:g}",
            hint="lower min_cosine, use scheme W8A16, or keep_float fewer layers",
        )
    if settings.fold:
        add_folds(bundle, tower, made)
    made.decisions["towers"][tower.name] = report


def _experts_report(
    settings: Quantize, tower: Tower, schemes: Mapping[str, str], context: Context
) -> dict[str, dict[str, str]]:
    """Say and return what the experts of a tower become: each sees few of the samples' tokens, and so none is fitted to them."""
    own = mixtures_of(tower) & schemes.keys()
    if not own:
        return {}
    scheme = schemes[min(own)]
    four = SCHEMES[scheme].weights == "int4"
    plain = settings.rounding == "nearest" or settings.symmetric_experts
    how = "hqq" if four and not plain else "nearest"
    text = f"{tower.name}: the experts of {len(own)} blocks take {scheme}, rounded by {how}"
    if settings.looks_at_samples:
        text += "; they are not fitted to samples, of which each sees few tokens"
    context.progress.say(text)
    return {"experts": {"scheme": scheme, "rounding": how}}


def _gains(
    settings: Quantize, bundle: Bundle, tower: Tower, paths: list[str], strength: float, context: Context
) -> dict[str, Tensor]:
    """Return what inputs are multiplied by that then are rounded token by token: one grid for all channels needs it as well."""
    how: dict[str, Any] = {
        "method": "min-max",
        "percentile": settings.percentile,
        "smooth": strength,
        "channels": settings.channels(tower),
    }
    grids = calibrate(bundle, tower, paths, settings.maker.inputs, context, **how)
    return {path: grid.gain for path, grid in grids.items() if grid.gain is not None}


def input_grids(
    settings: Quantize,
    bundle: Bundle,
    tower: Tower,
    paths: list[str],
    scheme: Scheme,
    context: Context,
    tensors: MutableMapping[str, Tensor],
) -> tuple[list[str], dict[str, Any]]:
    """Add the grids of the layers' inputs to `tensors`; return `paths` without the layers never called, and what to report.

    Their owner reads them: their input cannot be rounded, nor their weight replaced safely.
    """
    unrounded = mixtures_of(tower)
    linears = [path for path in paths if not (path in unrounded or isinstance(bundle.module(path), nn.Embedding))]
    floats = scheme.weights == "float8"
    pairs = pairs_of(bundle, tower, linears) if settings.rounds_logits and not floats else {}
    own = replace(settings, smooth=0.0) if floats else settings
    seen, strength, tried = seen_and_strength(own, bundle, tower, linears, [*pairs, *pairs.values()], context)
    how: dict[str, Any] = {
        "method": settings.observer,
        "percentile": settings.percentile,
        "smooth": strength,
        "channels": settings.channels(tower),
    }
    grids = grids_of(bundle, tower, seen, FLOAT8 if floats else settings.maker.inputs, context, **how)
    rounded = by_token(bundle, tower, linears, scheme.weights) if floats else linears
    for path, grid in grids.items():
        if path not in rounded:
            continue
        tensors.update(grid.tensors(path))
    if tried:
        context.progress.say(
            f"{tower.name}: smoothed by {strength:g}, cosine {tried[f'{strength:g}']:.4f} on samples held back"
        )
    report = {} if floats else {"smooth": strength, **({"smooth_tried": tried} if tried else {})}
    return whole_ties([path for path in paths if path in grids or path not in linears], tower), report
