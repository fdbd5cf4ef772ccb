"""Questions about drawings and scenes: what a small vision-language model is taught with and what it is asked afterwards.

A folder made here is what `mmc eval --data FOLDER` reads: pictures beside a metadata.jsonl with one line per question (id,
file_name, question, texts, group, turns). Drawings are split by vendor, scenes by number.
"""

import colorsys
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.scenes import COLOURS, PLACES, Group, Turn, ask_scene, draw_scene, make_scene

# The first wording is the one asked in tests; the others keep a model from hanging on one form of words.
WORDINGS: dict[str, tuple[str, ...]] = {
    "naming": ("What is this?", "What does the drawing show?", "Name this."),
    "category": ("Which category is it?", "What category does this belong to?"),
    "kind": ("What kind of thing is it?",),
    "colour": ("What is its main colour?",),
}
DRAWN_COLOURS = (*COLOURS, "brown", "pink")
# Training shows the scenes from 0 on; those for calibration and distillation, and the held-out ones, have other numbers.
FIRST_CALIBRATION, FIRST_HELDOUT = 1_000_000, 2_000_000
MAIN = 0.6  # a drawing has a main colour when so much of its ink has it
TURNS_EVERY = 5  # in the held-out folder, one question in so many comes after earlier ones about the same picture


@dataclass(frozen=True)
class Drawn:
    """One drawing: where it is, and its record (text, label, group, tags)."""

    file: Path
    row: dict[str, Any]


def drawn(folder: Path) -> list[Drawn]:
    """All drawings of `<folder>/<vendor>/metadata.jsonl`, in the order of vendors and lines."""
    found = []
    for table in sorted(folder.glob("*/metadata.jsonl")):
        for line in table.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.append(Drawn(table.parent / row["file_name"], row))
    return found


def colour_name(red: float, green: float, blue: float) -> str | None:
    """The everyday name of a colour with parts in 0..1; None for what looks like white paper."""
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    degrees = hue * 360
    if saturation < 0.18:
        return None if value > 0.88 else "grey" if value > 0.32 else "black"
    if value < 0.2:
        return "black"
    if degrees < 15 or degrees >= 335:
        return "pink" if value > 0.8 and saturation < 0.5 else "red"
    if degrees < 40:
        return "orange" if value > 0.75 else "brown"
    bounds = ((70, "yellow"), (165, "green"), (260, "blue"), (300, "purple"), (335, "pink"))
    return next(name for bound, name in bounds if degrees < bound)


def main_colour(image: Image.Image) -> str | None:
    """The colour that at least MAIN of a drawing's ink has, if there is one."""
    small = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX)).reshape(-1, 3) / 255
    names = Counter(name for pixel in small if (name := colour_name(*pixel)) is not None)
    if not names:
        return None
    name, count = names.most_common(1)[0]
    return name if count >= MAIN * names.total() else None


def ask_drawing(row: dict[str, Any], colour: str | None) -> dict[Group, str]:
    """The right answer of each slice for one drawing."""
    answers: dict[Group, str] = {"naming": row["text"], "category": row["group"], "kind": row["label"]}
    return answers | {"colour": colour} if colour else answers


def corpus(drawings: Sequence[Drawn]) -> list[str]:
    """What the tokenizer learns from: every question, and every answer in small letters, so that capitals stay single letters."""
    questions = [wording for several in WORDINGS.values() for wording in several]
    questions += [turn.question for seed in range(2000) for turn in ask_scene(make_scene(seed))]
    answers = [
        row[name].lower() for row in (drawing.row for drawing in drawings) for name in ("text", "label", "group")
    ]
    return questions + answers + [*DRAWN_COLOURS, *PLACES] * 50


@dataclass(frozen=True)
class Asked:
    """A picture's name in a folder, the question to it, and what was said before."""

    file_name: str
    turn: Turn
    earlier: tuple[Turn, ...] = ()


