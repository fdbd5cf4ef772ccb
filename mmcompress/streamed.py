"""Running steps on a model that is never in memory as a whole: one layer is read, changed and written at a time.

The model's tensors are deferred (`surgery.deferred`): cutting them is noted, and done when they are read to be written. What
needs a layer's values asks the bundle for the `layer`, and what takes its place is written at once and kept without values. So
passes need no code of their own for it; they only say (`Streamable`) when they look at no more than that.

A first look decides every step and leads to the structure of the result; a second one writes. What a killed run had written is
kept in whole files, with a journal of what lies where: the run that goes on with it makes the layers behind and ends in the same
bytes.

A step may also look at what samples do in the model (`Bundle.encode_all`): all batches are then run in step, each layer in memory
while it is called (`surgery.lending`). What is decided is the same as in memory, in the same bits. What a step keeps of it lies in
the run's working place, and a run that goes on after a kill computes none of that twice.

Memory: the largest layer and one shard of the output; with samples also the states that all batches have between two layers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import MmcError
from mmcompress.kept import write_atomically
from mmcompress.manifest import Manifest, Record
from mmcompress.opened import opened, stored
from mmcompress.passes.base import Context, Pass, Plan
from mmcompress.pipeline import Stage, Workplace, named
from mmcompress.surgery.deferred import defer, empty, is_deferred, lend, take_back, values
from mmcompress.surgery.lending import run_in_step
from mmcompress.weights import INDEX, locate, weight_files

SHARD_BYTES = 2**29
JOURNAL = "written.json"


@runtime_checkable
class Streamable(Protocol):
    """What a pass adds that can do its work layer by layer, on values it sees once."""

    def streams(self, data: bool) -> bool:
        """Whether the pass looks at the values of a few layers at a time, and through `Bundle.layer` alone.

        `data`: whether there are samples, at which it then looks through `Bundle.encode_all` alone. It may cut and replace layers
        in `apply`, and changes nothing in `fit`.
        """


@runtime_checkable
class Holding(Protocol):
    """What a pass adds that computes with more than a layer's values."""

    def holds(self, bundle: Bundle) -> int:
        """Return how many bytes it takes at its peak for what it has gathered of one layer's inputs."""


def can_stream(made: Pass, data: bool = False) -> bool:
    """Return whether a pass can run, with or without `data`, on a model that is not in memory."""
    return isinstance(made, Streamable) and made.streams(data)


def memory_needed(bundle: Bundle, stages: Sequence[Stage], states: int = 0) -> int:
    """Return about how many bytes `run` takes at its peak: the largest layer as read and as floats, and a shard.

    With data also what passes gather, and `states`: the bytes that all samples have between two layers.
    """
    largest = max(sum(own.nbytes for own in layer.parameters(recurse=False)) for layer in bundle.model.modules())
    held = max((stage.made.holds(bundle) for stage in stages if isinstance(stage.made, Holding)), default=0)
    return 2 * largest + max(SHARD_BYTES, held + states)


class Streamed(Bundle):
    """A bundle of deferred tensors whose layers have their values while they are asked for or called."""

    in_step = True
    place: Path
    """Where layers are put aside."""

    def layer(self, path: str) -> nn.Module:
        """Return a copy of the layer at `path` with its values in float32."""
        return lend(self.module(path), lambda parameter: values(parameter).float())

    def encode_all(
        self,
        tower: str,
        batches: Iterable[dict[str, Tensor]],
        goes_on: Callable[[dict[str, Tensor]], None] = lambda inputs: None,
        reached: Callable[[Tensor], None] = lambda tensor: None,
    ) -> Iterator[Tensor]:
        """Yield what `encode` returns of each batch; all are in memory together, and of the model a layer."""
        todo = list(batches)
        calls = [functools.partial(self.family.encode, tower=tower, inputs=inputs) for inputs in todo]
        return run_in_step(self.model, calls, lambda index: goes_on(todo[index]), reached)

    def aside(self, path: str, module: nn.Module) -> nn.Module:
        """Write what `module` holds itself beside the result to be, and return it with deferred tensors."""
        take_back(module)
        new = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if not is_deferred(tensor)}
        self.place.mkdir(exist_ok=True)
        file = self.place / f"{len(list(self.place.iterdir()))}-{path}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in new.items()}, file)
        empty(module)
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name in new:
                defer(tensor, stored(file, name))
        return module


