"""Where tokens stand, counted by hand."""

from __future__ import annotations

import torch

from mmcompress.ops.positions import evenly_placed, stand_apart
from mmcompress.ops.token_choice import by_place, pooled, standing_at


def test_a_picture_goes_on_taking_all_its_positions() -> None:
    """w i i w of a picture of 4 tokens: the second and the last are left. Behind it all counts on from where it would."""
    image = torch.tensor([[False, True, True, False]])
    positions, further = stand_apart(torch.arange(4)[None], image, torch.tensor([[1, 3]]), room=4)
    assert positions.tolist() == [[0, 2, 4, 5]]
    assert further.tolist() == [[2]]


def test_two_pictures_of_one_row_none_of_another_and_padding_before_a_third() -> None:
    counted = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    image = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]).bool()
    places = torch.tensor([[0, 5], [2, 3], [1, 4]])
    positions, further = stand_apart(counted, image, places, room=6)
    assert positions.tolist() == [[0, 5, 6, 9, 10, 13], [0, 1, 2, 3, 4, 5], [0, 0, 0, 2, 5, 7]]
    assert further.tolist() == [[8], [0], [4]]


def test_tokens_of_unknown_places_stand_at_equal_distances() -> None:
    assert evenly_placed(2, 2, 8).tolist() == [[2, 6], [2, 6]]


def test_places_are_the_middles_of_members_by_row_and_column() -> None:
    """In a grid of 3 rows and 4 columns: of places 0, 1, 4 and 5 it is 0 (halves go up and left), of 0, 8 and 11 it is 5."""
    rows = torch.zeros(1, 3, 12)
    rows[0, 0, [0, 8, 11]] = 1.0  # mean row 4/3, mean column 1
    rows[0, 1, [0, 1, 4, 5]] = 1.0
    rows[0, 2, 3] = 1.0
    ordered, places = by_place(rows, (3, 4))
    assert places[..., 0].tolist() == [[0, 3, 5]]
    assert torch.equal(ordered, rows[:, [1, 2, 0]])


def test_weights_move_the_middle_and_a_raster_mean_would_not_do() -> None:
    rows = torch.zeros(1, 16)
    rows[0, 1], rows[0, 13] = (
        3.0,
        1.0,
    )  # rows 0 and 3, both in column 1: three quarters of a row down, nearest to the second
    assert by_place(rows, (4, 4))[1].tolist() == [[5.0]]
    _, places = by_place(pooled((4, 4), (2, 2)), (4, 4))
    assert places[:, 0].tolist() == [0, 2, 8, 10]


def test_chosen_tokens_stand_where_they_were() -> None:
    kept = torch.tensor([2, 3, 7, 11])
    ordered, places = by_place(standing_at(kept, 12), (3, 4))
    assert places[:, 0].long().tolist() == kept.tolist()
    assert torch.equal(ordered, standing_at(kept, 12))
