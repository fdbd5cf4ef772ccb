"""What belongs to the residual stream of a tower, as `narrow` cuts it: declared by the family, checked here, and its cost counted.

Shape alphabet: C channels, K channels left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.surgery.counting import counting
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.narrowing import is_rms_norm
from mmcompress.surgery.watch import evaluating, watch_inputs
from mmcompress.views import Attention, Block, Mlp, Residual, Tower


@dataclass(frozen=True)
class Stream:
    """Paths of all that reads or writes one tower's stream."""

    tower: str
    width: int
    """C."""
    norms: dict[str, tuple[str, ...]]
    """Norm -> the Linears that read what it gives out, in the order of the blocks; the last norm last."""
    writers: tuple[str, ...]
    """Linears whose outputs go in."""
    rows: tuple[tuple[str, str], ...]
    """(module, name of its parameter (…, C)) whose rows go in."""
    last: str
    """The norm behind the last block."""
    tied: str = ""
    """The Linear that reads the last norm, where its weight is a table's among `rows`."""
    table: str = ""
    """That table."""

    @property
    def readers(self) -> Iterator[str]:
        """Every Linear that reads a norm and has a weight of its own."""
        return (path for readers in self.norms.values() for path in readers if path != self.tied)


def stream_of(tower: Tower) -> Stream:
    """Return the stream of a tower. Raises UsageError where the family does not say all that belongs to it."""
    residual = tower.residual
    if residual is None:
        reason = tower.why_no_residual or "its family does not name all that reads and writes it"
        raise UsageError(
            f"this tower's residual stream cannot become narrower: {reason}",
            hint=f"name towers other than {tower.name} with --towers; mmc prune takes heads, neurons and blocks of any",
        )
    norms: dict[str, tuple[str, ...]] = {}
    for block in tower.blocks:
        assert len(block.norms) == 2, f"{block.path} is in a tower whose stream is known, but not its norms"
        norms |= zip(block.norms, (part.writers for part in _parts(block)), strict=True)
    norms[residual.norm] = residual.readers
    added = [part.reader for block in tower.blocks for part in _parts(block)]
    table, tied = _tie(tower, residual)
    return Stream(
        tower.name,
        residual.width,
        norms,
        (*residual.makers, *added),
        tuple((owner, name) for owner, _, name in (row.rpartition(".") for row in residual.rows)),
        residual.norm,
        tied,
        table,
    )


def _parts(block: Block) -> tuple[Attention, Mlp]:
    assert block.mlp is not None, f"{block.path} has experts, and is in a tower whose stream is known"
    return block.attention, block.mlp


def _tie(tower: Tower, residual: Residual) -> tuple[str, str]:
    """Return (table, Linear) where one of the last readers has a table's weight, else empty paths."""
    return next(((table, linear) for table, linear in tower.tied if linear in residual.readers), ("", ""))


def require_narrowable(bundle: Bundle, stream: Stream) -> None:
    """Raise UsageError where something of the stream is no plain Linear, table or RMS norm."""
    for path in (*stream.writers, *(path for readers in stream.norms.values() for path in readers)):
        module = bundle.module(path)
        if type(module) is not nn.Linear or is_float_coded(module):
            raise UsageError(
                f"{path} is a {type(module).__name__}; narrow cuts nn.Linear",
                hint="put narrow before factorize and quantize",
            )
    for path, name in stream.rows:
        module = bundle.module(path)
        if name not in dict(module.named_parameters(recurse=False)):
            raise UsageError(
                f"{path} is a {type(module).__name__}; narrow cuts rows of floats", hint="put narrow before quantize"
            )
    for path in stream.norms:
        norm = bundle.module(path)
        if isinstance(norm, nn.Sequential):
            raise UsageError(
                f"the {stream.tower} tower is narrow already, with a product behind its last norm",
                hint="start from the checkpoint before that, with a larger ratio",
            )
        if not is_rms_norm(norm):
            raise UsageError(
                f"{path} is a {type(norm).__name__}, and only x / rms(x) times a gain commutes with rotations",
                hint="prune takes heads, neurons and blocks of any tower",
            )


def parameters_after(bundle: Bundle, stream: Stream, width: int) -> dict[str, int]:
    """Return how many parameters each tower has once the stream is `width` wide: counted from shapes, before anything is cut."""
    gone, lost = stream.width - width, {}
    for path in stream.writers:
        linear = bundle.module(path)
        lost[path] = gone * (linear.get_parameter("weight").shape[1] + (linear.bias is not None))
    for path in stream.readers:
        lost[path] = gone * bundle.module(path).get_parameter("weight").shape[0]
    lost |= dict.fromkeys(stream.norms, gone)
    for path, name in stream.rows:
        rows = bundle.module(path).get_parameter(name)
        lost[f"{path}.{name}"] = gone * (rows.numel() // stream.width)
    if stream.tied and gone:
        lost[stream.last] -= width * width
    return {
        tower.name: sum(p.numel() for name, p in bundle.model.named_parameters() if tower.owns(name))
        - sum(count for path, count in lost.items() if tower.owns(path))
        for tower in bundle.towers()
    }


def macs_saved(bundle: Bundle, stream: Stream, width: int) -> int:
    """Return the MACs of the tower's example inputs that go, in the tower itself."""
    tower, gone, seen = bundle.tower(stream.tower), stream.width - width, dict[str, int]()
    paths = [path for path in (*stream.writers, *stream.readers, *filter(None, [stream.tied])) if tower.owns(path)]

    def record(path: str, tokens: Tensor) -> None:
        seen[path] = seen.get(path, 0) + len(tokens)

    modules = {path: bundle.module(path) for path in paths} | {stream.last: bundle.module(stream.last)}
    with evaluating(bundle.model), counting(), watch_inputs(modules, record):
        bundle.encode(tower.name, bundle.example_inputs(tower.name, 1))
    saved = 0
    for path in paths:
        out, into = bundle.module(path).get_parameter("weight").shape
        saved += seen.get(path, 0) * gone * (into if path in stream.writers else out)
    return saved - (seen[stream.last] * width * width if stream.tied and gone else 0)
