"""Draws the emoji of several vendors as small PNG files with captions: a real image-text set.

One concept ("red apple") is drawn by several design families that share no artwork, so a split by vendor is an honest one:
what a model learns on some vendors is tested on drawings it has never seen. The sources are npm packages that carry SVG
(`@iconify-json/*`) and one that carries names, tags and groups (`emojibase-data`); rendering needs the PyPI package resvg_py.

Written layout, per vendor, is the ImageFolder one: `<vendor>/<hexcode>.png` beside `<vendor>/metadata.jsonl` with the fields
file_name, text, tags, label (subgroup in readable words), group.
"""

import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = 112
COMPONENTS, FLAGS = 2, 9  # emojibase group numbers: skin tones and hair; flags (no counterpart in most vendors)


@dataclass(frozen=True)
class Vendor:
    """One design family: the npm package that carries it, its licence, and whom to name."""

    name: str
    licence: str
    author: str
    heldout: bool = False


VENDORS: tuple[Vendor, ...] = (
    Vendor("emojione", "CC-BY-4.0", "EmojiOne (v2)"),
    Vendor("fluent-emoji", "MIT", "Microsoft Corporation"),
    Vendor("fluent-emoji-flat", "MIT", "Microsoft Corporation"),
    Vendor("fluent-emoji-high-contrast", "MIT", "Microsoft Corporation"),
    Vendor("fxemoji", "Apache-2.0", "Mozilla"),
    Vendor("noto", "Apache-2.0", "Google Inc."),
    Vendor("noto-v1", "Apache-2.0", "Google Inc."),
    Vendor("twemoji", "CC-BY-4.0", "Twitter, Inc. and other contributors", heldout=True),
)

# emojibase names its subgroups by keys; these are the ones whose key does not already read as a noun phrase.
CLASS_WORDS = {
    "face-smiling": "smiling face", "face-affection": "affectionate face", "face-tongue": "face with tongue",
    "face-hand": "face with hand", "face-neutral-skeptical": "neutral or skeptical face", "face-sleepy": "sleepy face",
    "face-unwell": "unwell face", "face-hat": "face with hat", "face-glasses": "face with glasses",
    "face-concerned": "concerned face", "face-negative": "angry face", "face-costume": "costumed creature face",
    "emotion": "emotion symbol", "hand-fingers-open": "open hand", "hand-fingers-partial": "hand sign",
    "hand-single-finger": "pointing finger", "hand-fingers-closed": "fist", "hands": "pair of hands",
    "hand-prop": "hand holding a thing", "body-parts": "body part", "person-gesture": "person gesturing",
    "person-role": "person at work", "person-fantasy": "fantasy person", "person-activity": "person doing an activity",
    "person-sport": "person doing sport", "person-resting": "person resting", "person-symbol": "silhouette of people",
    "animal-mammal": "mammal", "animal-bird": "bird", "animal-amphibian": "amphibian", "animal-reptile": "reptile",
    "animal-marine": "sea animal", "animal-bug": "bug", "plant-flower": "flower", "plant-other": "plant",
    "food-fruit": "fruit", "food-vegetable": "vegetable", "food-prepared": "cooked dish", "food-asian": "asian dish",
    "food-sweet": "sweet or dessert", "place-map": "globe or map", "place-geographic": "landscape",
    "place-building": "building", "place-religious": "religious building", "place-other": "scenic place",
    "transport-ground": "road or rail vehicle", "transport-water": "boat", "transport-air": "aircraft",
    "hotel": "hotel item", "time": "clock or timer", "sky-weather": "sky and weather", "event": "festive item",
    "award-medal": "medal or trophy", "sport": "sports item", "game": "game or toy", "arts-crafts": "arts and crafts item",
    "sound": "sound device", "music": "music item", "light-video": "lamp, film or camera", "book-paper": "book or paper",
    "writing": "pen or brush", "office": "office supply", "lock": "lock or key", "science": "science instrument",
    "medical": "medical item", "household": "household item", "other-object": "miscellaneous object",
    "transport-sign": "public sign", "warning": "prohibition sign", "religion": "religious symbol",
    "zodiac": "zodiac sign", "av-symbol": "media button", "gender": "gender sign", "math": "math sign",
    "punctuation": "punctuation mark", "currency": "currency sign", "other-symbol": "miscellaneous symbol",
    "alphanum": "letters or digits in a box", "geometric": "geometric shape", "keycap": "keypad key",
}  # fmt: skip


