"""What a run came to, and its document."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcompress.evaluate.findings import Finding
from mmcompress.jobs.gates import GateResult
from mmcompress.jobs.sensitivity import Row
from mmcompress.jobs.speed import TowerSpeed
from mmcompress.manifest import Manifest


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    output: Path
    manifest: Manifest
    findings: tuple[Finding, ...]
    rows: tuple[dict[str, Any], ...]
    """One row per stage, the original first: parameters, MACs per tower, headline metrics."""
    speeds: tuple[TowerSpeed, ...] = ()
    gates: tuple[GateResult, ...] = ()
    pictures: tuple[Path, ...] = ()
    """Drawings of what became of patches."""
    sensitivity: tuple[Row, ...] = ()
    """What quantizing each group of layers alone did, where that was asked for."""
    split: tuple[dict[str, Any], ...] = ()
    """How the budgets of pruning were split over towers and kinds of units."""

    def to_json(self) -> dict[str, Any]:
        """Return the document of ``--json``."""
        return {
            "output": str(self.output),
            "verdict": [finding.to_json() for finding in self.findings],
            "stages": list(self.rows),
            "speeds": [speed.to_json() for speed in self.speeds],
            "gates": [dataclasses.asdict(gate) for gate in self.gates],
            "plain_transformers": self.manifest.plain_transformers,
            "why": self.manifest.why,
            "pictures": [str(path) for path in self.pictures],
            "sensitivity": [dataclasses.asdict(row) for row in self.sensitivity],
            "split": list(self.split),
        }
