"""What attentions give evidence of, by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mmcompress.export.trace import quiet
from mmcompress.measure.run_openvino import load
from mmcompress.ops.masks import causal_mask
from mmcompress.surgery.attention import Looked, scores_by_some

HEADS, KEY_HEADS, TOKENS, WIDTH = 16, 4, 6, 8


class Asked(nn.Module):
    """An attention of many heads that says what some of its queries look at."""

    def forward(self, query: Tensor, key: Tensor, tokens: Tensor, asking: Tensor) -> Tensor:
        looked = Looked(query, key, causal_mask(0, tokens.shape[1], tokens.dtype, tokens[..., 0] < 9), 0.3, asking)
        return scores_by_some(looked)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    asking = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    return (
        torch.randn(2, HEADS, TOKENS, WIDTH),
        torch.randn(2, KEY_HEADS, TOKENS, WIDTH),
        torch.randn(2, TOKENS, WIDTH),
        asking,
    )


def test_scores_of_some_queries_are_their_rows_of_the_attention() -> None:
    query, key, _, asking = inputs()
    seen = torch.ones(TOKENS, TOKENS).tril().bool()
    logits = query @ key.repeat_interleave(HEADS // KEY_HEADS, dim=1).mT * 0.3
    weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1).mean(dim=1)
    expected = (asking[:, :, None] * weights).sum(dim=1)
    torch.testing.assert_close(Asked()(*inputs()), expected)


def test_openvino_computes_the_scores_of_many_heads(tmp_path: Path) -> None:
    """Added up head by head, 2026.4 makes one kernel of them all and has too few registers for it."""
    names, dynamic = ("query", "key", "tokens", "asking"), torch.export.Dim.DYNAMIC
    axes = tuple({0: dynamic, axis: dynamic} for axis in (2, 2, 1, 1))
    with quiet():
        program = torch.export.export(Asked().eval(), inputs(), dynamic_shapes=axes, strict=False)
        exported = torch.onnx.export(program, dynamo=True, input_names=names, verbose=False)
    assert exported is not None
    exported.save(tmp_path / "asked.onnx")
    runner = load(tmp_path / "asked.onnx", 1, "cpu", "fp32")
    (found,) = runner.run(dict(zip(names, (tensor.numpy() for tensor in inputs()), strict=True))).values()
    torch.testing.assert_close(torch.from_numpy(found), Asked()(*inputs()))
