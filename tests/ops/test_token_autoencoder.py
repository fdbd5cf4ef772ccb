"""The maths of learning which tokens to keep: golden values by hand, and the gradients that make it learn."""

from __future__ import annotations

import pytest
import torch

from mmcompress.ops import token_autoencoder as maths


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_normalised_pictures_have_a_mean_square_of_one_each() -> None:
    pictures = noise(3, 5, 4) * torch.tensor([0.1, 1.0, 1e4])[:, None, None]
    squares = maths.normalised(pictures.half()).square().mean(dim=(1, 2))
    torch.testing.assert_close(squares, torch.ones(3), rtol=1e-3, atol=1e-3)
    assert torch.equal(maths.normalised(torch.zeros(1, 5, 4)), torch.zeros(1, 5, 4))


def test_noise_is_logistic() -> None:
    drawn = maths.logistic_noise((200, 200), torch.Generator().manual_seed(0))
    assert drawn.mean().abs() < 0.02
    assert drawn.var() == pytest.approx(torch.pi**2 / 3, rel=0.02)
    # So a logit of log 3 is kept three times in four.
    assert (drawn + torch.tensor(3.0).log() > 0).float().mean() == pytest.approx(0.75, abs=0.01)


def test_a_mask_is_hard_and_its_gradient_soft() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.5]], requires_grad=True)
    shift = torch.tensor([[0.0, 0.0, -1.0]])
    mask = maths.drawn_mask(logits, shift, temperature=2.0)
    assert mask.tolist() == [[1.0, 0.0, 0.0]]
    mask.sum().backward()
    soft = ((logits.detach() + shift) / 2).sigmoid()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 2)


def test_the_loss_by_hand() -> None:
    features = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]])
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    given = maths.masked(features, mask, torch.tensor([0.5, 0.0]))
    assert given.tolist() == [[[1.0, 1.0], [0.5, 0.0], [0.5, 0.0], [0.5, 0.0]]]
    # Wrong by .5 1, 1.5 1, .5 1 in three of four places: 5.75 / 8.
    wrong = (5.75 / 8) ** 0.5
    assert maths.reconstruction_error(given, features).item() == pytest.approx(wrong, abs=1e-5)
    assert maths.autoencoding_loss(given, features, mask, floor=0.1).item() == pytest.approx(wrong + 0.25, abs=1e-5)
    assert maths.autoencoding_loss(given, features, mask, floor=0.5).item() == pytest.approx(wrong + 0.5, abs=1e-5)


def test_each_picture_has_a_share_of_its_own() -> None:
    """A picture that keeps all does not pay for one that keeps none."""
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert maths.share_above(mask, 0.5).tolist() == [1.0, 0.5]


def test_only_what_is_above_the_floor_is_asked_to_become_fewer() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    maths.share_above(mask, 0.3).sum().backward()
    assert mask.grad is not None
    assert mask.grad.tolist() == [[0.25] * 4, [0.0] * 4]


def test_a_floor_of_one_is_constant() -> None:
    mask = (noise(3, 8) > 0).float().requires_grad_()
    share = maths.share_above(mask, 1.0)
    assert share.tolist() == [1.0] * 3
    share.sum().backward()
    assert not mask.grad.any()  # type: ignore[union-attr]


def test_the_shared_vector_gets_a_gradient_of_dropped_tokens_only() -> None:
    features, mask = noise(2, 6, 4), torch.tensor([[1.0] * 6, [1.0, 0.0] * 3])
    for picture, some in ((0, False), (1, True)):
        shared = torch.zeros(4, requires_grad=True)
        given = maths.masked(features[[picture]], mask[[picture]], shared)
        maths.autoencoding_loss(given, features[[picture]], mask[[picture]], 0.5).backward()
        assert shared.grad is not None
        assert bool(shared.grad.any()) == some


def test_what_is_right_has_an_error_and_a_gradient_of_nothing() -> None:
    features = noise(2, 6, 4)
    made = features.clone().requires_grad_()
    error = maths.reconstruction_error(made, features)
    error.sum().backward()
    assert error.max() < 2e-3
    assert not made.grad.any()  # type: ignore[union-attr]
