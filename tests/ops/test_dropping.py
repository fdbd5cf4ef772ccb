"""Which image tokens leave a prompt, and where the others then stand: golden values by hand."""

from __future__ import annotations

import pytest
import torch

from mmcompress.ops.dropping import (
    counts_kept,
    drawn_factors,
    evenly_spread,
    last_of,
    raters,
    recovered,
    room_for,
    scattered,
    slots_of,
    unlike_earlier,
)
from mmcompress.ops.masks import HIDDEN, as_added, causal_mask, mask_both_ways, visible

# Text A, image 1 2 3, text B and C; the second row is shorter: padding, image 1, text B, padding.
PRESENT = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]])
IMAGE = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]])
SCORES = torch.tensor([[9.0, 0.1, 0.5, 0.3, 9.0, 9.0], [9.0, 0.2, 9.0, 9.0, 9.0, 9.0]])


def test_a_share_is_rounded_and_never_leaves_a_picture_without_tokens() -> None:
    images = torch.tensor([0, 1, 3, 4, 576])
    assert counts_kept(images, 0.5).tolist() == [0, 1, 2, 2, 288]
    assert counts_kept(images, 0.01).tolist() == [0, 1, 1, 1, 6]
    assert counts_kept(images, 1.0).tolist() == images.tolist()
    assert counts_kept(images, 1.0, most=3).tolist() == [0, 1, 3, 3, 3]


def test_what_stays_of_a_row_stands_at_the_right_in_order() -> None:
    room = room_for(PRESENT, IMAGE, keep=0.67)
    assert room.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    rows = slots_of(PRESENT.bool(), IMAGE.bool(), SCORES, room)
    assert rows.argmax(dim=-1)[0].tolist() == [0, 2, 3, 4, 5]
    assert rows[1, 3:].argmax(dim=-1).tolist() == [1, 2]
    assert rows.sum(dim=-1).tolist() == room.tolist()
    # Fewer: the best one of three.
    room = room_for(PRESENT, IMAGE, keep=0.3)
    assert slots_of(PRESENT.bool(), IMAGE.bool(), SCORES, room).argmax(dim=-1)[0].tolist() == [0, 2, 4, 5]


def test_all_stay_where_all_are_kept() -> None:
    room = room_for(PRESENT[:1], IMAGE[:1], keep=1.0)
    assert torch.equal(slots_of(PRESENT[:1].bool(), IMAGE[:1].bool(), SCORES[:1], room)[0], torch.eye(6))


@pytest.mark.parametrize("seed", range(5))
def test_text_stays_and_each_token_once(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(4, 20, generator=generator) > 0.2
    image = present & (torch.rand(4, 20, generator=generator) > 0.4)
    scores = torch.rand(4, 20, generator=generator)
    room = room_for(present.long(), image.long(), keep=0.4)
    rows = slots_of(present, image, scores, room)
    assert (rows.sum(dim=1) <= 1).all()
    assert torch.equal(rows.sum(dim=-1), room.float())
    stays = rows.sum(dim=1) > 0
    assert (stays | ~present | image).all()
    assert not (stays & ~present).any()
    for row in range(4):
        gone = image[row] & ~stays[row]
        assert not gone.any() or scores[row][gone].max() <= scores[row][image[row] & stays[row]].min()
        order = rows[row].argmax(dim=-1)[room[row].bool()]
        assert order.tolist() == sorted(order.tolist())


def test_the_last_token_is_found_on_either_side_of_padding() -> None:
    assert last_of(PRESENT.bool()).tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]]


def test_the_control_draws_the_same_for_each_row_and_another_with_another_seed() -> None:
    image = torch.ones(2, 4000, dtype=torch.bool)
    image[1, :7] = False
    drawn, other = scattered(image, drawn_factors(0)), scattered(image, drawn_factors(1))
    assert torch.equal(drawn[0, :-7], drawn[1, 7:])  # a token's number counts, not its place
    assert not torch.equal(drawn, other)
    # Nearly as many among the best quarter in the first half as in the second: 4 standard deviations are 110.
    best = drawn[0] > drawn[0].quantile(0.75)
    assert abs(int(best[:2000].sum()) - int(best[2000:].sum())) < 110
    assert drawn.max() < 2**15


