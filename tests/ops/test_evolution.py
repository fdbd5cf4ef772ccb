from collections.abc import Sequence

from mmcompress.ops.allocation import Layer, Removal, evenly, removable_cost
from mmcompress.ops.evolution import evolve

LAYERS = [
    Layer(tuple(float(unit) for unit in range(12)), cost=3, bound=2, multiple=2),
    Layer(tuple(float(10 * unit) for unit in range(12)), cost=3, bound=2, multiple=2),
    Layer((5.0, 1.0, 9.0, 2.0), cost=10, bound=1),
]


def starts(removal: Removal, remove: int) -> list[list[int]]:
    return [removal.greedy(remove), Removal(evenly(LAYERS)).greedy(remove)]


def test_every_allocation_keeps_the_budget_within_a_chunk_and_the_bounds() -> None:
    removal = Removal(LAYERS)
    for remove in (7, 30, 61, removable_cost(LAYERS)):
        tried: list[int] = []

        def damage(gone: Sequence[int], tried: list[int] = tried) -> float:
            kept = removal.kept(gone)
            assert all(len(units) >= layer.bound for units, layer in zip(kept, LAYERS, strict=True))
            assert all(len(units) % layer.multiple == 0 for units, layer in zip(kept, LAYERS, strict=True))
            tried.append(removal.removed(gone))
            return float(gone[0])

        evolve(removal, remove, starts(removal, remove), damage, 40, seed=0)
        assert all(remove <= cost < remove + 10 for cost in tried)


def test_it_finds_what_the_values_do_not_tell_and_is_never_worse_than_where_it_began() -> None:
    """By the values layer 0 pays; what is measured says that all of it should come from layer 1."""
    removal, calls = Removal(LAYERS), []

    def damage(gone: Sequence[int]) -> float:
        calls.append(tuple(gone))
        return 5.0 * gone[0] + 0.1 * gone[1] + 7.0 * gone[2]

    found = evolve(removal, 30, starts(removal, 30), damage, 60, seed=3)
    assert found.gone == (0, 5, 0)
    assert found.damage == 0.5
    assert found.damage <= min(found.started)
    assert found.started == tuple(damage(gone) for gone in starts(removal, 30))
    # Nothing is measured twice, and no more than was asked for.
    assert len(set(calls[: found.evaluations])) == found.evaluations == len(found.history) <= 60


def test_the_same_seed_gives_the_same_search() -> None:
    removal = Removal(LAYERS)
    # Hills and valleys, so that the search has somewhere to go.
    runs = [
        evolve(removal, 30, starts(removal, 30), lambda gone: (gone[0] * 7 + gone[1] * 5 + gone[2] * 3) % 11, 12, seed)
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1]
    assert runs[0].history != runs[2].history
