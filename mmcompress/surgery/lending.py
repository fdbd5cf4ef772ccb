"""Running a model of deferred tensors: values are there while something computes with them, and not before or after.

What computes with a deferred tensor is seen by a `TorchFunctionMode`, whoever does it: a layer, the module around it that reads its
weight, an operator of a quantized layer. So nothing has to be known of a model, its masks or what its blocks are given.

Several batches run in step: each in a thread of its own that stops where it needs values that are not there. When all have
stopped, those of one layer are read, and every batch goes on that waits for them, one after the other. So each layer is read once,
however many batches there are, and between layers a batch keeps what its own forward keeps there, a few states. Only one thread
runs at a time, and each batch computes exactly what it would alone: in the same bits.

Each batch has modules of its own, which share all tensors: what a model notes on its modules in one forward stays in that forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mmcompress.surgery.deferred import is_deferred, values
from mmcompress.surgery.freeing import give_back_freed

Call = Callable[[nn.Module], Tensor]

SHAPE_ALONE = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point}
"""Calls that look at no values; so do attributes that are no tensors."""


class _Lending(TorchFunctionMode):
    """Puts values in the place of deferred tensors wherever something is computed."""

    def __init__(self, ask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._ask = ask

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(_deferred(leaf) for leaf in tree_leaves((args, kwargs))) or call in SHAPE_ALONE:
            return call(*args, **kwargs)
        if getattr(call, "__name__", "") == "__get__":
            found = call(*args, **kwargs)
            if not isinstance(found, Tensor):
                return found
        args, kwargs = tree_map(lambda leaf: self._ask(leaf) if _deferred(leaf) else leaf, (args, kwargs))
        return call(*args, **kwargs)


def run_in_step(
    model: nn.Module,
    calls: Sequence[Call],
    goes_on: Callable[[int], None],
    reached: Callable[[Tensor], None],
) -> Iterator[Tensor]:
    """Yield what each of `calls` returns of `model`, in their order, without gradient.

    `goes_on(index)` is told which call runs from here, `reached(tensor)` that all that get there wait for a tensor: of what is
    computed before it, nothing is missing then. Raises what a call raises.
    """
    owners: dict[int, list[Tensor]] = {}
    for module in model.modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        own = [tensor for tensor in held if is_deferred(tensor)]
        for tensor in own:
            owners.setdefault(id(tensor), own)
    order = {tensor: place for place, tensor in enumerate(owners)}
    # A copy of the modules, not of what they hold.
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    running = [_Running(call, copy.deepcopy(model, dict(tensors))) for call in calls]
    done = 0
    try:
        lent: dict[int, Tensor] = {}
        while done < len(running):
            for index, each in enumerate(running):
                if not each.finished and (each.wants is None or id(each.wants) in lent):
                    goes_on(index)
                    each.go(lent)
                while done < len(running) and running[done].finished:
                    yield running[done].take()
                    done += 1
            waiting = [each.wants for each in running if each.wants is not None]
            lent = {}  # what was lent is gone before more is read
            give_back_freed()  # each thread has a heap of its own
            if waiting:
                # The model's order is the data's: who has no picture waits for those that have.
                first = min(waiting, key=lambda tensor: order[id(tensor)])
                for tensor in owners[id(first)]:
                    reached(tensor)
                lent = {id(tensor): values(tensor).to(tensor.dtype) for tensor in owners[id(first)]}
    finally:
        for each in running:
            each.cancel()


class _Cancelled(BaseException):
    """Ends a forward nobody waits for; no model's `except Exception` takes it."""


class _Running:
    """A call in a thread that runs only while it is waited for, and stops where it wants a tensor's values."""

    def __init__(self, call: Call, model: nn.Module) -> None:
        self.wants: Tensor | None = None
        self.finished = False
        self._cancelled = False
        self._lent: dict[int, Tensor] = {}
        self._result: Tensor | None = None
        self._error: BaseException | None = None
        self._may_go, self._stopped = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=self._run, args=(call, model), daemon=True)
        self._thread.start()

    def go(self, lent: dict[int, Tensor]) -> None:
        """Run until other values are wanted than `lent`. Raises what the call raises."""
        self._lent, self.wants = lent, None
        self._may_go.release()
        self._stopped.acquire()
        self._lent = {}
        if self._error is not None:
            raise self._error

    def take(self) -> Tensor:
        """Return what the call returned, and keep it no longer."""
        result, self._result = self._result, None
        assert result is not None, "it has not finished"
        return result

    def cancel(self) -> None:
        """End the thread where it is."""
        self._cancelled = True
        self._may_go.release()
        self._thread.join()

    def _run(self, call: Call, model: nn.Module) -> None:
        self._may_go.acquire()
        try:
            if not self._cancelled:
                with torch.inference_mode(), _Lending(self._ask):
                    self._result = call(model)
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error  # raised where it is waited for
        self.finished = True
        self._stopped.release()

    def _ask(self, tensor: Tensor) -> Tensor:
        while id(tensor) not in self._lent:
            self.wants = tensor
            self._stopped.release()
            self._may_go.acquire()
            if self._cancelled:
                raise _Cancelled
        return self._lent[id(tensor)]


def _deferred(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and is_deferred(leaf)
