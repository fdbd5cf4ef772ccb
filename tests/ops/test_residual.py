"""The maths of a narrower stream, by hand and by its normal equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmcompress.ops import residual

HALF = math.sqrt(0.5)


def tokens(count: int, channels: int, seed: int = 0) -> Tensor:
    """Return normalised states (T, C), float64, of unlike channels."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, channels, generator=generator, dtype=torch.float64)
    states = (
        states
        * torch.linspace(0.2, 3, channels)
        @ torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64)).Q
    )
    return states / states.square().mean(-1, keepdim=True).sqrt()


def test_two_channels_by_hand() -> None:
    """S = [[5, 3], [3, 5]]: eigenvalues 8 and 2, the larger one's direction (1, 1) / sqrt 2."""
    second = torch.tensor([[5.0, 3], [3, 5]])
    basis = residual.leading(second, 1)
    torch.testing.assert_close(basis, torch.tensor([[HALF], [HALF]], dtype=torch.float64))
    assert residual.kept_energy(second, basis) == pytest.approx(0.8)
    # Of a mean square of 5 a channel, one channel has 8 left: 8 / 5 = 0.8 * 2 / 1.
    assert residual.norm_scale(second, basis) == pytest.approx(math.sqrt(1.6))
    # Rows (3, 1) and (1, -1) of a table lie 4 and 0 far along it.
    rows = residual.written(torch.tensor([[3.0, 1], [1, -1]]), basis)
    torch.testing.assert_close(rows, torch.tensor([[4 * HALF], [0]]))
    # What reads (2 x, 0 y) through gains (1, 5) reads the mean of both: S Q = 8 Q, so that the fit is W Q.
    made = residual.reader(torch.tensor([[2.0, 0]]), torch.tensor([1.0, 5]), second, basis)
    torch.testing.assert_close(made, torch.tensor([[2 * HALF]], dtype=torch.float64))


def test_channels_by_hand() -> None:
    """Of S = [[4, 2], [2, 1]] the first channel stays, which tells the second: y = x / 2."""
    second = torch.tensor([[4.0, 2], [2, 1]])
    basis = residual.largest_channels(second, 1)
    assert basis.tolist() == [[1], [0]]
    made = residual.reader(torch.tensor([[1.0, 6]]), torch.tensor([1.0, 0.5]), second, basis)
    torch.testing.assert_close(made, torch.tensor([[1 + 6 * 0.5 * 0.5]], dtype=torch.float64))
    # In their own order, whichever is larger.
    assert residual.largest_channels(torch.diag(torch.tensor([1.0, 3, 2])), 2).T.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_readers_are_the_least_squares_fit() -> None:
    states = tokens(200, 12)
    second = states.T @ states / len(states)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    gain = torch.randn(12, generator=generator, dtype=torch.float64)
    for basis in (residual.largest_channels(second, 8), residual.random_directions(12, 8, generator)):
        made = residual.reader(weight, gain, second, basis)
        seen, wanted = states @ basis, states @ (weight * gain).T
        error = wanted - seen @ made.T
        # No error is left that lies along what is read; turning the weight alone, as SliceGPT does, leaves more.
        assert float((error.T @ seen).abs().max()) < 1e-6 * float((wanted.T @ seen).abs().max())
        assert error.square().sum() < (wanted - seen @ (weight * gain @ basis).T).square().sum()


def test_at_full_width_nothing_is_lost() -> None:
    states = tokens(200, 6)
    second = states.T @ states / len(states)
    generator = torch.Generator().manual_seed(2)
    basis = residual.random_directions(6, 6, generator)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    assert residual.norm_scale(second, basis) == pytest.approx(1)
    table, gain = torch.randn(9, 6, generator=generator, dtype=torch.float64), torch.linspace(-1, 2, 6)
    made = residual.reader(table, gain, second, basis)
    torch.testing.assert_close(made, table * gain @ basis, rtol=1e-6, atol=1e-8)
    # The table itself with a product before it: Q' diag(g) Q.
    mix = residual.mixing(table @ basis, made)
    torch.testing.assert_close(mix, basis.T @ torch.diag(gain.double()) @ basis, rtol=1e-6, atol=1e-7)


def test_the_principal_directions_keep_most() -> None:
    states = tokens(300, 16)
    second = states.T @ states / len(states)
    generator = torch.Generator().manual_seed(3)
    kept = residual.kept_energy(second, residual.leading(second, 8))
    # The energy that is kept is that of the projected tokens.
    projected = states @ residual.leading(second, 8)
    assert kept == pytest.approx(float(projected.square().sum() / states.square().sum()))
    others = [residual.random_directions(16, 8, generator) for _ in range(5)]
    assert all(residual.kept_energy(second, basis) < kept for basis in [*others, residual.largest_channels(second, 8)])


