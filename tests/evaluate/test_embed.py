"""Embedding a dataset: order, shared texts, batches, and what never happens."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcompress.data import Dataset, Memory, Sample, open_data
from mmcompress.errors import UsageError
from mmcompress.evaluate import embed_dataset, embed_texts
from mmcompress.evaluate.findings import health
from tests.evaluate.worlds import CHANNELS, Constant, Seeing, picture, world


def test_rows_follow_the_dataset_whatever_the_batch() -> None:
    data = world(10, captions=lambda i: tuple("very " * ((i * 7) % 5) + f"thing {j}" for j in (i, i + 100)))
    whole = embed_dataset(Seeing(), data, batch=64)
    for batch in (1, 3):
        embedder = Seeing()
        found = embed_dataset(embedder, data, batch=batch)
        np.testing.assert_array_equal(found.images, whole.images)
        np.testing.assert_array_equal(found.text_vectors, whole.text_vectors)
        assert found.texts == whole.texts
        assert embedder.largest_batch == batch
    assert whole.keys == tuple(sample.key for sample in data)
    np.testing.assert_allclose(whole.images[3], Seeing().meaning(3), rtol=1e-6)
    np.testing.assert_allclose(
        whole.text_vectors[whole.texts.index("very thing 103")], Seeing().meaning(103), rtol=1e-6
    )
    assert whole.images.dtype == np.float32


def test_equal_texts_are_one_text_with_several_images() -> None:
    data = world(4, captions=lambda i: ("thing 9", f"thing {i}") if i < 2 else ("thing 9",))
    found = embed_dataset(Seeing(), data)
    assert found.texts == ("thing 9", "thing 0", "thing 1")
    assert found.pairs.tolist() == [[0, 0], [0, 1], [1, 0], [1, 2], [2, 0], [3, 0]]
    assert found.text_owners.tolist() == [0, 0, 1]


def test_texts_can_be_left_out() -> None:
    found = embed_dataset(Seeing(), world(3), with_texts=False)
    assert (found.texts, found.text_vectors.shape, found.pairs.shape) == ((), (0, CHANNELS), (0, 2))


def test_progress_is_told_of_every_batch_and_of_the_end() -> None:
    class Listening:
        def __init__(self) -> None:
            self.heard: list[tuple[str, int | None]] = []
            self.steps = 0

        def start(self, label: str, total: int | None) -> None:
            self.heard.append((label, total))

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.steps += steps

        def finish(self) -> None:
            self.heard.append(("end", None))

        def say(self, line: str) -> None:
            raise AssertionError(line)

    listening = Listening()
    embed_dataset(Seeing(), world(5), batch=2, progress=listening)
    assert listening.heard == [("embedding images", 3), ("end", None), ("embedding texts", 3), ("end", None)]
    assert listening.steps == 6


def test_an_embedder_that_breaks_its_promise_is_named() -> None:
    class Flat(Constant):
        def embed_texts(self, texts: object) -> np.ndarray:
            return np.ones(CHANNELS)

    class Other(Constant):
        def embed_texts(self, texts: object) -> np.ndarray:
            return np.ones((len(texts), 3))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"shape \(32,\) for 1 items"):
        embed_texts(Flat(), ["a"])
    with pytest.raises(ValueError, match="32 channels but texts in 3"):
        embed_dataset(Other(), world(2))


def test_pictures_do_not_pile_up_in_memory(tmp_path: Path) -> None:
    rows = []
    for number in range(24):
        Image.new("RGB", (400, 400), (0, number, 7)).save(tmp_path / f"{number}.png")
        rows.append(f'{{"file_name": "{number}.png", "text": "thing {number}"}}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    data = open_data(tmp_path)
    alive = []

    class Counting(Seeing):
        def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
            alive.append(sum(issubclass(type(thing), Image.Image) for thing in gc.get_objects()))
            return super().embed_images(images)

    gc.collect()
    before = sum(issubclass(type(thing), Image.Image) for thing in gc.get_objects())
    embed_dataset(Counting(), data, batch=2)
    # The batch at hand, and at most the one before it until the next is complete.
    assert max(alive) - before <= 4


def test_a_broken_picture_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "bad.png", "text": "thing 1"}')
    with pytest.raises(UsageError, match=r"bad\.png is not a readable image"):
        embed_dataset(Seeing(), open_data(tmp_path))
    with pytest.raises(UsageError, match="'words' has no image"):
        embed_dataset(Seeing(), Dataset(Memory([Sample("ok", picture=picture(1)), Sample("words")])))


def test_health_names_what_is_wrong_and_how_much_of_it() -> None:
    good = np.random.default_rng(0).normal(size=(50, 16))
    assert health("image", good) == []
    assert health("image", good[:1]) == []
    broken = good.copy()
    broken[:3], broken[3] = np.nan, np.inf
    broken[4:6] = 0
    texts = [finding.text for finding in health("image", broken)]
    assert texts == [
        "BROKEN: 4 of 50 image embeddings are NaN or infinite",
        "BROKEN: 2 of 50 image embeddings are zero",
    ]
    collapsed = 1 + 0.01 * good
    assert "COLLAPSED: text embeddings are all alike" in health("text", collapsed)[0].text
    assert health("text", 0.7 + good) == []  # a cone as CLIP has it, not a collapse
