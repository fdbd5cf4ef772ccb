"""Reading the preprocessing of a checkpoint: what its files describe, built by transformers, none of their code run."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.tokenizer import PREPROCESSING
from mmcompress.weights import read_json

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
EXTRAS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "normalizer.json",
    "chat_template.jinja",
    "video_preprocessor_config.json",
)


def read_processor(directory: Path) -> Processor:
    """Return the preprocessing of a checkpoint: the image processor, feature extractor and tokenizer its files describe.

    Raises UsageError for a file that is damaged.
    """
    image = tokenizer = audio = None
    names = (*PREPROCESSING, *TOKENIZERS, *EXTRAS)
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    for name, content in files.items():
        _require_readable(directory / name, content)
    parts = _preprocessors(directory)
    with quiet():
        # Old image processors call themselves feature extractors; those of sound know how often it was sampled.
        if any("sampling_rate" not in part for part in parts):
            image = AutoImageProcessor.from_pretrained(directory, backend="pil")
        if any("sampling_rate" in part for part in parts):
            audio = AutoFeatureExtractor.from_pretrained(directory)
        if any((directory / name).exists() for name in TOKENIZERS):
            tokenizer = _tokenizer_class(directory).from_pretrained(directory)
    return Processor(image, tokenizer, audio, files)


def _require_readable(path: Path, content: bytes) -> None:
    """Raise UsageError for a file that is not JSON, or not text, as its name says: transformers' own errors name no file."""
    try:
        if path.suffix == ".json":
            document = json.loads(content)
            if path.name == "tokenizer.json" and not (isinstance(document, dict) and "model" in document):
                raise UsageError(f"{path} describes no tokenizer", hint="fetch the model again")
        elif path.suffix in (".jinja", ".txt"):
            content.decode("utf-8")
    except ValueError as error:
        what = "JSON" if path.suffix == ".json" else "text in UTF-8"
        raise UsageError(f"{path} is not {what}: {error}", hint="fetch the model again") from error


def _preprocessors(directory: Path) -> list[dict[str, Any]]:
    """Return the settings of every preprocessor: in a file of its own, or inside processor_config.json (transformers 5)."""
    alone, together = (directory / name for name in PREPROCESSING)
    document = read_json(together) if together.exists() else {}
    parts = [document[key] for key in ("image_processor", "feature_extractor") if isinstance(document.get(key), dict)]
    return [*parts, read_json(alone)] if alone.exists() else parts


def _tokenizer_class(directory: Path) -> Any:
    """AutoTokenizer picks by model type even where the files name the generic class (transformers 5.23, siglip2)."""
    path = directory / "tokenizer_config.json"
    named = read_json(path).get("tokenizer_class") if path.exists() else None
    return PreTrainedTokenizerFast if named in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' advice about optional backends and its own loading bars; errors still raise."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torchvision.*")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
