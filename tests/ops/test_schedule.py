import pytest

from mmcompress.errors import UsageError
from mmcompress.ops.schedule import (
    capped,
    check_schedule,
    kept_share,
    largest_merge,
    solve_keep,
    spread,
    tokens_after,
)


def test_decreasing_golden() -> None:
    # 16 - 16/11 * l, rounded down: the sum is 91 and not 96 (ToMe's schedule (8, -1) for 12 blocks).
    assert spread(8, 12, "decreasing") == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    # Whole numbers stay whole: 22 - 2 l.
    assert spread(11, 12, "decreasing") == list(range(22, -1, -2))
    assert spread(8, 1, "decreasing") == [8]


def test_every_nth_block_by_hand() -> None:
    assert spread(6, 5, every=2) == [6, 0, 6, 0, 6]
    # 4 blocks of 31 tokens, 40% of 124 is 50 when rounded: in blocks 0 and 2, 4 * 8 + 2 * 9.
    assert solve_keep(0.6, 31, 1, 4, every=2) == [8, 0, 9, 0]
    for every in (1, 2, 3, 4):
        schedule = solve_keep(0.7, 197, 1, 12, every=every)
        assert [index for index, merged in enumerate(schedule) if merged] == list(range(0, 12, every))
        assert 0 <= kept_share(schedule, 197) - 0.7 + 0.5 / (12 * 197) < 1 / 197
    with pytest.raises(UsageError, match="merging in 1 of 12 blocks") as raised:
        solve_keep(0.4, 65, 1, 12, every=12)
    assert "or a smaller every" in raised.value.hint


def test_constant_is_cut_at_half_of_the_unprotected_tokens() -> None:
    # 197 tokens, r = 16: eleven blocks leave 21, and half of 20 is 10. r = 50: 97 are left after two, then halves of 96, 48, 24.
    assert capped([16] * 12, 197, 1) == [16] * 11 + [10]
    assert capped([50] * 5, 197, 1) == [50, 50, 48, 24, 12]
    assert tokens_after([50, 50, 48, 24, 12], 197) == [147, 97, 49, 25, 13]


@pytest.mark.parametrize(
    ("tokens", "protected", "limit"), [(6, 1, 2), (7, 1, 3), (7, 0, 3), (6, 0, 3), (7, 2, 2), (1, 1, 0), (1, 2, 0)]
)
def test_largest_merge(tokens: int, protected: int, limit: int) -> None:
    assert largest_merge(tokens, protected) == limit


def test_kept_share_by_hand() -> None:
    # 10 tokens, 2 then 4 removed: 8 and 4 enter the MLPs, of 10 each.
    assert kept_share([2, 4], 10) == pytest.approx(12 / 20)


@pytest.mark.parametrize("shape", ["constant", "decreasing"])
@pytest.mark.parametrize("tokens", [50, 65, 197, 257])
@pytest.mark.parametrize("keep", [0.95, 0.8, 0.62])
def test_solve_keep_is_exact_where_no_cap_binds(keep: float, tokens: int, shape: str) -> None:
    schedule = solve_keep(keep, tokens, 1, 12, shape)  # type: ignore[arg-type]
    check_schedule(schedule, tokens, 1)
    # One token removed in the first block is missing 12 times; the sum over blocks is met to a rounding.
    assert abs(sum(tokens_after(schedule, tokens)) - keep * tokens * 12) <= 0.5
    if shape == "constant":
        assert max(schedule) - min(schedule) <= 1


@pytest.mark.parametrize("shape", ["constant", "decreasing"])
def test_solve_keep_near_the_smallest_share_is_within_one_token_on_average(shape: str) -> None:
    for tokens, protected, blocks in [(50, 5, 5), (577, 2, 19), (197, 0, 27), (17, 5, 6), (5, 1, 3)]:
        least = kept_share(capped([tokens] * blocks, tokens, protected), tokens)
        for step in range(11):
            keep = least + (1 - least) * step / 10
            schedule = solve_keep(keep, tokens, protected, blocks, shape)  # type: ignore[arg-type]
            check_schedule(schedule, tokens, protected)
            assert -1e-9 <= kept_share(schedule, tokens) * tokens - keep * tokens + 0.5 / blocks < 1 + 0.5 / blocks


def test_known_solutions() -> None:
    # 65 tokens: 5 in every block would leave 65 - 6.5 * 5 = 32.5 on average; the last block has 10 tokens and can merge 4.
    assert solve_keep(0.5, 65, 1, 12) == [5] * 11 + [4]
    # 2 blocks, 11 tokens, a quarter of 22 is 5.5, rounded 6 = 2 * 2 + 2 * 1.
    assert solve_keep(0.75, 11, 1, 2) == [2, 2]
    falling = solve_keep(0.7, 197, 1, 12, "decreasing")
    assert falling[0] > 2 * falling[6] - 2
    assert falling[-1] == 0


def test_keep_one_merges_nothing() -> None:
    assert solve_keep(1.0, 65, 1, 12) == [0] * 12
    assert solve_keep(1.0, 65, 1, 12, "decreasing") == [0] * 12


def test_impossible_keep_says_what_is_possible() -> None:
    # 9 tokens, 1 protected: halving leaves 5 and 3 of 9, so 8/18 = 0.444 is the least.
    with pytest.raises(UsageError, match=r"keeps 0\.444") as raised:
        solve_keep(0.3, 9, 1, 2)
    assert "0.445" in raised.value.hint
    assert solve_keep(0.445, 9, 1, 2) == [4, 2]


def test_explicit_schedule_names_the_block_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"block 1 has 6 tokens \(1 protected\) and cannot merge 3; the limit is 2"):
        check_schedule([4, 3], 10, 1)
    with pytest.raises(UsageError, match="cannot merge -1"):
        check_schedule([-1], 10, 1)
