"""The contract of a pass: check, plan, apply, fit.

A pass is a frozen dataclass; its fields, all with literal defaults and a docstring under each, are its recipe parameters and
command-line options (see `schema`). Field types: int, float, str, bool, Literal[...], tuple[T, ...], dict[str, T], T | None.

    check   refuses early, with the reason and a hint
    plan    decides: sees weights and data, changes nothing
    apply   cuts: structure only; the same code runs on meta tensors when a checkpoint is loaded
    fit     tunes: values only, never structure; returns facts

Loading a checkpoint runs `apply` with the recorded decisions, then fills in the saved weights. So `apply` must need nothing but
`plan.decisions` to make the right structure, and every value that `fit` changes must live in the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Json
from mmcompress.progress import Progress, Silent
from mmcompress.views import Tower

if TYPE_CHECKING:
    from mmcompress.data import Dataset


@dataclass(frozen=True)
class Plan:
    """What a pass decided. `decisions` is recorded in mmc.json; `tensors` only spare `apply` from computing twice.

    `facts`: what was learned about the data on the way; recorded beside what `fit` returns.
    """

    decisions: dict[str, Json]
    tensors: MutableMapping[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What `Pass.seconds` estimates from."""

    samples: int
    """How many samples calibration looks at."""
    dataset: int
    """How many there are to train on."""
    forward: float
    """Seconds that one sample takes through all towers, preprocessing included. With gradients it takes about three times that."""


class Stopwatch(Protocol):
    """Times things on this machine, exported and in the engine of one target; milliseconds."""

    def model(self, bundle: Bundle, stages: tuple[str, ...]) -> float:
        """Return what parts of a bundle take together: towers, or the "prompt"."""

    def layer(self, layer: nn.Module, rows: int) -> float:
        """Return what one Linear, quantized or not, takes for so many rows."""


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the bundle."""

    data: Dataset | None = None
    """Calibration and training data, in a fixed order."""
    num_samples: int = 128
    """How many samples calibration may look at."""
    batch_size: int = 16
    seed: int = 0
    teacher: Callable[[], Bundle] | None = None
    """Loads the uncompressed original."""
    progress: Progress = field(default_factory=Silent)
    stopwatch: Callable[[str], Stopwatch] | None = None
    """Returns what times for a target ("cpu", "openvino"), or for "" in the fastest of the run's engines."""
    workdir: Path | None = None
    """Where a long `plan` or `fit` keeps what it needs to resume after being killed. None: it starts over."""

    def require_data(self, what: str) -> Dataset:
        """Return the data. Raises UsageError saying that `what` needs some."""
        if self.data is None:
            raise UsageError(
                f"{what} needs data", hint="give --data FOLDER (metadata.jsonl, tar shards) or --data demo:train"
            )
        return self.data

    def require_stopwatch(self, what: str, target: str, hint: str) -> Stopwatch:
        """Return what times for a target. Raises UsageError saying that `what` needs it, and with `hint` what else there is."""
        if self.stopwatch is None:
            raise UsageError(f"{what} needs a run that may export and time the model", hint=hint)
        return self.stopwatch(target)


def chosen_towers(name: str, bundle: Bundle, towers: Sequence[str], ratios: Mapping[str, float]) -> list[Tower]:
    """Return the towers that pass `name` is for: `towers`, or all. Raises UsageError for an unknown one, also among `ratios`."""
    for tower in ratios:
        if towers and tower not in towers:
            raise UsageError(
                f"{name}.ratios names '{tower}', {name}.towers does not", hint="name it in both or neither"
            )
    for tower in (*towers, *ratios):
        bundle.tower(tower)
    return [tower for tower in bundle.towers() if not towers or tower.name in towers]


def require_one(name: str, **given: Any) -> None:
    """Raise UsageError where several of the parameters of pass `name` are given that say the same thing."""
    named = [key for key, value in given.items() if value not in (None, ())]
    if len(named) > 1:
        raise UsageError(f"{name} has both {' and '.join(named[:2])}", hint="give one of them")


def require_kept_share(key: str, share: float | None, hint: str) -> None:
    """Raise UsageError unless `share`, the parameter `key`, is a share above 0 or None."""
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"{key} is {share:g}; expected 0 < {key.rpartition('.')[2]} <= 1", hint=hint)


def require_milliseconds(key: str, given: float | None) -> None:
    """Raise UsageError unless `given`, the parameter `key`, is above 0 or None."""
    if given is not None and given <= 0:
        raise UsageError(f"{key} is {given:g}; expected a number > 0", hint="20 allows twenty milliseconds")


class Pass(Protocol):
    """One transformation of a bundle; see the module's docstring for the contract."""

    name: ClassVar[str]

    def check(self, bundle: Bundle) -> None:
        """Raise UsageError when this pass cannot work on this model with these parameters."""

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Decide what to do, changing nothing."""

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Change the structure as decided; works on meta tensors."""

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Tune values; return facts worth recording."""

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """Return about how long plan, apply and fit will take, for `--dry-run`."""

    def control(self, decisions: Mapping[str, Any] | None = None) -> Pass | None:
        """Return this pass with a random selection in place of its own, or None when it selects nothing.

        `decisions`: those of its plan, for a pass whose parameters alone do not say how much it removed.
        """
