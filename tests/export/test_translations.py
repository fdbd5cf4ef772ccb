"""Attention written as four plain operators equals torch's, with every kind of mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mmcompress.export.running import open_graph
from mmcompress.export.trace import quiet
from mmcompress.export.translations import translations


class EveryAttention(nn.Module):
    """Queries (B, 4, N, 6) against keys of 4 and of 2 heads."""

    def forward(self, query: Tensor, grouped: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
        return torch.stack(
            [
                scaled_dot_product_attention(query, query, query),
                scaled_dot_product_attention(query, query, query, is_causal=True),
                scaled_dot_product_attention(query, query, query, attn_mask=shown),
                scaled_dot_product_attention(query, query, query, attn_mask=bias, scale=0.3),
                scaled_dot_product_attention(query, grouped, grouped, enable_gqa=True),
            ]
        )


@pytest.fixture(scope="module")
def program():
    batch, tokens = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    heads = {0: batch, 2: tokens}
    with quiet():
        exported = torch.export.export(
            EveryAttention(),
            example(2, 5),
            dynamic_shapes=(heads, heads, {0: batch, 2: tokens, 3: tokens}, {2: tokens, 3: tokens}),
        )
        made = torch.onnx.export(
            exported, dynamo=True, opset_version=20, custom_translation_table=translations(), verbose=False
        )
    assert made is not None
    return made.model_proto


def example(batch: int, tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 4, tokens, 6, generator=generator)
    grouped = torch.randn(batch, 2, tokens, 6, generator=generator)
    shown = torch.rand(batch, 1, tokens, tokens, generator=generator) > 0.5
    shown[..., 0] = True
    return query, grouped, shown, torch.randn(1, 1, tokens, tokens, generator=generator)


@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (1, 9)])
def test_attention(program, batch, tokens):
    inputs = example(batch, tokens)
    run, _ = open_graph(program)
    names = [value.name for value in program.graph.input]
    (got,) = run(dict(zip(names, inputs, strict=True)))
    np.testing.assert_allclose(got, EveryAttention()(*inputs).numpy(), atol=1e-5)


def test_it_is_written_in_the_form_runtimes_fuse(program):
    operators = [node.op_type for node in program.graph.node]
    assert operators.count("Softmax") == 5
    # Four of the five share the product of queries and keys.
    assert operators.count("MatMul") == 2 + 5
    assert not {"IsNaN", "Sqrt"} & set(operators)
