"""One process or many: which share of a batch is ours, and how shares meet.

Many means torchrun, or `accelerate launch --multi_gpu`: both set WORLD_SIZE. `accelerate launch --cpu` (1.15) does not, and starts
one process.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import MissingError


@dataclass(frozen=True)
class Ranks:
    """This process (`rank`) among `world` processes that train one model together."""

    rank: int = 0
    world: int = 1
    accelerator: Any = None

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Meet the other processes that the launcher started; alone when there are none.

        Raises MissingError when there are several and accelerate is not installed.
        """
        if world_size() == 1:
            return cls()
        try:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs
        except ImportError as error:
            raise MissingError(
                f"training with {world_size()} processes needs accelerate", hint="pip install 'mmcompress[train]'"
            ) from error
        # Buffers (integer weights among them) never change while training, so they need not be sent at every step.
        options = DistributedDataParallelKwargs(broadcast_buffers=False)
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[options])
        return cls(accelerator.process_index, accelerator.num_processes, accelerator)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device(self, alone: torch.device) -> torch.device:
        """Return where this process computes; `alone` when it is the only one."""
        return alone if self.accelerator is None else torch.device(self.accelerator.device)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return `module` so that its backward averages gradients over all processes; every backward must reach all of them."""
        if self.accelerator is None:
            return module
        with warnings.catch_warnings():
            # torch 2.13 renamed the option; the new name is unknown to the older versions we serve.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

    def alone(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Return a context in which the backward of a wrapped `module` keeps its gradients here, unless it is the `last`."""
        if self.accelerator is None or last:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(module)
        return context

    def gather(self, own: Tensor) -> Tensor:
        """Return the rows of all processes in order of rank: (B, C) -> (world * B, C); only our own carry gradient.

        Every process then computes the same loss over all rows and gets the gradient of its own; the sum over processes is the
        gradient of the whole.
        """
        if self.accelerator is None:
            return own
        parts = list(self.accelerator.gather(own.detach()).split(len(own)))
        parts[self.rank] = own
        return torch.cat(parts)

    def agree(self, value: Any) -> Any:
        """Return the first process's `value` in all of them."""
        if self.accelerator is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def world_size() -> int:
    """Return how many processes the launcher started, without meeting them."""
    return int(os.environ.get("WORLD_SIZE", "1"))
