"""English prose to go on with: how a passage of a State of the Union address begins, and what the president says next.

One passage a speech, from its middle, so that samples do not depend on one another; 233 speeches from 1790 to 2021. Every eighth is
for calibration, the others for the test. A language model may have read them: compare compressed models with their original on
them, not with others.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

Split = Literal["test", "calibration", "asked"]

QUESTION = "Continue this speech:\n\n"
BEGINNING, CONTINUATION = (60, 240), 240
"""Characters: how long a beginning may be; of what follows at most so many, which is more than the tokens that are judged."""
EVERY = 8
ASKED = 24
PICTURES = {"calibration": 8, "asked": 8}
"""Rows with a drawing, so that the vision tower can be calibrated and pictures reach the language model."""


def passage(text: str) -> tuple[str, str]:
    """A sentence from the middle of a speech and what follows it. Raises ValueError where no sentence is of the right length."""
    sentences = re.split(r"(?<=[.?!]) +(?=[A-Z])", " ".join(text.split()))
    for place in range(len(sentences) // 2, len(sentences) - 1):
        beginning, following = sentences[place], " ".join(sentences[place + 1 :])[:CONTINUATION]
        if BEGINNING[0] <= len(beginning) <= BEGINNING[1] and len(following) == CONTINUATION:
            return beginning, following.rsplit(" ", 1)[0]
    raise ValueError(f"no sentence of {BEGINNING} characters in the second half of {text[:60]!r}")


def read_passages(split: Split, speeches: Path) -> list[dict[str, Any]]:
    """Metadata rows, by year; `speeches` holds a JSON file a speech."""
    files = sorted(speeches.glob("*.json"))
    chosen = [file for number, file in enumerate(files) if (number % EVERY == 0) == (split == "calibration")]
    rows = []
    for file in chosen[:ASKED] if split == "asked" else chosen:
        beginning, following = passage(json.loads(file.read_text(encoding="utf-8"))["text"])
        rows.append({"id": file.stem, "question": QUESTION + beginning, "text": following})
    return rows


def write_split(split: Split, speeches: Path, drawings: Path, folder: Path) -> None:
    """Writes `folder`/metadata.jsonl and, beside some of the questions, a drawing out of the folder `drawings`."""
    rows = read_passages(split, speeches)
    count = PICTURES.get(split, 0)
    lines = (drawings / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    for row, line in zip(rows[:count], lines[:count], strict=True):
        drawn = json.loads(line)
        shutil.copy(drawings / drawn["file_name"], folder)
        row |= {"file_name": drawn["file_name"], "question": "What is this?", "text": drawn["text"]}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
