"""A small search as a program that tests start as several processes: python searching.py OUT SETTINGS."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from mmcompress import passes, pipeline
from mmcompress.passes.base import Context
from mmcompress.recipe import Step
from tests import tiny


def main(out: Path, settings: dict[str, Any]) -> None:
    """Search a tiny CLIP; every process writes what it decided, with its rank behind the name."""
    torch.set_num_threads(1)
    stage = pipeline.Stage(1, Step("search-prune", settings), passes.build("search-prune", settings))
    context = Context(data=tiny.dataset(24), teacher=lambda: tiny.bundle("clip"))
    record = pipeline.run_stage(tiny.bundle("clip"), stage, context)
    Path(f"{out}.{os.environ.get('RANK', '0')}").write_text(json.dumps(record.plan["kept"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
