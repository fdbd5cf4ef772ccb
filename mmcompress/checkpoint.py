"""Loading and saving: one code path for plain checkpoints and for `mmc` outputs.

Loading an `mmc` output builds the original class from the original config under a throw-away subclass whose `__init__` replays
every record's `apply` on meta tensors; `from_pretrained` then fills in the saved weights, and the model is handed back as an
ordinary instance of its base class. So a reloaded model is what was saved, bit for bit, and no pass needs its own loader.

Weights are stored in the dtype the original had. Computation is float32 unless asked otherwise, so `save` first rounds the
model in memory to what will be stored: what was measured is what was written.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig

import mmcompress
from mmcompress import manifest as manifests
from mmcompress.bundle import Bundle, Family, Processor
from mmcompress.card import write_card
from mmcompress.errors import MissingError, UsageError
from mmcompress.families import family_for
from mmcompress.manifest import Manifest, Record, Source
from mmcompress.passes import build
from mmcompress.passes.base import Plan
from mmcompress.plainly import loads_plainly
from mmcompress.preprocessing import quiet, read_processor
from mmcompress.room import require_room
from mmcompress.staging import staging
from mmcompress.surgery.deferred import empty
from mmcompress.surgery.float_codes import empty_codes, is_float_coded
from mmcompress.surgery.quantized_base import weights_unread
from mmcompress.weights import digest, locate, read_json, stored_dtype, weight_files

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    model: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, allow_pickle: bool = False
) -> Bundle:
    """Load a Hugging Face directory, an `mmc` output or (with a network) a hub id.

    Nothing in a checkpoint is executed: the classes come from transformers, weights from safetensors. Pickled weights are
    refused unless `allow_pickle`, and then read with ``weights_only=True``.

    Raises UsageError for a missing, damaged or unsupported checkpoint, MissingError for an absent device, OutOfMemory for a model
    larger than memory.
    """
    directory = locate(str(model))
    require_device(device)
    saved = manifests.read(directory)
    config = read_json(directory / "config.json")
    family = family_for(config)
    files = weight_files(directory, allow_pickle)
    require_room(files, dtype.itemsize)
    records: tuple[Record, ...]
    source, records = (saved.source, saved.records) if saved else (_source(directory, config, files), ())
    made = _build(directory, files, family, source, records, dtype)
    made.eval()
    bundle = Bundle(made.to(device), read_processor(directory), family, source, list(records))
    if records:
        family.write_config(made)
    return bundle


def save(
    bundle: Bundle,
    output: str | Path,
    *,
    measured: dict[str, Any] | Callable[[Path], dict[str, Any]] | None = None,
    recipe: dict[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    write_weights: Callable[[Path], None] | None = None,
) -> Manifest:
    """Write the bundle as a checkpoint directory with mmc.json and a model card; all of it appears at once or not at all.

    `measured` may be a function of the directory with the written weights, which may add files to it. `write_weights(directory)`
    writes those of a model that holds no values itself. Raises UsageError when `output` exists, OSError (ENOSPC) when the disk is
    full.
    """
    bundle.family.write_config(bundle.model)
    plain, why = loads_plainly(bundle)
    with staging(Path(output), overwrite=overwrite) as directory:
        with quiet(), _full_disk_named():
            if write_weights:
                save_configs(bundle.model, directory)
                write_weights(directory)
            else:
                with _stored_precision(bundle):
                    # The names transformers 5 computes with, not those of a class's first checkpoints: it knows how to rename
                    # only its own tensors.
                    bundle.model.save_pretrained(directory, save_original_format=False)
            bundle.processor.save(str(directory))
        written = Manifest(
            source=bundle.source,
            family=bundle.family.name,
            versions=_versions(),
            seed=seed,
            records=tuple(bundle.history),
            measured=(measured(directory) if callable(measured) else measured) or {},
            plain_transformers=plain,
            why=why,
            recipe=recipe or {},
            mmc=mmcompress.__version__,
        )
        set_config_dtype(directory / "config.json", bundle.source.dtype)
        written.write(directory)
        write_card(written, directory)
    return written


def outline(model: str | Path, *, allow_pickle: bool = False) -> Bundle:
    """Return a checkpoint's bundle whose weights are all zero and take no memory: to ask what it is made of, and what runs cost.

    Of the files only headers are read: the source of a checkpoint that is no `mmc` output has no digest. Raises what `load` raises
    of the files; whether all tensors are there is not looked at.
    """
    directory = locate(str(model))
    saved = manifests.read(directory)
    config = read_json(directory / "config.json")
    family = family_for(config)
    files = weight_files(directory, allow_pickle)
    source = saved.source if saved else _source(directory, config, files, digested=False)
    records = saved.records if saved else ()
    base = _replaying(family, source, records)
    with torch.device("meta"), quiet():
        made = base(_config(source))
    if base.can_generate() and (directory / "generation_config.json").exists():
        made.generation_config = _generation_settings(directory)
    made.__class__ = base.__mro__[1]
    made.eval()
    empty(made)
    for module in made.modules():
        if is_float_coded(module):
            empty_codes(module)
    made.tie_weights()
    return Bundle(made, read_processor(directory), family, source, list(records))


def save_configs(model: Any, directory: Path) -> None:
    """Write what `save_pretrained` writes beside the weights."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


