"""The fewest that are enough, and how often that is asked."""

from __future__ import annotations

import pytest

from mmcompress.ops.budget import fewest


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 67])
def test_it_is_the_first_that_is_enough_and_few_are_asked(count: int) -> None:
    for first in range(count + 2):
        asked: list[int] = []

        def enough(number: int, asked: list[int] = asked, first: int = first) -> bool:
            asked.append(number)
            return number >= first

        assert fewest(count, enough) == min(first, count)
        assert len(asked) == len(set(asked))
        # 0, 1, 3, 7, ..., then the halves between the last two.
        assert len(asked) <= 2 * (min(first, count) + 1).bit_length()
