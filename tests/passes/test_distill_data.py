"""What a distillation step sees: order, held-back samples, captions, changed images, and embeddings computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmcompress.data import Dataset, Memory, Sample
from mmcompress.ops import losses
from mmcompress.passes.distill_data import Feeder, augmented, random_for, read_corpus, shuffled, split
from mmcompress.passes.distill_objective import Objective
from mmcompress.passes.distill_pair_lesson import same_rows
from mmcompress.passes.distill_ranks import Ranks
from mmcompress.passes.distill_run import curve
from mmcompress.passes.distill_state import State
from mmcompress.passes.distill_targets import CHUNK, digest, embed_once
from mmcompress.passes.distill_train import Schedule, parameter_groups
from mmcompress.progress import Silent
from tests import tiny


def captioned() -> Dataset:
    """Four images; the first has two captions, one of them also the third's."""
    texts = [("a cat", "the cat"), ("a dog",), ("the cat",), ("a tree",)]
    pairs = zip(tiny.images(4), texts, strict=True)
    return Dataset(Memory([Sample(str(i), own, picture=image) for i, (image, own) in enumerate(pairs)]))


def test_the_softmax_is_as_sharp_as_the_teachers_and_no_sharper_than_clip() -> None:
    torch.manual_seed(0)
    own, goal = ({name: torch.randn(4, 5) for name in ("vision", "text")} for _ in range(2))
    for scale, used in ((7.0, 7.0), (250.0, 100.0)):
        objective = Objective(0, 1, 0, 0, 0, 1.0, True, student=(3.0, 0.0), teacher=(scale, 0.0))
        pairs = ((part["vision"], part["text"]) for part in (own, goal))
        assert float(objective(own, goal, None)) == pytest.approx(float(losses.interactive(*pairs, used)))


def test_equal_texts_are_one_text() -> None:
    data = captioned()
    corpus = read_corpus(data, "auto", seed=0)
    assert corpus.paired
    assert len(corpus.origin) == 4
    assert corpus.captions[1] == corpus.captions[3]
    spelled = [corpus.text(int(row)) for row in corpus.captions]
    assert spelled == [text for sample in data for text in sample.texts]


def test_captions_of_a_sample_take_turns_and_belong_to_it() -> None:
    corpus = read_corpus(captioned(), "auto", seed=0)
    seen: dict[int, set[str]] = {}
    for start in range(0, 40, 4):
        rows = corpus.batch(start, 4, seed=3)
        for image, text in zip(rows.images, rows.texts, strict=True):
            seen.setdefault(int(image), set()).add(corpus.text(int(text)))
    assert seen == {0: {"a cat", "the cat"}, 1: {"a dog"}, 2: {"the cat"}, 3: {"a tree"}}


def test_every_epoch_shows_every_sample_once_in_a_new_order() -> None:
    rows = np.arange(100, 107)
    first, second = shuffled(rows, np.arange(7), 0), shuffled(rows, np.arange(7, 14), 0)
    assert sorted(first) == sorted(second) == list(rows)
    assert list(first) != list(second)
    across = shuffled(rows, np.arange(5, 9), 0)
    assert list(across) == [*first[5:], *second[:2]]


def test_held_back_samples_never_train() -> None:
    train, held = split(np.arange(50), seed=0)
    assert (len(train), len(held)) == (45, 5)
    assert sorted([*train, *held]) == list(range(50))
    assert len(split(np.arange(10_000), seed=0)[1]) == 64
    few = split(np.arange(9), seed=0)
    assert list(few[0]) == list(few[1]) == list(range(9))


def test_used_rows_cover_what_the_batches_show() -> None:
    for pairing in ("paired", "unpaired"):
        corpus = read_corpus(tiny.dataset(30), pairing, seed=0)  # type: ignore[arg-type]
        shown, used = corpus.batch(0, 12, seed=5), corpus.used(12, seed=5)
        assert set(shown.images) | set(corpus.held.images) == set(used.images)
        assert set(shown.texts) | set(corpus.held.texts) == set(used.texts)
        assert len(used.images) == 12 + 3


def test_processes_and_pieces_split_the_same_batch() -> None:
    corpus, bundle = read_corpus(tiny.dataset(24), "auto", seed=0), tiny.bundle("clip")
    whole = Feeder(corpus, bundle, ("vision", "text"), 8, 1, seed=0, augment=True)
    rows, (micro,) = whole.batch(2)
    pieces = []
    for rank in range(2):
        part = Feeder(corpus, bundle, ("vision", "text"), 2, 2, seed=0, rank=rank, world=2, augment=True)
        own, micros = part.batch(2)
        assert np.array_equal(own.images, rows.images)
        assert np.array_equal(own.texts, rows.texts)
        pieces += [one.inputs["vision"]["pixel_values"] for one in micros]
    assert torch.equal(torch.cat(pieces), micro.inputs["vision"]["pixel_values"])


def test_batches_come_in_order_and_end() -> None:
    corpus, bundle = read_corpus(tiny.dataset(12), "auto", seed=0), tiny.bundle("clip")
    feeder = Feeder(corpus, bundle, ("vision",), 3, 1, seed=0)
    found = [list(rows.images) for rows, _ in feeder.batches(1, 4)]
    assert found == [list(feeder.batch(step)[0].images) for step in (1, 2, 3)]
    assert list(feeder.batches(4, 4)) == []


