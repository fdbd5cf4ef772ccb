"""Does the exported graph compute what the torch model computes, at every corner of its shapes?

The reference is the torch module that was exported, in the same precision. Float graphs must agree to a small error
relative to the largest output; where a part chooses the rows it gives out (B, rows, C), in all but a few of them. Half precision
rounds at other places than torch, so its limit is wider. A model that float32 itself computes less exactly than that (Whisper's
encoder with smoothed weights, 1e-4) may differ by `OWN_ERRORS` times as much as torch's float32 differs from its float64. How
quantized graphs are held to account is told in `rounding`. A graph that fails is an error that names the shape and the first block
whose output differs.

Shape alphabet: B batch, N tokens, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from mmcompress.errors import GateFailed
from mmcompress.export.rounding import check_grids, no_rounding, rounding_layers, rounds, unrounded, unrounded_inputs
from mmcompress.export.running import open_graph, run_torch, run_torch_blocks
from mmcompress.export.trace import Traced
from mmcompress.parts import BATCH, PAST, TOKENS


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal: `relative` to the largest absolute output, `cosine` per row."""

    relative: float
    cosine: float

    def holds(self, row: ParityRow) -> bool:
        """Whether a comparison is within the limits; NaN never is."""
        return row.relative <= self.relative and row.cosine >= self.cosine


TOLERANCES = {
    "float32": Tolerance(relative=1e-4, cosine=0.99999),
    "float16": Tolerance(relative=2e-2, cosine=0.999),
    "bfloat16": Tolerance(relative=1.5e-1, cosine=0.99),
    "quantized": Tolerance(relative=float("inf"), cosine=0.98),
}


CHOSEN_ROWS = 0.75
"""The least share of every item's rows that is equal where rows are chosen: a token that is as near to two clusters as float32 can
tell changes the means of both, and with them where further ones go."""
OWN_ERRORS = 4
"""Two float32 computations of one thing are each off by their own error, and sums in another order now and then by twice that."""


@dataclass(frozen=True)
class ParityRow:
    """One comparison, of the output that differs most. `tokens` and `past` are 0 for inputs without such axes."""

    batch: int
    tokens: int
    max_abs: float
    relative: float
    cosine: float
    runner: str
    rounding: bool = True
    """False: compared without the rounding of activations."""
    past: int = 0


