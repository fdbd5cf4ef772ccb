"""How much each group of layers costs in accuracy once it is quantized, and which are to be left more precise.

All layers are judged together first: where the tower keeps what it has to, nothing else needs to be known, and is only looked for
when it is asked for. Sensitivity is measured, not assumed: each group of layers (a block's attention, its cross-attention, its MLP,
a projection, an embedding table with the Linear that shares its weight) is swapped in alone, and what the tower makes of a few
samples is compared with what the float model does. That takes one run of a few samples per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcompress.bundle import Bundle
from mmcompress.ops.budget import fewest
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize_calibrate import batches
from mmcompress.passes.quantize_layers import weighed
from mmcompress.passes.quantize_logits import rounds_output
from mmcompress.passes.quantize_make import Maker
from mmcompress.passes.quantize_schemes import SCHEMES
from mmcompress.progress import track
from mmcompress.surgery.low_rank import layer_of
from mmcompress.surgery.watch import evaluating
from mmcompress.views import Tower


def groups_of(tower: Tower, paths: Sequence[str]) -> dict[str, list[str]]:
    """Return the layers that are judged together: per block its attention, its cross-attention and its MLP, else each layer alone.

    A Linear that shares its weight with an embedding table is judged with it.
    """
    tables = {linear: table for table, linear in tower.tied}
    groups: dict[str, list[str]] = {}
    for path in paths:
        name, layer = tables.get(path, path), layer_of(path)
        for block in tower.blocks:
            if layer in (*block.attention.writers, block.attention.reader):
                name = f"{block.path}.attention"
            elif block.cross and layer in (*block.cross.writers, block.cross.reader):
                name = f"{block.path}.cross"
            elif block.mlp and layer in (*block.mlp.writers, block.mlp.reader):
                name = f"{block.path}.mlp"
        groups.setdefault(name, []).append(path)
    return groups


@contextmanager
def swapped(bundle: Bundle, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `modules` in place inside, and everything back as it was afterwards."""
    before = {path: bundle.module(path) for path in modules}
    try:
        for path, module in modules.items():
            bundle.replace(path, module)
        yield
    finally:
        for path, module in before.items():
            bundle.replace(path, module)


class Judge:
    """Compares what a tower makes of a few samples with what the float model does."""

    def __init__(self, bundle: Bundle, tower: str, context: Context, samples: int) -> None:
        self.bundle, self.tower, self.progress = bundle, tower, context.progress
        self.inputs = list(batches(bundle, tower, context, samples, "sensitivity"))
        self.samples = sum(len(next(iter(inputs.values()))) for inputs in self.inputs)
        self.wanted = list(self._rows())
        self.runs = 1

    def cosine(self, modules: Mapping[str, nn.Module]) -> float:
        """Return the mean cosine between the float model's rows and those with `modules` swapped in."""
        self.runs += 1
        cosines: list[Tensor] = []
        with swapped(self.bundle, modules):
            # Batch by batch: rows may be long (a vocabulary for each token) and as long as the longest of their batch.
            for rows, wanted in zip(self._rows(), self.wanted, strict=True):
                pairs = zip(rows, wanted, strict=True)
                cosines += [functional.cosine_similarity(one.double(), other.double(), dim=0) for one, other in pairs]
        return torch.stack(cosines).mean().item()

    def _rows(self) -> Iterator[Tensor]:
        with evaluating(self.bundle.model):
            yield from self.bundle.encode_all(self.tower, self.inputs)


@dataclass(frozen=True)
class Settled:
    """What `settle` came to."""

    made: dict[str, nn.Module]
    """The layers that stay quantized."""
    cosine: float
    before: float
    """The cosine with every layer as it came."""
    alone: dict[str, float]
    """Group -> the cosine with it alone quantized; empty where that was not needed."""
    given_back: list[str]


def settle(
    judge: Judge,
    groups: Mapping[str, Sequence[str]],
    made: Mapping[str, nn.Module],
    instead: Callable[[str], nn.Module | None],
    least: float,
    every: bool,
) -> Settled:
    """Measure all of `made` together; give as few groups back as it takes, worst first, until the cosine is `least`.

    Each of `groups` is measured alone where one has to go back or `every` asks for it. What takes the place of a layer that is
    given back is `instead`, None for the float layer.
    """
    before = judge.cosine(made)
    alone: dict[str, float] = {}
    if every or before < least:
        alone = {
            name: judge.cosine({path: made[path] for path in paths})
            for name, paths in track(groups.items(), judge.progress, f"{judge.tower} sensitivity", len(groups))
        }
    worst = sorted(alone, key=lambda name: alone[name])
    reached = {0: before}

    def without(count: int) -> dict[str, nn.Module]:
        left = dict(made)
        for path in (path for name in worst[:count] for path in groups[name]):
            del left[path]
            other = instead(path)
            if other is not None:
                left[path] = other
        return left

    def enough(count: int) -> bool:
        if count not in reached:
            reached[count] = judge.cosine(without(count))
        return reached[count] >= least

    count = fewest(len(worst), enough)
    enough(count)  # of all of them nothing is known yet where fewer never were
    given_back = [path for name in worst[:count] for path in groups[name]]
    return Settled(without(count), reached[count], before, alone, given_back)


