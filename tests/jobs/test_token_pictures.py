"""What became of an image's patches, drawn."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmcompress.bundle import Bundle
from mmcompress.data import Sample
from mmcompress.errors import UsageError
from mmcompress.jobs.compress import compress
from mmcompress.jobs.report import write_report
from mmcompress.jobs.token_painting import GAP, GONE, TILE, TITLE, painted
from mmcompress.jobs.token_pictures import _dropping, _left_on_the_way, draw, reduces
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.recipe import parse
from tests import tiny


def sample(question: str = "what is this ?") -> Sample:
    return Sample("one", picture=tiny.images(1)[0], question=question)


def run(family: str, **steps: dict[str, Any]) -> Bundle:
    bundle = tiny.bundle(family)
    for name, params in steps.items():
        made = build(name.replace("_", "-"), params)
        made.check(bundle)
        made.apply(bundle, made.plan(bundle, Context()))
    return bundle


def test_patches_of_one_token_have_its_mean_colour_and_those_in_none_are_dark() -> None:
    """Four patches of one colour each: the first two become one, the third stays, the last goes."""
    colours = np.array([[[1.0, 0, 0], [0, 1.0, 0]], [[0, 0, 1.0], [1.0, 1.0, 1.0]]])
    pixels = colours.repeat(8, axis=0).repeat(8, axis=1)
    made = np.asarray(painted(pixels, np.array([0, 0, 1, -1]), (2, 2)), float) / 255
    side = TILE // 2
    middles = made[side // 2 :: side, side // 2 :: side]
    assert np.allclose(middles[0, 0], middles[0, 1])
    assert np.allclose(middles[0, 0], [0.5, 0.5, 0], atol=0.05)
    assert np.allclose(middles[1, 0], [0, 0, 1], atol=0.05)
    assert np.allclose(middles[1, 1], GONE, atol=0.02)
    # A line between the merged ones and what is below, none between themselves.
    assert np.all(made[side - 1, side // 2] == 1)
    assert not np.all(made[side // 2, side - 1] == 1)


def places_of(path: Path) -> int:
    """How many tiles there is room for: rows of up to four."""
    with Image.open(path) as page:
        width, height = page.size
    return (width - GAP) // (TILE + GAP) * ((height - GAP) // (TILE + TITLE + GAP))


@pytest.mark.parametrize(
    ("family", "steps", "places"),
    [
        ("clip", {"merge_tokens": {"keep": 0.6}}, 4),
        ("siglip", {"merge_tokens": {"keep": 0.6, "method": "random"}}, 4),
        ("clip", {"merge_tokens": {"keep": 0.8, "every": 2}}, 3),
        ("llava_clip", {"reduce_visual_tokens": {"keep": 0.5}}, 2),
        ("smolvlm", {"merge_tokens": {"keep": 0.6}, "reduce_visual_tokens": {"keep": 0.5}}, 8),
        ("llava_clip", {"drop_visual_tokens": {"keep": 0.5}}, 2),
        (
            "llava_clip",
            {"reduce_visual_tokens": {"keep": 0.5}, "drop_visual_tokens": {"keep": 0.5, "after": (1, 2)}},
            4,
        ),
    ],
)
def test_there_is_a_tile_wherever_tokens_become_fewer(
    family: str, steps: dict[str, Any], places: int, tmp_path: Path
) -> None:
    bundle = run(family, **steps)
    assert reduces(bundle)
    before = bundle.encode("vision", bundle.example_inputs("vision", 1))
    draw(bundle, sample(), tmp_path / "tokens.png")
    assert places_of(tmp_path / "tokens.png") == places
    assert torch.equal(bundle.encode("vision", bundle.example_inputs("vision", 1)), before)


def test_what_is_left_on_the_way_is_what_the_prompt_kept() -> None:
    """Three places behind one another: clusters of the connector, then those of their tokens that stay."""
    bundle = run("llava_clip", reduce_visual_tokens={"keep": 0.5}, drop_visual_tokens={"keep": 0.25, "after": (1, 2)})
    how, tower = _dropping(bundle), bundle.tower("vision")
    assert how is not None
    views = list(_left_on_the_way(bundle, tower, how, sample()))
    assert [view.title for view in views] == ["after block 0: 4 of 8", "after block 1: 2 of 8"]
    for view, tokens in zip(views, (4, 2), strict=True):
        assert len(set(view.token_of[view.token_of >= 0].tolist())) == tokens
    assert (views[0].token_of[views[1].token_of >= 0] >= 0).all()  # what is gone stays gone


def test_a_question_decides_what_is_left() -> None:
    bundle = run("llava_clip", drop_visual_tokens={"keep": 0.3, "after": (1,), "method": "sparsevlm"})
    how, tower = _dropping(bundle), bundle.tower("vision")
    assert how is not None
    asked = [
        next(_left_on_the_way(bundle, tower, how, sample(text))).token_of for text in ("what is", "how many", "this ?")
    ]
    assert len({tuple(one.tolist()) for one in asked}) > 1


def test_what_merges_nothing_is_refused() -> None:
    assert not reduces(tiny.bundle("clip"))
    assert not reduces(tiny.bundle("whisper"))
    with pytest.raises(UsageError, match="no tokens of a picture become fewer in this model"):
        draw(tiny.bundle("clip"), sample(), Path("never.png"))


def test_a_run_draws_what_it_was_shown_and_some_samples_and_the_report_shows_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tiny.images(1)[0].save(tmp_path / name / "photo.png")
    recipe = parse({"steps": [{"merge-tokens": {"keep": 0.6}}]})
    shown = [tmp_path / "a" / "photo.png", tmp_path / "b" / "photo.png"]
    result = compress(tiny.bundle("clip"), recipe, tmp_path / "out", explain=shown)
    assert [path.relative_to(tmp_path / "out").as_posix() for path in result.pictures] == [
        "reports/tokens-photo.png",
        "reports/tokens-photo-2.png",
    ]
    assert result.to_json()["pictures"] == [str(path) for path in result.pictures]
    write_report([tmp_path / "out"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(base64.b64encode(path.read_bytes()).decode() in page for path in result.pictures)
    assert "What became of patches" in page


@pytest.mark.parametrize(("family", "drawn"), [("clip", 3), ("siglip2", 0)])
def test_samples_are_drawn_and_what_cannot_be_drawn_costs_nothing(family: str, drawn: int, tmp_path: Path) -> None:
    """SigLIP 2 is given patches, of which no picture can be made again."""
    folder = tiny.write_pairs(tmp_path / "data", 6, "x" * 200)
    recipe = parse(
        {
            "steps": [{"merge-tokens": {"keep": 0.6}}],
            "tasks": ["retrieval"],
            "data": {"evaluation": str(folder)},
            "control": False,
        }
    )
    result = compress(tiny.bundle(family), recipe, tmp_path / "out")
    assert len(result.pictures) == drawn
    assert all(path.is_file() for path in result.pictures)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_picture_that_is_none_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    recipe = parse({"steps": [{"merge-tokens": {"keep": 0.6}}]})
    for path, message in (("text.png", "is not a readable image"), ("none.png", "no file at")):
        with pytest.raises(UsageError, match=message):
            compress(tiny.bundle("clip"), recipe, tmp_path / "out", explain=[tmp_path / path])
        assert not list(tmp_path.glob("*out*"))
