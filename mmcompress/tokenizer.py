"""A processor's tokenizer as the document that describes it, and a processor with another one."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError

PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
"""The files beside a tokenizer's: what is done to images and sound."""


def document_of(processor: Processor) -> dict[str, Any]:
    """Return what tokenizer.json says. Raises UsageError where the tokenizer is not one of `tokenizers`."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError("the tokenizer has no tokenizer.json", hint="save it with transformers 5, which writes one")
    document: dict[str, Any] = json.loads(backend.to_str())
    return document


def with_length(processor: Processor, length: int) -> Processor:
    """Return the preprocessing with a tokenizer that knows texts to have at most `length` tokens."""
    return with_document(processor, document_of(processor), length)


def with_document(processor: Processor, document: dict[str, Any], length: int | None = None) -> Processor:
    """Return the preprocessing with another tokenizer.json, and the tokenizer's own settings as they were.

    `length`: the most tokens a text may have, where that is another number now.
    """
    old = processor.tokenizer
    special = {name: value for name, value in old.special_tokens_map.items() if isinstance(value, str)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        model_max_length=old.model_max_length if length is None else length,
        padding_side=old.padding_side,
        truncation_side=old.truncation_side,
        model_input_names=old.model_input_names,
        clean_up_tokenization_spaces=old.clean_up_tokenization_spaces,
        chat_template=getattr(old, "chat_template", None),
        **special,
    )
    files = {}
    if processor.files:
        with tempfile.TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            own = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        files = {name: content for name, content in processor.files.items() if name in PREPROCESSING} | own
    return replace(processor, tokenizer=made, files=files)
