"""What counts blocks beside the weights: lists of types, of windows, places in the stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmcompress import passes
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.prune_cut import renumbered
from tests import tiny


@pytest.mark.parametrize(
    ("value", "numbering", "kept", "depth", "want"),
    [
        (["full", "sliding", "full", "sliding"], "each", [0, 3], 4, ["full", "sliding"]),
        ([7, 15, 23, 31], "block", [0, 7, 8, 23, 31], 32, [1, 3, 4]),
        ([1], "block", [0, 2], 3, []),
        # hidden states: 0 is before the first block, 24 after the last of 24
        (24, "after", list(range(0, 24, 2)), 24, 12),
        (3, "after", [0, 2, 3], 5, 2),
        (0, "after", [4], 5, 0),
        # -1 is behind the last block, -2 before it: the state that LLaVA reads
        (-1, "after", [0, 1], 3, -1),
        (-2, "after", [0, 2], 3, -2),
        (-2, "after", [0, 1], 3, -1),
        (-3, "after", [0, 2], 4, -2),
        ([-2, -1, 2], "after", [1, 3], 4, [-2, -1, 1]),
    ],
)
def test_by_hand(value: Any, numbering: Any, kept: list[int], depth: int, want: Any) -> None:
    assert renumbered(value, numbering, kept, depth) == want


def drop(bundle: Bundle, **kept: str) -> None:
    passes.build("prune", {"units": ["blocks"]}).apply(
        bundle, Plan({"kept": {"heads": {}, "neurons": {}, "blocks": kept}})
    )


def test_a_block_that_llava_never_reads_goes_without_a_trace() -> None:
    bundle = tiny.bundle("llava_clip")  # reads the state before its last vision block
    assert bundle.model.config.vision_feature_layer == -2
    inputs = bundle.example_inputs("vision", 2)
    with torch.no_grad():
        before = bundle.encode("vision", inputs)
        drop(bundle, vision="0-1")
        after = bundle.encode("vision", inputs)
    assert bundle.model.config.vision_feature_layer == -1
    assert torch.equal(before, after)


def test_such_a_block_goes_first() -> None:
    bundle = tiny.bundle("llava_clip")
    made = passes.build("prune", {"units": ["blocks"], "score": "taylor", "ratios": {"vision": 0.2}, "ratio": 0.0})
    plan = made.plan(bundle, Context(data=tiny.data("llava_clip", 8), num_samples=8))
    assert plan.decisions["kept"]["blocks"] == {"vision": "0-1"}


def test_full_attention_stays_with_its_block() -> None:
    bundle = tiny.bundle("qwen2_5_vl")  # windows in blocks 0 and 2, not in 1
    drop(bundle, vision="1-2")
    assert bundle.model.model.visual.fullatt_block_indexes == [0]
    assert bundle.model.config.vision_config.fullatt_block_indexes == [0]
    drop(bundle, vision="1")
    assert bundle.model.model.visual.fullatt_block_indexes == []


def test_layer_types_follow_and_the_cache_is_counted_anew() -> None:
    bundle = tiny.bundle("llava_next")
    config = bundle.model.config.text_config
    config.layer_types = ["full_attention", "full_attention", "full_attention"]
    drop(bundle, language="0,2")
    assert config.layer_types == ["full_attention", "full_attention"]
    assert config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in bundle.model.model.language_model.layers] == [0, 1]
    answers = bundle.generate(list(tiny.data("llava_next", 4)))
    bundle.model.generation_config.use_cache = False
    assert bundle.generate(list(tiny.data("llava_next", 4))) == answers


def test_a_block_that_deepstack_reads_stays() -> None:
    bundle = tiny.bundle("qwen3_vl")
    assert bundle.tower("vision").needed == (0,)
    made = passes.build("prune", {"units": ["blocks"], "score": "random", "towers": ["vision"], "ratio": 0.2})
    for seed in range(4):
        kept = made.plan(bundle, Context(seed=seed)).decisions["kept"]["blocks"]["vision"]
        assert kept.startswith("0"), kept
    with pytest.raises(UsageError, match="2 vision blocks"):
        passes.build("prune", {"units": ["blocks"], "score": "random", "towers": ["vision"], "ratio": 0.9}).plan(
            bundle, Context()
        )


def test_query_heads_leave_with_their_keys() -> None:
    bundle = tiny.bundle("llava_clip")  # 4 query heads of width 8 over 2 key-value heads
    passes.build("prune", {}).apply(bundle, Plan({"kept": {"heads": {"language.0": "1"}, "neurons": {}, "blocks": {}}}))
    attention = bundle.model.model.language_model.layers[0].self_attn
    original = tiny.bundle("llava_clip").model.model.language_model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, original.q_proj.weight[16:])
    assert torch.equal(attention.k_proj.weight, original.k_proj.weight[8:])
    assert torch.equal(attention.v_proj.weight, original.v_proj.weight[8:])
    assert torch.equal(attention.o_proj.weight, original.o_proj.weight[:, 16:])


def test_fused_projections_lose_the_rows_of_all_three() -> None:
    bundle = tiny.bundle("qwen2_vl")  # 4 heads of width 8: rows 0-31 queries, 32-63 keys, 64-95 values
    passes.build("prune", {}).apply(bundle, Plan({"kept": {"heads": {"vision.0": "0,3"}, "neurons": {}, "blocks": {}}}))
    attention, original = (b.model.model.visual.blocks[0].attn for b in (bundle, tiny.bundle("qwen2_vl")))
    rows = [*range(8), *range(24, 40), *range(56, 72), *range(88, 96)]
    assert torch.equal(attention.qkv.weight, original.qkv.weight[rows])
    assert torch.equal(attention.qkv.bias, original.qkv.bias[rows])
    assert torch.equal(attention.proj.weight, original.proj.weight[:, [*range(8), *range(24, 32)]])
    assert attention.num_heads == 2