def test_augmentation_is_light_repeatable_and_never_mirrors() -> None:
    left = np.zeros((56, 56, 3), dtype=np.uint8)
    left[:, :20] = 255
    image = Image.fromarray(left)
    views = [augmented(image, random_for(0, epoch, 1)) for epoch in range(20)]
    assert all(view.size == image.size for view in views)
    assert len({view.tobytes() for view in views}) > 15
    assert augmented(image, random_for(0, 3, 1)).tobytes() == views[3].tobytes()
    for view in views:
        pixels = np.asarray(view).mean(axis=2)
        assert pixels[:, :6].mean() > 150
        assert pixels[:, -6:].mean() < 60


def test_embeddings_are_computed_once_and_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.passes.distill_targets.CHUNK", 4)
    bundle, images = tiny.bundle("clip"), tiny.images(10)
    asked: list[int] = []

    def item(row: int) -> Image.Image:
        asked.append(row)
        return images[row]

    rows = np.array([0, 2, 3, 5, 7, 8, 9])
    common = {"batch_size": 2, "ranks": Ranks(), "progress": Silent(), "label": "teacher"}
    live = embed_once(bundle, "vision", rows, item, folder=None, **common)  # type: ignore[arg-type]
    kept = embed_once(bundle, "vision", rows, item, folder=tmp_path, **common)  # type: ignore[arg-type]
    (tmp_path / "000000004.npy").unlink()
    asked.clear()
    again = embed_once(bundle, "vision", rows, item, folder=tmp_path, **common)  # type: ignore[arg-type]
    assert asked == [7, 8, 9]
    wanted = np.array([9, 0, 5, 9])
    for table in (live, kept, again):
        with torch.inference_mode():
            expected = bundle.encode("vision", bundle.prepare("vision", [images[row] for row in wanted]))
        assert torch.allclose(table.lookup(wanted), expected, atol=1e-5)
        assert torch.equal(table.lookup(wanted), live.lookup(wanted))
    assert CHUNK == 256


def test_a_digest_sees_weights_and_arrays() -> None:
    bundle, other = tiny.bundle("clip"), tiny.bundle("clip", seed=1)
    assert digest(bundle) == digest(tiny.bundle("clip")) != digest(other)
    assert digest(np.arange(3)) != digest(np.arange(4))
    assert digest("a", "b") != digest("ab")


def test_the_schedule_rises_then_follows_half_a_cosine() -> None:
    schedule = Schedule(100, 2.0, 0.0, 0.1, 1.0, 0.0, 5.0)
    assert schedule.rate(0, 100) == pytest.approx(0.2)
    assert schedule.rate(4, 100) == pytest.approx(1.0 * (1 + np.cos(np.pi * 0.04)) / 2)
    assert schedule.rate(50, 100) == pytest.approx(1.0)
    assert 0 < schedule.rate(99, 100) < 1e-3


def test_few_steps_are_small_ones_unless_told_otherwise() -> None:
    usual = Schedule(10, None, 0.0, 0.1, 1.0, 0.0, 5.0)
    assert [usual.peak(steps) for steps in (1, 50, 100, 1000)] == pytest.approx([1e-6, 5e-5, 1e-4, 1e-4])
    assert usual.rate(0, 10) == pytest.approx(1e-5)
    assert Schedule(10, 1e-3, 0.0, 0.1, 1.0, 0.0, 5.0).peak(10) == 1e-3


def test_only_weights_of_products_decay() -> None:
    model = tiny.bundle("dual_encoder_dinov2").model
    parameters = dict(model.named_parameters())
    decayed, plain = parameter_groups(model, parameters, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {names[id(parameter)] for parameter in decayed["params"]}  # type: ignore[attr-defined]
    assert len(found) + len(plain["params"]) == len(parameters)  # type: ignore[arg-type]
    assert "visual_projection.weight" in found
    assert "vision_model.embeddings.patch_embeddings.projection.weight" in found
    assert not {name for name in found if name.endswith("bias") or "norm" in name.lower() or "position" in name}
    assert "text_model.embeddings.word_embeddings.weight" not in found


def test_the_curve_keeps_twenty_means() -> None:
    assert curve([]) == []
    assert curve([3.0, 1.0]) == [[1, 3.0], [2, 1.0]]
    points = curve([float(i) for i in range(100)])
    assert len(points) == 20
    assert points[0] == [5, 2.0]
    assert points[-1] == [100, 97.0]


def test_state_of_another_run_or_damaged_state_is_not_taken_up(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    parameters = dict(layer.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = State.open(tmp_path, "mine")
    state.step, state.steps, state.losses = 1, 5, [0.5]
    state.save(parameters, optimizer, {}, {})
    found = State.open(tmp_path, "mine")
    assert (found.step, found.steps, found.losses, found.resumed_at) == (1, 5, [0.5], 1)
    assert State.open(tmp_path, "another").step == 0
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    assert State.open(tmp_path, "mine").step == 0
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_caption_shared_by_two_images_is_no_negative() -> None:
    corpus = read_corpus(captioned(), "auto", seed=0)
    rows = next(rows for rows in (corpus.batch(4 * i, 4, 0) for i in range(20)) if len(set(rows.texts)) == 3)
    same = same_rows(rows, torch.device("cpu"), paired=True)
    assert same is not None
    assert same.sum() == 2
    generator = torch.Generator().manual_seed(0)
    vectors = [{n: torch.randn(4, 6, generator=generator) for n in ("vision", "text")} for _ in range(2)]
    only = Objective(0, 1, 0, 0, 0, 1.0, True, student=(10.0, 0.0), teacher=(10.0, 0.0))
    assert only(*vectors, same) < only(*vectors, None)
    assert same_rows(rows, torch.device("cpu"), paired=False) is None
