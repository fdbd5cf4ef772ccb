"""Rendered scenes with exact answers: coloured shapes and words on a 3 x 3 grid, drawn with Pillow alone.

A scene comes from its number only, so a split is a range of numbers. The words are always the same ones: what is read is one
of WORDS in a picture never seen, in another colour, size and place. Words are written in capitals, which the tokenizer knows as
single letters, so an answer is spelt.
"""

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

SIDE = 224
CELL = SIDE // 3
COLOURS = {
    "red": (214, 39, 40), "green": (44, 150, 44), "blue": (31, 90, 200), "yellow": (240, 205, 20),
    "orange": (250, 125, 10), "purple": (130, 50, 170), "black": (20, 20, 20), "grey": (135, 135, 135),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PAPERS = ((255, 255, 255), (245, 240, 228), (228, 240, 248), (236, 246, 232), (250, 232, 238))
ROWS = ("top", "middle", "bottom")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
MOST = 6
WORDS = (
    "ANT", "APPLE", "BABY", "BANK", "BEACH", "BELL", "BIRD", "BOAT", "BOOK", "BREAD", "BUS", "CAKE", "CAR", "CHAIR", "CLOCK", "COW",
    "CROWN", "DOG", "DOOR", "DRUM", "EGG", "FIRE", "FISH", "FLAG", "FOX", "FROG", "GHOST", "GRAPE", "HAND", "HAT", "HORSE", "ICE",
    "KEY", "KITE", "LEMON", "LION", "LOCK", "MOON", "MOUSE", "NOSE", "OWL", "PEAR", "PIG", "PIZZA", "RAIN", "SHIP", "SNAKE", "TREE",
)  # fmt: skip

Group = Literal["naming", "category", "kind", "colour", "counting", "reading", "position"]


@dataclass(frozen=True)
class Turn:
    """One question about a picture, what counts as right (the first is what a model is taught) and its slice."""

    question: str
    answers: tuple[str, ...]
    group: Group


@dataclass(frozen=True)
class Word:
    """A word in capitals, the row it stands in (0..2) and its colour."""

    text: str
    row: int
    colour: str


@dataclass(frozen=True)
class Kind:
    """All shapes of one kind: they share a colour; `cells` (0..8, row by row) says where each one is."""

    shape: str
    colour: str
    cells: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """What is drawn; `seed` settles the jitter, so the same scene is the same picture."""

    seed: int
    paper: tuple[int, int, int]
    words: tuple[Word, ...]
    kinds: tuple[Kind, ...]


def make_scene(seed: int) -> Scene:
    """The scene of number `seed`."""
    choose = random.Random(seed)
    rows = choose.sample(range(3), choose.choice((0, 1, 1, 1, 2)))
    colours = choose.sample(sorted(COLOURS), len(COLOURS))
    shown = tuple(Word(choose.choice(WORDS), row, colours.pop()) for row in sorted(rows))
    cells = [cell for cell in range(9) if cell // 3 not in rows]
    choose.shuffle(cells)
    kinds = []
    for number, shape in enumerate(choose.sample(SHAPES, choose.randint(1, 3))):
        # The second kind is alone as often as not, so that most scenes hold something with a place of its own.
        count = 1 if number == 1 and choose.random() < 0.7 else choose.randint(1, MOST)
        taken, cells = cells[:count], cells[count:]
        if taken:
            kinds.append(Kind(shape, colours.pop(), tuple(sorted(taken))))
    return Scene(seed, choose.choice(PAPERS), shown, tuple(kinds))


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "cross":
        thin = r * 0.35
        corners = ((-thin, -r), (thin, -r), (thin, -thin), (r, -thin), (r, thin), (thin, thin))
        return [(x + dx, y + dy) for dx, dy in corners] + [(x - dx, y - dy) for dx, dy in corners]
    # A five-pointed star, point upwards: ten corners, every second one on the inner circle.
    points = ((0, -1), (0.25, -0.34), (0.95, -0.31), (0.4, 0.13), (0.59, 0.81))
    mirrored = ((0, 0.42), (-0.59, 0.81), (-0.4, 0.13), (-0.95, -0.31), (-0.25, -0.34))
    return [(x + r * dx, y + r * dy) for dx, dy in points + mirrored]


def draw_scene(scene: Scene) -> Image.Image:
    """The picture, RGB, SIDE x SIDE pixels. Letters are at least 30 pixels high, shapes at least 36 wide."""
    place = random.Random(scene.seed + 1)
    image = Image.new("RGB", (SIDE, SIDE), scene.paper)
    pen = ImageDraw.Draw(image)
    for word in scene.words:
        size = place.randint(44, 58)
        left, top, right, bottom = pen.textbbox((0, 0), word.text, font=ImageFont.load_default(size))
        if right - left > SIDE - 12:
            size = int(size * (SIDE - 12) / (right - left))
        font = ImageFont.load_default(size)
        left, top, right, bottom = pen.textbbox((0, 0), word.text, font=font)
        x = place.uniform(6, max(7, SIDE - 6 - (right - left))) - left
        y = CELL * (word.row + 0.5) - (top + bottom) / 2 + place.uniform(-8, 8)
        pen.text((x, y), word.text, fill=COLOURS[word.colour], font=font)
    for kind in scene.kinds:
        for cell in kind.cells:
            r = place.uniform(18, 28)
            x, y = (CELL * (part + 0.5) + place.uniform(28 - r, r - 28) * 0.9 for part in (cell % 3, cell // 3))
            fill = COLOURS[kind.colour]
            if kind.shape in ("circle", "ring"):
                hollow = kind.shape == "ring"
                box = (x - r, y - r, x + r, y + r)
                pen.ellipse(box, fill=None if hollow else fill, outline=fill, width=7 if hollow else 1)
            else:
                pen.polygon(_polygon(kind.shape, x, y, r), fill=fill)
    return image


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def ask_scene(scene: Scene) -> list[Turn]:
    """Every question that has exactly one right answer in this scene, always in the same order."""
    choose = random.Random(scene.seed + 2)
    turns = []
    for word in scene.words:
        where = "" if len(scene.words) == 1 else f" at the {ROWS[word.row]}" if word.row != 1 else " in the middle"
        turns.append(Turn(f"What word is written{where}?", (word.text,), "reading"))
        turns.append(Turn(f"What colour is the word{where}?", (word.colour,), "colour"))
    for kind in scene.kinds:
        turns.append(Turn(f"How many {plural(kind.shape)} are there?", (str(len(kind.cells)),), "counting"))
        if len(kind.cells) == 1:
            turns.append(Turn(f"What colour is the {kind.shape}?", (kind.colour,), "colour"))
            turns.append(Turn(f"Where is the {kind.shape}?", (PLACES[kind.cells[0]],), "position"))
        else:
            turns.append(Turn(f"What colour are the {plural(kind.shape)}?", (kind.colour,), "colour"))
    if choose.random() < 0.25:
        absent = choose.choice([shape for shape in SHAPES if shape not in {kind.shape for kind in scene.kinds}])
        turns.append(Turn(f"How many {plural(absent)} are there?", ("0",), "counting"))
    return turns
