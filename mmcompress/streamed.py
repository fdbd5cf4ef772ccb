"""Running steps on a model that is never in memory as a whole: one layer is read, changed and written at a time.

What makes it possible is that `apply` asks the bundle for one layer after another and puts another in its place: here a layer gets
its values when it is asked for, and what replaces it is written at once and kept without values. So passes need no code of their
own for it; they only say (`Streamable`) when they decide without looking at values or data.

Memory: the largest layer and one shard of the output.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Manifest, Record
from mmcompress.passes.base import Context, Pass, Plan
from mmcompress.pipeline import Stage
from mmcompress.weights import INDEX

SHARD_BYTES = 2**29


@runtime_checkable
class Streamable(Protocol):
    """What a pass adds that can do its work layer by layer, on values it sees once."""

    def streams(self) -> bool:
        """Whether, without data, `plan` looks at no values, `fit` changes none, and `apply` makes each layer of itself alone."""


def can_stream(made: Pass) -> bool:
    """Return whether a pass can run on a model that is not in memory."""
    return isinstance(made, Streamable) and made.streams()


def memory_needed(bundle: Bundle) -> int:
    """Return about how many bytes `run` takes at its peak: the largest layer as read and as floats, and a shard."""
    layers = (module for module in bundle.model.modules() if next(module.children(), None) is None)
    largest = max(sum(parameter.nbytes for parameter in layer.parameters(recurse=False)) for layer in layers)
    return 2 * largest + SHARD_BYTES


class Streamed(Bundle):
    """A bundle without values whose layers have them while they are asked for."""

    read: Callable[[str], Tensor]
    shards: Shards

    def module(self, path: str) -> nn.Module:
        """Return the layer at `path` with its values in float32; a module that is not a layer as it is, without."""
        module = super().module(path)
        names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
        if not names or next(module.children(), None) is not None:
            return module
        filled = copy.copy(module)
        filled._parameters = dict(module._parameters)
        for name in names:
            filled._parameters[name] = nn.Parameter(self.read(f"{path}.{name}").float(), requires_grad=False)
        return filled

    def replace(self, path: str, module: nn.Module) -> None:
        """Write `module` and keep its structure in the place `path` names."""
        self.shards.add_all(module, path)
        super().replace(path, module.to("meta"))


def run(
    model: str | Path,
    stages: Sequence[Stage],
    output: Path,
    context: Context,
    *,
    measured: Callable[[Path], dict[str, Any]],
    recipe: dict[str, Any],
) -> Manifest:
    """Run `stages` on the checkpoint `model`, write the result to `output` and return its manifest.

    `measured(directory)` returns what is recorded of the written weights. Raises UsageError for a checkpoint whose tensors are
    stored in another shape than the model computes with, and what checks raise.
    """
    bundle, files = checkpoint.shell(model)
    plans: list[Plan] = []
    for stage in stages:
        started = time.perf_counter()
        stage.made.check(bundle)
        plan = stage.made.plan(bundle, context)
        stage.made.apply(bundle, plan)
        plans.append(plan)
        decisions = json.loads(json.dumps(plan.decisions))
        facts = json.loads(json.dumps(stage.made.fit(bundle, context)))
        seconds = round(time.perf_counter() - started, 3)
        bundle.history.append(Record(stage.step.name, stage.step.params, decisions, facts, seconds))

    def write_weights(directory: Path) -> None:
        source, _ = checkpoint.shell(model)
        with _reader(source.model, files) as read:
            streamed = Streamed(**vars(source))
            streamed.read, streamed.shards = (
                read,
                Shards(directory, checkpoint.DTYPES[bundle.source.dtype], SHARD_BYTES),
            )
            context.progress.say(f"{bundle.source.id}: {len(files)} weight files, layer by layer")
            for stage, plan in zip(stages, plans, strict=True):
                stage.made.apply(streamed, plan)
            _rest(streamed)
            streamed.shards.finish()

    return checkpoint.save(
        bundle, output, measured=measured, write_weights=write_weights, recipe=recipe, seed=context.seed
    )


def _rest(streamed: Streamed) -> None:
    """Copy what no pass replaced, tied tensors once."""
    ties = getattr(streamed.model, "all_tied_weights_keys", {})
    parameters = {name for name, _ in streamed.model.named_parameters(remove_duplicate=False)}
    for name in streamed.model.state_dict():
        if name not in streamed.shards.where and name not in ties:
            streamed.shards.add(name, streamed.read(name), name in parameters)


class Shards:
    """Weight files of a bounded size, and the index that says where each tensor lies."""

    def __init__(self, directory: Path, dtype: torch.dtype, limit: int = SHARD_BYTES) -> None:
        """`dtype` is what parameters are stored in; buffers keep theirs. A file is written when it has `limit` bytes."""
        self.directory, self.dtype, self.limit = directory, dtype, limit
        self.where: dict[str, int] = {}
        self.waiting: dict[str, Tensor] = {}
        self.count, self.bytes = 0, 0

    def add_all(self, module: nn.Module, path: str) -> None:
        """Take the tensors of a layer."""
        parameters = dict(module.named_parameters())
        for name, tensor in module.state_dict().items():
            self.add(f"{path}.{name}", tensor, name in parameters)

    def add(self, name: str, tensor: Tensor, parameter: bool) -> None:
        """Take a tensor; shards are written as they fill."""
        converts = parameter and tensor.is_floating_point()
        self.waiting[name] = (tensor.to(self.dtype) if converts else tensor).detach().contiguous()
        self.where[name] = self.count
        if sum(value.nbytes for value in self.waiting.values()) >= self.limit:
            self._write()

    def _write(self) -> None:
        if self.waiting:
            save_file(self.waiting, self._name(self.count), metadata={"format": "pt"})
            self.bytes += sum(value.nbytes for value in self.waiting.values())
            self.waiting, self.count = {}, self.count + 1

    def _name(self, number: int) -> Path:
        return self.directory / f".shard-{number}"

    def finish(self) -> None:
        """Write the last shard, give all their names, and write the index where there are several."""
        self._write()
        if self.count == 1:
            self._name(0).rename(self.directory / "model.safetensors")
            return
        names = [f"model-{number + 1:05d}-of-{self.count:05d}.safetensors" for number in range(self.count)]
        for number, name in enumerate(names):
            self._name(number).rename(self.directory / name)
        document = {
            "metadata": {"total_size": self.bytes},
            "weight_map": {name: names[number] for name, number in sorted(self.where.items())},
        }
        (self.directory / INDEX).write_text(json.dumps(document, indent=2) + "\n")


@contextmanager
def _reader(model: Any, files: Sequence[Path]) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function that reads a tensor by the name the model has for it.

    Raises UsageError where a checkpoint's tensors have to be joined or cut first.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = model.state_dict()
    with ExitStack() as stack:
        found: dict[str, Callable[[], Tensor]] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt", backend="pread"))
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
                if pattern is not None and name not in own:
                    raise UsageError(
                        f"{file} stores {key} in another shape than the model has it",
                        hint="load and save it with transformers 5 first, which joins such tensors",
                    )
                found[name] = _slice(opened, key)

        ties = dict(getattr(model, "all_tied_weights_keys", {}))

        def read(name: str) -> Tensor:
            name = name if name in found else ties.get(name, name)
            if name not in found:
                raise UsageError(f"the checkpoint lacks {name}", hint="it is incomplete; fetch it again")
            return found[name]()

        yield read


def _slice(opened: Any, key: str) -> Callable[[], Tensor]:
    return lambda: opened.get_tensor(key)
