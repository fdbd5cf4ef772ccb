"""The longest text a tower can read: the table of places, and everything that says how many there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.trim_words import config_of, of_size
from mmcompress.tokenizer import with_length
from mmcompress.views import Positions


def positions_of(bundle: Bundle, name: str) -> Positions:
    """Return the table of places of the tower `name`. Raises UsageError where there is none, or it is no plain table."""
    tower = bundle.tower(name)
    if tower.positions is None:
        raise UsageError(
            f"trim-vocabulary.length shortens a table of places, and the {name} tower of {bundle.family.name} models has none "
            "that a short text leaves unread",
            hint="leave length out",
        )
    table = bundle.module(tower.positions.table)
    if not isinstance(table, nn.Embedding) or "weight" not in table._parameters:
        raise UsageError(
            f"{tower.positions.table} is a {type(table).__name__}; length cuts a plain table",
            hint="put trim-vocabulary before quantize",
        )
    return tower.positions


def require_length(bundle: Bundle, name: str, length: int) -> None:
    """Raise UsageError for texts longer than now, or too short for a token beside the special ones; 0 is told by data."""
    tokenizer = bundle.processor.tokenizer
    least = 1 + (tokenizer.num_special_tokens_to_add() if tokenizer is not None else 0)
    if length and not least <= length <= places(bundle, name):
        raise UsageError(
            f"trim-vocabulary.length is {length}; expected {least} to {places(bundle, name)} tokens for the {name} tower",
            hint="0 means the longest text of the data",
        )
    positions_of(bundle, name)


def places(bundle: Bundle, name: str) -> int:
    """Return the most tokens a text may have."""
    positions = positions_of(bundle, name)
    return int(bundle.module(positions.table).num_embeddings) - positions.first  # type: ignore[arg-type]


def shortened(bundle: Bundle, name: str, length: int) -> dict[str, Tensor]:
    """Return the rows of the table that texts of up to `length` tokens read, by the parameter's name."""
    positions = positions_of(bundle, name)
    weight = bundle.layer(positions.table).weight
    assert isinstance(weight, Tensor), f"{positions.table} has no weight"
    return {f"{positions.table}.weight": weight.detach()[: positions.first + length]}


def shorten(bundle: Bundle, name: str, length: int, values: Mapping[str, Tensor]) -> None:
    """Put a table for texts of up to `length` tokens in place, and say so in the config, modules and the tokenizer."""
    tower, positions = bundle.tower(name), positions_of(bundle, name)
    old: Any = bundle.module(positions.table)
    before, rows = old.num_embeddings, positions.first + length
    table = of_size(old, rows, {"weight": values.get(f"{positions.table}.weight")})
    table.num_embeddings = rows
    bundle.replace(positions.table, table)
    setattr(config_of(bundle, tower), positions.key, rows)
    # The numbers of places, and BERT's types of tokens, lie ready in a row beside the table.
    for module in bundle.module(tower.path).modules():
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and not buffer.is_floating_point() and buffer.shape == (1, before):
                module.register_buffer(
                    key, buffer[:, :rows].clone(), persistent=key not in module._non_persistent_buffers_set
                )
    if bundle.processor.tokenizer is not None:
        bundle.processor = with_length(bundle.processor, length)
