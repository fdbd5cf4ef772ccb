"""Training state on disk: one safetensors file, replaced as a whole, so that a kill leaves the former or the new one."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmcompress.errors import OutOfMemory

FILE_NAME = "training.safetensors"
WEIGHT, AVERAGE, OPTIMIZER, PACE = "weight", "average", "optimizer", "pace"


@dataclass
class State:
    """Where a run is. Random numbers are functions of seed and step, so none are kept."""

    run: str
    """Names the run: parameters of the pass, data, student and teacher. State of another run is not taken up."""
    file: Path | None = None
    step: int = 0
    """Steps made."""
    steps: int = 0
    """Steps decided on; 0 while undecided."""
    losses: list[float] = field(default_factory=list)
    """One for each step made."""
    seconds: float = 0.0
    """Spent in steps, over all attempts."""
    resumed_at: int = 0

    @classmethod
    def open(cls, folder: Path | None, run: str) -> State:
        """Return the state that `folder` keeps of `run`, or a fresh one; damaged state counts as none."""
        fresh = cls(run, folder / FILE_NAME if folder else None)
        if fresh.file is None or not fresh.file.exists():
            return fresh
        try:
            with safe_open(fresh.file, framework="pt") as stored:
                kept = json.loads((stored.metadata() or {})["state"])
            if kept["run"] != run:
                return fresh
            return cls(run, fresh.file, kept["step"], kept["steps"], kept["losses"], kept["seconds"], kept["step"])
        except (SafetensorError, KeyError, ValueError):
            return fresh

    def restore(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        average: dict[str, Tensor],
        pace: dict[str, Tensor],
    ) -> None:
        """Put the stored values into parameters, optimizer, average and what else has its pace; nothing happens at step 0."""
        if not self.step or self.file is None:
            return
        with torch.no_grad(), safe_open(self.file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, name = key.split("|", 1)
                value = stored.get_tensor(key)
                if kind == WEIGHT:
                    parameters[name].copy_(value)
                elif kind == AVERAGE:
                    average[name].copy_(value)
                elif kind == PACE:
                    pace[name].copy_(value)
                else:
                    _, _, moment = kind.partition(":")
                    # Adam counts its steps in a CPU scalar, wherever the parameter lives.
                    home = parameters[name].device if value.ndim else value.device
                    optimizer.state[parameters[name]][moment] = value.to(home)

    def save(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        average: dict[str, Tensor],
        pace: dict[str, Tensor],
    ) -> None:
        """Replace the file, if there is one. Raises OutOfMemory when the disk has no room."""
        if self.file is None:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"{WEIGHT}|{name}"] = parameter.detach().contiguous()
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{OPTIMIZER}:{moment}|{name}"] = value.contiguous()
        for name, value in average.items():
            tensors[f"{AVERAGE}|{name}"] = value.contiguous()
        for name, value in pace.items():
            tensors[f"{PACE}|{name}"] = value.detach().contiguous()
        kept = {name: getattr(self, name) for name in ("run", "step", "steps", "losses", "seconds")}
        staged = self.file.with_suffix(".partial")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, staged, {"state": json.dumps(kept)})
            staged.replace(self.file)
        except (OSError, SafetensorError) as error:
            staged.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno != errno.ENOSPC:
                raise
            size = sum(value.nbytes for value in tensors.values()) / 2**20
            raise OutOfMemory(
                f"cannot write {size:.0f} MiB of training state to {self.file.parent}: {error}",
                hint="make room on the disk, then run again with --resume",
            ) from error