@contextlib.contextmanager
def _full_disk_named() -> Iterator[None]:
    """Give safetensors' complaint about a full disk the errno it lacks."""
    try:
        yield
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


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


def _source(directory: Path, config: dict[str, Any], files: list[Path], digested: bool = True) -> Source:
    return Source(
        id=directory.name,
        sha256=digest(files) if digested else "",
        config=config,
        bytes=sum(file.stat().st_size for file in files),
        dtype=stored_dtype(files),
    )


def _config(source: Source) -> Any:
    with quiet():
        return AutoConfig.for_model(**source.config)


def _replaying(family: Family, source: Source, records: tuple[Record, ...]) -> Any:
    """Return a throw-away subclass of the model's class whose models are cut as `records` say."""
    base: Any = family.model_class(_config(source))

    class Replayed(base):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            replayed = Bundle(self, Processor(), family, source)
            for record in records:
                build(record.name, record.params).apply(replayed, Plan(record.plan))

    # transformers looks renamed weights of older checkpoints up by class name, in classes of its own only (5.23).
    Replayed.__name__, Replayed.__module__ = base.__name__, base.__module__
    return Replayed


def _build(
    directory: Path,
    files: Sequence[Path],
    family: Family,
    source: Source,
    records: tuple[Record, ...],
    dtype: torch.dtype,
) -> nn.Module:
    config = _config(source)
    replaying = _replaying(family, source, records)
    base = replaying.__mro__[1]
    # How transformers itself reads the layers that bitsandbytes packed.
    packed = read_json(directory / "config.json").get("quantization_config") if records else None
    if packed:
        config.quantization_config = packed
    try:
        with quiet(), weights_unread(), _tensors(files) as tensors:
            model, found = replaying.from_pretrained(
                None if tensors else directory, config=config, dtype=dtype, state_dict=tensors, output_loading_info=True
            )
    except (RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"the weights in {directory} do not fit their config: {reason}", hint="fetch the model again"
        ) from error
    if base.can_generate() and (directory / "generation_config.json").exists():
        # transformers reads it itself only where it reads the weights itself.
        model.generation_config = _generation_settings(directory)
    lost = [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]
    if lost:
        raise UsageError(
            f"the weights in {directory} lack {len(lost)} tensors, such as {sorted(lost)[0]}",
            hint="the checkpoint is incomplete or of another architecture; fetch it again",
        )
    model.__class__ = base
    if packed:
        # An ordinary model again, which is moved, copied and saved like any other.
        model.hf_quantizer.remove_quantization_config(model)
        model.config.quantization_config = packed
    return model


@contextlib.contextmanager
def _tensors(files: Sequence[Path]) -> Iterator[dict[str, Any] | None]:
    """Yield what reads each tensor when it is asked for, by name; None for pickled weights.

    Left to itself, transformers maps the file into memory and parameters stay views of that one map: a weight that a pass
    replaces would stay in memory until the last view is gone.
    """
    if any(file.suffix != ".safetensors" for file in files):
        yield None
        return
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt", backend="pread")) for file in files]
        yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _stored_precision(bundle: Bundle) -> Iterator[None]:
    """Hold the parameters in the dtype they are stored in, then return them to the dtype they compute in, rounded.

    One tensor at a time, so no second copy of the model exists. Buffers (scales) keep their dtype.
    """
    stored = DTYPES[bundle.source.dtype]
    changed = [(p, p.dtype) for p in bundle.model.parameters() if p.is_floating_point() and p.dtype != stored]
    for parameter, _ in changed:
        parameter.data = parameter.data.to(stored)
    try:
        yield
    finally:
        for parameter, computing in changed:
            parameter.data = parameter.data.to(computing)


def set_config_dtype(path: Path, dtype: str) -> None:
    document = read_json(path)
    for part in document.values():
        # transformers adds a dtype to the parts of a loaded config, and none to those of a new one.
        if isinstance(part, dict):
            part.pop("dtype", None)
    document["dtype"] = dtype
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "numpy")}


def _generation_settings(directory: Path) -> GenerationConfig:
    """Return how the model writes, from its generation_config.json. Raises UsageError where that is damaged."""
    read_json(directory / "generation_config.json")
    return GenerationConfig.from_pretrained(directory)
