import pytest
import torch

from mmcompress.errors import UsageError
from mmcompress.ops.selection import random_selection, restoring


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("protected", [0, 1, 3])
def test_keeps_the_protected_ones_and_the_order(protected: int) -> None:
    kept = random_selection(20, 6, protected, generator())
    assert len(kept) == 14
    assert kept[:protected].tolist() == list(range(protected))
    assert torch.equal(kept, kept.unique())


def test_same_seed_same_choice_and_every_position_can_go() -> None:
    assert torch.equal(random_selection(20, 6, 1, generator(3)), random_selection(20, 6, 1, generator(3)))
    seen = torch.zeros(20)
    for seed in range(200):
        seen[random_selection(20, 6, 1, generator(seed))] += 1
    # Each unprotected position stays with probability 13/19; 200 draws have a standard deviation of 6.6.
    assert seen[0] == 200
    assert torch.all((seen[1:] - 200 * 13 / 19).abs() < 30)


def test_dropping_more_than_merging_could_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot drop 10 of 20 tokens with 1 protected; the limit is 9"):
        random_selection(20, 10, 1, generator())


def test_restoring_puts_tokens_back_and_keeps_the_mean() -> None:
    kept = torch.tensor([0, 2, 3, 6])
    tokens = torch.tensor([[[5.0], [1.0], [2.0], [6.0]]])
    back = restoring(kept, 7, 1, torch.ones(1, 4)) @ tokens
    # Position 0 is protected and stays out of the mean (1 + 2 + 6) / 3 = 3 of the others.
    assert back.flatten().tolist() == pytest.approx([5, 3, 1, 2, 3, 3, 6])
    assert back[0, 1:].mean().item() == pytest.approx(3)
    padded = restoring(kept, 7, 1, torch.tensor([[1.0, 1.0, 1.0, 0.0]])) @ tokens
    assert padded.flatten().tolist() == pytest.approx([5, 1.5, 1, 2, 1.5, 1.5, 6])