class Written(Streamed):
    """A streamed bundle that writes what takes a layer's place at once, and keeps its structure."""

    shards: Shards

    def layer(self, path: str) -> nn.Module:
        """Return a copy of the layer at `path` with its values, or without them where a killed run has written what it became."""
        if not self.shards.has_all_of(path):
            return super().layer(path)
        return lend(self.module(path), lambda parameter: torch.empty(parameter.shape, device="meta"))

    def replace(self, path: str, module: nn.Module) -> None:
        """Write what `module` holds itself, that is, what is not deferred."""
        take_back(module)
        for name, tensor in module.state_dict(keep_vars=True).items():
            if not is_deferred(tensor):
                self.shards.add(f"{path}.{name}", tensor, isinstance(tensor, nn.Parameter))
        empty(module)
        super().replace(path, module)

    def finish(self, directory: Path) -> None:
        """Write what no pass replaced, tied tensors once, and put all files into `directory`."""
        ties = getattr(self.model, "all_tied_weights_keys", {})
        state = self.model.state_dict(keep_vars=True)
        lost = {*self.shards.where, *self.shards.waiting} - state.keys()
        assert not lost, f"{len(lost)} tensors were written and then cut away, such as {min(lost)}"
        for name, tensor in state.items():
            if name not in self.shards.where and name not in self.shards.waiting and name not in ties:
                self.shards.add(name, values(tensor), isinstance(tensor, nn.Parameter))
        self.shards.finish(directory)


class Planned(Streamed):
    """A streamed bundle that only becomes what the written one will be."""

    def layer(self, path: str) -> nn.Module:
        """Return a copy of the layer at `path` on the meta device."""
        return lend(self.module(path), lambda parameter: torch.empty(parameter.shape, device="meta"))

    def replace(self, path: str, module: nn.Module) -> None:
        """Keep the structure of `module`."""
        take_back(module)
        empty(module)
        super().replace(path, module)


def run(
    model: str | Path,
    stages: Sequence[Stage],
    output: Path,
    context: Context,
    place: Workplace,
    sha256: str,
    *,
    after: Callable[[str, Bundle], None],
    measured: Callable[[Path], dict[str, Any]],
    recipe: dict[str, Any],
) -> Manifest:
    """Run `stages` on the checkpoint `model`, write the result to `output` and return its manifest.

    What an interrupted run has left in `place` is gone on with. `sha256` is that of the checkpoint's weights.
    `after(name, bundle)` is called with the original and after each step; what it is shown has shapes and no values.
    `measured(directory)` returns what is recorded of the written weights. Raises UsageError for a checkpoint whose tensors are
    stored in another shape than the model computes with, and what checks raise.
    """
    files = weight_files(locate(str(model)))
    with opened(model, files, to_run=context.data is not None) as bundle:
        after("original", bundle)
        for stage in stages:
            with named(stage):
                stage.made.check(bundle)
        plans = []
        for stage in stages:
            with named(stage, stages):
                plans.append(_decided(stage, bundle, dataclasses.replace(context, workdir=place.scratch(stage))))
            after(stage.step.name, bundle)
    if not bundle.source.sha256:
        bundle.source = dataclasses.replace(bundle.source, sha256=sha256)
    source = bundle.source

    def write_weights(directory: Path) -> None:
        with opened(model, files) as again:
            written = Written(**vars(again))
            written.shards = Shards(place.directory, checkpoint.DTYPES[source.dtype], SHARD_BYTES)
            begun = f", going on behind {len(written.shards.where)} tensors" if written.shards.where else ""
            context.progress.say(f"{source.id}: {len(files)} weight files, layer by layer{begun}")
            for stage, plan in zip(stages, plans, strict=True):
                stage.made.apply(written, plan)
            written.finish(directory)

    return checkpoint.save(
        bundle, output, measured=measured, write_weights=write_weights, recipe=recipe, seed=context.seed
    )


