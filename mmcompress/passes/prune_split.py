"""What `prune` decided, to be recorded; and how one budget was split over towers and kinds of units, to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mmcompress.manifest import Json, Record
from mmcompress.passes.prune_units import Costs, Group, write_ranges

Kept = Mapping[Group, Sequence[int]]


def decisions(totals: Mapping[str, Costs], cut: Kept, depths: Mapping[str, int]) -> dict[str, Json]:
    """Return the kept units of every group that loses some, and what each tower costs before and after."""
    kept: dict[str, dict[str, str]] = {"heads": {}, "neurons": {}, "blocks": {}}
    after = {name: [costs.parameters, costs.macs] for name, costs in totals.items()}
    gone_blocks: dict[str, set[int]] = {}
    for group, indices in cut.items():
        after[group.tower][0] -= group.cost.parameters * (group.units - len(indices))
        after[group.tower][1] -= group.cost.macs * (group.units - len(indices))
        if group.kind == "blocks":
            gone_blocks.setdefault(group.tower, set()).add(group.block)
        else:
            kept.setdefault(group.kind, {})[group.key] = write_ranges(indices)
    for name, gone in gone_blocks.items():
        kept["blocks"][name] = write_ranges([index for index in range(depths[name]) if index not in gone])
    return {
        "kept": kept,
        "before": {name: asdict(costs) for name, costs in totals.items()},
        "after": {name: asdict(Costs(*costs)) for name, costs in after.items()},
    }


def staying(groups: Sequence[Group], cut: Kept) -> list[Group]:
    """Return `groups` without the parts of blocks that go: those are the blocks'."""
    gone = {(group.tower, group.block) for group in cut if group.kind == "blocks"}
    return [group for group in groups if group.kind == "blocks" or (group.tower, group.block) not in gone]


def split(groups: Sequence[Group], cut: Kept) -> list[dict[str, Any]]:
    """Return, for each tower and kind of unit, how many there were of those that might go and are left, and what went with them."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for group in groups:
        kind = f"{group.part} {group.kind}".strip()
        row = rows.setdefault(
            (group.tower, kind),
            {"tower": group.tower, "kind": kind, "before": 0, "after": 0, "parameters": 0, "macs": 0},
        )
        gone = group.units - len(cut.get(group, range(group.units)))
        row["before"] += group.units
        row["after"] += group.units - gone
        row["parameters"] += gone * group.cost.parameters
        row["macs"] += gone * group.cost.macs
    return [{**row, "share": round(1 - row["after"] / row["before"], 6)} for row in rows.values()]


def recorded_splits(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the rows that prune steps among `records` recorded, each with the number of its step."""
    return [
        {"step": number, **row} for number, record in enumerate(records, 1) for row in record.facts.get("split", [])
    ]
