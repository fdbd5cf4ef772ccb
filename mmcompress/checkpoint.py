"""Loading and saving: one code path for plain checkpoints and for `mmc` outputs.

Loading an `mmc` output builds the original class from the original config under a throw-away subclass whose `__init__` replays
every record's `apply` on meta tensors; `from_pretrained` then fills in the saved weights, and the model is handed back as an
ordinary instance of its base class. So a reloaded model is what was saved, bit for bit, and no pass needs its own loader.

Weights are stored in the dtype the original had. Computation is float32 unless asked otherwise, so `save` first rounds the
model in memory to what will be stored: what was measured is what was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast

import mmcompress
from mmcompress import manifest as manifests
from mmcompress.bundle import Bundle, Family, Processor
from mmcompress.card import write_card
from mmcompress.errors import MissingError, UsageError
from mmcompress.families import family_for
from mmcompress.manifest import Manifest, Record, Source
from mmcompress.passes import build
from mmcompress.passes.base import Plan
from mmcompress.staging import staging

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")


def load(
    model: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, allow_pickle: bool = False
) -> Bundle:
    """Load a Hugging Face directory, an `mmc` output or (with a network) a hub id.

    Nothing in a checkpoint is executed: the classes come from transformers, weights from safetensors. Pickled weights are
    refused unless `allow_pickle`, and then read with ``weights_only=True``.

    Raises UsageError for a missing, damaged or unsupported checkpoint, MissingError for an absent device.
    """
    directory = locate(str(model))
    require_device(device)
    saved = manifests.read(directory)
    config = _read_json(directory / "config.json")
    family = family_for(config)
    files = weight_files(directory, allow_pickle)
    if saved is None:
        source = Source(
            id=directory.name,
            sha256=digest(files),
            config=config,
            bytes=sum(file.stat().st_size for file in files),
            dtype=_stored_dtype(files),
        )
        records: tuple[Record, ...] = ()
    else:
        source, records = saved.source, saved.records
    made = _build(directory, family, source, records, dtype)
    made.eval()
    bundle = Bundle(made.to(device), read_processor(directory), family, source, list(records))
    if records:
        family.write_config(made)
    return bundle


def save(
    bundle: Bundle,
    output: str | Path,
    *,
    measured: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Write the bundle as a checkpoint directory with mmc.json and a model card; all of it appears at once or not at all.

    Raises UsageError when `output` exists, OutOfMemory when the disk is full.
    """
    bundle.family.write_config(bundle.model)
    plain, why = loads_plainly(bundle)
    written = Manifest(
        source=bundle.source,
        family=bundle.family.name,
        versions=_versions(),
        seed=seed,
        records=tuple(bundle.history),
        measured=measured or {},
        plain_transformers=plain,
        why=why,
        recipe=recipe or {},
        mmc=mmcompress.__version__,
    )
    with staging(Path(output), overwrite=overwrite) as directory:
        with _quiet(), _stored_precision(bundle):
            bundle.model.save_pretrained(directory)
            bundle.processor.save(str(directory))
        _set_config_dtype(directory / "config.json", bundle.source.dtype)
        written.write(directory)
        write_card(written, directory)
    return written


def loads_plainly(bundle: Bundle) -> tuple[bool, str]:
    """Return whether plain transformers rebuilds this very model from its config.json, and if not, why not.

    Found out by building it (on meta tensors) and comparing every name and shape, not by trusting what passes did.
    """
    bound = [name for name, module in bundle.model.named_modules() if "forward" in vars(module)]
    with torch.device("meta"), _quiet():
        plain = bundle.family.model_class(bundle.model.config)(bundle.model.config)
    want = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    have = {name: tuple(tensor.shape) for name, tensor in bundle.model.state_dict().items()}
    changed = sorted(set(want) ^ set(have))
    uneven = sorted(name for name in set(want) & set(have) if want[name] != have[name])
    if changed:
        return False, f"{len(changed)} tensors are stored differently, such as {changed[0]}; load with mmcompress.load"
    if uneven:
        name = uneven[0]
        return False, (
            f"config.json cannot say the shapes of {len(uneven)} tensors, such as {name} {list(have[name])}; "
            "load with mmcompress.load"
        )
    if bound:
        return (
            False,
            f"{len(bound)} modules such as {bound[0]} reduce tokens; plain transformers would run without that",
        )
    return True, ""


