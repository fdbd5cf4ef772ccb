"""Layers of a video that become fewer: tables by hand, and what they make."""

from __future__ import annotations

import pytest
import torch

from mmcompress.ops.frames import drawn_places, halves, mean_over_time, moves, one_hot, picks, taken


def test_a_table_of_halves_by_hand() -> None:
    assert halves(1).tolist() == [[0, 0, 0]]
    assert halves(2).tolist() == [[0, 0, 1]]
    assert halves(5).tolist() == [[0, 0, 1], [1, 2, 3], [3, 4, 4]]


def test_only_a_still_picture_does_not_move() -> None:
    assert not moves(halves(1)).any()
    assert all(moves(halves(layers)).all() for layers in range(2, 10))
    assert not moves(picks(7, 2, (1, 0))).any()


def test_picks_stay_within_their_groups() -> None:
    """Seven layers by three: the last group has one, whose place is 2 modulo 1."""
    assert picks(7, 3, (1, 2, 2, 0))[:, 0].tolist() == [1, 5, 6]
    assert picks(5, 2, (1,)).tolist() == [[1, 1, 1], [3, 3, 3], [4, 4, 4]]
    assert picks(6, 2, (0, 1))[:, 0].tolist() == [0, 3, 4]


def test_means_by_hand() -> None:
    rows = torch.tensor([[0.0], [2.0], [5.0]])
    assert mean_over_time(rows, halves(3)).tolist() == [[1.0], [5.0]]
    assert mean_over_time(rows, picks(3, 2, (1,))).tolist() == [[2.0], [5.0]]


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
def test_the_mean_of_equal_layers_is_that_layer_to_the_bit(layers: int) -> None:
    layer = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 1e3
    rows = layer.expand(layers, -1, -1)
    while len(rows) > 1:
        rows = mean_over_time(rows, halves(len(rows)))
        assert all(torch.equal(row, layer) for row in rows)


def test_matmuls_take_what_tables_say() -> None:
    """Of a picture, a video of three layers and one of two, in one row."""
    layers = [1, 3, 2]
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    tables = [halves(count) for count in layers]
    table = one_hot(tables, layers)
    assert table.shape == (3, 4, 6)
    apart = [taken(own, one) for own, one in zip(rows.split(layers), tables, strict=True)]
    for number, want in enumerate(zip(*apart, strict=True)):
        assert torch.equal(table[number] @ rows, torch.cat(want))


def test_drawn_places_follow_the_seed() -> None:
    assert drawn_places(4, 1) == drawn_places(4, 1) != drawn_places(4, 2)
    assert set(drawn_places(4, 1)) == {0, 1, 2, 3}