def judge_tower(
    judge: Judge, tower: Tower, paths: Sequence[str], plan: Plan, maker: Maker, min_cosine: float, every: bool
) -> dict[str, Any]:
    """Give groups back until the tower keeps `min_cosine`, in `plan`: of 4 bits to 8, logits to float, then all to float.

    Return what to report.

    `every`: see `settle`.
    """
    bundle, layers, sizes = judge.bundle, plan.decisions["layers"], plan.decisions["groups"]
    tables = {linear: table for table, linear in tower.tied}
    made: dict[str, nn.Module] = {}
    for path in sorted(paths, key=tables.__contains__):
        layer = maker.made(bundle.layer(path), path, plan, made.get(tables.get(path, "")))
        made[path] = bundle.aside(path, layer)
    groups = groups_of(tower, list(made))
    report: dict[str, Any] = {}
    everything = None
    if sizes.keys() & made.keys():

        def eight_bits(path: str) -> nn.Module:
            return bundle.aside(path, maker.made(bundle.layer(path), path, _in_eight_bits(plan, path)))

        packed = {name: own for name, own in groups.items() if sizes.keys() & set(own)}
        first, schemes = dict(made), dict(layers)
        found = settle(judge, packed, made, eight_bits, min_cosine, every)
        made, everything = found.made, found.before
        for path in found.given_back:
            if sizes.pop(path, 0):
                layers[path] = "W8A16"
                plan.decisions["scaled"].pop(path, None)
                for name in _of_four_bits(path):
                    plan.tensors.pop(name, None)
        report = {"given_8_bits": found.given_back, "sensitivity": found.alone}
        report["options"] = _options(bundle, found, groups, first, schemes)
        _say(judge, f"{len(found.given_back)} of {len(made)} layers take 8 bits", found, min_cosine)
    pairs = [path for path in plan.decisions.get("logits", {}) if path in made]
    if pairs:
        attentions = {name: own for name, own in groups.items() if set(pairs) & set(own)}
        rounding, without = dict(made), replace(plan, decisions={**plan.decisions, "logits": {}})

        def float_logits(path: str) -> nn.Module:
            if not rounds_output(path, plan.decisions):
                return rounding[path]
            return bundle.aside(path, maker.made(bundle.layer(path), path, without))

        found = settle(judge, attentions, made, float_logits, min_cosine, False)
        made, everything = found.made, found.before
        report = {"float_logits": [path for path in pairs if path in found.given_back], "sensitivity": {}}
        for path in report["float_logits"]:
            for own in (path, plan.decisions["logits"].pop(path)):
                plan.tensors.pop(f"{own}.output_scale")
        _say(judge, f"{len(report['float_logits'])} of {len(pairs)} attentions keep float logits", found, min_cosine)
    if everything is None or found.cosine < min_cosine or (pairs and every):
        first = dict(made)
        found = settle(judge, groups, made, lambda path: None, min_cosine, every)
        report["options"] = [*report.get("options", []), *_options(bundle, found, groups, first, layers)]
        everything = found.before if everything is None else everything
        report["sensitivity"] = report.get("sensitivity", {}) | found.alone
        report["kept_float"] = found.given_back
        _say(judge, f"{len(found.given_back)} of {len(made)} layers stay float", found, min_cosine)
    for path in report.setdefault("kept_float", []):
        del layers[path]
        for decided in ("tied", "scaled"):
            plan.decisions[decided].pop(path, None)
    return report | {
        "cosine": round(found.cosine, 6),
        "cosine_all_quantized": round(everything, 6),
        "sensitivity": {name: round(1 - value, 7) for name, value in report["sensitivity"].items()},
        "judged_on": {"samples": judge.samples, "runs": judge.runs},
    }


def _of_four_bits(path: str) -> tuple[str, str]:
    """Return the names of tensors that are a layer's as long as it has 4 bits: scales of its inputs, and its bias."""
    return f"{path}.gain", f"{path}.bias"


def _in_eight_bits(plan: Plan, path: str) -> Plan:
    """Return a plan for one layer, as it is unless it has 4 bits, which become 8."""
    own = {name: plan.tensors[name] for name in plan.tensors if name.startswith(f"{path}.")}
    if path not in plan.decisions["groups"]:
        return Plan(plan.decisions, own)
    scaled = {other: value for other, value in plan.decisions["scaled"].items() if other != path}
    changed = {"layers": {**plan.decisions["layers"], path: "W8A16"}, "scaled": scaled}
    tensors = {name: tensor for name, tensor in own.items() if name not in _of_four_bits(path)}
    return Plan({**plan.decisions, **changed}, tensors)


def _options(
    bundle: Bundle,
    found: Settled,
    groups: Mapping[str, Sequence[str]],
    made: Mapping[str, nn.Module],
    layers: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return what each group that was quantized alone saved and lost, and whether it stays so."""
    options = []
    for name, cosine in found.alone.items():
        own = groups[name]
        options.append(
            {
                "layers": name,
                # What falls back to another scheme than its tower's does not name the group.
                "scheme": max((layers[path] for path in own), key=lambda scheme: bool(SCHEMES[scheme].otherwise)),
                "bytes_saved": weighed(bundle.module(path) for path in own) - weighed(made[path] for path in own),
                "loss": round(1 - cosine, 7),
                "chosen": not set(own) & set(found.given_back),
            }
        )
    return options


def _say(judge: Judge, what: str, found: Settled, least: float) -> None:
    if found.given_back:
        judge.progress.say(
            f"{judge.tower}: cosine {found.before:.4f} with everything quantized, below {least:g}; "
            f"{what}, cosine {found.cosine:.4f}"
        )
