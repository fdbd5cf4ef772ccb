"""One metadata record: which columns mean what. The same for a line of metadata.jsonl and a .json member of a shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmcompress.errors import UsageError, closest

TEXT_COLUMNS = ("text", "texts", "caption", "captions", "transcription", "answer", "answers")
QUESTION_COLUMNS = ("question", "prompt")
LABEL_COLUMNS = ("label", "group", "tags")
FILE_COLUMNS = ("file_name", "image_file_name", "audio_file_name")
LIST_COLUMNS = ("images", "file_names")
FILE_ENDINGS = ("_file_name", "_file_names")
"""How Hugging Face's folders name further columns of files."""
FRAME_COLUMNS = ("frames", "frames_file_names")
KNOWN = (
    *TEXT_COLUMNS, *QUESTION_COLUMNS, *LABEL_COLUMNS, *FILE_COLUMNS, *LIST_COLUMNS, *FRAME_COLUMNS,
    "fps", "sampling_rate", "id", "turns",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What a metadata record says about its sample."""

    texts: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    frames: tuple[str, ...] | str = ()
    """Of a video: names in order, or the name of the folder they lie in."""
    frame_rate: float | None = None
    sampling_rate: int | None = None
    key: str | None = None
    question: str = ""
    turns: tuple[tuple[str, str], ...] = ()


def parse_json(content: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in `content`. Raises UsageError naming `where` when it is not one."""
    try:
        record = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}", hint="write one JSON object, in UTF-8") from error
    if not isinstance(record, dict):
        raise UsageError(f"{where} holds a {type(record).__name__}, not an object", hint='write {"text": "..."}')
    return record


def parse_row(record: Mapping[str, Any], where: str, strict: bool) -> Row:
    """Return what `record` says. Raises UsageError naming `where` and the column that is wrong.

    With `strict`, a record that has texts under no known column is an error, and files are named by it; a shard's .json often holds
    other things, and its files lie beside it.
    """
    texts: list[str] = []
    for column in TEXT_COLUMNS:
        if record.get(column) is not None:
            found = _texts(record[column], column, where)
            # Several people may give one answer, and how many do says how right it is; a caption told twice says no more.
            texts += found if column == "answers" else [text for text in dict.fromkeys(found) if text not in texts]
    if strict and not texts:
        _refuse_unknown_texts(record, where)
    rate = record.get("sampling_rate")
    if rate is not None and (not isinstance(rate, int) or rate < 1):
        raise UsageError(f"{where}: sampling_rate {rate!r} is not a positive number", hint="write samples per second")
    return Row(
        texts=tuple(texts),
        label=_label(record.get("label"), "label", where),
        group=_label(record.get("group"), "group", where),
        tags=tuple(_texts(record.get("tags") or [], "tags", where)),
        files=tuple(_files(record, where)) if strict else (),
        frames=_frames(record, where) if strict else (),
        frame_rate=_frame_rate(record.get("fps"), where),
        sampling_rate=rate,
        key=_label(record.get("id"), "id", where),
        question=_question(record, where),
        turns=_turns(record.get("turns") or [], where),
    )


def _question(record: Mapping[str, Any], where: str) -> str:
    found = next((record[column] for column in QUESTION_COLUMNS if record.get(column) is not None), "")
    if not isinstance(found, str):
        raise UsageError(f"{where}: the question must be a text, not {found!r}", hint="write one line a question")
    return found.strip()


def _turns(found: Any, where: str) -> tuple[tuple[str, str], ...]:
    pairs: list[Any] = found if isinstance(found, list) else [None]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(part, str) for part in p) for p in pairs):
        raise UsageError(
            f"{where}: 'turns' must be a list of pairs", hint='write [["earlier question", "its answer"], ...]'
        )
    return tuple((question, answer) for question, answer in pairs)


def _refuse_unknown_texts(record: Mapping[str, Any], where: str) -> None:
    if any(record.get(column) is not None for column in (*TEXT_COLUMNS, *LABEL_COLUMNS)):
        return
    others = [column for column, value in record.items() if column not in KNOWN and isinstance(value, str | list)]
    if others:
        near = [hint for other in others if (hint := closest(other, TEXT_COLUMNS)).startswith("did you mean")]
        raise UsageError(
            f"{where} has no text column; it has " + ", ".join(f"'{other}'" for other in others),
            hint=near[0] if near else "known: " + ", ".join(TEXT_COLUMNS),
        )


def _texts(found: Any, column: str, where: str) -> list[str]:
    items = [found] if isinstance(found, str) else found
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UsageError(f"{where}: '{column}' must be a text or a list of texts", hint="write text in quotes")
    return [text for item in items if (text := item.strip())]


def _label(found: Any, column: str, where: str) -> str | None:
    if found is None or isinstance(found, str):
        return found
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    raise UsageError(f"{where}: '{column}' must be a text or a whole number", hint="write one label for each sample")


def _files(record: Mapping[str, Any], where: str) -> list[str]:
    """Return the names of images and recordings: of the columns known by name first, then of those known by their ending."""
    others = [column for column in record if column.endswith(FILE_ENDINGS) and column not in FRAME_COLUMNS]
    names: list[str] = []
    for column in dict.fromkeys((*FILE_COLUMNS, *LIST_COLUMNS, *others)):
        found = record.get(column)
        if column in LIST_COLUMNS or column.endswith("_file_names"):
            names += [] if found is None else _names(found, column, where)
        elif found is not None:
            names.append(_file(found, column, where))
    return names


def _frames(record: Mapping[str, Any], where: str) -> tuple[str, ...] | str:
    found = [(column, record[column]) for column in FRAME_COLUMNS if record.get(column) is not None]
    if not found:
        return ()
    (column, names), *second = found
    if second:
        raise UsageError(f"{where} has both {' and '.join(FRAME_COLUMNS)}", hint="write one of them")
    return names if isinstance(names, str) and names else tuple(_names(names, column, where))


def _names(found: Any, column: str, where: str) -> list[str]:
    if not isinstance(found, list) or not found:
        raise UsageError(
            f"{where}: '{column}' must be a list of file names", hint=f'write "{column}": ["1.png", "2.png"]'
        )
    return [_file(name, column, where) for name in found]


def _frame_rate(found: Any, where: str) -> float | None:
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1000:
        raise UsageError(f"{where}: fps {found!r} is not a positive number", hint="write frames per second, such as 2")
    return float(found)


def _file(found: Any, column: str, where: str) -> str:
    if not isinstance(found, str) or not found:
        raise UsageError(f"{where}: '{column}' must be a file name", hint="write a path inside the data folder")
    return found
