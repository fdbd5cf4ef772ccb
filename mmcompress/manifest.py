"""mmc.json: where an artifact came from, what was done to it, and what was measured.

Reading it back is enough to rebuild the model's structure: `records` hold every pass with its parameters and its recorded
plan. Weights are never in here, and neither is anything about the machine that does not change a result.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmcompress.errors import UsageError

FILE_NAME = "mmc.json"
SCHEMA = 1

Json = Any
"""A value the json module can write: None, bool, int, float, str, list or dict of these."""


@dataclass(frozen=True)
class Source:
    """The checkpoint everything started from."""

    id: str
    """Hub id or directory name; never a machine path."""
    revision: str = ""
    sha256: str = ""
    """Digest over the weight files' bytes, in name order."""
    config: dict[str, Json] = field(default_factory=dict)
    """The original config.json: what replaying the records starts from."""
    bytes: int = 0
    """Size of the original weight files."""
    dtype: str = "float32"
    """What the original stores its floating-point weights as; outputs are stored as the same."""


@dataclass(frozen=True)
class Record:
    """One pass that was run: enough to replay its `apply`, and what it found."""

    name: str
    params: dict[str, Json]
    plan: dict[str, Json]
    facts: dict[str, Json] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """The content of mmc.json."""

    source: Source
    family: str
    versions: dict[str, str]
    seed: int
    records: tuple[Record, ...]
    measured: dict[str, Json] = field(default_factory=dict)
    plain_transformers: bool = True
    why: str = ""
    """What plain transformers would get wrong; where `plain_transformers` is true, what it needs beside itself, if anything."""
    recipe: dict[str, Json] = field(default_factory=dict)
    mmc: str = ""
    schema: int = SCHEMA

    def write(self, directory: Path) -> None:
        """Write mmc.json, the same bytes for the same content."""
        document = asdict(self)
        for record in document["records"]:
            record["pass"] = record.pop("name")
        (directory / FILE_NAME).write_text(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read(directory: Path) -> Manifest | None:
    """Return the manifest of an `mmc` output, or None for a plain checkpoint.

    Raises UsageError when mmc.json is there but is not readable by this version.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        if document["schema"] > SCHEMA:
            raise UsageError(
                f"{path} has schema {document['schema']}; this mmc reads up to {SCHEMA}",
                hint=f"install mmcompress {document.get('mmc', '')} or newer",
            )
        records = tuple(Record(name=r.pop("pass"), **r) for r in document.pop("records"))
        return Manifest(**{**document, "source": Source(**document["source"]), "records": records})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged: {error}", hint="restore the file or start from the original model"
        ) from error
