"""Reading views out of modules, by the names of their parts (`block_names`); and what towers are shown as examples."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from mmcompress.families.block_names import BlockNames
from mmcompress.surgery.experts import stacked_shape
from mmcompress.views import Attention, Block, Counts, Experts, Mlp


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _width(block: nn.Module, path: str, side: Literal["in_features", "out_features"]) -> int:
    return int(_attribute(block, f"{path}.{side}"))


def read_blocks(model: nn.Module, blocks_path: str, names: BlockNames, activation: str) -> tuple[Block, ...]:
    """Return the views of the blocks in the ModuleList at `blocks_path`, with today's widths."""
    blocks = []
    for index, block in enumerate(model.get_submodule(blocks_path).children()):
        path = f"{blocks_path}.{index}"
        experts = _experts(block, path, names)
        blocks.append(
            Block(
                path=path,
                index=index,
                attention=_attention(block, path, names, names.attention),
                mlp=None if experts else _mlp(block, path, names, activation),
                attend=names.attend,
                feed=names.feed,
                cross=_attention(block, path, names, names.cross) if names.cross else None,
                norms=tuple(f"{path}.{norm}" for norm in names.norms),
                experts=experts,
                scales=tuple(f"{path}.{scale}" for scale in names.scales),
            )
        )
    return tuple(blocks)


def _mlp(block: nn.Module, path: str, names: BlockNames, activation: str) -> Mlp:
    return Mlp(
        path=f"{path}.{names.mlp}".rstrip("."),
        writers=tuple(f"{path}.{writer}" for writer in names.mlp_writers),
        reader=f"{path}.{names.mlp_reader}",
        neurons=_width(block, names.mlp_reader, "in_features"),
        activation=activation,
    )


def _experts(block: nn.Module, path: str, names: BlockNames) -> Experts | None:
    """Return the view of a block's experts; None where it has one feed-forward for all tokens."""
    if not names.experts or names.experts not in dict(block.named_modules()):
        return None
    count, _, neurons = stacked_shape(block, names.stacked[-1])
    return Experts(
        path=f"{path}.{names.mlp}",
        router=f"{path}.{names.router}",
        stacked=tuple(f"{path}.{name}" for name in names.stacked),
        experts=count,
        top=int(_attribute(block, names.top)),
        neurons=neurons,
        bookkeeping=tuple(
            (f"{path}.{owner}", attribute)
            for owner, _, attribute in (name.rpartition(".") for name in names.experts_counted)
        ),
    )


def _attention(block: nn.Module, path: str, names: BlockNames, where: str) -> Attention:
    """Return the view of the attention at `where` in a block, which lies inside as `names.attention` does."""
    scale: tuple[tuple[str, Counts], ...] = ((names.scale, "scale"),) if names.scale else ()
    numbers = (*names.bookkeeping, (names.head_dim, "head_dim"), *scale)
    writers = tuple(where + writer.removeprefix(names.attention) for writer in names.writers)
    head_dim = int(_attribute(block.get_submodule(where), names.head_dim))
    made = [_width(block, writer, "out_features") for writer in writers]
    query, key = made[:2] if len(made) > 1 else (made[0] // 3, made[0] // 3)
    at = f"{path}.{where}"
    return Attention(
        path=at,
        writers=tuple(f"{path}.{writer}" for writer in writers),
        reader=f"{path}.{where}{names.reader.removeprefix(names.attention)}",
        heads=query // head_dim,
        kv_heads=key // head_dim,
        head_dim=head_dim,
        bookkeeping=tuple(
            (f"{at}.{owner}".rstrip("."), attribute, counts)
            for owner, _, attribute, counts in ((*name.rpartition("."), counts) for name, counts in numbers)
        ),
        per_head=tuple(f"{path}.{name}" for name in names.per_head),
        why_whole=names.why_whole,
        why_rigid=names.why_rigid or names.why_whole,
        turned=names.turned,
    )


def widths(blocks: tuple[Block, ...]) -> tuple[int, int] | None:
    """Return (heads, neurons) when every block has the same, and heads as wide, else None."""
    found = {(block.attention.heads, block.feeding.neurons, block.attention.head_dim) for block in blocks}
    return found.pop()[:2] if len(found) == 1 else None


def stream_width(model: nn.Module, blocks: tuple[Block, ...]) -> int:
    """Return C of the stream that the norms of `blocks` read, today."""
    return len(getattr(model.get_submodule(blocks[0].norms[0]), "weight"))  # noqa: B009


def example_pixels(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Return smooth deterministic images (B, channels, height, width) in about -2..2."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, channels, 7, 7, generator=generator)
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)


def example_tokens(batch: int, length: int, vocabulary: int, last: int, padding: int = 0) -> torch.Tensor:
    """Return deterministic token ids (B, length) that end in `last`, and have it and `padding` nowhere else."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary - 1, (batch, length), generator=generator)
    ids += (ids >= last).long()  # `last` occurs at the end only
    # RoBERTa counts its positions by what is not padding.
    ids[ids == padding] = next(token for token in range(1, vocabulary) if token not in (last, padding))
    ids[:, -1] = last
    return ids


def roberta_positions(config: Any) -> int:
    """Return the most tokens of a RoBERTa: its positions count from the padding id + 1, and the table holds those before."""
    return int(config.max_position_embeddings) - int(config.pad_token_id) - 1
