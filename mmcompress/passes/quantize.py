"""The pass `quantize`: weights of 8 or 4 bits, and 8-bit activations where the scheme says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from mmcompress.bundle import Bundle
from mmcompress.ops.grouped import nearest
from mmcompress.ops.half_quadratic import half_quadratic
from mmcompress.ops.rounding import INT8, UINT8, WEIGHT_INT7, WEIGHT_INT8
from mmcompress.ops.token_rounding import TOKEN_INT8, TOKEN_UINT8, TokenGrid
from mmcompress.passes import quantize_fit
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.quantize_cache import cache_bytes, cached_tower
from mmcompress.passes.quantize_channels import Channels, channels_of
from mmcompress.passes.quantize_checks import require_quantizable, require_sensible
from mmcompress.passes.quantize_layers import bytes_of
from mmcompress.passes.quantize_make import Maker
from mmcompress.passes.quantize_mixed import plan_mixed
from mmcompress.passes.quantize_plan import begun, finished, plan_tower
from mmcompress.passes.quantize_schemes import AUTO, FLOAT_CODES, FOUR_BITS, OFF, with_activations
from mmcompress.passes.quantize_smooth import STRENGTHS
from mmcompress.passes.quantize_times import TIMING_SECONDS
from mmcompress.passes.stacked import say_left
from mmcompress.surgery.float_codes import loading_config
from mmcompress.surgery.folding import fold
from mmcompress.surgery.freeing import give_back_freed
from mmcompress.surgery.quantized import drop_ties
from mmcompress.surgery.rounded_cache import round_cache
from mmcompress.views import Tower


@dataclass(frozen=True)
class Quantize:
    """Store weights as 8-bit or 4-bit integers and, with W8A8, compute with 8-bit activations, per tower.

    8-bit weights get one scale per output channel, activations one per tensor, from calibration samples. 4-bit weights, of Linears
    and of a mixture's experts, get a scale and a zero point for each group of inputs; everything else takes 8 bits there. The
    experts of a block are one layer, of weights alone: with W8A8 their inputs stay floats. What stays more precise is
    decided by measurement: where a tower's embeddings change by more than `min_cosine` allows, every group of layers is quantized
    alone, and groups are given back, worst first, until it holds: from 4 bits to 8, then to float. With scheme auto a budget is
    given instead, every group of layers is quantized alone in each scheme, and those are chosen that lose least within it.
    """

    name: ClassVar[str] = "quantize"

    scheme: str = "W8A8"
    """W8A8 (weights and activations; fastest for prompts and pictures), W8A16 (weights only), W4A16 (4-bit weights of Linears
    and experts: smallest, and in onnxruntime fastest where tokens come one by one), W4A8 (the same, and what is measured in torch
    is what a runtime computes that rounds the inputs it multiplies to 8 bits), FP8 (8-bit floats, for GPUs of 2022 or later), MXFP4
    or NVFP4 (4-bit floats in blocks of 32 or 16 inputs, for runtimes that know the type: OpenVINO, GPUs of 2025), NF4 or FP4 (4-bit
    floats of Linears, by bitsandbytes: plain transformers loads them, no other runtime does), auto (each group of layers 4 bits, 8
    bits or float, by measured sensitivity within a budget: `bits`, `size_mib` or `latency_ms`; it needs data) or W16A16 (off)."""
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
    bits: float | None = None
    """For scheme auto: how many bits a weight may have on average, in all towers with that scheme together. Scales are not counted:
    with groups of 32 they add about one bit in float32 and half of that in 16 bits."""
    size_mib: float | None = None
    """For scheme auto, instead of `bits`: MiB that the towers with that scheme may take together, with all they consist of."""
    latency_ms: float | None = None
    """For scheme auto, instead of `bits`: milliseconds that the exported towers with that scheme may take together on this
    machine's processor, in the engine of `target`; a model that writes: to read its prompt. Layers may then have W8A8 too; what the
    product of each shape takes in each scheme is measured, and so is the result."""
    assign: Literal["measured", "random"] = "measured"
    """For scheme auto: how groups of layers get their schemes: those that lose least, or drawn within the budget (the control)."""
    towers: tuple[str, ...] = ()
    """Towers to quantize; empty means all."""
    target: Literal["cpu", "openvino", "cuda", "tensorrt"] = "cpu"
    """Where it will run: cpu gives unsigned activations with a zero point (fast in onnxruntime and in OpenVINO), the others signed
    ones with zero point 0, which TensorRT demands and OpenVINO multiplies a little faster, at some loss of accuracy. Where weights
    alone are integers, cpu lets engines round inputs to 8 bits in blocks as they multiply: that makes single tokens fast."""
    activations: Literal["static", "dynamic"] = "static"
    """For W8A8 and FP8: static rounds a layer's inputs on one grid, found by calibration, so it needs data; dynamic gives each
    token its own while it runs, which needs none and costs some speed; with data W8A8 is smoothed, which makes it more accurate.
    W4A8 is always dynamic."""
    observer: Literal["min-max", "percentile", "mse", "entropy"] = "min-max"
    """How an activation's range is chosen: cover everything, cut off rare outliers, least squared error, or least divergence of
    the distributions (TensorRT's). Vision transformers keep what matters in a few huge values, which clipping destroys."""
    percentile: float = 99.99
    """For observer percentile: the percent of values inside the range."""
    group_size: int = 32
    """For W4A16: how many neighbouring inputs share a scale (16, 32, 64 or 128; 0: all of a row). Where it does not divide them,
    the largest that does; Linears, and experts, that none divides take 8 bits."""
    double_quant: bool = False
    """For NF4 and FP4: store the scale of each 64 weights in 8 bits, which takes 4.13 bits a weight in place of 4.5."""
    rounding: Literal["nearest", "hqq", "gptq", "adaround"] = "nearest"
    """For W4A16: to the nearest place of a grid that covers a group; of the grid that suits most of its weights (HQQ; on SmolLM2 no
    better, python -m bench.fitted_weights); or so that outputs change least on the calibration samples (on HQQ's grids; it needs
    data; of experts HQQ's grids alone, since each sees few tokens): one column of weights makes up for another (GPTQ), or whether
    each weight goes up or down is learned (AdaRound, which takes far longer). 8-bit weights go to the nearest."""
    symmetric_experts: bool = False
    """For W4A16 of a mixture's experts: grids with their zero point in the middle, rounded to nearest. A little less accurate; vLLM
    and transformers take no others of experts, and compressed-tensors then keeps 4 bits where it takes 8 without."""
    scaling: Literal["none", "awq", "equalize"] = "none"
    """For weights alone (W4A16, W8A16): scale the inputs' channels so that weights which multiply large inputs are rounded more
    finely, as strongly as outputs on the calibration samples change least (AWQ; it needs data). Or, without data, so that the
    weights which make a channel and those which read it are equally large (equalize: of an attention's values, and of gated and
    ReLU MLPs). With W8A8, see `smooth`."""
    clip: bool = False
    """For W4A16: cut a group's few largest weights off where outputs on the calibration samples change less for it; needs data."""
    correct_bias: bool = False
    """For weights alone (W4A16, W8A16): take what rounding adds to outputs on average over the calibration samples off the biases,
    of layers that have one; needs data."""
    balance: Literal["none", "modality", "text"] = "none"
    """What `scaling`, `clip` and gptq look at in a language model that is shown pictures: every token alike; image and text tokens
    by how much errors there change the answers (MBQ; one backward pass); or text tokens alone, to compare with."""
    fold: bool = True
    """Let what makes layers' inputs do the scaling of them, where that computes the same: the norm before, if nothing else reads
    it; the values of an attention; the linear half of a gated MLP. Other tools can say no scaling beside (mmc export --to)."""
    embeddings: bool = True
    """Quantize large embedding tables too, one scale per row. A table that shares its weight with a Linear shares its integers with
    it: both are quantized, or neither. Target tensorrt leaves them floats: it looks up no integers."""
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
    cache: Literal["float", "int8"] = "float"
    """Keys and values that a language model keeps while it answers: int8 makes them 8-bit integers with a scale for each token and
    head, a little more than a quarter of float32. The cache is smaller for it and not faster: they are made floats again for each
    token. For models that are shown pictures and answer in text; with scheme W16A16 nothing else changes."""
    logits: Literal["float", "int8"] = "float"
    """For W8A8 with static activations and target openvino: int8 rounds queries and keys too, as their Linears give them out, so
    that attentions compute their logits of integers; a little faster, and a little less accurate. Not where places turn them
    afterwards (rotary), one Linear makes both, or keys wait in a cache. Logits are given back first, for `min_cosine`."""
    smooth: float | None = None
    """For W8A8, with data: how much of the spread of an activation's channels moves into the weights (SmoothQuant); 0 is off. By
    default it is searched, tower by tower, on a quarter of the samples, `sensitivity_samples` at most, before ranges are taken from
    those too. Where nothing is searched it is 0.75: with dynamic activations, other observers than min-max, fewer than four
    samples, `sensitivity_samples` 0, or a model that does not fit into memory."""
    reduce_range: bool = False
    """Use 7 of the 8 bits of weights: for x86 CPUs without VNNI or AMX, whose 16-bit sums of u8*s8 products overflow."""

    def __post_init__(self) -> None:
        require_sensible(self)

    def control(self, decisions: Mapping[str, Any] | None = None) -> Quantize | None:
        """Return this pass with schemes drawn at random; None where they are given and nothing is selected."""
        return replace(self, assign="random") if AUTO in self.used and self.assign != "random" else None

    def streams(self, data: bool = False) -> bool:
        """Whether weights alone are rounded, each layer's by itself; with data also to what samples show of each layer's inputs.

        Not what looks at gradients, which takes all weights at once.
        """
        used = [with_activations(name, self.activations) for name in self.used]
        looks = any(scheme.inputs == "static" for scheme in used) or self.looks_at_samples
        return (data or not looks) and self.balance != "modality" and not self.used & {AUTO, *FLOAT_CODES}

    def holds(self, bundle: Bundle) -> int:
        """The moments of the widest layer's inputs, and what is computed of them."""
        return max((quantize_fit.bytes_held(self, bundle, tower) for tower in bundle.towers()), default=0)

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Looks at the samples for ranges or moments, and what AdaRound learns by them; then a tower is judged, or each part of its
        blocks, in rounded arithmetic.
        """
        towers = [tower for tower in bundle.towers() if self.scheme_of(tower.name) != OFF]
        if not towers:
            return 0.0
        looks = 0
        for tower in towers:
            scheme = with_activations(self.scheme_of(tower.name), self.activations)
            looks = max(looks, quantize_fit.looks(self, bundle, tower))
            smoothed = scheme.inputs == "dynamic" and scheme.weights == "int8"
            looks = max(looks, 2 if scheme.inputs == "static" else int(smoothed))
        parts = max(sum(2 + (block.cross is not None) for block in tower.blocks) for tower in towers)
        runs = parts + 3 if self.sensitivity else 2
        if AUTO in self.used:
            runs = 2 * parts + 5 if self.assign == "measured" else 0
            looks = 2 if self.latency_ms is not None else looks
        judged = 2 * runs * min(self.sensitivity_samples, work.samples)
        if self.smooth is None and self._searches(towers):
            judged += 2 * len(STRENGTHS) * min(self.sensitivity_samples, work.samples // 4)
        timed = TIMING_SECONDS if self.latency_ms is not None else 0.0
        learned = sum(quantize_fit.learning_seconds(self, bundle, tower) for tower in towers)
        return (looks * work.samples + judged) * work.forward + timed + learned

    def check(self, bundle: Bundle) -> None:
        """Refuse schemes for towers that are not there, towers quantized already, broken ties, and patterns that match nothing."""
        require_quantizable(self, bundle)

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Choose layers, calibrate, measure sensitivity; what was computed of samples travels as tensors.

        With a `workdir` they lie there, and what a killed run has computed is not computed again.
        """
        made = begun(self.target, context)
        towers = {tower: self.scheme_of(tower.name) for tower in bundle.towers()}
        for tower, scheme in towers.items():
            if scheme not in (OFF, AUTO) and tower.name not in made.decisions["towers"]:
                plan_tower(self, bundle, tower, context, made)
                finished(made, context)
        if AUTO in towers.values():
            plan_mixed(self, bundle, [tower for tower, scheme in towers.items() if scheme == AUTO], context, made)
        for name in ("groups", "scaled", "folds", "logits"):
            if not made.decisions[name]:
                del made.decisions[name]
        if self.cache == "int8":
            made.decisions["cache"] = [cached_tower(bundle, self.towers).name]
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
        for maker in plan.decisions.get("folds", {}):
            # Quantized ones were made so. A plan that was read back has no tensors: a checkpoint holds what they became.
            if maker not in layers and f"{maker}.fold" in plan.tensors:
                fold(bundle.module(maker), plan.tensors[f"{maker}.fold"])
        for name in plan.decisions.get("cache", ()):
            round_cache(bundle.module(block.attention.path) for block in bundle.tower(name).blocks)
        drop_ties(bundle.model)
        loading = loading_config(bundle.model, bundle.source.dtype)
        if loading:
            bundle.model.config.quantization_config = loading

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Change nothing; report the bytes each tower now takes, recounted, and those of a token in a cache of integers."""
        held = cache_bytes(bundle)
        if self.cache == "int8":
            context.progress.say("bytes of a token in the cache: {} before, now {}".format(*held.values()))
        towers = [tower for tower in bundle.towers() if self.scheme_of(tower.name) != OFF]
        left = say_left(bundle, towers, context, "floats", floats=True)
        return {"bytes": {tower.name: bytes_of(bundle, tower) for tower in bundle.towers()}, **held, **left}

    def _searches(self, towers: Sequence[Tower]) -> bool:
        timed = self.latency_ms is not None and AUTO in self.used
        static = self.activations == "static" and self.observer == "min-max"
        return static and (timed or any(self.scheme_of(tower.name) == "W8A8" for tower in towers))

    @property
    def maker(self) -> Maker:
        return Maker(
            inputs=UINT8 if self.target == "cpu" else INT8,
            weights=WEIGHT_INT7 if self.reduce_range else WEIGHT_INT8,
            smooth=self.smooth != 0,
            rounding=nearest if self.rounding == "nearest" else half_quadratic,
            rounds_inputs=self.target == "cpu",
            symmetric_experts=self.symmetric_experts,
            double_quant=self.double_quant,
            tokens=self._tokens,
        )

    @property
    def _tokens(self) -> TokenGrid | None:
        if self.activations == "static":
            return None
        return TOKEN_UINT8 if self.target == "cpu" else TOKEN_INT8

    @property
    def rounds_logits(self) -> bool:
        """Whether queries and keys are rounded, of layers that have W8A8."""
        return self.logits == "int8"

    def scheme_of(self, tower: str) -> str:
        """Return the name of the scheme a tower gets."""
        if self.towers and tower not in self.towers:
            return OFF
        return self.own_schemes.get(tower, self.scheme).upper()

    @property
    def used(self) -> set[str]:
        """The schemes of all towers."""
        return {given.upper() for given in (self.scheme, *self.own_schemes.values())}

    @property
    def looks_at_samples(self) -> bool:
        """Whether weights are rounded to what samples show of their inputs."""
        return (
            self.scaling == "awq"
            or self.clip
            or self.correct_bias
            or (self.rounding in quantize_fit.FITTED and bool(self.used & FOUR_BITS))
        )

    @property
    def tables(self) -> bool:
        """Whether embedding tables are quantized: TensorRT (RTX 1.7) has integers in no other place than before a product."""
        return self.embeddings and self.target != "tensorrt"

    def channels(self, tower: Tower) -> dict[str, Channels]:
        """Return the layers whose gains rows of another take over, where that is wanted."""
        return channels_of(tower) if self.fold else {}

    @property
    def own_schemes(self) -> dict[str, str]:
        """Tower -> its own scheme, where one is given."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_scheme")}
        return {name.removesuffix("_scheme"): scheme for name, scheme in given.items() if scheme is not None}
