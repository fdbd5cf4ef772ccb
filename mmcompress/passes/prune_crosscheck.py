"""Ask torch-pruning whether our groups are complete: does cutting a head or a neuron drag anything else along?

torch-pruning (Fang et al. 2023, DepGraph) traces a model and derives what has to be cut together. Its search can run for ever (seen
with grouped-query attention, version 1.6.1), so it gets a time limit. It works on a copy of the model: tracing leaves things
behind.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import MissingError, UsageError
from mmcompress.passes.prune_units import head_rows, kept_rows
from mmcompress.surgery.linears import spread
from mmcompress.views import Tower

T = TypeVar("T")
Channels = dict[tuple[str, str], list[int]]
"""(path of a layer, "rows" or "columns") -> the channels that go."""
Names = dict[nn.Module | nn.Parameter, str]
"""What is compared, with its path."""


def crosscheck(bundle: Bundle, towers: Sequence[Tower], seconds: float = 120.0) -> int:
    """Compare our group of the last unit of every kind and block with torch-pruning's; return how many agreed.

    Raises MissingError without torch-pruning, UsageError when a group differs or the search does not end in `seconds`.
    """
    require_torch_pruning()
    agreed = 0
    model = copy.deepcopy(bundle.model).requires_grad_(True)
    copied = Bundle(model, bundle.processor, bundle.family, bundle.source)
    for tower in towers:
        what = f"torch-pruning's search in the {tower.name} tower"
        agreed += in_time(seconds, what, functools.partial(_agreeing, copied, tower))
    return agreed


def require_torch_pruning() -> None:
    """Raise MissingError without torch-pruning."""
    if importlib.util.find_spec("torch_pruning") is None:
        raise MissingError("crosscheck needs torch-pruning", hint="pip install 'mmcompress[prune]'")


def _agreeing(bundle: Bundle, tower: Tower) -> int:
    graph = dependencies(bundle, tower)
    names: Names = {module: name for name, module in bundle.model.named_modules()}
    agreed = 0
    for ours in unit_channels(bundle, tower):
        theirs = closure(graph, bundle.model, names, ours)
        if theirs != ours:
            raise UsageError(
                f"{next(iter(ours))[0]}: torch-pruning cuts {show(theirs)}, we would cut {show(ours)}",
                hint="this block is not built as its family says; report it, or leave crosscheck off to go on",
            )
        agreed += 1
    return agreed


def unit_channels(bundle: Bundle, tower: Tower) -> Iterator[Channels]:
    """Yield what we cut with the last head and with the last neuron of each block, the first writer's rows first."""
    for block in tower.blocks:
        for attention in (block.attention, block.cross):
            if attention and not attention.why_whole:
                last = torch.tensor([attention.kv_heads - 1])
                rows = kept_rows(attention, last)
                ours: Channels = {(path, "rows"): channels.tolist() for path, channels in rows.items()}
                yield ours | {(attention.reader, "columns"): spread(last, head_rows(attention)[0]).tolist()}
        if block.mlp:
            neuron = [block.mlp.neurons - 1]
            yield {**{(path, "rows"): neuron for path in block.mlp.writers}, (block.mlp.reader, "columns"): neuron}


class _Encoder(nn.Module):
    """The tower as a module that can be called: what torch-pruning wants to trace."""

    def __init__(self, bundle: Bundle, tower: str) -> None:
        super().__init__()
        self.model = bundle.model
        self.call = lambda inputs: bundle.encode(tower, inputs)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        embeddings: torch.Tensor = self.call(inputs)
        return embeddings


def dependencies(bundle: Bundle, tower: Tower) -> Any:
    """Return torch-pruning's graph of a tower, traced on its example inputs."""
    with warnings.catch_warnings():
        # It warns about parameters outside modules (class tokens, position tables), whose last dimension it takes for channels.
        warnings.simplefilter("ignore")
        import torch_pruning

        return torch_pruning.DependencyGraph().build_dependency(
            _Encoder(bundle, tower.name), example_inputs={"inputs": bundle.example_inputs(tower.name, 1)}, verbose=False
        )


def closure(graph: Any, model: nn.Module, names: Names, ours: Channels) -> Channels:
    """Return all that goes, of what `names` names, with the rows that `ours` begins with."""
    import torch_pruning

    (path, _), channels = next(iter(ours.items()))
    group = graph.get_pruning_group(model.get_submodule(path), torch_pruning.prune_linear_out_channels, channels)
    found: Channels = {}
    for dependency, indices in group:
        part = dependency.target.module
        if isinstance(part, (nn.Module, nn.Parameter)) and part in names:
            side = "rows" if graph.is_out_channel_pruning_fn(dependency.handler) else "columns"
            found[(names[part], side)] = sorted(set(indices))
    return found


def in_time(seconds: float, what: str, search: Callable[[], T]) -> T:
    """Return what `search` returns. Raises UsageError when it takes longer; its thread then ends with the process.

    Not an alarm signal: an exception out of a signal handler crashed the interpreter where torch had exported a model before
    (torch 2.13, Python 3.11).
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(search())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="crosscheck", daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError:
        raise UsageError(f"{what} did not end in {seconds:g} s", hint="leave crosscheck off for this model") from None


def show(channels: Channels) -> str:
    """Return channels for a person."""
    return ", ".join(f"{len(indices)} {side} of {path}" for (path, side), indices in channels.items())
