"""Relevance by hand, and the laws it has to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.ops.relevance import after_attention, after_cross_attention, looked, normalised


def rows(*given: list[float]) -> Tensor:
    return torch.tensor([given], dtype=torch.float64)


OWN = torch.eye(2, dtype=torch.float64)[None]
SELF = rows([0.6, 0.4], [0.3, 0.7])


def test_two_layers_of_one_stream() -> None:
    relevance = after_attention(after_attention(OWN, SELF), SELF)
    torch.testing.assert_close(relevance, rows([2.68, 1.32], [0.99, 3.01]))
    torch.testing.assert_close(normalised(relevance), rows([1.56, 0.44], [0.33, 1.67]))


def test_a_text_that_looks_at_a_picture() -> None:
    text, picture = OWN + SELF, OWN + rows([0.5, 0.5], [0.2, 0.8])
    nothing = torch.zeros_like(OWN)
    own, known = after_cross_attention(text, picture, nothing, nothing, rows([0.9, 0.1], [0.4, 0.6]))
    torch.testing.assert_close(known, rows([2.408, 1.392], [1.772, 2.428]))
    assert torch.equal(own, text)
    # What the picture knew of the text comes back through the same map.
    own, _ = after_cross_attention(text, picture, nothing, OWN, rows([0.9, 0.1], [0.4, 0.6]))
    torch.testing.assert_close(own, rows([2.5, 0.5], [0.7, 2.3]))


def test_without_gradients_nothing_is_learned() -> None:
    weights = torch.rand(1, 3, 2, 2).softmax(dim=-1).double()
    assert torch.equal(after_attention(OWN, looked(weights, torch.zeros_like(weights))), OWN)
    assert torch.equal(normalised(OWN), OWN)


def test_only_what_raises_the_score_counts() -> None:
    weights = torch.full((1, 2, 2, 2), 0.5)
    gradients = torch.tensor([[[[2.0, -2.0], [0.0, 4.0]], [[0.0, -1.0], [2.0, 0.0]]]])
    torch.testing.assert_close(looked(weights, gradients), torch.tensor([[[0.5, 0.0], [0.5, 1.0]]]))


def test_what_nobody_looks_at_is_not_relevant() -> None:
    weights = torch.tensor([[[[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]]]])
    relevance = after_attention(torch.eye(3)[None], looked(weights, torch.ones_like(weights)))
    assert relevance[0, :2, 2].tolist() == [0.0, 0.0]


def test_even_attention_makes_even_rows() -> None:
    attended = looked(torch.full((1, 4, 5, 5), 0.2), torch.ones(1, 4, 5, 5))
    learned = after_attention(torch.eye(5)[None], attended) - torch.eye(5)
    torch.testing.assert_close(learned, learned[..., :1].expand_as(learned))
