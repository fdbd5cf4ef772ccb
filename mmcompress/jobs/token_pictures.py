"""Pictures of what became of an image's patches: which were merged, which went, block by block and behind the connector, and which
were left on their way through a language model that was asked something.

A patch that goes on by itself is shown as it is; patches that became one token are painted in their mean colour, with a line
around them; a patch that is in no token any more is dark.

Shapes: N patches, M tokens left, rows and columns of patches.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Sample, Stored
from mmcompress.data.sample import seen
from mmcompress.errors import MmcError, UsageError
from mmcompress.jobs.token_painting import ASKED, TILES, View, grid_of, page_of, pixels_of
from mmcompress.progress import Progress
from mmcompress.surgery.dropping import dropping_of
from mmcompress.surgery.ledger import watching
from mmcompress.surgery.prompt_flow import Dropping
from mmcompress.surgery.reducing import choice_of
from mmcompress.surgery.reduction import ledger_of
from mmcompress.views import Tower

PREFIX = "tokens-"
"""Of the files' names."""
LONGEST = 80
"""Letters of a name."""
SAMPLES = 3
"""Pictures of the evaluation data that are drawn."""


def reduces(bundle: Bundle) -> bool:
    """Whether the model makes fewer tokens of a picture, so that there is something to show."""
    tower = _tower(bundle)
    if tower is None:
        return False
    chooses = tower.connector is not None and choice_of(bundle.module(tower.connector.path)) is not None
    merges = ledger_of(bundle.module(tower.blocks[0].path)) is not None
    return chooses or merges or _dropping(bundle) is not None


def named(paths: Sequence[Path], question: str = "") -> dict[str, Sample]:
    """Return pictures, with a question about them, by the names of their files. Raises UsageError for what is no picture."""
    made: dict[str, Sample] = {}
    for path in paths:
        name = _free(path.stem, made)
        made[name] = Sample(name, picture=seen(Stored.at(path)), question=question)
    return made


def draw_all(
    bundle: Bundle, shown: Mapping[str, Sample], data: Dataset | None, folder: Path, progress: Progress
) -> list[str]:
    """Draw `shown`, and the first pictures of `data` where patches become fewer; return the names of the files in `folder`.

    What cannot be drawn is said and left out: a drawing is not worth a finished run.
    """
    if not reduces(bundle):
        if shown:
            progress.say("there is nothing to draw: no tokens of a picture become fewer")
        return []
    names: list[str] = []
    try:
        wanted = dict(shown)
        for sample in itertools.islice((one for one in data or () if one.picture is not None), SAMPLES):
            wanted[_free(re.sub(r"\W+", "-", sample.key), wanted)] = sample
        for name, sample in wanted.items():
            draw(bundle, sample, folder / f"{PREFIX}{name}.png")
            names.append(f"{PREFIX}{name}.png")
    except (MmcError, OSError) as error:
        progress.say(f"patches are not drawn: {error}")
    return names


