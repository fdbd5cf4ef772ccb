"""rotate: turn what layers give each other, so that no channel stands out when it is rounded; what the model computes stays.

Two rotations go into the weights and cost nothing while the model runs:

- of a tower's residual stream, by one matrix for the tower: what writes into it writes turned, what reads it turns back, and norms
  pass it on, their gains having gone into what reads them (see `passes.narrow`, which cuts the same stream);
- of the values of each attention, head by head: an attention mixes them by token and never by channel, so that its output layer
  can turn them back.

Source: QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), section 4, stages 1a and 1c; SpinQuant (Liu et al. 2024, arXiv 2405.16406)
calls them R1 and R2. Deliberately left out are the products it adds before the second half of a feed-forward, and behind places
that turn queries and keys: they serve activations and caches of 4 bits, which no runtime here computes with. LayerNorms stay, as a
stream without its mean may be turned within what has none (`ops.residual`).

Shape alphabet: C channels of a stream, D of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.hadamard import hadamard_rotation
from mmcompress.ops.residual import random_directions, without_mean
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.narrow_cut import cut
from mmcompress.passes.narrow_fit import values_by_part
from mmcompress.passes.narrow_units import Stream, is_centred, known, require_narrowable, stream_of, why_not
from mmcompress.passes.prune_cut import set_parameters
from mmcompress.passes.quantize_channels import Channels, channels_of
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.views import Tower

SPARSE = 0.25
"""The share of zeros above which weights have been made so; dead channels alone leave fewer."""


@dataclass(frozen=True)
class Rotate:
    """Turn the residual stream and the values of attentions, so that no channel stands out when they are rounded afterwards.

    What the model computes stays as it is, and no data is needed. Put it before quantize, and measure: it helped GPTQ with one grid
    for a row (--group-size 0); weights rounded to nearest, and W8A8 that is smoothed, lost by it or gained nothing.
    """

    name: ClassVar[str] = "rotate"

    method: Literal["hadamard", "random"] = "hadamard"
    """By which rotation: of ones with random signs, where the width has one and norms are RMS norms, or a random one."""
    stream: bool = True
    """Turn the residual stream of towers where it is known. Image tokens of a language model are turned with its stream: distill
    the language tower alone afterwards. Where LayerNorms begin or end it, or a table is the output layer, a product is added."""
    values: bool = True
    """Turn the values of each attention, head by head."""
    towers: tuple[str, ...] = ()
    """Towers to turn; by default all."""

    def control(self, decisions: Mapping[str, Any] | None = None) -> None:
        """Nothing is selected."""

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """No sample is looked at."""
        return 0.0

    def check(self, bundle: Bundle) -> None:
        """Refuse towers that have nothing to turn, or in which something is no Linear, table or norm any more."""
        if self.stream and not self.values and not self.towers:
            known(bundle)
        for tower in self._chosen(bundle):
            if self.stream and tower.residual:
                require_narrowable(bundle, stream_of(tower), self.name)
            elif self.stream and not self.values and tower.name in self.towers:
                stream_of(tower)  # which says why not
            for channels, reader in self._values(tower):
                for path in (channels.maker, reader):
                    module = bundle.module(path)
                    if type(module) is not nn.Linear or is_float_coded(module):
                        raise UsageError(
                            f"{path} is a {type(module).__name__}; rotate is for nn.Linear",
                            hint="put rotate before factorize and quantize",
                        )

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Draw the rotations; what they make of weights is computed as they are put in."""
        streams: dict[str, list[str]] = {}
        values: list[str] = []
        made = Plan({"streams": streams, "values": values, "seed": context.seed})
        for tower in self._chosen(bundle):
            if self.stream and tower.residual:
                found = stream_of(tower)
                _require_dense(bundle, found.writers)
                streams[tower.name] = [found.table, found.tied] if found.tied else []
                made.tensors[f"{tower.name}.stream"] = self._of_stream(bundle, found, _drawing(context.seed, 0))
            elif self.stream:
                context.progress.say(f"the {tower.name} tower's stream stays as it is: {why_not(tower)}")
            drawing = _drawing(context.seed, 1)
            _require_dense(bundle, [reader for _, reader in self._values(tower)])
            widths = sorted({channels.width for channels, _ in self._values(tower)})
            made.tensors.update({f"{tower.name}.values.{width}": self._rotation(width, drawing) for width in widths})
            if widths:
                values.append(tower.name)
        made.facts["largest"] = self._largest(bundle)
        return made

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Turn weights in place, one part of a tower after the other; a plan that was read back makes the structure alone."""
        for name in plan.decisions["values"]:
            for channels, reader in self._values(bundle.tower(name)):
                turn = plan.tensors.get(f"{name}.values.{channels.width}")
                if turn is not None:
                    turn_values(bundle, channels, reader, turn)
        for name, tie in plan.decisions["streams"].items():
            turn_stream(bundle, stream_of(bundle.tower(name)), plan.tensors.get(f"{name}.stream"), tie)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune nothing; report how far the largest weights now stand out."""
        return {"largest_now": self._largest(bundle)}

    def _chosen(self, bundle: Bundle) -> list[Tower]:
        return [bundle.tower(name) for name in self.towers] or list(bundle.towers())

    def _values(self, tower: Tower) -> Iterator[tuple[Channels, str]]:
        """Yield what makes the values of each attention, and its output layer."""
        if self.values:
            made = channels_of(tower)
            for block in tower.blocks:
                for attention in filter(None, (block.attention, block.cross)):
                    yield made[attention.reader], attention.reader

    def _rotation(self, channels: int, drawing: torch.Generator) -> Tensor:
        draw = hadamard_rotation if self.method == "hadamard" else _random
        return draw(channels, drawing)

    def _of_stream(self, bundle: Bundle, stream: Stream, drawing: torch.Generator) -> Tensor:
        if not is_centred(bundle, stream):
            return self._rotation(stream.width, drawing)
        # Of what has no mean, into what has none: orders of Hadamard matrices less one are odd.
        flat = without_mean(stream.width)
        return flat @ _random(stream.width - 1, drawing) @ flat.T

    @torch.no_grad()
    def _largest(self, bundle: Bundle) -> dict[str, float]:
        """Return of each tower how many times its largest weight is the root of their mean square: a mean over its Linears."""
        found = {}
        for tower in self._chosen(bundle):
            parts = [part for block in tower.blocks for part in (block.attention, block.cross, block.mlp) if part]
            paths = [path for part in parts for path in (*part.writers, part.reader)]
            linears = [bundle.module(path) for path in paths if type(bundle.module(path)) is nn.Linear]
            weights = [linear.get_parameter("weight") for linear in linears]
            shares = [float(each.abs().max() / each.float().square().mean().sqrt()) for each in weights if each.any()]
            if shares:
                found[tower.name] = round(sum(shares) / len(shares), 2)
        return found