def _decided(stage: Stage, bundle: Bundle, context: Context) -> Plan:
    """Decide a step and make the structure it leads to; append its record to the bundle's history."""
    started = time.perf_counter()
    stage.made.check(bundle)
    streamed = Streamed(**vars(bundle))
    assert context.workdir is not None, "what is put aside needs a place"
    streamed.place = context.workdir / "aside"
    shutil.rmtree(streamed.place, ignore_errors=True)  # a killed run's
    plan = stage.made.plan(streamed, context)
    shutil.rmtree(streamed.place, ignore_errors=True)
    stage.made.apply(Planned(**vars(bundle)), plan)
    decisions = json.loads(json.dumps(plan.decisions))
    facts = json.loads(json.dumps({**plan.facts, **stage.made.fit(bundle, context)}))
    seconds = round(time.perf_counter() - started, 3)
    bundle.history.append(Record(stage.step.name, stage.step.params, decisions, facts, seconds))
    return plan


class Shards:
    """Weight files of a bounded size, and the index that says where each tensor lies."""

    def __init__(self, place: Path, dtype: torch.dtype, limit: int = SHARD_BYTES) -> None:
        """Go on behind the files an earlier run has finished in `place`.

        `dtype` is what parameters are stored in; buffers keep theirs. A file has at most `limit` bytes, or a single tensor.
        """
        self.place, self.dtype, self.limit = place, dtype, limit
        self.where: dict[str, int] = {}
        self.waiting: dict[str, Tensor] = {}
        self.count, self.bytes = 0, 0
        journal = json.loads((place / JOURNAL).read_text()) if (place / JOURNAL).exists() else {"count": 0}
        # A run that was killed while it handed its files over has some of them no longer.
        if all(self._name(number).exists() for number in range(journal["count"])):
            vars(self).update(journal)
        self.stored = frozenset(self.where)
        self._layers = list(dict.fromkeys(name.rpartition(".")[0] for name in self.where))

    def has_all_of(self, path: str) -> bool:
        """Return whether an earlier run has written every tensor of the layer at `path`; of the last one some may be missing."""
        own = [place for place, each in enumerate(self._layers) if f"{each}.".startswith(f"{path}.")]
        return bool(own) and own[-1] + 1 < len(self._layers)

    def add(self, name: str, tensor: Tensor, parameter: bool) -> None:
        """Take a tensor; shards are written as they fill. Raises MmcError for one with NaN or infinity: nothing runs the model."""
        if name in self.stored:
            return
        converts = parameter and tensor.is_floating_point()
        taken = (tensor.to(self.dtype) if converts else tensor).detach().contiguous()
        # Of floats of 8 bits torch does not tell (2.13); ours are cut off at their ends, and so are finite where their scales are.
        if taken.is_floating_point() and taken.itemsize > 1 and not taken.isfinite().all():
            raise MmcError(f"{name} has NaN or infinity", hint="the checkpoint is damaged, or its dtype too small")
        if taken.nbytes + sum(value.nbytes for value in self.waiting.values()) > self.limit:
            self._write()
        self.waiting[name] = taken

    def _write(self) -> None:
        if self.waiting:
            save_file(self.waiting, self._name(self.count), metadata={"format": "pt"})
            self.bytes += sum(value.nbytes for value in self.waiting.values())
            self.where |= dict.fromkeys(self.waiting, self.count)
            self.waiting, self.count = {}, self.count + 1
            journal = {"where": self.where, "count": self.count, "bytes": self.bytes}
            write_atomically(self.place / JOURNAL, json.dumps(journal))

    def _name(self, number: int) -> Path:
        return self.place / f"weights-{number}"

    def finish(self, directory: Path | None = None) -> None:
        """Write the last shard, and the index where there are several; all go into `directory` (None: they stay where they lie)."""
        self._write()
        directory = directory or self.place
        (self.place / JOURNAL).unlink(missing_ok=True)
        if self.count == 1:
            self._name(0).rename(directory / "model.safetensors")
            return
        names = [f"model-{number + 1:05d}-of-{self.count:05d}.safetensors" for number in range(self.count)]
        for number, name in enumerate(names):
            self._name(number).rename(directory / name)
        document = {
            "metadata": {"total_size": self.bytes},
            "weight_map": {name: names[number] for name, number in sorted(self.where.items())},
        }
        (directory / INDEX).write_text(json.dumps(document, indent=2) + "\n")
