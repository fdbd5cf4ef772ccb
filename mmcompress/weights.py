"""A checkpoint's files: where they are, whether they can be trusted and read, and what they hold. Nothing is executed here."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmcompress.demo import CLIP
from mmcompress.errors import MissingError, UsageError

INDEX = "model.safetensors.index.json"
DEMO_MODEL = "demo:clip"


def locate(model: str) -> Path:
    """Return the local directory of a model, fetching a hub id if that is what it is. Raises UsageError.

    ``demo:clip`` is the model that comes with the package; MissingError where it does not.
    """
    if model == DEMO_MODEL:
        if not (CLIP / "config.json").exists():
            raise MissingError(f"{model} is not part of this installation", hint="give a model directory")
        return CLIP
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(f"{model} has no config.json", hint="give a Hugging Face model directory")
        return path
    if path.exists():
        raise UsageError(
            f"{model} is a file; expected a model directory", hint="give the directory that holds config.json"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UsageError(f"there is no directory {model}", hint="give a model directory or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise UsageError(
            f"{model} is no directory, and the hub did not give it: {type(error).__name__}",
            hint="check the name and the network, or give a local directory",
        ) from error


def weight_files(directory: Path, allow_pickle: bool = False) -> list[Path]:
    """Return the weight files after checking that each can be read. Raises UsageError naming the damaged one."""
    if (directory / INDEX).exists():
        names = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise UsageError(
                f"{directory / INDEX} names files outside its directory", hint="do not use this checkpoint"
            )
        files = [directory / name for name in names]
    else:
        files = [directory / "model.safetensors"]
    missing = [file for file in files if not file.exists()]
    if missing:
        pickled = sorted(directory.glob("pytorch_model*.bin"))
        if pickled and allow_pickle:
            return pickled
        if pickled:
            raise UsageError(
                f"{pickled[0]} is pickled, and pickles can run code",
                hint="convert it to safetensors, or pass --allow-pickle (read with weights_only=True)",
            )
        raise UsageError(
            f"{missing[0]} is missing", hint="the directory needs model.safetensors (or all shards of its index)"
        )
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except SafetensorError as error:
            raise UsageError(f"{file} is damaged or cut off: {error}", hint="fetch the file again") from error
    return files


def digest(files: list[Path]) -> str:
    """Return the sha256 over the files' bytes, in the order given."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 22):
                total.update(chunk)
    return total.hexdigest()


def stored_dtype(files: list[Path]) -> str:
    """Return the dtype most floating-point elements are stored in."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    counts: dict[str, int] = {}
    for file in files:
        if file.suffix != ".safetensors":
            return "float32"
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                view = opened.get_slice(key)
                name = names.get(view.get_dtype())
                if name:
                    counts[name] = counts.get(name, 0) + math.prod(view.get_shape())
    return max(counts, key=lambda name: counts[name]) if counts else "float32"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UsageError for anything else."""
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a JSON object", hint="fetch the file again")
    return document
