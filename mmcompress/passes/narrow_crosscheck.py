"""Ask torch-pruning whether a stream is complete: does cutting one channel of it drag anything else along, or less?

torch-pruning (Fang et al. 2023, DepGraph) traces the tower and derives what has to go together with one output channel of the last
block's feed-forward. That has to be a channel of all that the family declares, and of nothing else. It traces a copy that is cut as
`narrow` cuts it, to all of its channels: where Linears end the stream, what lies beyond them is not its business.

Of what goes into the stream before the blocks it does not follow everything: a table that is multiplied by another matrix (SigLIP 2
resizes its positions), image tokens that are put in the place of words, a mask token that no picture needs. That is named.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.narrow_cut import cut
from mmcompress.passes.narrow_units import Stream
from mmcompress.passes.prune_crosscheck import (
    Channels,
    Names,
    closure,
    dependencies,
    in_time,
    require_torch_pruning,
    show,
)
from mmcompress.progress import Progress

Key = tuple[str, str]


def crosscheck(bundle: Bundle, streams: Sequence[Stream], progress: Progress, seconds: float = 120.0) -> dict[str, Any]:
    """Compare each stream with what torch-pruning cuts; return what it says of each tower, and tell `progress`.

    Raises MissingError without torch-pruning; UsageError where a stream differs, and where torch-pruning cannot follow a tower or
    does not end in `seconds`.
    """
    require_torch_pruning()
    facts: dict[str, Any] = {}
    for stream in streams:
        copied = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model).requires_grad_(True))
        what = f"torch-pruning's search in the {stream.tower} tower"
        agreed, unfollowed = in_time(seconds, what, functools.partial(_compared, copied, stream))
        facts[stream.tower] = {"agreed": agreed, "not_followed": unfollowed}
        rest = f"; it does not follow {', '.join(unfollowed)}" if unfollowed else ""
        progress.say(
            f"torch-pruning cuts a channel of the {stream.tower} tower's stream in the same {agreed} places{rest}"
        )
    return facts


def _compared(bundle: Bundle, stream: Stream) -> tuple[int, list[str]]:
    """Return in how many places both cut, and what goes in that torch-pruning does not follow."""
    cut(bundle, stream, stream.width, [stream.table, stream.tied] if stream.tied else [])
    channel = [stream.width - 1]
    inside, before = (dict.fromkeys(keys, channel) for keys in members(bundle, stream))
    ours: Channels = inside | before
    tower = bundle.tower(stream.tower)
    try:
        theirs = closure(dependencies(bundle, tower), bundle.model, _names(bundle.model), ours)
    except Exception as error:  # whatever a tracer may meet in a model it does not know
        raise UsageError(
            f"torch-pruning cannot follow the {tower.name} tower of {bundle.family.name} models: "
            f"{type(error).__name__}: {error}",
            hint="leave crosscheck off for this tower",
        ) from error
    more = {key: channels for key, channels in theirs.items() if ours.get(key) != channels}
    fewer = {key: channels for key, channels in inside.items() if key not in theirs}
    if more or fewer:
        raise UsageError(
            f"of the {tower.name} tower's stream, torch-pruning cuts {show(more) or 'nothing'} that we would not, and not "
            f"{show(fewer) or 'less'}",
            hint="this tower is not built as its family says; report it, or leave crosscheck off to go on",
        )
    return len(theirs), [path for path, _ in before if (path, "rows") not in theirs]


def members(bundle: Bundle, stream: Stream) -> tuple[list[Key], list[Key]]:
    """Return what the cut stream's channels are rows or columns of: from the blocks on, its last writer first; and before."""
    residual = bundle.tower(stream.tower).residual
    assert residual is not None
    written = [path for path in stream.writers if path not in residual.makers]
    inside = [(path, "rows") for path in reversed(written)]
    inside += [(name, "rows") for name in stream.scales.values()]
    for norm, readers in stream.norms.items():
        behind = bundle.module(norm)
        product = isinstance(behind, nn.Sequential)
        at, module = (f"{norm}.0", behind[0]) if product else (norm, behind)  # type: ignore[index]
        # torch-pruning knows LayerNorms; of other norms it sees the parameter.
        inside.append((at if isinstance(module, nn.LayerNorm) else f"{at}.weight", "rows"))
        inside += [(f"{norm}.1", "columns")] if product else [(path, "columns") for path in readers]
    before = [(path, "rows") for path in residual.makers]
    before += [(f"{stream.entry}.1", "rows")] if stream.entry else []
    for path, name in stream.rows:
        before.append((path if isinstance(bundle.module(path), nn.Embedding) else f"{path}.{name}", "rows"))
    return inside, before


def _names(model: nn.Module) -> Names:
    """Return the modules and parameters that torch-pruning may name, with their paths."""
    modules: Names = {module: name for name, module in model.named_modules()}
    return modules | {parameter: name for name, parameter in model.named_parameters()}