def _lines(asked: Iterable[Asked]) -> str:
    seen: Counter[str] = Counter()
    lines = []
    for item in asked:
        name = f"{Path(item.file_name).stem}-{item.turn.group}"
        seen[name] += 1
        row = {
            "id": f"{name}-{seen[name]}",
            "file_name": item.file_name,
            "question": item.turn.question,
            "texts": list(item.turn.answers),
            "group": item.turn.group,
        }
        if item.earlier:
            row["turns"] = [[turn.question, turn.answers[0]] for turn in item.earlier]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def drawing_turns(drawing: Drawn) -> list[Turn]:
    """The questions to a drawing in their first wording."""
    with Image.open(drawing.file) as image:
        answers = ask_drawing(drawing.row, main_colour(image))
    return [Turn(WORDINGS[group][0], (answer,), group) for group, answer in answers.items()]


def write_naming(drawings: Sequence[Drawn], out: Path) -> int:
    """Writes one naming question for every drawing; returns the number of questions."""
    asked = []
    for drawing in drawings:
        _copy(drawing, out)
        turn = Turn(WORDINGS["naming"][0], (drawing.row["text"],), "naming")
        asked.append(Asked(_name(drawing), turn))
    (out / "metadata.jsonl").write_text(_lines(asked), encoding="utf-8")
    return len(asked)


def write_slices(
    drawings: Sequence[Drawn],
    first_scene: int,
    each: int,
    out: Path,
    seed: int = 0,
) -> int:
    """Writes `each` questions of every slice about drawings and scenes; returns the number of questions.

    Scenes are numbered from `first_scene` on. Every TURNS_EVERY-th question has earlier turns about its picture.
    """
    choose = random.Random(seed)
    asked: list[Asked] = []
    missing: Counter[str] = Counter()

    def take(file_name: str, turns: list[Turn], groups: Sequence[str]) -> bool:
        """Asks at most one question a slice, so that the questions of a slice are about different pictures."""
        before = len(asked)
        for group in groups:
            candidates = [turn for turn in turns if turn.group == group]
            if missing[group] and candidates:
                turn = choose.choice(candidates)
                others = [other for other in turns if other.question != turn.question]
                earlier = choose.sample(others, min(len(others), 2)) if len(asked) % TURNS_EVERY == 0 else []
                asked.append(Asked(file_name, turn, tuple(earlier)))
                missing[group] -= 1
        return len(asked) > before

    missing.update(naming=each, category=each)
    for drawing in choose.sample(list(drawings), min(each, len(drawings))):
        if take(_name(drawing), drawing_turns(drawing), ("naming", "category")):
            _copy(drawing, out)
    missing.update(colour=each, counting=each, reading=each, position=each)
    number = first_scene
    while any(missing[group] for group in ("colour", "counting", "reading", "position")):
        scene = make_scene(number)
        name = f"scene-{number}.png"
        if take(name, ask_scene(scene), ("colour", "counting", "reading", "position")):
            draw_scene(scene).save(out / name, optimize=True)
        number += 1
    (out / "metadata.jsonl").write_text(_lines(asked), encoding="utf-8")
    return len(asked)


def write_split(split: str, drawings: Path, out: Path) -> int:
    """Writes the questions of a split from the drawings in `drawings/test` and `drawings/train`; returns their number.

    Raises ValueError for a split that does not exist.
    """
    everything = drawn(drawings)
    heldout, training = ([each for each in everything if each.file.parent.name == name] for name in ("test", "train"))
    if split == "naming":
        return write_naming(heldout, out)
    if split == "heldout":
        return write_slices(heldout, FIRST_HELDOUT, each=300, out=out)
    if split == "training":
        return write_slices(training, FIRST_CALIBRATION, each=600, out=out)
    raise ValueError(f"no split {split!r}: heldout, naming or training")


def _name(drawing: Drawn) -> str:
    return f"{drawing.file.parent.name}-{drawing.file.name}"


def _copy(drawing: Drawn, out: Path) -> None:
    (out / _name(drawing)).write_bytes(drawing.file.read_bytes())
