"""A cache of keys and values that holds integers: what is in it, and everything transformers does with one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, Gemma2Model, LlamaConfig, LlamaModel, StaticCache

from mmcompress.errors import UsageError
from mmcompress.surgery.cache_lengths import CACHE
from mmcompress.surgery.rounded_cache import RoundedLayer, codes_unrounded, round_cache, rounds_cache

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
}


def states(count: int, seed: int = 0) -> Tensor:
    """(2, 3, count, 4)"""
    return torch.randn(2, 3, count, 4, generator=torch.Generator().manual_seed(seed))


def model(rounded: bool = True) -> LlamaModel:
    torch.manual_seed(0)
    made = LlamaModel(LlamaConfig(**SIZES)).eval()
    if rounded:
        round_cache(layer.self_attn for layer in made.layers)
    return made


def run(made: LlamaModel, ids: Tensor, cache: DynamicCache | None = None, **more: bool) -> Tensor:
    with torch.no_grad():
        found: Tensor = made(ids, **{CACHE: cache}, **more).last_hidden_state
    return found


IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))


def test_what_is_kept_by_hand() -> None:
    layer = RoundedLayer()
    keys = torch.tensor([254.0, 5.0, -3.1, 0.0]).reshape(1, 1, 1, 4)
    values = torch.tensor([0.126, -1.27, 0.0, 0.635]).reshape(1, 1, 1, 4)
    made = layer.update(keys, values)
    assert layer.keys.dtype == layer.values.dtype == torch.int8
    assert layer.keys.flatten().tolist() == [127, 2, -2, 0]
    assert layer.values.flatten().tolist() == [13, -127, 0, 64]  # 63.5 steps go to the even number
    assert (layer.key_scale.item(), layer.value_scale.item()) == pytest.approx((2.0, 0.01))
    assert made[0].flatten().tolist() == [254.0, 4.0, -4.0, 0.0]
    assert made[1].flatten().tolist() == pytest.approx([0.13, -1.27, 0.0, 0.64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_token_after_token_is_all_at_once(dtype: torch.dtype) -> None:
    keys, values = (states(7, seed).to(dtype) for seed in (1, 2))
    once, slowly = RoundedLayer(), RoundedLayer()
    want = once.update(keys, values)
    for place in range(7):
        made = slowly.update(keys[..., place : place + 1, :], values[..., place : place + 1, :])
    for one, other in zip(want, made, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)
    assert slowly.get_seq_length() == 7
    assert [getattr(slowly, name).dtype for name in slowly.held_names] == [torch.int8, dtype] * 2


def test_it_is_handled_as_any_layer_is() -> None:
    """Cut, copied, its rows chosen, repeated, put in another order, moved and forgotten, codes and scales alike."""
    layer = RoundedLayer()
    keys, values = layer.update(states(5, 1), states(5, 2))
    rows = torch.tensor([1, 0])

    def stands_for(changed: RoundedLayer, one: Tensor, other: Tensor) -> None:
        assert torch.equal(changed.keys * changed.key_scale, one)
        assert torch.equal(changed.values * changed.value_scale, other)

    twin = copy.deepcopy(layer)
    twin.crop(-2)
    assert twin.get_seq_length() == 3
    stands_for(twin, keys[:, :, :3], values[:, :, :3])
    twin = copy.deepcopy(layer)
    twin.reorder_cache(rows)
    stands_for(twin, keys[rows], values[rows])
    twin.batch_repeat_interleave(3)
    stands_for(twin, keys[rows].repeat_interleave(3, dim=0), values[rows].repeat_interleave(3, dim=0))
    twin.batch_select_indices(torch.tensor([4]))
    stands_for(twin, keys[rows][1:], values[rows][1:])
    twin.offload()
    twin.prefetch()
    stands_for(twin, keys[rows][1:], values[rows][1:])
    twin.reset()
    assert twin.get_seq_length() == 0
    assert twin.key_scale is None
    stands_for(layer, keys, values)


def test_with_a_cache_as_without() -> None:
    made = model()
    want = run(made, IDS, use_cache=False)
    assert not torch.equal(want, run(model(rounded=False), IDS, use_cache=False))
    for cache in (DynamicCache(), DynamicCache(config=made.config)):
        parts = [run(made, IDS[:, :6], cache, use_cache=True)]
        parts += [run(made, IDS[:, place : place + 1], cache, use_cache=True) for place in (6, 7, 8)]
        torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-5, rtol=1e-4)
        assert [type(layer) for layer in cache.layers] == [RoundedLayer] * 2
        assert cache.get_seq_length() == 9
        assert {layer.keys.dtype for layer in cache.layers} == {torch.int8}


def test_blocks_that_see_a_window_see_no_further() -> None:
    torch.manual_seed(0)
    made = Gemma2Model(
        Gemma2Config(
            **{**SIZES, "head_dim": 8, "sliding_window": 3}, layer_types=["full_attention", "sliding_attention"]
        )
    ).eval()
    round_cache(layer.self_attn for layer in made.layers)
    want, cache = run(made, IDS, use_cache=False), DynamicCache(config=made.config)
    assert cache.is_sliding == [False, True]
    parts = [run(made, IDS[:, :5], cache, use_cache=True)]
    parts += [run(made, IDS[:, place : place + 1], cache, use_cache=True) for place in range(5, 9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-5, rtol=1e-4)
    made.layers[1].self_attn.sliding_window = None
    made.config.layer_types = ["full_attention"] * 2
    assert not torch.allclose(run(made, IDS, use_cache=False), want, atol=1e-3)


def test_every_token_looks_at_rounded_keys_itself_included() -> None:
    """The first token sees itself alone: its attention is what its rounded values say."""
    made = model()
    attention = made.layers[0].self_attn
    given: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    values: list[Tensor] = []
    attention.v_proj.register_forward_hook(lambda _, __, said: values.append(said))
    run(made, IDS[:, :1], use_cache=False)
    rounded = RoundedLayer().update(*[values[0].unflatten(-1, (2, 8)).transpose(1, 2)] * 2)[1]
    assert not torch.equal(rounded.transpose(1, 2).flatten(2), values[0])
    torch.testing.assert_close(given[0], rounded.repeat_interleave(2, dim=1).transpose(1, 2).flatten(2))


def test_gradients_pass_straight_through() -> None:
    layer = RoundedLayer()
    layer.update(states(2, 1), states(2, 2))
    keys, values = states(3, 4).requires_grad_(), states(3, 5).requires_grad_()
    made = layer.update(keys, values)
    (made[0].sum() + 2 * made[1].sum()).backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))  # type: ignore[arg-type]
    assert torch.equal(values.grad, torch.full_like(values, 2))  # type: ignore[arg-type]
    assert not layer.key_scale.requires_grad
    again = RoundedLayer()
    again.update(states(2, 1), states(2, 2))
    assert torch.equal(again.update(states(3, 4), states(3, 5))[0], made[0])


def test_a_copy_rounds_and_the_original_is_left_alone() -> None:
    plain = model(rounded=False)
    twin = copy.deepcopy(plain)
    round_cache(layer.self_attn for layer in twin.layers)
    assert torch.equal(run(copy.deepcopy(twin), IDS), run(twin, IDS))
    assert torch.equal(run(plain, IDS), run(model(rounded=False), IDS))
    assert all(rounds_cache(layer.self_attn) for layer in copy.deepcopy(twin).layers)
    assert not any(rounds_cache(layer.self_attn) for layer in plain.layers)


def test_unrounded_it_is_the_plain_model() -> None:
    with codes_unrounded():
        torch.testing.assert_close(run(model(), IDS), run(model(rounded=False), IDS), atol=1e-5, rtol=1e-4)


def test_other_caches_are_refused() -> None:
    made, floats = model(), DynamicCache()
    run(model(rounded=False), IDS, floats)
    with pytest.raises(UsageError, match="holds floats of 9 tokens"):
        run(made, IDS[:, :1], floats)
    with pytest.raises(UsageError, match="a cache of StaticLayer"):
        run(made, IDS, StaticCache(config=made.config, max_cache_len=20))