def test_random_directions_have_no_preference() -> None:
    """On average each entry of Q Q' is that of the identity, K / C of it."""
    generator = torch.Generator().manual_seed(4)
    drawn = [residual.random_directions(4, 2, generator) for _ in range(4000)]
    mean = torch.stack([basis @ basis.T for basis in drawn]).mean(0)
    torch.testing.assert_close(mean, torch.eye(4, dtype=torch.float64) / 2, rtol=0, atol=0.02)
    entries = torch.stack(drawn).mean(0)  # nor has any entry a sign of its own
    assert float(entries.abs().max()) < 0.05


def test_directions_without_a_mean_by_hand() -> None:
    """Of three channels: (1, -1, 0) / sqrt 2 and (1, 1, -2) / sqrt 6."""
    found = residual.without_mean(3)
    wanted = torch.tensor([[HALF, -HALF, 0], [6**-0.5, 6**-0.5, -2 * 6**-0.5]], dtype=torch.float64).T
    torch.testing.assert_close(found, wanted)
    for channels in (2, 17):
        found = residual.without_mean(channels)
        torch.testing.assert_close(found.T @ found, torch.eye(channels - 1, dtype=torch.float64))
        assert float(found.sum(0).abs().max()) < 1e-12


def test_layer_norms_of_turned_channels() -> None:
    """With K = C, and with K < C where nothing is lost: the LayerNorm of Q'x is Q' times that of x, as often as sqrt(C / K)."""
    generator = torch.Generator().manual_seed(6)
    states = torch.randn(50, 8, generator=generator, dtype=torch.float64) + 3
    within = residual.without_mean(8)[:, [1, 4, 5]]  # of directions without a mean, three that are used
    narrow = 2 + states @ within @ within.T
    for width, given in ((8, states), (4, narrow)):
        inside = residual.without_mean(8) if width == 8 else within
        turn = residual.random_directions(width - 1, width - 1, generator)
        basis = inside @ turn @ residual.without_mean(width).T
        made = torch.nn.functional.layer_norm(residual.written(given, basis), (width,), eps=0)
        wanted = torch.nn.functional.layer_norm(given, (8,), eps=0) @ basis
        torch.testing.assert_close(made * math.sqrt(8 / width), wanted)
        assert float(basis.sum(1).abs().max()) < 1e-12


def test_biases_make_up_for_the_mean_by_hand() -> None:
    """The second of two channels goes: of a reader (2, 3), gains (1, 5), biases (7, 11) and means (0.5, 0.25)."""
    basis = torch.tensor([[1.0], [0]], dtype=torch.float64)
    numbers = [torch.tensor(values) for values in ([[2.0, 3]], [1.0, 5], [7.0, 11], [0.5, 0.25])]
    made = torch.tensor([[2.5]], dtype=torch.float64)
    # 2 * 7 + 3 * 11 of the norm's biases; 2 * 1 * 0.5 + 3 * 5 * 0.25 of its means, of which 2.5 * 0.5 is still read.
    assert residual.shift(*numbers, basis, made).tolist() == [14 + 33 + 1 + 3.75 - 1.25]


def test_what_is_read_decides_by_hand() -> None:
    """Of S = diag(4, 1) readers (0, 3) and (0, 1) read the smaller alone; (1, 0), (0, 3) read 4 and 9; (2, 0), (0, 3) 16 and 9."""
    second = torch.diag(torch.tensor([4.0, 1]))
    for weight, wanted in (([[0.0, 3], [0, 1]], 1), ([[1.0, 0], [0, 3]], 1), ([[2.0, 0], [0, 3]], 0)):
        readers = torch.tensor(weight)
        found = residual.told(second, readers.T @ readers, 1).abs()
        torch.testing.assert_close(found, torch.eye(2, dtype=torch.float64)[:, [wanted]])
    assert residual.leading(second, 1).abs().argmax() == 0


def test_no_directions_leave_less_error_in_what_is_read() -> None:
    states = tokens(400, 12)
    second = states.T @ states / len(states)
    generator = torch.Generator().manual_seed(7)
    weight, gain = torch.randn(5, 12, generator=generator, dtype=torch.float64), torch.ones(12)

    def error(basis: Tensor) -> float:
        made = residual.reader(weight, gain, second, basis)
        return float((states @ weight.T - states @ basis @ made.T).square().sum())

    for width in (2, 4):
        found = residual.told(second, weight.T @ weight, width)
        torch.testing.assert_close(found.T @ found, torch.eye(width, dtype=torch.float64))
        others = [residual.random_directions(12, width, generator) for _ in range(5)]
        assert all(error(found) < error(basis) for basis in [*others, residual.leading(second, width)])
    assert error(residual.told(second, weight.T @ weight, 5)) < 1e-9 * float((states @ weight.T).square().sum())
