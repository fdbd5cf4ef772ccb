"""Two blocks of every method against the same done by hand from the block's own parts, and the scores attention gives."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from mmcompress.ops.complete_matching import energy_matching, guided_matching
from mmcompress.ops.fusing import fused, neighbours
from mmcompress.ops.matching import bipartite_soft_matching
from mmcompress.passes import schema
from mmcompress.surgery import reducing, reduction
from mmcompress.surgery.attention import Looked, class_scores, scores
from mmcompress.surgery.merging import bind_block
from mmcompress.surgery.reduction import Method, Reduction, TokenLedger
from tests import tiny

MERGED = (14, 9)
"""Of 50 tokens in the first block, of 36 in the second."""


def parts(block: Any, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens after attention, the keys averaged over heads (B, N, D) and the weights of all queries (B, H, N, N)."""
    attention, normed = block.self_attn, block.layer_norm1(tokens)
    query, key = (
        project(normed).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    logits = query @ key.mT * attention.head_dim**-0.5
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return tokens + attention(normed, attention_mask=bias)[0], key.mean(dim=1), weights


def by_hand(block: Any, tokens: Tensor, sizes: Tensor, method: str, merged: int, depth: float) -> tuple[Tensor, Tensor]:
    """One block: attention, merging, MLP. Returns the tokens and their sizes."""
    bias = None if method == "evit" else sizes.log()[:, None, None, :]
    tokens, keys, weights = parts(block, tokens, bias)
    counts = torch.ones_like(sizes)
    if method == "tome":
        rows = bipartite_soft_matching(keys, merged, 1)
    elif method == "pitome":
        rows = energy_matching(keys, merged, 1, margin=0.9 * (1 - depth))
    elif method == "crossget":
        rows, counts = guided_matching(keys, merged, 1)
    elif method == "evit":
        rows, counts = fused(weights[:, :, 0].mean(dim=1), merged, 1)
        counts = counts / sizes
    else:
        rows = neighbours(tokens.shape[1], merged, 1).expand(len(tokens), -1, -1)
    share = rows * (sizes * counts)[:, None, :]
    tokens = (share / share.sum(dim=-1, keepdim=True)).double() @ tokens
    return tokens + block.mlp(block.layer_norm2(tokens)), (rows * sizes[:, None, :]).sum(dim=-1)


@pytest.mark.parametrize("method", get_args(Method))
def test_two_blocks_are_what_the_method_says(method: Any) -> None:
    bundle = tiny.bundle("clip")
    bundle.model.double().eval()
    blocks = bundle.tower("vision").blocks[:2]
    plain = [bundle.module(block.path) for block in blocks]
    bound: list[nn.Module] = [copy.deepcopy(module) for module in plain]
    ledger = TokenLedger()
    for index, (block, module) in enumerate(zip(blocks, bound, strict=True)):
        reduction = Reduction(
            attend=block.attend,
            attention=block.attention.path.removeprefix(block.path + "."),
            feed=block.feed,
            merged=MERGED[index],
            method=method,
            depth=index / 2,
            protected=1,
            proportional=method != "evit",
            first=index == 0,
            last=index == 1,
            ledger=ledger,
        )
        bind_block(module, reduction)
    width = plain[0].layer_norm1.normalized_shape[0]  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    # Ten directions, so that there is something to merge.
    tokens = torch.randn(2, 10, width, generator=generator, dtype=torch.float64).repeat(1, 5, 1)
    tokens = tokens + 0.3 * torch.randn(tokens.shape, generator=generator, dtype=torch.float64)
    expected, sizes = tokens, torch.ones(2, 50, dtype=torch.float64)
    with torch.no_grad():
        for index, module in enumerate(plain):
            expected, sizes = by_hand(module, expected, sizes, method, MERGED[index], index / 2)
        got = tokens
        for module in bound:
            got = module(got, None)
    assert got.shape == expected.shape == (2, 27, width)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()  # scores are of float32
    assert sizes.sum(dim=-1).tolist() == [50, 50]


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("kind", ["true", "added"])
def test_padding_is_not_looked_at_and_asks_nothing(kind: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(2))
    seen = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()[:, None, None, :].expand(-1, -1, rows, -1)
    mask = seen if kind == "true" else torch.where(seen, 0.0, -30000.0)
    looked = Looked(query, key, mask, scale=0.5, asking=None)
    for sample, count in ((0, 6), (1, 4)):
        weights = (query[sample, :, :count] @ key[sample, :, :count].mT / 2).softmax(dim=-1).mean(dim=0)
        given = scores(looked)
        torch.testing.assert_close(given[sample, :count], weights.mean(dim=0))
        of_class = class_scores(looked)
        torch.testing.assert_close(of_class[sample, :count], weights[0])
        assert not given[sample, count:].any()
        assert not of_class[sample, count:].any()


def test_the_passes_offer_what_there_is() -> None:
    """Schemas are read without importing, so the names stand in the passes too."""
    offered = {
        name: next(p for p in schema(name).parameters if p.name == "method")
        for name in ("merge-tokens", "reduce-visual-tokens")
    }
    assert offered["merge-tokens"].choices == (*get_args(reduction.Method), "random")
    assert offered["reduce-visual-tokens"].choices == get_args(reducing.Method)