def locate(model: str) -> Path:
    """Return the local directory of a model, fetching a hub id if that is what it is. Raises UsageError."""
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
        names = sorted(set(_read_json(directory / INDEX)["weight_map"].values()))
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


def require_device(device: str) -> None:
    """Raise MissingError when `device` is not there, UsageError when it is not a device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"'{device}' is not a device", hint="cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            "CUDA was asked for, but torch sees no CUDA device", hint="mmc doctor shows why; or --device cpu"
        )


def _build(
    directory: Path, family: Family, source: Source, records: tuple[Record, ...], dtype: torch.dtype
) -> nn.Module:
    with _quiet():
        config = AutoConfig.for_model(**source.config)
    base: Any = family.model_class(config)

    class Replayed(base):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            replayed = Bundle(self, Processor(), family, source)
            for record in records:
                build(record.name, record.params).apply(replayed, Plan(record.plan))

    Replayed.__name__ = base.__name__
    try:
        with _quiet():
            model, found = Replayed.from_pretrained(directory, config=config, dtype=dtype, output_loading_info=True)
    except (RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"the weights in {directory} do not fit their config: {reason}", hint="fetch the model again"
        ) from error
    lost = [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]
    if lost:
        raise UsageError(
            f"the weights in {directory} lack {len(lost)} tensors, such as {sorted(lost)[0]}",
            hint="the checkpoint is incomplete or of another architecture; fetch it again",
        )
    model.__class__ = base
    return model


def read_processor(directory: Path) -> Processor:
    image = tokenizer = None
    with _quiet():
        if any((directory / name).exists() for name in PREPROCESSING):
            image = AutoImageProcessor.from_pretrained(directory, backend="pil")
        if any((directory / name).exists() for name in TOKENIZERS):
            tokenizer = _tokenizer_class(directory).from_pretrained(directory)
    names = (*PREPROCESSING, *TOKENIZERS, *TOKENIZER_EXTRAS)
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    return Processor(image, tokenizer, files)


def _tokenizer_class(directory: Path) -> Any:
    """AutoTokenizer picks by model type even where the files name the generic class (transformers 5.23, siglip2)."""
    path = directory / "tokenizer_config.json"
    named = _read_json(path).get("tokenizer_class") if path.exists() else None
    return PreTrainedTokenizerFast if named in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer


@contextlib.contextmanager
def _stored_precision(bundle: Bundle) -> Iterator[None]:
    """Hold the parameters in the dtype they are stored in, then return them to the dtype they compute in, rounded.

    One tensor at a time, so no second copy of the model exists. Buffers (scales) keep their dtype.
    """
    stored = DTYPES[bundle.source.dtype]
    changed = [(p, p.dtype) for p in bundle.model.parameters() if p.is_floating_point() and p.dtype != stored]
    for parameter, _ in changed:
        parameter.data = parameter.data.to(stored)
    yield
    for parameter, computing in changed:
        parameter.data = parameter.data.to(computing)


def _stored_dtype(files: list[Path]) -> str:
    """The dtype most floating-point elements are stored in."""
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
                    counts[name] = counts.get(name, 0) + torch.Size(view.get_shape()).numel()
    return max(counts, key=lambda name: counts[name]) if counts else "float32"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not JSON: {error}", hint="fetch the file again") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a JSON object", hint="fetch the file again")
    return document


def _set_config_dtype(path: Path, dtype: str) -> None:
    document = _read_json(path)
    for part in document.values():
        # transformers adds a dtype to the parts of a loaded config, and none to those of a new one.
        if isinstance(part, dict):
            part.pop("dtype", None)
    document["dtype"] = dtype
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "numpy")}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
