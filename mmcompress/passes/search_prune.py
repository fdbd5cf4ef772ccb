"""search-prune: find out which heads, neurons and blocks can go while the model trains, so that it learns to do without them.

UPop (Shi et al. 2023, arXiv 2301.13741): every unit has a gate, 1 at first. Gates do not train; their gradients add up over all
steps, and what opening a gate further would raise the loss by is least useful. After every `interval` steps a growing share of the
budget (`ops.progressive`) is chosen anew from these sums, standardised over all heads and all neurons of all towers, and the gates
of what is chosen close a little further. After the last step they are closed, and what is behind them is cut out. One budget spans
all towers.

Differences from the paper and its code, on purpose: the loss is distillation from the original (no labels); an attention's units
are whole heads and not the same places of every head's width, so that heads stay as wide as the model says; a neuron's gate stands
behind its activation, where a closed one equals the cut; costs are exact, parameters or MACs, and not a fixed 36 to 1; sparsity is
not asked for in the loss: the gradient of a sum of gates is the same for each of them, and standardising takes it away again.

UVC (Yu et al., ICLR 2022): how much every group gives up, and which blocks are skipped, is the structure of a problem with one
constraint, the budget, solved by a primal-dual method (`ops.primal_dual`, where the formulas are) in the first steps, while the
weights of what is to go shrink; in the last it is fixed, and the rest learns to do without it (`search_joint`). Differences: as
above, the loss is distillation, costs are exact, and an attention's units are whole heads; nothing within a head goes, so the
paper's r and p are left out, and with them its L0 threshold. Norms are those of what reads a unit. Blocks may be skipped where
`units` names them. What was found is rounded to the budget as that of the other methods is, and cut, not masked. Step sizes are
free of scale, which `ops.primal_dual` explains.

What remains usually trains on: `distill` after it is the paper's third stage.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.distill import Distill
from mmcompress.passes.distill_job import Job
from mmcompress.passes.distill_pace import Pace
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_run import train
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_checks import require_prunable
from mmcompress.passes.prune_split import decisions, split, staying
from mmcompress.passes.search_gates import Search
from mmcompress.passes.search_joint import Joint
from mmcompress.surgery.gates import Gates

OF_PRUNE = ("ratio", "target", "ratios", "budget", "units", "uniform", "towers", "min_keep", "multiple", "protect")
OF_DISTILL = (
    "teacher", "epochs", "steps", "max_minutes", "batch_size", "accumulate", "learning_rate", "weight_decay", "warmup", "clip",
    "cross_entropy", "augment", "amp", "save_minutes", "seed",
)  # fmt: skip
FAR = 0.02
"""How far a search may end from its budget, as a share of the cost, without a word about it."""


@dataclass(frozen=True)
class SearchPrune:
    """Remove heads, neurons and blocks while training towards the original (UPop, UVC), under one budget across towers.

    What goes is chosen anew as training goes on, and fades before it is cut out. Needs data. Continues after being killed, and runs
    in several processes, as `distill` does.
    """

    name: ClassVar[str] = "search-prune"

    ratio: float = 0.3
    """Share of the towers' parameters or MACs to remove, embeddings and projections counted in; 0 changes nothing."""
    target: float | None = None
    """Instead of `ratio` and `ratios`: the parameters or MACs all chosen towers may have together afterwards."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Separate ratios for towers, such as vision=0.5,text=0.1; the other towers share `ratio`."""
    budget: Literal["parameters", "macs"] = "parameters"
    """What is counted: parameters, or multiply-accumulates at the family's example input size."""
    method: Literal["upop", "fisher", "uvc", "random"] = "upop"
    """How units are chosen: by the sum of their gates' gradients (upop), or of the squares of these (fisher); how many each group
    gives up and which blocks are skipped by a primal-dual method, the smallest weights first (uvc); random is the control,
    chosen once."""
    interval: int = 10
    """Steps between two choices; of uvc: between two steps of the blocks' gates."""
    units: tuple[str, ...] = ("heads", "neurons")
    """What may go: heads, neurons; with uvc and random also blocks, alone or beside these."""
    uniform: bool = False
    """The same width in every block of a tower, so that config.json can say it."""
    towers: tuple[str, ...] = ()
    """Towers to prune and train; empty means all."""
    min_keep: float = 0.1
    """Share of a block's heads and neurons that always stays; at least one does."""
    multiple: int = 8
    """Neuron counts are rounded to multiples of this, which matrix kernels like."""
    protect: tuple[int, ...] = ()
    """Blocks never touched, by index in each tower that has so many; negative ones count from the end."""
    teacher: str = ""
    """The checkpoint to learn from; empty: the uncompressed original."""
    epochs: float | None = None
    """How often every training sample is seen; default 1, or as often as `max_minutes` allow."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    max_minutes: float | None = None
    """Make as many steps as fit into this time; decided once, by timing the first."""
    batch_size: int | None = None
    """Samples that go through the towers at once, in each process; default 64, of models that answer in text 8."""
    accumulate: int = 1
    """Batches in one step."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; default 1e-4, with fewer than 100 steps a hundredth of that for each."""
    weight_decay: float = 0.01
    """Decay of the weights of linear and convolution layers."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it falls as half a cosine afterwards."""
    clip: float = 1.0
    """Largest norm of the weights' gradient; 0: no limit."""
    cross_entropy: float = 0.0
    """Of models that answer in text: weight of the cross entropy of the data's answers, beside the teacher's."""
    augment: bool = False
    """Crop and recolour the images lightly, never mirror them."""
    amp: bool = True
    """Compute in bfloat16 where the device has it in hardware."""
    save_minutes: float = 5.0
    """How often the state to continue from is written; 0: after every step."""
    seed: int | None = None
    """Order, choice of captions, augmentation; default: the run's seed."""

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise UsageError(f"search-prune.interval is {self.interval}; expected at least 1", hint="10 is the default")
        if "experts" in self.units:
            raise UsageError(
                "search-prune removes what gates can close, and experts have none", hint="use mmc prune --units experts"
            )
        if "blocks" in self.units and self.method in ("upop", "fisher"):
            raise UsageError(
                f"search-prune with method {self.method} removes heads and neurons, and units names blocks",
                hint="use method uvc, or mmc prune --units blocks",
            )
        with _as_own():
            _ = self.prunes, self.lesson

    @property
    def prunes(self) -> list[Prune]:
        """What surveys, checks and cuts: one for parts of blocks and one for whole blocks, of which `prune` removes one kind."""
        given = {name: getattr(self, name) for name in OF_PRUNE}
        parts = tuple(unit for unit in self.units if unit != "blocks")
        kinds = [parts] if parts or "blocks" not in self.units else []
        kinds += [("blocks",)] if "blocks" in self.units else []
        return [Prune(score="random", compensate="none", **{**given, "units": units}) for units in kinds]

    @property
    def lesson(self) -> Distill:
        """What trains."""
        return Distill(towers=self.towers, **{name: getattr(self, name) for name in OF_DISTILL})

    @property
    def neutral(self) -> bool:
        """Whether there is nothing to do."""
        return self.target is None and not any((self.ratio, *self.ratios.values()))

    def control(self, decisions: Mapping[str, Any] | None = None) -> SearchPrune | None:
        """Return the pass that removes as much at random, trained the same way."""
        return None if self.method == "random" else dataclasses.replace(self, method="random")

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """What training takes."""
        return 0.0 if self.neutral else self.lesson.seconds(bundle, work)

    def check(self, bundle: Bundle) -> None:
        """Refuse what `prune` or `distill` would refuse."""
        with _as_own():
            for prune in self.prunes:
                require_prunable(prune, bundle, prune.chosen(bundle))
            self._survey(bundle)
            self.lesson.check(bundle)

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Train a copy whose units fade; return what it kept, and its weights."""
        totals, groups, bounds, wanted = self._survey(bundle)
        if not wanted:
            return Plan(decisions(totals, {}, bounds.depths))
        student = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model))
        names = {name for pool in wanted for name in pool.towers}
        groups = [group for group in groups if group.tower in names]
        made: dict[str, Any] = {}
        found: dict[str, Any] = {}

        @contextmanager
        def fading(job: Job, ranks: Ranks) -> Iterator[Pace]:
            blocks = [group.reader for group in groups if group.kind == "blocks"]
            readers = {group.reader: group.units for group in groups if group.kind != "blocks"}
            gates = Gates(student.model, {} if self.method == "uvc" else readers, blocks)
            name, budget = bundle.family.name, self.budget
            search: Search | Joint
            if self.method == "uvc":
                model = student.model
                search = Joint(name, self.interval, groups, wanted, bounds, budget, model, gates, ranks, job.seed)
            else:
                search = Search(
                    name, self.method, self.interval, groups, wanted, bounds, budget, gates, ranks, job.seed
                )
            with gates.open():
                yield search
            cut = search.cut()
            made.update(decisions(totals, cut, bounds.depths))
            found.update(search.facts(), split=split(staying(groups, cut), cut))
            self.apply(student, Plan(made))

        with _as_own():
            facts, trained = train(self.lesson, student, context, "search", asdict(self), fading)
        for budget in found.get("search", ()):
            if abs(budget["cost"] - budget["budget"]) > FAR:
                context.progress.say(
                    f"search-prune ended at {budget['cost']:.1%} of what {' and '.join(budget['towers'])} cost, and the budget is "
                    f"{budget['budget']:.1%}: rounding did the rest; make more steps"
                )
        # Blocks that stay have new names where others went.
        moved = [tower for tower in student.towers() if tower.name in made["kept"]["blocks"]]
        after = {
            name: parameter.detach()
            for name, parameter in student.model.named_parameters()
            if name in trained or any(tower.owns(name) for tower in moved)
        }
        return Plan(made, after, facts | found)

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Cut what was decided, and put the trained weights in, in place."""
        self.prunes[0].apply(bundle, plan)

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune nothing; recount what the cut model costs."""
        return self.prunes[0].fit(bundle, context)

    def _survey(self, bundle: Bundle) -> tuple[Any, ...]:
        prune = self.prunes[0]
        return prune.survey(bundle, prune.chosen(bundle), self.units)


@contextmanager
def _as_own() -> Iterator[None]:
    """Name this pass where `prune` and `distill` complain of their parameters."""
    try:
        yield
    except UsageError as error:
        for name in ("prune", "distill"):
            error.message = error.message.replace(f"{name}.", f"{SearchPrune.name}.")
        error.args = (error.message,)
        raise
