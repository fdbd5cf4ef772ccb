"""artifact.json: what lies in an exported directory, enough to run, evaluate and benchmark it without the checkpoint.

An exported directory holds one graph per component, the preprocessing files and artifact.json. There is no config.json on purpose:
the directory is not a checkpoint, and the model's config is kept inside artifact.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmcompress.errors import UsageError, closest

FILE_NAME = "artifact.json"
SCHEMA = 2


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; a dim is a number, or the name of a dynamic axis ("batch", "tokens")."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Component:
    """One exported graph."""

    name: str
    file: str
    bytes: int
    """Size on disk, weights kept beside the graph included."""
    sha256: str
    """Over the graph file, then the weights beside it."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: dict[str, int]
    """How often each operator occurs."""
    weights: dict[str, int]
    """Bytes of initialisers by dtype."""
    data: str = ""
    """The file with the weights, for graphs larger than protobuf can hold."""
    tokens: int = 0
    """The most tokens it takes; 0 without a token axis."""
    quantized: int = 0
    """How many weight matrices are stored as integers."""
    parity: tuple[dict[str, Any], ...] = ()
    """One row per shape the graph was compared with torch at."""


@dataclass(frozen=True)
class Artifact:
    """The content of artifact.json, and where it lies."""

    directory: Path
    components: tuple[Component, ...]
    family: str
    config: dict[str, Any]
    """The model's config as exported: what preprocessing needs to know."""
    source: dict[str, Any]
    """Of the original checkpoint: id, revision, sha256, bytes."""
    records: tuple[dict[str, Any], ...]
    """The passes that were run."""
    embedding: int
    """C of the shared space; 0 for a model that answers in text."""
    similarity: tuple[float, float]
    """(scale, bias): logits are scale * cosine + bias."""
    precision: str
    opset: int
    preprocessing: tuple[str, ...]
    """File names of the image processor and the tokenizer."""
    versions: dict[str, str] = field(default_factory=dict)
    mmc: str = ""
    generation: dict[str, Any] | None = None
    """The generation config of a model that answers in text, None for one that embeds."""
    format: str = "onnx"
    schema: int = SCHEMA

    def component(self, name: str) -> Component:
        """Return the component called `name`. Raises UsageError naming those there are."""
        found = {component.name: component for component in self.components}
        if name not in found:
            raise UsageError(f"{self.directory} has no component '{name}'", hint=closest(name, found))
        return found[name]

    def path(self, name: str) -> Path:
        """Return the graph file of a component."""
        return self.directory / self.component(name).file

    @property
    def bytes(self) -> int:
        """Size of all graphs on disk."""
        return sum(component.bytes for component in self.components)

    def write(self) -> None:
        """Write artifact.json, the same bytes for the same content."""
        document = asdict(self)
        del document["directory"]
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False)
        (self.directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def is_artifact(directory: str | Path) -> bool:
    """Whether `directory` is an exported artifact (and not a checkpoint)."""
    return (Path(directory) / FILE_NAME).is_file()


def open_artifact(directory: str | Path, *, verify: bool = True) -> Artifact:
    """Read an exported directory back; with `verify`, check every graph's bytes against its recorded sha256.

    Raises UsageError when the directory is no artifact, was written by a newer mmc, or a file is missing or damaged.
    """
    directory = Path(directory)
    path = directory / FILE_NAME
    if not path.is_file():
        raise UsageError(f"{directory} has no {FILE_NAME}", hint="give a directory made by mmc export")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] > SCHEMA:
            raise UsageError(
                f"{path} has schema {document['schema']}; this mmc reads up to {SCHEMA}",
                hint=f"install mmcompress {document.get('mmc', '')} or newer",
            )
        components = tuple(_component(part) for part in document.pop("components"))
        for key in ("records", "similarity", "preprocessing"):
            document[key] = tuple(document[key])
        artifact = Artifact(directory=directory, components=components, **document)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: {error}", hint="export the model again") from error
    for component in components:
        _check_files(directory, component, verify)
    for name in artifact.preprocessing:
        if not (directory / name).is_file():
            raise UsageError(f"{directory / name} is missing", hint="export the model again")
    return artifact


def sha256(*paths: Path) -> str:
    """Return the digest of the files' bytes, one after the other."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as opened:
            while chunk := opened.read(1 << 22):
                total.update(chunk)
    return total.hexdigest()


def _component(document: dict[str, Any]) -> Component:
    for key in ("inputs", "outputs"):
        document[key] = tuple(TensorSpec(**{**spec, "dims": tuple(spec["dims"])}) for spec in document[key])
    document["parity"] = tuple(document["parity"])
    return Component(**document)


def _check_files(directory: Path, component: Component, verify: bool) -> None:
    names = [name for name in (component.file, component.data) if name]
    for name in names:
        # A file name from a document someone else wrote must not lead out of the directory.
        if Path(name).name != name:
            raise UsageError(f"{FILE_NAME} names a file outside its directory: {name}", hint="do not use it")
        if not (directory / name).is_file():
            raise UsageError(f"{directory / name} is missing", hint="export the model again")
    paths = [directory / name for name in names]
    size = sum(path.stat().st_size for path in paths)
    if size != component.bytes or (verify and sha256(*paths) != component.sha256):
        raise UsageError(f"{paths[0]} is damaged: its bytes are not the exported ones", hint="export the model again")