def corners(module: Traced, batches: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Yield inputs at every corner of the shapes: each batch with each of the part's sizes, and once the longest."""
    part = module.part
    for batch in batches:
        for sizes in part.corners:
            yield module.example({BATCH: batch, **sizes})
    if part.longest is not None:
        yield module.example({BATCH: 1, **part.longest})


def check_parity(
    module: Traced,
    path: Path,
    *,
    precision: str,
    batches: Sequence[int] = (1, 2, 7),
    used: Collection[str] | None = None,
) -> tuple[ParityRow, ...]:
    """Compare the graph at `path` with the torch module at every corner.

    `used`: names of the tensors that the part's outputs are computed from (`trace.Graph`); None: of all it runs.

    Raises GateFailed naming the part, the shape, the difference and the first block that differs.
    """
    inputs = list(corners(module, batches))
    strict = TOLERANCES[precision]
    rounded = rounds(onnx.load(path, load_external_data=False)) or bool(rounding_layers(module))
    if not rounded and precision != "bfloat16":
        return _compare_all(module, path, inputs, strict)
    graph = onnx.load(path)
    if not rounded:
        return _compare_all(module, graph, inputs, strict)
    check_grids(module, graph, used)
    with no_rounding(module):
        rows = _compare_all(module, unrounded(graph), [unrounded_inputs(given) for given in inputs], strict)
    loose = TOLERANCES["quantized"]
    return (
        *(replace(row, rounding=False) for row in rows),
        *_compare_all(module, graph, inputs, loose),
    )


def _compare_all(
    module: Traced, graph: onnx.ModelProto | Path, corner_inputs: Sequence[dict[str, Tensor]], limit: Tolerance
) -> tuple[ParityRow, ...]:
    run, runner = open_graph(graph)
    rows = []
    for inputs in corner_inputs:
        want = run_torch(module, inputs)
        got = run(inputs)
        row = _worst(module, want, got, inputs, runner)
        if not (
            limit.holds(row)
            or (module.part.choosing and _chosen_alike(want, got, limit))
            or _as_exact_as_torch(module, inputs, want, row, limit)
        ):
            where = first_divergence(module, onnx.load(graph) if isinstance(graph, Path) else graph, inputs, limit)
            sizes = (f", {row.tokens} tokens" if row.tokens else "") + (f", {row.past} past" if row.past else "")
            raise GateFailed(
                f"the exported {module.part.name} part differs from torch at batch {row.batch}{sizes}: "
                f"cosine {row.cosine:.5f} (limit {limit.cosine}), relative error {row.relative:.2e} "
                f"(limit {limit.relative}); first in {where or 'what follows the blocks'}",
                hint=_why(module, inputs, want, limit),
            )
        rows.append(row)
    return tuple(rows)


def _as_exact_as_torch(
    module: Traced, inputs: dict[str, Tensor], want: list[np.ndarray], row: ParityRow, limit: Tolerance
) -> bool:
    """Whether a float32 graph is off by no more than float32 itself is, by the measure of `OWN_ERRORS`."""
    if module.dtype != torch.float32 or row.cosine < limit.cosine:
        return False
    return row.relative <= OWN_ERRORS * _own_error(module, inputs, want).relative


def _own_error(module: Traced, inputs: dict[str, Tensor], want: list[np.ndarray]) -> ParityRow:
    """Return how torch's float64 differs from its float32."""
    wide = copy.deepcopy(module).double()
    wide.dtype = torch.float64
    return _worst(module, run_torch(wide, inputs), want, inputs, "torch")


def _why(module: Traced, inputs: dict[str, Tensor], want: list[np.ndarray], limit: Tolerance) -> str:
    """Return what a person can do about a graph that differs."""
    if module.part.choosing and module.dtype == torch.float32:
        own = _own_error(module, inputs, want)
        if own.cosine < limit.cosine:
            return (
                f"torch's own float64 differs from its float32 as well (cosine {own.cosine:.5f}): tokens are chosen by "
                "differences in the last digits; use a method that is steadier here, such as tome or pool"
            )
    return "report it with the model's config; a float32 export without quantize tells whether rounding is the cause"


def _chosen_alike(want: list[np.ndarray], got: list[np.ndarray], limit: Tolerance) -> bool:
    """Whether outputs (B, …, rows, C) or (rows, C) have the same rows but for a few; one chosen otherwise moves those behind."""
    if not all(np.isfinite(output).all() for output in got):
        return False
    items = [item for pair in zip(want, got, strict=True) for item in zip(*map(_rows, pair), strict=True)]
    for ours, theirs in items:
        largest = np.abs(ours).max() * limit.relative
        lengths = np.linalg.norm(ours, axis=-1)[:, None] * np.linalg.norm(theirs, axis=-1)
        cosines = ours @ theirs.T / np.maximum(lengths, np.finfo(np.float32).tiny)
        apart = np.stack([np.abs(row - theirs).max(axis=-1) for row in ours])
        same = (apart <= largest) & ((cosines >= limit.cosine) | (lengths == 0))  # (rows, rows); zeros point nowhere
        if min(same.any(axis=0).mean(), same.any(axis=1).mean()) < CHOSEN_ROWS:
            return False
    return True


def _rows(output: np.ndarray) -> np.ndarray:
    """Return (B, rows, …) flat behind the rows, which stand before the last axis."""
    moved = np.moveaxis(output if output.ndim > 2 else output[None], -2, 1)
    return moved.reshape(*moved.shape[:2], -1)


def _worst(
    module: Traced, want: list[np.ndarray], got: list[np.ndarray], inputs: dict[str, Tensor], runner: str
) -> ParityRow:
    """Compare every output; the largest differences, and NaN before any number."""
    if [array.shape for array in want] != [array.shape for array in got]:
        shapes = [(a.shape, b.shape) for a, b in zip(want, got, strict=True) if a.shape != b.shape]
        raise GateFailed(
            f"the exported {module.part.name} part gives shape {shapes[0][1]}, torch {shapes[0][0]}",
            hint="report it with the model's config and the versions of torch and onnxscript",
        )
    rows = [compare(*pair, runner) for pair in zip(want, got, strict=True) if pair[0].size]
    sizes = {
        name: inputs[key].shape[axis]
        for key, names in module.part.axes.items()
        for axis, name in enumerate(names)
        if name in (BATCH, TOKENS, PAST)
    }
    return replace(
        rows[0],
        batch=sizes[BATCH],
        max_abs=float(np.max([row.max_abs for row in rows])),
        relative=float(np.max([row.relative for row in rows])),
        cosine=float(np.min([row.cosine for row in rows])),
        tokens=sizes.get(TOKENS, 0),
        past=sizes.get(PAST, 0),
    )


def compare(want: np.ndarray, got: np.ndarray, runner: str) -> ParityRow:
    """Return the differences between two outputs (B, …); NaN where one has NaN, which no tolerance accepts."""
    want, got = want.astype(np.float64).reshape(len(want), -1), got.astype(np.float64).reshape(len(got), -1)
    largest = float(np.abs(want - got).max())
    norms = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    cosines = (want * got).sum(axis=1) / np.maximum(norms, 1e-30)
    return ParityRow(
        batch=len(want),
        tokens=0,
        max_abs=largest,
        relative=largest / max(float(np.abs(want).max()), 1e-30),
        cosine=float(cosines.min()),
        runner=runner,
    )


def as_records(rows: Sequence[ParityRow]) -> tuple[dict[str, Any], ...]:
    """Return rows as JSON-able values, rounded to what is meaningful."""
    return tuple(
        {**asdict(row), "max_abs": float(f"{row.max_abs:.2e}"), "relative": float(f"{row.relative:.2e}"),
         "cosine": round(row.cosine, 6)}
        for row in rows
    )  # fmt: skip


def first_divergence(module: Traced, graph: onnx.ModelProto, inputs: dict[str, Tensor], limit: Tolerance) -> str | None:
    """Return the path of the first block whose output differs from torch by more than `limit`, or None.

    A block's output in the graph is the last node named after it, so a block that was optimised away is skipped.
    """
    blocks = [
        block
        for tower in module.family.towers(module.model)
        if tower.name == module.part.tower
        for block in tower.blocks
    ]
    exposed = onnx.ModelProto()
    exposed.CopyFrom(graph)
    values = {}
    for block in blocks:
        last = [node for node in graph.graph.node if node.name.startswith((f"{block.path}/", f"{block.path}."))]
        if last:
            values[block.path] = last[-1].output[0]
            exposed.graph.output.append(onnx.helper.make_empty_tensor_value_info(last[-1].output[0]))
    run, runner = open_graph(exposed)
    got = dict(zip(values, run(inputs)[len(module.part.outputs) :], strict=True))
    for block_path, want in run_torch_blocks(module, inputs, list(values)).items():
        found = got[block_path]
        if want.shape != found.shape or not limit.holds(compare(want, found, runner)):
            return block_path
    return None
