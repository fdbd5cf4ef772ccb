"""Bound blocks against the plain blocks of every family, in float64 where a law is exact."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.surgery.attention import KEYS, give_keys
from mmcompress.surgery.merging import bind_block, bind_pool
from mmcompress.surgery.merging_step import reduce_tokens
from mmcompress.surgery.reduction import Flow, Reduction, TokenLedger, is_reduced
from tests import tiny

families = pytest.mark.parametrize("family", tiny.MERGING)
torch_modes = pytest.mark.parametrize("training", [False, True])


def plain_blocks(family: str) -> tuple[Bundle, list[nn.Module]]:
    bundle = tiny.bundle(family)
    bundle.model.double()
    return bundle, [bundle.module(block.path) for block in bundle.tower("vision").blocks]


def bound_blocks(bundle: Bundle, merged: Sequence[int], **more: Any) -> tuple[list[Any], TokenLedger]:
    """Bind copies of the vision blocks; `more` overrides fields of every reduction."""
    ledger = TokenLedger()
    made = []
    for index, (block, removed) in enumerate(zip(bundle.tower("vision").blocks, merged, strict=True)):
        module = copy.deepcopy(bundle.module(block.path))
        own = Reduction(
            attend=block.attend,
            attention=block.attention.path.removeprefix(block.path + "."),
            feed=block.feed,
            merged=removed,
            first=index == 0,
            last=index == len(merged) - 1,
            ledger=ledger,
        )
        bind_block(module, replace(own, **more))
        made.append(module)
    return made, ledger


def run(blocks: Sequence[nn.Module], tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    for block in blocks:
        tokens = block(tokens, mask)
    return tokens


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def width(bundle: Bundle) -> int:
    return int(bundle.model.config.vision_config.hidden_size)


@families
@torch_modes
def test_a_block_that_merges_nothing_is_the_plain_block_bit_by_bit(family: str, training: bool) -> None:
    bundle, plain = plain_blocks(family)
    bound, _ = bound_blocks(bundle, [0, 0, 0])
    for block in (*plain, *bound):
        block.train(training)
        for child in block.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.3
    tokens = noise(2, 9, width(bundle))
    results = []
    for blocks in (plain, bound):
        torch.manual_seed(0)
        results.append(run(blocks, tokens))
    assert torch.equal(*results)


@families
def test_merging_equal_tokens_changes_nothing(family: str) -> None:
    """Pairs of equal neighbours merge; everything after that is as if they had not, also after putting them back."""
    bundle, plain = plain_blocks(family)
    tokens = noise(2, 6, width(bundle)).repeat_interleave(2, dim=1)
    expected = run(plain, tokens)
    bound, _ = bound_blocks(bundle, [6, 0, 0])
    assert run(bound, tokens).shape[1] == 6
    assert (run(bound, tokens) - expected[:, ::2]).abs().max() <= 1e-12
    restored, ledger = bound_blocks(bundle, [6, 0, 0], restore=True)
    assert (run(restored, tokens) - expected).abs().max() <= 1e-12
    assert ledger.flow is None


@families
def test_m_copies_equal_one_token_of_size_m(family: str) -> None:
    bundle, plain = plain_blocks(family)
    number = torch.tensor([1, 3, 1, 5, 2])
    tokens = noise(1, 5, width(bundle))
    expected = plain[0](tokens.repeat_interleave(number, dim=1), None)
    block = bound_blocks(bundle, [0, 0, 0])[0][0]
    got, _ = reduce_tokens(block, block.reduction, tokens, Flow(number[None].double()), False, False, {})
    first = torch.cat([torch.zeros(1, dtype=torch.long), number.cumsum(0)[:-1]])
    assert (got - expected[:, first]).abs().max() <= 1e-12
    # Without proportional attention the two differ: the test above is not vacuous.
    without = replace(block.reduction, proportional=False)
    got, _ = reduce_tokens(block, without, tokens, Flow(number[None].double()), False, False, {})
    assert (got - expected[:, first]).abs().max() > 1e-4


@families
def test_sizes_add_up_and_tokens_are_as_many_as_promised(family: str) -> None:
    bundle, _ = plain_blocks(family)
    bound, ledger = bound_blocks(bundle, [4, 3, 2], protected=1, pooled=True)
    out = run(bound, noise(3, 20, width(bundle)))
    assert out.shape[1] == 11
    assert ledger.flow is not None
    assert ledger.flow.sizes is not None
    assert ledger.flow.sizes.shape == (3, 11)
    assert ledger.flow.sizes.sum(1).tolist() == [20, 20, 20]
    assert torch.all(ledger.flow.sizes[:, 0] == 1)


def test_restoring_returns_the_tokens_each_one_went_into() -> None:
    bundle, _ = plain_blocks("clip")
    tokens = noise(2, 20, width(bundle))
    short, ledger = bound_blocks(bundle, [4, 3, 2], protected=1, pooled=True)
    left = run(short, tokens)
    assert ledger.flow is not None
    sizes = ledger.flow.sizes
    assert sizes is not None
    back = run(bound_blocks(bundle, [4, 3, 2], protected=1, restore=True)[0], tokens)
    assert back.shape == tokens.shape
    assert torch.equal(back[:, 0], left[:, 0])
    # The plain mean over the old tokens is the mean of the new ones by size.
    assert (back.mean(1) - (left * sizes[:, :, None]).sum(1) / 20).abs().max() <= 1e-12


def test_dropping_and_restoring_keeps_the_mean_of_the_kept() -> None:
    bundle, _ = plain_blocks("clip")
    tokens = noise(2, 8, width(bundle))
    kept = [(0, 1, 2, 4, 6, 7), (0, 2, 3, 5)]
    blocks, _ = bound_blocks(bundle, [0, 0, 0], protected=1)
    for index, positions in enumerate(kept):
        blocks[index].reduction = replace(blocks[index].reduction, kept=positions, tokens=8 - 2 * index)
    left = run(blocks, tokens)
    assert left.shape[1] == 4
    blocks[2].reduction = replace(blocks[2].reduction, restore=True, survivors=(0, 2, 4, 7), original=8)
    back = run(blocks, tokens)
    assert torch.equal(back[:, [0, 2, 4, 7]], left)
    assert (back[:, 1:].mean(1) - left[:, 1:].mean(1)).abs().max() <= 1e-12
    with pytest.raises(UsageError, match="made for 8 tokens, but here are 9"):
        run(blocks, noise(2, 9, width(bundle)))


@pytest.mark.parametrize("form", ["bool", "float"])
def test_padding_neither_influences_nor_is_missed(form: str) -> None:
    """With as many merges as padding can take, real tokens come out as from the plain blocks without the padding."""
    bundle, plain = plain_blocks("siglip2")
    real, total = 10, 24
    tokens = noise(2, total, width(bundle))
    expected = run(plain, tokens[:, :real])
    mask = (torch.arange(total) < real).expand(2, 1, total, total)
    if form == "float":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    # Side A holds 7 of the 14 padded tokens, then 4 of the 7 that are left, then 2 of 3.
    bound, ledger = bound_blocks(bundle, [7, 4, 2], pooled=True)
    out = run(bound, tokens, mask)
    assert ledger.padded
    assert ledger.flow is not None
    assert ledger.flow.sizes is not None
    alive = ledger.flow.sizes > 0
    assert alive.sum(1).tolist() == [real, real]
    assert torch.equal(ledger.flow.sizes[alive], torch.ones(2 * real, dtype=torch.float64))
    got = out[alive].view(2, real, -1)
    assert (got.sum(1) - expected.sum(1)).abs().max() <= 1e-12
    # What the padding holds makes no difference, bit by bit.
    other = tokens.clone()
    other[:, real:] = 1e3 * noise(2, total - real, width(bundle), seed=9)
    assert torch.equal(run(bound, other, mask)[alive], out[alive])


def test_a_batch_equals_its_samples() -> None:
    bundle, _ = plain_blocks("clip")
    bound, _ = bound_blocks(bundle, [4, 3, 2], protected=1)
    tokens = noise(5, 20, width(bundle))
    together = run(bound, tokens)
    for index in range(5):
        assert (run(bound, tokens[index : index + 1])[0] - together[index]).abs().max() <= 1e-12


def test_flash_masks_are_refused() -> None:
    bundle, _ = plain_blocks("clip")
    bound, _ = bound_blocks(bundle, [2, 0, 0])
    with pytest.raises(UsageError, match="mask of 2 dimensions"):
        run(bound, noise(2, 9, width(bundle)), torch.ones(2, 9))


def test_a_forward_that_failed_leaves_nothing_behind_for_the_next() -> None:
    bundle, _ = plain_blocks("clip")
    bound, ledger = bound_blocks(bundle, [4, 3, 2], protected=1)
    tokens = noise(2, 20, width(bundle))
    expected = run(bound, tokens)
    assert ledger.flow is None
    run(bound[:2], tokens[:1])
    assert ledger.flow is not None
    assert torch.equal(run(bound, tokens), expected)


def test_threads_and_copies_do_not_share_sizes() -> None:
    bundle, _ = plain_blocks("clip")
    bound, _ = bound_blocks(bundle, [4, 3, 2], protected=1)
    inputs = [noise(2, 20, width(bundle), seed=seed) for seed in range(2)]
    expected = [run(bound, tokens) for tokens in inputs]
    # Interleaved block by block: thread 1 runs a whole forward between two blocks of thread 0.
    half = run(bound[:1], inputs[0])
    other: list[Tensor] = []
    thread = threading.Thread(target=lambda: other.append(run(bound, inputs[1])))
    thread.start()
    thread.join()
    assert torch.equal(other[0], expected[1])
    twin = copy.deepcopy(nn.ModuleList(bound))
    assert torch.equal(run(list(twin), inputs[1]), expected[1])
    assert len({id(block.reduction.ledger) for block in twin}) == 1
    assert twin[0].reduction.ledger is not bound[0].reduction.ledger
    assert twin[0].forward.__self__ is twin[0]
    assert torch.equal(run(bound[1:], half), expected[0])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    bundle, _ = plain_blocks("clip")
    grads = []
    for checkpointing in (False, True):
        bound, _ = bound_blocks(bundle, [4, 3, 2], protected=1, restore=True)
        calls = []

        def checkpoint(function: Any, *inputs: Any, calls: list[Any] = calls) -> Any:
            calls.append(function)
            return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)

        for block in bound:
            block.train()
            block.gradient_checkpointing = checkpointing
            block._gradient_checkpointing_func = checkpoint
        tokens = noise(2, 20, width(bundle)).requires_grad_()
        run(bound, tokens).square().sum().backward()
        assert len(calls) == (3 if checkpointing else 0)
        weight = bound[0].mlp.fc1.weight
        grads.append((tokens.grad, weight.grad))
    for one, two in zip(*grads, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)
        assert one.abs().sum() > 0


def test_pooling_weighs_keys_by_size_and_hides_padding() -> None:
    torch.manual_seed(0)
    pool = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    query, tokens = noise(2, 1, 8), noise(2, 4, 8)
    number = torch.tensor([1, 3, 2, 1])
    repeated = tokens.repeat_interleave(number, dim=1)
    expected = pool(query, repeated, repeated)[0]
    ledger = TokenLedger()
    bound = copy.deepcopy(pool)
    bind_pool(bound, ledger, proportional=True)
    ledger.flow = Flow(number.double().expand(2, -1))
    stale = torch.zeros(4, 1, 4, dtype=torch.float64)
    assert (bound(query, tokens, tokens, attn_mask=stale)[0] - expected).abs().max() <= 1e-12
    assert ledger.flow is None
    ledger.flow = Flow()
    assert torch.equal(bound(query, tokens, tokens, attn_mask=stale[:, :, :2])[0], pool(query, tokens, tokens)[0])
    # Called by itself it keeps its caller's mask.
    hidden = torch.full_like(stale, -1e9).index_fill(2, torch.tensor([1]), 0.0)
    alone = tokens[:, 1:2]
    assert torch.allclose(bound(query, tokens, tokens, attn_mask=hidden)[0], pool(query, alone, alone)[0])
    # Samples with different padding, in one batch.
    ledger.padded = True
    ledger.flow = Flow(torch.tensor([[1.0, 3, 0, 0], [1, 3, 2, 1]], dtype=torch.float64))
    short = repeated[:1, :4]
    got = bound(query, tokens, tokens)[0]
    assert (got[:1] - pool(query[:1], short, short)[0]).abs().max() <= 1e-12
    assert (got[1:] - expected[1:]).abs().max() <= 1e-12
    # With no sizes it is the plain pooling.
    assert torch.equal(bound(query, tokens, tokens)[0], pool(query, tokens, tokens)[0])


def test_give_keys_changes_only_the_modules_it_was_given() -> None:
    bundle = tiny.bundle("clip")
    blocks = bundle.tower("vision").blocks
    before = bundle.model.config.to_json_string()
    first, second = (bundle.module(block.attention.path) for block in blocks[:2])
    tokens = torch.randn(2, 9, width(bundle))
    expected = first(tokens)[0]
    give_keys([first])
    output, keys = first(tokens)
    assert torch.equal(output, expected)
    heads, head_dim = blocks[0].attention.heads, blocks[0].attention.head_dim
    by_hand = bundle.module(blocks[0].attention.writers[1])(tokens).view(2, 9, heads, head_dim).mean(2)
    assert torch.allclose(keys, by_hand, atol=1e-6)
    assert second.config._attn_implementation != KEYS
    assert second(tokens)[1] is None
    assert bundle.model.config.to_json_string() == before
    assert KEYS not in before
    with pytest.raises(UsageError, match="Linear computes attention by itself"):
        give_keys([nn.Linear(2, 2)])


def test_the_class_and_the_state_dict_stay() -> None:
    bundle, plain = plain_blocks("clip")
    bound, _ = bound_blocks(bundle, [2, 0, 0])
    assert type(bound[0]) is type(plain[0])
    assert list(bound[0].state_dict()) == list(plain[0].state_dict())
    assert is_reduced(bound[0])
    assert not is_reduced(plain[0])
