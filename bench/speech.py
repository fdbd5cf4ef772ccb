"""Spoken English with known words: sentences made of emoji names, read by a piper voice (text to speech) on this machine.

The voice is a PyPI package; its recordings are made where they are used and never published. piper runs in a process of its own, so
that its modules are on nobody else's path. Sentences are drawn with a fixed seed; test sentences share no noun and no pattern with
training sentences.
"""

import json
import random
import re
import subprocess
import sys
import wave
from pathlib import Path

GROUPS = {3, 4, 5, 6, 7}  # animals and plants, food, travel and places, activities, objects
COUNTS = {"test": 200, "train": 600}

PATTERNS = {
    "test": (
        "Yesterday I saw {a} and {b} near the old harbour.",
        "Could you bring me {a} before the meeting starts?",
        "My sister keeps {a} on the shelf above her desk.",
        "There were {n} people waiting behind {a}.",
        "Nobody had expected to find {a} under {b}.",
        "He paid {n} dollars for {a}, and gave {b} away for nothing.",
        "The teacher drew {a} on the board and asked what it was.",
        "Please put {a} back where you found it.",
        "We talked about {a} for almost {n} hours.",
        "When the rain stopped, the children carried {a} into the garden.",
        "It is easier to draw {a} than {b}.",
        "She never understood why anyone would want {a}.",
        "In the picture, {a} stands to the left of {b}.",
        "After dinner they compared {a} with {b}, and laughed.",
        "The first thing I noticed was {a} by the window.",
        "Every morning at {n} o'clock he feeds the birds next to {a}.",
    ),
    "train": (
        "This is {a}.",
        "I have never seen {a} as large as that one.",
        "Do you prefer {a} or {b}?",
        "The shop on the corner sells {a} for {n} pounds.",
        "Someone left {a} on the train this afternoon.",
        "They found {a} at the bottom of the lake.",
        "Remember to take {a} with you when you leave.",
        "Between {a} and {b} there was hardly any room.",
        "The story begins with {a} and ends with {b}.",
        "My neighbour bought {a} last week, and he already regrets it.",
        "If it snows tomorrow, we will stay at home and look at {a}.",
        "You can rent {a} for {n} days.",
        "A photograph of {a} hangs in the hall.",
        "The old man told us how {a} once saved his life.",
        "What would you do with {n} boxes and {a}?",
        "Her favourite present was {a}, not {b}.",
    ),
}
NUMBERS = (
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "twenty",
    "thirty",
)

READ_ALOUD = """
import json, pathlib, sys, wave
import onnxruntime
from piper import PiperVoice
voice, table, folder = sys.argv[1:]
onnxruntime.set_seed(0)
speaker = PiperVoice.load(voice)
for row in map(json.loads, open(table, encoding="utf-8")):
    with wave.open(str(pathlib.Path(folder) / row["file_name"]), "wb") as file:
        speaker.synthesize_wav(row["text"], file)
"""


def nouns(emojibase: Path) -> list[str]:
    """Names of things out of emojibase's data.json, one to three plain words, in a fixed shuffled order."""
    rows = json.loads(emojibase.read_text(encoding="utf-8"))
    found = sorted(
        {
            row["label"]
            for row in rows
            if row.get("group") in GROUPS and re.fullmatch(r"[a-z]{3,}( [a-z]{2,}){0,2}", row["label"])
        }
    )
    random.Random(0).shuffle(found)
    return found


def sentences(split: str, emojibase: Path) -> list[str]:
    """The sentences of a split, no two the same; a quarter of the nouns belongs to the test."""
    known = nouns(emojibase)
    border = len(known) // 4
    own = known[:border] if split == "test" else known[border:]
    draw = random.Random(f"sentences {split}")
    made: dict[str, None] = {}
    while len(made) < COUNTS[split]:
        pattern = PATTERNS[split][len(made) % len(PATTERNS[split])]
        first, second = draw.sample(own, 2)
        text = pattern.format(a=_article(first), b=_article(second), n=draw.choice(NUMBERS))
        if 4 <= len(text.split()) <= 20:
            made[text] = None
    return list(made)


def _article(noun: str) -> str:
    if noun.endswith("s") and not noun.endswith("ss"):
        return f"the {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def joined(sentences: Path, folder: Path, longest: float = 29.0) -> None:
    """Writes the recordings of a spoken split one after the other into `folder`, up to `longest` seconds each, and their texts.

    Sentences last three seconds; these recordings fill what Whisper hears at once.
    """
    groups: list[tuple[list[bytes], list[str]]] = []
    seconds = longest
    for row in map(json.loads, (sentences / "metadata.jsonl").read_text(encoding="utf-8").splitlines()):
        with wave.open(str(sentences / row["file_name"])) as file:
            form, frames = file.getparams(), file.readframes(file.getnframes())
        more = form.nframes / form.framerate
        if seconds + more > longest:
            groups.append(([], []))
            seconds = 0.0
        seconds += more
        groups[-1][0].append(frames)
        groups[-1][1].append(row["text"])
    rows = []
    for number, (pieces, texts) in enumerate(groups):
        rows.append(json.dumps({"file_name": f"{number:03d}.wav", "text": " ".join(texts)}, ensure_ascii=False))
        with wave.open(str(folder / f"{number:03d}.wav"), "wb") as file:
            file.setparams(form)
            file.writeframes(b"".join(pieces))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def speak(texts: list[str], voice: Path, piper: Path, folder: Path) -> None:
    """Writes `folder`/000.wav … and metadata.jsonl, the form `mmc --data` reads.

    `voice` is the .onnx of a piper voice, `piper` a folder that holds the packages piper and pathvalidate.
    """
    rows = [
        json.dumps({"file_name": f"{number:03d}.wav", "text": text}, ensure_ascii=False)
        for number, text in enumerate(texts)
    ]
    table = folder / "metadata.jsonl"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    script = f"import sys; sys.path.insert(0, {str(piper)!r})\n{READ_ALOUD}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(voice), str(table), str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"piper failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