def _slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    for old, new in (("&", "and"), ("'", ""), ("#", "hash"), ("*", "asterisk")):
        plain = plain.replace(old, new)
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


@dataclass(frozen=True)
class Concept:
    """One emoji: its code, caption, tags, readable subgroup and group, and the icon names vendors may use for it."""

    hexcode: str
    text: str
    tags: tuple[str, ...]
    label: str
    group: str
    names: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """The metadata.jsonl record."""
        return {
            "file_name": f"{self.hexcode}.png",
            "text": self.text,
            "tags": list(self.tags),
            "label": self.label,
            "group": self.group,
        }


def concepts(emojibase: Path) -> list[Concept]:
    """Every drawable emoji of the unpacked emojibase-data package, flags and components left out, in its own order."""
    folder = emojibase / "en"
    messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
    groups = {g["order"]: g["message"] for g in messages["groups"]}
    labels = {s["order"]: CLASS_WORDS.get(s["key"], s["key"].replace("-", " ")) for s in messages["subgroups"]}
    tables = [
        json.loads((folder / f"shortcodes/{name}.json").read_text(encoding="utf-8"))
        for name in ("cldr", "emojibase", "joypixels")
    ]
    found = []
    for emoji in json.loads((folder / "data.json").read_text(encoding="utf-8")):
        if emoji.get("group", COMPONENTS) in (COMPONENTS, FLAGS):
            continue
        names = [_slug(emoji["label"])]
        for table in tables:
            entry = table.get(emoji["hexcode"], [])
            names += [_slug(name.replace("_", "-")) for name in ([entry] if isinstance(entry, str) else entry)]
        found.append(
            Concept(
                hexcode=emoji["hexcode"],
                text=emoji["label"],
                tags=tuple(emoji.get("tags", [])),
                label=labels[emoji["subgroup"]],
                group=groups[emoji["group"]],
                names=tuple(dict.fromkeys(names)),
            )
        )
    return found


def matched(icons: dict[str, Any], wanted: Iterable[Concept]) -> Iterator[tuple[Concept, str]]:
    """Pairs each concept with the vendor's SVG for it; a drawing serves one concept only, so captions stay unambiguous."""
    drawings, aliases = icons["icons"], icons.get("aliases", {})
    without_hyphens = {key.replace("-", ""): key for key in drawings}
    used: set[str] = set()
    for concept in wanted:
        for name in concept.names:
            parent = aliases.get(name, {}).get("parent")
            key = name if name in drawings else parent or without_hyphens.get(name.replace("-", ""), "")
            if key in drawings:
                break
        else:
            continue
        if key in used:
            continue
        used.add(key)
        icon = drawings[key]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        yield (
            concept,
            (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
                f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
            ),
        )


def _draw(job: tuple[str, str, int]) -> None:
    import resvg_py

    path, svg, size = job
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    if image.size != (size, size):  # resvg keeps the aspect ratio; a model wants a square
        image = image.resize((size, size))
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    page.convert("RGB").save(path)


def draw_vendor(icons_package: Path, emojibase: Path, out: Path, size: int = SIZE) -> int:
    """Draws one vendor into `out` (ImageFolder layout) and returns how many drawings it has.

    `icons_package` and `emojibase` are unpacked npm packages; `size` is the side in pixels.
    """
    icons = json.loads((icons_package / "icons.json").read_text(encoding="utf-8"))
    pairs = list(matched(icons, concepts(emojibase)))
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(str(out / f"{concept.hexcode}.png"), svg, size) for concept, svg in pairs]
    with ProcessPoolExecutor(max_workers=2) as pool:
        list(pool.map(_draw, jobs, chunksize=64))
    lines = [json.dumps(concept.row(), ensure_ascii=False) + "\n" for concept, _ in pairs]
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(pairs)