def test_what_an_earlier_token_said_leaves_first() -> None:
    # A text token between, which is nobody's earlier one; 0.6 and 0.8 are cosines.
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 3.0], [4.0, 0.0]]])
    image = torch.tensor([[1, 0, 1, 1, 1]]).bool()
    scores = unlike_earlier(tokens, image)
    assert scores[0].argmax() == 0
    torch.testing.assert_close(scores[0, 2:], torch.tensor([-0.6, -0.8, -1.0]))


def test_half_stands_out_and_half_is_near_the_words() -> None:
    # A word at 0 degrees, image tokens at 90, 95, 100, 200 and 30: their mean lies near 100, from which 200 is farthest, then 30.
    angles = torch.tensor([[0.0, 90, 95, 100, 200, 30]]).deg2rad()
    tokens = torch.stack([angles.cos(), angles.sin()], dim=-1)
    image, words = torch.tensor([[0, 1, 1, 1, 1, 1]]).bool(), torch.tensor([[1, 0, 0, 0, 0, 0]]).bool()

    def best(kept: int) -> list[int]:
        scores = recovered(tokens, image, words, torch.tensor([kept])).masked_fill(~image, -9.0)
        return sorted(scores[0].topk(kept).indices.tolist())

    assert best(1) == [4]
    assert best(2) == [4, 5]  # the second is nearest to the word
    assert best(3) == [1, 4, 5]  # two stand out, and then 90 degrees is nearest


def test_of_equal_frames_one_stays() -> None:
    torch.manual_seed(0)
    frame = torch.randn(1, 5, 8)
    tokens, image = torch.cat([torch.randn(1, 2, 8), *[frame] * 3], dim=1), torch.arange(17)[None] >= 2
    present = torch.ones(1, 17, dtype=torch.bool)
    room = room_for(present, image, 1 / 3)
    rows = slots_of(present, image, unlike_earlier(tokens, image), room)
    assert rows[0].argmax(dim=-1).tolist() == list(range(7))


def test_even_distances_take_as_many_as_are_kept() -> None:
    image = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    made = evenly_spread(image, torch.tensor([3, 1]))
    assert (made * image).sum(dim=-1).tolist() == [3, 1]
    assert made[0].tolist() == [0, 0, 1, 0, 1, 0, 0, 1]


def test_raters_are_the_words_a_picture_is_like() -> None:
    """One image token along the first axis; words along the first axis, against it, and across."""
    tokens = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]])
    image = torch.tensor([[True, False, False, False]])
    words = torch.tensor([[False, True, True, True]])
    # softmax(2, -2, 0) = (0.867, 0.016, 0.117); the mean is 1/3
    assert raters(tokens, image, words).tolist() == [[0, 1, 0, 0]]
    # Without a picture no word is nearer: all rate.
    assert torch.allclose(raters(tokens, ~words & False, words), words / 3)


def test_masks_of_booleans_and_of_added_numbers_say_the_same() -> None:
    present = torch.tensor([[0, 1, 1]])
    mask = causal_mask(1, 2, torch.float32, present)
    assert mask[0, 0].tolist() == [[HIDDEN, 0, HIDDEN], [HIDDEN, 0, 0]]
    assert mask_both_ways(2, torch.float32, present)[0, 0].tolist() == [[HIDDEN, 0, 0], [HIDDEN, 0, 0]]
    assert torch.equal(visible(mask), mask == 0)
    lowest = torch.full((1, 1), torch.finfo(torch.float32).min)
    assert not visible(lowest).any()
    assert torch.equal(visible(as_added(mask == 0, torch.float16)), mask == 0)
