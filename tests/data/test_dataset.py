"""Selections, batches, fingerprints and zero-shot classes; and that nothing piles up in memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mmcompress.data import Dataset, Memory, Sample, batches, open_data, zero_shot_classes
from mmcompress.errors import UsageError
from tests.data.layouts import image_folder, png, shard


def samples(n: int) -> Dataset:
    return Dataset(Memory([Sample(f"k{i}", (f"text {i}",), label=f"c{i % 3}") for i in range(n)]))


def test_subset_is_random_by_seed_ordered_and_repeatable() -> None:
    data = samples(100)
    keys = [sample.key for sample in data.subset(20, seed=1)]
    assert keys == [sample.key for sample in data.subset(20, seed=1)]
    assert keys != [sample.key for sample in data.subset(20, seed=2)]
    assert keys == sorted(keys, key=lambda key: int(key[1:]))
    assert len(set(keys)) == 20
    assert len(data.subset(500)) == 100


def test_apart_are_two_parts_that_share_nothing() -> None:
    data = Dataset(Memory([Sample(str(number), ("x",)) for number in range(20)]), "numbers")
    few, others = data.apart(6, 1)
    keys = [[int(sample.key) for sample in part] for part in (few, others)]
    assert [len(part) for part in keys] == [6, 14]
    assert all(part == sorted(part) for part in keys)
    assert sorted(keys[0] + keys[1]) == list(range(20))
    assert [int(sample.key) for sample in data.subset(6, 1)] == keys[0]
    with pytest.raises(AssertionError, match="leave nothing"):
        data.apart(20)


def test_selections_of_selections_stay_inside() -> None:
    data = samples(100)
    chosen = data.subset(20, seed=1)
    assert [s.key for s in chosen.take(3)] == [s.key for s in chosen][:3]
    assert {s.key for s in chosen.subset(5, seed=3)} <= {s.key for s in chosen}
    assert chosen.take(3)[-1].key == chosen[2].key
    with pytest.raises(IndexError):
        chosen.take(3)[3]


def test_batches_cover_everything_once_in_order() -> None:
    assert [[s.key for s in batch] for batch in batches(samples(5), 2)] == [["k0", "k1"], ["k2", "k3"], ["k4"]]


@pytest.mark.parametrize("action", [lambda d: d.take(0), lambda d: d.subset(-1), lambda d: next(batches(d, 0))])
def test_sizes_below_one_are_refused(action: Any) -> None:
    with pytest.raises(UsageError, match="1"):
        action(samples(3))


def test_fingerprint_follows_content_and_order_but_not_the_place(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"}]
    first = open_data(image_folder(tmp_path / "one", rows)).fingerprint()
    assert open_data(image_folder(tmp_path / "two", rows)).fingerprint() == first
    changed = [rows[::-1], [rows[0], {**rows[1], "text": "c"}], rows[:1]]
    others = {open_data(image_folder(tmp_path / f"x{i}", other)).fingerprint() for i, other in enumerate(changed)}
    assert len(others | {first}) == 4
    (tmp_path / "two" / "a.png").write_bytes(png(size=(50, 50)))
    assert open_data(tmp_path / "two").fingerprint() != first


def test_iterating_a_large_shard_holds_one_sample_at_a_time(tmp_path: Path) -> None:
    heavy = b"\x89PNG" + bytes(200_000)
    data = open_data(shard(tmp_path / "a.tar", {f"{i}.png": heavy for i in range(60)}))
    tracemalloc.start()
    for sample in data:
        stored = sample.picture
        assert stored is not None
        stored.read()  # type: ignore[union-attr]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(heavy)  # all of them would be 60


def test_the_index_of_a_large_shard_is_small(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {f"{i:05d}.{kind}": "x" for i in range(1500) for kind in ("txt", "cls")})
    tracemalloc.start()
    data = open_data(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == 1500
    assert held < 100_000
    assert peak < 500_000  # the keys, to see that none comes twice; the headers of all members would be 3 MB


def test_the_index_of_a_large_folder_is_small(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"caption number {i} " + "x" * 1000}) for i in range(2000)]
    image_folder(tmp_path, rows)
    tracemalloc.start()
    data = open_data(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == 2000
    assert held < 200_000  # the captions alone are 2 MB


def test_classes_come_from_beside_the_data_from_the_shard_or_from_the_user(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "f", [{"file_name": "a.png", "label": "n01"}])
    assert open_data(folder).zero_shot is None
    (folder / "classes.json").write_text('{"classes": {"n01": "tench", "n02": "cod"}, "templates": ["a {}", "the {}"]}')
    found = open_data(folder).zero_shot
    assert found is not None
    assert found.prompts() == [["a tench", "the tench"], ["a cod", "the cod"]]
    assert found.index(open_data(folder)[0]) == 0
    own = tmp_path / "own.json"
    own.write_text('{"classes": ["x", "n01"], "field": "label"}')
    given = open_data(folder, classes=own).zero_shot
    assert given is not None
    assert given.index(open_data(folder)[0]) == 1
    inside = shard(tmp_path / "a.tar", {"classes.json": '{"classes": ["p", "q"]}', "0.png": png()})
    assert open_data(inside).zero_shot is not None
    assert len(open_data(inside)) == 1


def test_classes_found_in_labels_are_sorted_and_readable() -> None:
    data = Dataset(Memory([Sample("a", label="polar_bear"), Sample("b", label="ant"), Sample("c")]))
    found = zero_shot_classes(data)
    assert (found.labels, found.names) == (("ant", "polar_bear"), ("ant", "polar bear"))
    with pytest.raises(UsageError, match="has 1 labels"):
        zero_shot_classes(data.take(1))


def test_labels_are_found_by_name_then_by_number(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"classes": ["cat", "0", "dog"], "field": "group"}')
    zero_shot = open_data(image_folder(tmp_path, [{"text": "x"}]), classes=path).zero_shot
    assert zero_shot is not None
    assert [zero_shot.index(Sample("k", group=label)) for label in ("dog", "0", "2")] == [2, 1, 2]
    with pytest.raises(UsageError, match="'dgo', which is not among the 3 classes") as caught:
        zero_shot.index(Sample("k", group="dgo"))
    assert caught.value.hint == "did you mean 'dog'?"
    with pytest.raises(UsageError, match="has no group"):
        zero_shot.index(Sample("k", label="dog"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ('{"clases": ["a"]}', "unknown key 'clases'"),
        ('{"classes": []}', "non-empty list"),
        ("{}", "non-empty list"),
        ('{"classes": ["a", 1]}', "non-empty list"),
        ('{"classes": ["a", "a"]}', "'a' twice"),
        ('{"classes": ["a"], "templates": ["no place"]}', "has no {}"),
        ('{"classes": ["a"], "field": "tags"}', "field 'tags'"),
    ],
)
def test_each_mistake_in_classes_json_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        open_data(image_folder(tmp_path / "d", [{"text": "x"}]), classes=path)
    assert caught.value.hint
    with pytest.raises(UsageError, match="cannot be read"):
        open_data(tmp_path / "d", classes=tmp_path / "none.json")
