"""What belongs to the residual stream of a tower, as `narrow` cuts it and `rotate` turns it: declared by the family, checked here.

Shape alphabet: C channels, K channels left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.surgery.cross_tokens import cross_vector
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.narrowing import centres, is_rms_norm
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
    entry: str = ""
    """The norm before the first block, where nothing else goes in: it stays as wide, with a Linear (C, K) behind it."""
    scales: dict[str, str] = field(default_factory=dict)
    """Writer -> name of the parameter (C,) that multiplies its outputs."""

    @property
    def widens(self) -> bool:
        """Whether what reads the last norm goes on reading C channels: a Linear (K, C) behind it makes them."""
        return not self.norms[self.last]


def stream_of(tower: Tower) -> Stream:
    """Return the stream of a tower. Raises UsageError where the family does not say all that belongs to it."""
    residual = tower.residual
    if residual is None:
        raise UsageError(
            f"this tower's residual stream cannot become narrower: {why_not(tower)}",
            hint=f"name towers other than {tower.name} with --towers; mmc prune takes heads, neurons and blocks of any",
        )
    norms: dict[str, tuple[str, ...]] = {}
    for block in tower.blocks:
        assert len(block.norms) == 2, f"{block.path} is in a tower whose stream is known, but not its norms"
        norms |= zip(block.norms, (part.writers for part in _parts(block)), strict=True)
    norms[residual.norm] = residual.readers
    added = [part.reader for block in tower.blocks for part in _parts(block)]
    scales = [name for block in tower.blocks for name in block.scales]
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
        residual.entry,
        dict(zip(added, scales, strict=True)) if scales else {},
    )


def known(bundle: Bundle) -> list[Tower]:
    """Return the towers whose stream is known. Raises UsageError where none is."""
    towers = bundle.towers()
    found = [tower for tower in towers if tower.residual]
    if not found:
        reasons = "; ".join(f"{tower.name}: {why_not(tower)}" for tower in towers)
        raise UsageError(
            f"no residual stream of {bundle.family.name} models can become narrower ({reasons})",
            hint="mmc prune takes heads, neurons and blocks of any tower",
        )
    return found


def why_not(tower: Tower) -> str:
    """Return why a tower's stream is not known, for a person."""
    return tower.why_no_residual or "its family does not name all that reads and writes it"


def _parts(block: Block) -> tuple[Attention, Mlp]:
    assert block.mlp is not None, f"{block.path} has experts, and is in a tower whose stream is known"
    return block.attention, block.mlp


def _tie(tower: Tower, residual: Residual) -> tuple[str, str]:
    """Return (table, Linear) where one of the last readers has a table's weight, else empty paths."""
    return next(((table, linear) for table, linear in tower.tied if linear in residual.readers), ("", ""))


def is_centred(bundle: Bundle, stream: Stream) -> bool:
    """Whether the norms are LayerNorms: what is written may then lose its mean."""
    return centres(bundle.module(stream.last))


def require_narrowable(bundle: Bundle, stream: Stream, name: str = "narrow") -> None:
    """Raise UsageError where something of the stream is no plain layer, table or norm, or does not turn; `name`: of the pass."""
    readers = [path for readers in stream.norms.values() for path in readers]
    for path in (*stream.writers, *readers):
        module = bundle.module(path)
        if type(module) not in ((nn.Linear,) if path in readers else (nn.Linear, nn.Conv2d)) or is_float_coded(module):
            raise UsageError(
                f"{path} is a {type(module).__name__}; {name} is for nn.Linear",
                hint=f"put {name} before factorize and quantize",
            )
    for path, row in stream.rows:
        module = bundle.module(path)
        if row not in dict(module.named_parameters(recurse=False)):
            raise UsageError(
                f"{path} is a {type(module).__name__}; {name} is for rows of floats", hint=f"put {name} before quantize"
            )
    for path in (*stream.norms, *filter(None, [stream.entry])):
        if isinstance(bundle.module(path), nn.Sequential):
            raise UsageError(
                f"the {stream.tower} tower has been narrowed or rotated already: there is a product behind {path}",
                hint="start from the checkpoint before that",
            )
    for block in bundle.tower(stream.tower).blocks:
        if cross_vector(bundle.module(block.path)) is not None:
            raise UsageError(
                f"{block.path} has learned a cross token, which goes into the stream",
                hint=f"put {name} before merge-tokens",
            )
    for path in stream.norms:
        norm = bundle.module(path)
        if not (centres(norm) if is_centred(bundle, stream) else is_rms_norm(norm)):
            raise UsageError(
                f"{path} is a {type(norm).__name__}, and {stream.last} a {type(bundle.module(stream.last)).__name__}; "
                "only where all are LayerNorms, or x / rms(x) times a gain, rotations change nothing",
                hint="prune takes heads, neurons and blocks of any tower",
            )