def draw(bundle: Bundle, sample: Sample, path: Path) -> None:
    """Write what becomes of the patches of a sample's first image to `path`, where it counts with what is asked about it.

    Raises UsageError where no tokens of pictures become fewer, and for a sample without an image.
    """
    tower = _tower(bundle)
    if tower is None or not reduces(bundle):
        raise UsageError(
            "no tokens of a picture become fewer in this model",
            hint="merge the vision tower's tokens, or use mmc reduce or mmc drop",
        )
    sample = sample.showing(sample.pictures[:1])
    inputs = bundle.prepare(tower.name, [sample.image])
    pixels = pixels_of(inputs["pixel_values"])
    views = _views(bundle, tower, inputs, pixels.shape[:2])
    dropping = _dropping(bundle)
    if dropping is not None:
        views += _left_on_the_way(bundle, tower, dropping, sample)
    asked = f"asked: {sample.question or 'nothing'}"[:ASKED] if dropping else ""
    page_of(pixels, _some(views), asked).save(path)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Return `name`, cut to what is long enough for a file, or with the first number behind it that is not taken."""
    name = name[:LONGEST]
    numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(key for key in numbered if key not in taken)


def _tower(bundle: Bundle) -> Tower | None:
    return next((tower for tower in bundle.towers() if tower.name == "vision"), None)


@torch.inference_mode()
def _views(bundle: Bundle, tower: Tower, inputs: dict[str, Tensor], size: tuple[int, int]) -> list[View]:
    """Return the tokens wherever there become fewer. Of several tiles, the first."""
    bundle.model.eval()
    views: list[View] = []
    ledger = ledger_of(bundle.module(tower.blocks[0].path))
    if ledger is not None:
        assert tower.stream is not None, "a tower that merges has a stream"
        with watching(ledger) as steps:
            bundle.encode(tower.name, inputs)
        patches = tower.stream.tokens - tower.stream.protected
        names = [f"block {block.index}" for block in tower.blocks]
        views += _steps(names, steps, tower.stream.protected, tower.stream.tokens, grid_of(patches, size))
    choice = choice_of(bundle.module(tower.connector.path)) if tower.connector else None
    if choice is not None:
        with watching(choice.seen) as steps:
            bundle.encode(tower.name, inputs)
        views += _steps(["behind the connector"], steps, 0, choice.tokens, choice.grid)
    return views


def _dropping(bundle: Bundle) -> Dropping | None:
    """Return how image tokens leave the language model, None where they do not."""
    prompts = [tower.prompt for tower in bundle.towers() if tower.prompt is not None]
    return dropping_of(bundle.module(prompts[0].path)) if prompts else None


@torch.inference_mode()
def _left_on_the_way(bundle: Bundle, tower: Tower, dropping: Dropping, sample: Sample) -> Iterator[View]:
    """Yield the tokens behind each place where some leave the language model. Of several tiles, the first.

    Raises UsageError where an image token stands for no patches of known places.
    """
    if tower.connector is None:
        raise UsageError(
            f"{bundle.family.name} puts a picture's tokens together in its own way, so what was left cannot be drawn",
            hint="draw another model",
        )
    choice = choice_of(bundle.module(tower.connector.path))
    of_patches = torch.eye(tower.connector.tokens)
    language = next(tower for tower in bundle.towers() if tower.prompt is not None)
    assert language.prompt is not None
    inputs = bundle.prepare(language.name, [replace(sample, texts=sample.texts[:1] or ("",))])
    with watching(dropping.ledger) as steps, contextlib.ExitStack() as stack:
        handed = stack.enter_context(watching(choice.seen)) if choice else []
        bundle.encode(language.name, inputs)
    if handed and handed[0] is not None:
        first = handed[0]
        of_patches = (first if first.dim() == 2 else first[0]).cpu().float()
    (image,) = torch.isin(inputs["input_ids"][0].cpu(), torch.tensor(language.prompt.image_tokens)).nonzero(
        as_tuple=True
    )
    image = image[: len(of_patches)]
    through = torch.eye(inputs["input_ids"].shape[1])
    for drop, step in zip(dropping.drops, steps, strict=False):
        assert step is not None, "tokens leave here"
        through = step[0].cpu().float() @ through
        rows = through[:, image]
        into = rows[rows.any(dim=1)] @ of_patches
        token_of = torch.where(into.any(dim=0), into.argmax(dim=0), -1).numpy()
        title = (
            f"after block {drop.after - 1}: {len(into)} of {len(image)}"
            if drop.after
            else f"{len(into)} of {len(image)}"
        )
        yield View(title, token_of, tower.connector.grid)


def _steps(
    names: Sequence[str], steps: Sequence[Tensor | None], protected: int, count: int, grid: tuple[int, int]
) -> Iterator[View]:
    """Yield where each of `count` tokens has gone, from step to step."""
    into = torch.eye(count)
    for name, step in zip(names, steps, strict=False):
        if step is None:
            continue
        step = step if step.dim() == 2 else step[0]
        into = (step.cpu().float() > 0).float() @ into
        patches = into[:, protected:]
        token_of = torch.where(patches.any(dim=0), patches.argmax(dim=0), -1).numpy()
        yield View(f"{name}: {len(into) - protected} of {count - protected}", token_of, grid)


def _some(views: list[View]) -> list[View]:
    """Return the last of them and others at equal distances, no more than there is room for beside the picture itself."""
    room = TILES - 1
    if len(views) <= room:
        return views
    return [views[round((index + 1) * len(views) / room) - 1] for index in range(room)]