@torch.no_grad()
def _require_dense(bundle: Bundle, paths: Sequence[str]) -> None:
    """Raise UsageError where many of the weights to be turned are 0."""
    weights = [bundle.module(path).get_parameter("weight") for path in paths]
    zeros = sum(int((each == 0).sum()) for each in weights) / max(1, sum(each.numel() for each in weights))
    if zeros > SPARSE:
        raise UsageError(
            f"{zeros:.0%} of the weights to be turned are 0, and turned none would be ({paths[0]} and {len(paths) - 1} more)",
            hint="put rotate before sparsify",
        )


def _random(channels: int, drawing: torch.Generator) -> Tensor:
    return random_directions(channels, channels, drawing)


def _drawing(seed: int, stage: int) -> torch.Generator:
    return torch.Generator().manual_seed(2 * seed + stage)


@torch.no_grad()
def turn_values(bundle: Bundle, channels: Channels, reader: str, turn: Tensor) -> None:
    """Turn the values of every head by `turn` (D, D), and their reader back, in place."""
    rows = slice(channels.first, channels.first + channels.kv_heads * channels.width)
    for parameter in bundle.module(channels.maker).parameters(recurse=False):
        own = parameter[rows]
        by = turn.to(own.device)
        heads = own.double().unflatten(0, (channels.kv_heads, channels.width)).movedim(1, -1)
        own.copy_((heads @ by).movedim(-1, 1).flatten(0, 1))
    weight = bundle.module(reader).get_parameter("weight")
    columns = weight.double().unflatten(1, (channels.heads, channels.width))
    weight.copy_((columns @ turn.to(weight.device)).flatten(1))


def turn_stream(bundle: Bundle, stream: Stream, basis: Tensor | None, tie: list[str]) -> None:
    """Turn a stream by `basis` (C, C) in place, or, where that is None, make the structure of such a tower alone."""
    beside: dict[str, Tensor] = {}
    if basis is not None:
        there = dict(bundle.model.named_parameters(remove_duplicate=False))
        for values in values_by_part(bundle, stream, None, basis):
            set_parameters(bundle, {name: value for name, value in values.items() if name in there})
            beside |= {name: value for name, value in values.items() if name not in there}
    cut(bundle, stream, stream.width, tie)
    set_parameters(bundle, beside)
