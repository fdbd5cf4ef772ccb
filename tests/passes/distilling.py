"""A small distillation as a program: what the tests kill, resume, and start as several processes.

python distilling.py OUT WORKDIR SETTINGS [FAMILY]   (settings of the pass as JSON; a family of tests/tiny.py)
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmcompress.passes.base import Context
from mmcompress.passes.distill import Distill
from mmcompress.passes.distill_job import INTEGERS
from mmcompress.passes.distill_state import State
from tests import tiny
from tests.passes import fitting


def main(out: Path, workdir: Path, settings: dict[str, Any], family: str = "clip") -> None:
    """Train a damaged tiny model, of 4 bits where integers train; the first process writes its weights and the facts."""
    torch.set_num_threads(1)
    student = tiny.bundle(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    if settings.get("train") == INTEGERS:
        fitting.run(student, Context())
    given = {"batch_size": 8, "steps": 6, "learning_rate": 1e-3, "amp": False, **settings}
    data = tiny.spoken(24) if family in tiny.GENERATORS else tiny.dataset(24)
    context = Context(data=data, teacher=lambda: tiny.bundle(family), workdir=workdir)
    facts = Distill(**given).fit(student, context)
    if os.environ.get("RANK", "0") == "0":
        # Weights that are tied have one memory, which a file may not hold twice.
        save_file({name: value.clone() for name, value in student.model.state_dict().items()}, out)
        out.with_suffix(".json").write_text(json.dumps(facts))


def hang_after(step: int, reached: Any, *arguments: Any) -> None:
    """Run `main`, but stop dead once the state of `step` is saved, and set the event `reached`."""
    save = State.save

    def saved(self: State, *values: Any) -> None:
        save(self, *values)
        if self.step == step:
            reached.set()
            time.sleep(600)

    State.save = saved  # type: ignore[method-assign]
    main(*arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), *sys.argv[4:])
