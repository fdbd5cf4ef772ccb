"""Which parameters of `quantize` go together, and which models it can work on."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError, closest
from mmcompress.ops.choice import require_solver
from mmcompress.ops.grouped import GROUP_SIZES
from mmcompress.passes.quantize_budget import require_budget
from mmcompress.passes.quantize_cache import cached_tower
from mmcompress.passes.quantize_equalize import equalizes
from mmcompress.passes.quantize_layers import mixtures_of
from mmcompress.passes.quantize_logits import require_logits
from mmcompress.passes.quantize_schemes import AUTO, FLOAT_CODES, FOUR_BITS, OFF, SCHEMES, WEIGHTS_ALONE, refuse_target
from mmcompress.surgery.float_codes import is_float_coded, require_bitsandbytes
from mmcompress.surgery.quantized_base import Quantized

if TYPE_CHECKING:
    from mmcompress.passes.quantize import Quantize


def require_sensible(settings: Quantize) -> None:
    """Raise UsageError for a value that is out of range, or asks for what another one rules out."""
    for field, given in {
        "scheme": settings.scheme,
        **{f"{k}_scheme": v for k, v in settings.own_schemes.items()},
    }.items():
        if given.upper() not in SCHEMES:
            known = ", ".join(SCHEMES)
            raise UsageError(f"quantize.{field} is '{given}'; known schemes: {known}", hint=closest(given, SCHEMES))
    if not 0 < settings.percentile <= 100:
        raise UsageError(
            f"quantize.percentile is {settings.percentile:g}; expected 0 < percentile <= 100",
            hint="99.9 to 99.999 are usual",
        )
    if not -1 <= settings.min_cosine < 1:
        raise UsageError(
            f"quantize.min_cosine is {settings.min_cosine:g}; expected -1 <= min_cosine < 1",
            hint="0.99 is a usual limit; 1 would allow no rounding at all",
        )
    if settings.smooth is not None and not 0 <= settings.smooth <= 1:
        raise UsageError(
            f"quantize.smooth is {settings.smooth:g}; expected 0 <= smooth <= 1", hint="0.5 to 0.85 are usual"
        )
    if settings.group_size not in (0, *GROUP_SIZES):
        raise UsageError(
            f"quantize.group_size is {settings.group_size}; expected 0 or one of {', '.join(map(str, sorted(GROUP_SIZES)))}",
            hint="32 is usual; larger groups are a little smaller and faster, and less accurate",
        )
    for name in sorted(settings.used):
        refuse_target(name, settings.target, settings.observer)
    if settings.scaling != "none" and not settings.used & WEIGHTS_ALONE:
        raise UsageError(
            f"quantize.scaling is '{settings.scaling}', which is for weights alone, and no tower gets W4A16 or W8A16",
            hint="use smooth for W8A8",
        )
    if settings.scaling == "equalize" and not settings.fold:
        raise UsageError(
            "quantize.scaling is 'equalize', which lets what makes inputs do the scaling, and fold is off",
            hint="leave fold on, or use scaling awq",
        )
    if settings.correct_bias and not settings.used & WEIGHTS_ALONE:
        raise UsageError(
            "quantize.correct_bias is for weights alone, and no tower gets W4A16 or W8A16", hint="leave it out"
        )
    if settings.clip and not settings.used & FOUR_BITS:
        raise UsageError(
            "quantize.clip is for 4-bit weights, and no tower gets W4A16", hint="leave it out, or use scheme W4A16"
        )
    if settings.symmetric_experts and not settings.used & FOUR_BITS:
        raise UsageError(
            "quantize.symmetric_experts is for 4-bit weights, and no tower gets W4A16",
            hint="leave it out, or use scheme W4A16; experts of 8 bits are symmetric as they are",
        )
    if settings.balance != "none" and not settings.looks_at_samples:
        raise UsageError(
            f"quantize.balance is '{settings.balance}', but nothing is asked for that looks at tokens",
            hint="use it with scaling awq, clip, or rounding gptq or adaround and W4A16",
        )
    if settings.logits == "int8":
        _require_logits_known(settings)
    require_budget(settings, AUTO in settings.used)
    coded = [name for name in FLOAT_CODES if name in settings.used]
    if len(coded) > 1:
        raise UsageError(
            "quantize has towers of NF4 and of FP4, which no checkpoint of bitsandbytes can say",
            hint="use one of them",
        )
    if settings.double_quant and not coded:
        raise UsageError(
            "quantize.double_quant is for the scales of 4-bit floats, and no tower gets NF4 or FP4",
            hint="leave it out, or use scheme NF4",
        )
    if coded and settings.target not in ("cpu", "cuda"):
        raise UsageError(
            f"quantize.scheme {coded[0]} does not go to {settings.target}; only torch computes with bitsandbytes' layers",
            hint="use W4A16 for openvino, W8A8 or W8A16 for tensorrt, or --target cuda",
        )
    if settings.sensitivity_samples < 0:
        raise UsageError(
            f"quantize.sensitivity_samples is {settings.sensitivity_samples}; expected 0 or more",
            hint="0 skips the measurement",
        )


def _require_logits_known(settings: Quantize) -> None:
    """Raise UsageError where no tower can get int8 logits, or its engine gains nothing by them."""
    if settings.target != "openvino":
        raise UsageError(
            f"quantize.logits int8 does not go to {settings.target}: only OpenVINO is known to gain by it",
            hint="leave it out, or use --target openvino",
        )
    timed = AUTO in settings.used and settings.latency_ms is not None
    if settings.activations == "dynamic" or not ("W8A8" in settings.used or timed):
        given = "dynamic activations" if settings.activations == "dynamic" else ", ".join(sorted(settings.used))
        raise UsageError(
            f"quantize.logits int8 rounds what is computed of rounded inputs, on grids found by calibration; given: {given}",
            hint="use scheme W8A8 with static activations, or leave it out",
        )


def require_quantizable(settings: Quantize, bundle: Bundle) -> None:
    """Raise UsageError for towers that are not there or quantized already, broken ties, and patterns that match nothing."""
    if any(name in settings.used for name in FLOAT_CODES):
        require_bitsandbytes()
    towers = {tower.name: tower for tower in bundle.towers()}
    for name in (*settings.towers, *settings.own_schemes):
        bundle.tower(name)
    unlisted = [name for name in settings.own_schemes if settings.towers and name not in settings.towers]
    if unlisted:
        raise UsageError(
            f"quantize has a scheme for the {unlisted[0]} tower, which quantize.towers does not name",
            hint="name it in both or neither",
        )
    for tower in towers.values():
        if settings.scheme_of(tower.name) == OFF:
            continue
        done = [
            path
            for path, module in bundle.model.named_modules()
            if tower.owns(path) and (isinstance(module, Quantized) or is_float_coded(module))
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
    shown = [tower for tower in towers.values() if tower.prompt and settings.scheme_of(tower.name) != OFF]
    if settings.balance != "none" and not shown:
        raise UsageError(
            f"quantize.balance is '{settings.balance}', but no tower to be quantized is given both image and text tokens",
            hint="it is for the language tower of models that are shown pictures",
        )
    if settings.scaling == "equalize" and not equalizes(settings, bundle, towers.values()):
        raise UsageError(
            "quantize.scaling is 'equalize', and no Linear to be rounded reads what rows of another one make",
            hint="it is for output projections of attentions and for gated MLPs; leave it out, or look at keep_float and towers",
        )
    if AUTO in settings.used and settings.assign == "measured":
        require_solver()  # not after everything was judged
    if settings.cache == "int8":
        cached_tower(bundle, settings.towers)
    if settings.logits == "int8":
        require_logits(settings, bundle)
    if settings.symmetric_experts and not any(mixtures_of(tower) for tower in towers.values()):
        raise UsageError("quantize.symmetric_experts: the model has no experts", hint="leave it out")
    for pattern in settings.keep_float:
        if not any(fnmatch.fnmatchcase(path, pattern) for path, _ in bundle.model.named_modules()):
            raise UsageError(
                f"quantize.keep_float has '{pattern}', which matches no layer",
                hint="mmc inspect MODEL names the towers; patterns are such as 'text_model.*'",
            )
