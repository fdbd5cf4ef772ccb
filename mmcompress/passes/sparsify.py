"""sparsify: set weights of Linears to 0, each for itself, or in the pattern N:M that some tensor cores can skip.

Only values change. Shapes, bytes on disk and every runtime's arithmetic stay what they were, so by itself this makes nothing
smaller and nothing faster; what zeros are good for is said and measured in the README. They survive what may follow: `distill`
trains everything but them, `quantize` stores them as what stands for 0, `prune` that repairs nothing leaves them.

Inputs of all layers are those of the model as it is given, as for GPTQ (see `quantize_moments`), and not of one whose earlier
layers are sparse already, as in Wanda's and SparseGPT's code: a plan changes nothing. Whoever wants that names `layers` in several
steps of a recipe, the first blocks first: each step measures what the former left.

Memory: a plan holds the new weights of all chosen layers, so the towers once more, beside the moments of a few layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.ops.sparsity import Pattern
from mmcompress.passes.base import Context, Plan, Work, require_one
from mmcompress.passes.prune_cut import set_parameters
from mmcompress.passes.sparsify_layers import linears_of_blocks, named, recount
from mmcompress.passes.sparsify_weights import FROM_SAMPLES, Method, looks, sparse_weights
from mmcompress.passes.stacked import say_left
from mmcompress.views import Tower

SPARSITY = 0.5
MOST = 32
"""The largest M of N:M: no hardware knows more than 16 or so, and blocks of SparseGPT must hold some groups."""


@dataclass(frozen=True)
class Sparsify:
    """Set weights of Linears to zero: a share of each row, or all but N of M neighbouring ones (2:4).

    Zeros are stored and multiplied as all numbers are: by itself this makes a model neither smaller nor faster. Linears of
    attentions and MLPs alone; embeddings, convolutions and projections stay dense.
    """

    name: ClassVar[str] = "sparsify"

    sparsity: float | None = None
    """Share of the weights of each row that become zero; default 0.5; 0 changes nothing."""
    pattern: str = "unstructured"
    """unstructured, or N:M instead of `sparsity`: of M neighbouring inputs at most N are read (2:4, 4:8). Layers whose inputs M
    does not divide stay dense."""
    method: Literal["auto", "sparsegpt", "wanda", "magnitude", "random"] = "auto"
    """Which weights go: those that make the least difference to the outputs, others making up for them (SparseGPT); those with the
    least |weight| times size of its input (Wanda); the smallest, which needs no data; or at random, the control. auto is sparsegpt
    with data and magnitude without."""
    update: bool = False
    """For method random: change what stays as sparsegpt does, which makes it the control of that."""
    balance: Literal["none", "modality", "text"] = "none"
    """What sparsegpt and wanda look at in a language model that is shown pictures: every token alike; image and text tokens by how
    much errors there change the answers (MBQ; one backward pass); or text tokens alone."""
    layers: tuple[str, ...] = ()
    """Layers to make sparse, as path patterns such as "*.mlp.*"; empty means all of the towers' blocks."""
    towers: tuple[str, ...] = ()
    """Towers to make sparse; empty means all."""

    def __post_init__(self) -> None:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if found:
            require_one("sparsify", sparsity=self.sparsity, pattern=self.pattern)
        if self.pattern != "unstructured" and not (found and 0 < int(found[1]) < int(found[2]) <= MOST):
            raise UsageError(
                f"sparsify.pattern is '{self.pattern}'; expected unstructured, or N:M with 1 <= N < M <= {MOST}",
                hint="2:4 is what GPUs know: of 4 neighbours 2 stay",
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise UsageError(
                f"sparsify.sparsity is {self.sparsity:g}; expected 0 <= sparsity < 1", hint="it is the share made zero"
            )
        if self.update and self.method != "random":
            raise UsageError(
                f"sparsify.update is for method random, and method is {self.method}",
                hint="leave it out: sparsegpt always updates, wanda and magnitude never do",
            )
        if self.balance != "none" and self.method not in ("auto", *FROM_SAMPLES) and not self.update:
            raise UsageError(
                f"sparsify.balance is '{self.balance}', but method {self.method} looks at no tokens",
                hint="use it with sparsegpt or wanda",
            )

    @property
    def shape(self) -> Pattern:
        """Which weights go, in numbers."""
        kept, _, of = self.pattern.partition(":")
        if of:
            return Pattern.grouped(int(kept), int(of))
        return Pattern(SPARSITY if self.sparsity is None else self.sparsity)

    def control(self, decisions: Mapping[str, Any] | None = None) -> Sparsify | None:
        """Return the pass that makes as many weights zero at random; beside sparsegpt what stays makes up for it as well."""
        if self.method == "random" or not self.shape.sparsity:
            return None
        method = self.method if decisions is None else decisions["method"]
        updated = method in ("auto", "sparsegpt")
        balance = self.balance if updated else "none"
        return dataclasses.replace(self, method="random", update=updated, balance=balance)

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Looks at the samples, as many as the moments of all layers need."""
        kind = self._method(work.samples > 0)
        towers = self.chosen(bundle) if self.shape.sparsity else []
        count = max(
            (looks(kind, self.update, self.balance, bundle, t, self.linears(bundle, t)) for t in towers), default=0
        )
        return count * work.samples * work.forward

    def check(self, bundle: Bundle) -> None:
        """Refuse layers that are quantized, patterns that match none or fit none, and a balance of nothing."""
        towers = self.chosen(bundle)
        found = {path: linear for tower in towers for path, linear in self.linears(bundle, tower).items()}
        for pattern in self.layers:
            if not named(found, (pattern,)):
                raise UsageError(
                    f"sparsify.layers has '{pattern}', which matches no Linear of the {' or '.join(t.name for t in towers)} blocks",
                    hint="patterns are such as '*.mlp.*'; embeddings, convolutions and projections stay dense",
                )
        widths = {path: linear.in_features for path, linear in found.items()}
        if not any(self.shape.fits(width) for width in widths.values()):
            raise UsageError(
                f"sparsify.pattern is {self.pattern}, and no layer has inputs in multiples of {self.shape.of} "
                f"({', '.join(f'{path} has {width}' for path, width in list(widths.items())[:2])}, …)",
                hint="use pattern unstructured, or put sparsify before prune, which has multiple=8",
            )
        if self.balance != "none" and not any(tower.prompt for tower in towers):
            raise UsageError(
                f"sparsify.balance is '{self.balance}', but no tower to be made sparse is given both image and text tokens",
                hint="it is for the language tower of models that are shown pictures",
            )

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Choose what goes; with sparsegpt also compute what the others become."""
        method = self._method(context.data is not None)
        made = Plan(
            {"method": method, "pattern": str(self.shape), "sparsity": self.shape.sparsity, "zeros": {}, "dense": []}
        )
        if not self.shape.sparsity:
            return made
        for tower in self.chosen(bundle):
            linears = self.linears(bundle, tower)
            dense = [path for path, linear in linears.items() if not self.shape.fits(linear.in_features)]
            if dense:
                shown = ", ".join(f"{path} ({linears[path].in_features} inputs)" for path in dense[:3])
                more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
                context.progress.say(
                    f"{tower.name}: {shown}{more} stay dense: {self.shape.of} does not divide their inputs"
                )
            chosen = {path: linear for path, linear in linears.items() if path not in dense}
            weights = sparse_weights(method, self.update, self.balance, self.shape, bundle, tower, chosen, context)
            made.tensors.update({f"{path}.weight": weight for path, weight in weights.items()})
            made.decisions["zeros"] |= {path: self.shape.zeros(chosen[path].in_features) for path in weights}
            made.decisions["dense"] += dense
        return made

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Put the weights in; a plan that was read back has none: a checkpoint holds them."""
        set_parameters(bundle, plan.tensors)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Change nothing; recount zeros, and see that every row and group has its own."""
        if not self.shape.sparsity:
            return {}
        counted = {}
        for tower in self.chosen(bundle):
            for path, linear in self.linears(bundle, tower).items():
                whole = not self.shape.fits(linear.in_features) or self.shape.holds(linear.weight.detach())
                assert whole, f"{path} has fewer zeros than {self.pattern} asks for"
            counted[tower.name] = found = recount(bundle, tower)
            context.progress.say(
                f"{tower.name}: {found['zeros']:,} of {found['weights']:,} weights of its blocks' Linears are zero "
                f"({found['share']:.1%}; {found['share_of_tower']:.1%} of all its parameters)"
            )
        return {"sparsity": counted, **say_left(bundle, self.chosen(bundle), context, "dense")}

    def chosen(self, bundle: Bundle) -> list[Tower]:
        """Return the towers to make sparse."""
        for name in self.towers:
            bundle.tower(name)
        return [tower for tower in bundle.towers() if not self.towers or tower.name in self.towers]

    def linears(self, bundle: Bundle, tower: Tower) -> dict[str, nn.Linear]:
        """Return the layers of a tower that `layers` names, by path. Raises UsageError where one of them is quantized."""
        return linears_of_blocks(bundle, tower, self.layers)

    def _method(self, data: bool) -> Method:
        if self.method == "auto":
            return "sparsegpt" if data else "magnitude"
        return self.method
