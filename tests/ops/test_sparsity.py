"""Sparsity: golden values by hand, exact counts, and what each score is good for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmcompress.ops.gptq import compensation, gptq, output_error
from mmcompress.ops.grouped import nearest_grid
from mmcompress.ops.importance import wanda
from mmcompress.ops.sparsity import Pattern, sparsegpt

HALF = Pattern(0.5)
TWO_FOUR = Pattern.grouped(2, 4)
PATTERNS = pytest.mark.parametrize(
    "pattern", [HALF, Pattern(0.3), Pattern(0.9), TWO_FOUR, Pattern.grouped(4, 8), Pattern.grouped(1, 3)], ids=str
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, seed: int = 1) -> Tensor:
    """The second moment of inputs of few directions and very different sizes."""
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    inputs = (random(4096, columns // 4, seed=seed) @ random(columns // 4, columns, seed=seed + 1)) * sizes
    inputs += random(4096, columns, seed=seed + 2) * sizes / 2
    return inputs.T @ inputs / len(inputs)


def fitted(
    weight: Tensor, moment: Tensor, pattern: Pattern, scores: Tensor | None = None, damping: float = 0.01
) -> Tensor:
    how = compensation(moment, damping, torch.arange(len(moment)))
    return sparsegpt(weight, how, moment.diagonal() <= 0, pattern, scores)


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[0.5, -0.2, 0.1, 0.4], [-0.3, 0.6, -0.1, 0.2]])
    scores = wanda(weight, torch.tensor([1.0, 3.0, 10.0, 0.5]))
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.6, 1.0, 0.2], [0.3, 1.8, 1.0, 0.1]]))
    assert HALF.lowest(scores).tolist() == [[True, False, False, True]] * 2


def test_sparsegpt_by_hand() -> None:
    """H = [[2, 1], [1, 2]]: U = [[sqrt(2/3), -1/sqrt(6)], [0, 1/sqrt(2)]], so w = (1, 2) scores 1 / (2/3) and 4 / (1/2).

    The first goes, and takes the second to 2 + 1/2: the output changes by (1, -1/2) H (1, -1/2)' = 1.5, its score.
    """
    moment, weight = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 2.0]])
    factor = compensation(moment, 0.0, torch.arange(2)).factor
    torch.testing.assert_close((weight / factor.diagonal()).square(), torch.tensor([[1.5, 8.0]]))
    made = fitted(weight, moment, HALF, damping=0.0)
    torch.testing.assert_close(made, torch.tensor([[0.0, 2.5]]))
    assert output_error(weight, made, moment).item() == pytest.approx(1.5)


@PATTERNS
@pytest.mark.parametrize("columns", [24, 264])
def test_every_row_has_its_zeros_and_every_group(pattern: Pattern, columns: int) -> None:
    """264 columns are two blocks of 128 and one of 8, of groups of 3 two of 126 and one of 12."""
    weight, moment = random(5, columns), correlated(columns)
    want = pattern.zeros(columns)
    assert want == (
        columns // pattern.of * (pattern.of - pattern.kept) if pattern.of else round(pattern.sparsity * columns)
    )
    for made in (weight.masked_fill(pattern.lowest(weight.abs()), 0), fitted(weight, moment, pattern)):
        assert (made == 0).sum(1).tolist() == [want] * 5
        assert pattern.holds(made)
        if pattern.of:
            assert ((made.view(5, -1, pattern.of) != 0).sum(-1) == pattern.kept).all()
    assert not pattern.holds(weight)


def test_one_zero_too_few_is_seen() -> None:
    half, groups = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    assert HALF.holds(half)
    assert TWO_FOUR.holds(half)
    assert HALF.holds(groups)
    assert not TWO_FOUR.holds(groups)
    half[1, 0] = 1
    assert not HALF.holds(half)
    assert not TWO_FOUR.holds(half)


@pytest.mark.parametrize("pattern", [HALF, Pattern(0.7), TWO_FOUR], ids=["half", "70%", "2:4"])
@pytest.mark.parametrize("seed", range(3))
def test_what_looks_at_more_loses_less(pattern: Pattern, seed: int) -> None:
    weight, moment = random(32, 192, seed=seed), correlated(192, seed=seed + 3)
    norms = moment.diagonal().sqrt()
    chosen = {"random": torch.rand(weight.shape), "magnitude": weight.abs(), "wanda": wanda(weight, norms)}
    found = {name: weight.masked_fill(pattern.lowest(scores), 0) for name, scores in chosen.items()}
    found["random, updated"] = fitted(weight, moment, pattern, chosen["random"])
    found["sparsegpt"] = fitted(weight, moment, pattern)
    lost = {name: output_error(weight, made, moment).sum().item() for name, made in found.items()}
    assert lost["sparsegpt"] < 0.6 * lost["wanda"]
    assert lost["wanda"] < 0.7 * lost["magnitude"] < lost["random"]
    assert lost["sparsegpt"] < lost["random, updated"] < lost["random"]


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_inputs_that_have_nothing_to_do_with_each_other_give_magnitude(pattern: Pattern) -> None:
    weight, moment = random(8, 128), 3.0 * torch.eye(128)
    plain = weight.masked_fill(pattern.lowest(weight.abs()), 0)
    assert torch.equal(fitted(weight, moment, pattern), plain)
    assert torch.equal(pattern.lowest(wanda(weight, moment.diagonal().sqrt())), plain == 0)


def test_groups_give_magnitude_over_several_blocks_too() -> None:
    weight = random(8, 300)
    assert torch.equal(fitted(weight, torch.eye(300), TWO_FOUR), weight.masked_fill(TWO_FOUR.lowest(weight.abs()), 0))


def test_columns_that_are_never_seen_go_first_and_count() -> None:
    weight, moment = random(6, 64).abs() + 1, correlated(64)
    moment[:, ::4] = moment[::4] = 0
    made = fitted(weight, moment, HALF)
    assert not made[:, ::4].any()
    assert ((made == 0).sum(1) == 32).all()
    assert made.isfinite().all()
    moment[:, 1::2] = moment[1::2] = 0  # three quarters are silent, half of the weights go
    assert ((fitted(weight, moment, HALF) == 0).sum(1) == 32).all()


def test_nothing_that_is_asked_for_changes_nothing() -> None:
    weight = random(6, 64)
    assert torch.equal(fitted(weight, correlated(64), Pattern(0.0)), weight)


def test_equal_scores_go_from_the_left_so_that_zeros_are_exact() -> None:
    assert HALF.lowest(torch.ones(1, 6)).tolist() == [[True] * 3 + [False] * 3]
    assert TWO_FOUR.lowest(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]


def test_gptq_leaves_zeros_zero() -> None:
    """What it makes up for would fill them otherwise."""
    weight = random(16, 128)
    made = fitted(weight, correlated(128), HALF)
    rounded = gptq(made, compensation(correlated(128)), *nearest_grid(made, 32)).dequantized()
    assert not rounded[made == 0].any()
    assert (
        output_error(made, rounded, correlated(128)).sum()
        < output_error(made, torch.zeros_like(made), correlated(128)).sum()
    )
