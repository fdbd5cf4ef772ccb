"""A checkpoint opened to be read tensor by tensor: its bundle, each stored tensor deferred until its values are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming, rename_source_key

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.surgery.deferred import defer


@contextmanager
def opened(model: str | Path, files: Sequence[Path], *, to_run: bool = False) -> Iterator[Bundle]:
    """Yield the checkpoint's bundle, its stored tensors deferred for as long as its files are open.

    With `to_run` tensors that are not stored have their values. Raises UsageError where a stored one is missing.
    """
    bundle = checkpoint.outline(model)
    if to_run:
        _fill_unstored(bundle.model)
    with _reader(bundle.model, files) as reading:
        for name, tensor in bundle.model.state_dict(keep_vars=True).items():
            defer(tensor, reading(name))
        yield bundle


@contextmanager
def _reader(model: Any, files: Sequence[Path]) -> Iterator[Callable[[str], Callable[[], Tensor]]]:
    """Yield a function that returns what reads a tensor, by the name the model has for it.

    One that is stored with two sides swapped is turned as it is read. Raises UsageError where tensors have to be joined or cut.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = model.state_dict()
    with ExitStack() as stack:
        found: dict[str, Callable[[], Tensor]] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt", backend="pread"))
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
                swapped: tuple[int, ...] = ()
                if pattern is not None:
                    shape, wanted = opened.get_slice(key).get_shape(), list(own[name].shape) if name in own else None
                    swapped = () if shape == wanted else _swapped(converters, pattern)
                    if _turned(shape, swapped) != wanted:
                        raise UsageError(
                            f"{file} stores {key} in another shape than the model has it",
                            hint="load and save it with transformers 5 first, which joins such tensors",
                        )
                found[name] = _slice(opened, key, swapped)

        ties = dict(getattr(model, "all_tied_weights_keys", {}))

        def reading(name: str) -> Callable[[], Tensor]:
            name = name if name in found else ties.get(name, name)
            if name not in found:
                raise UsageError(f"the checkpoint lacks {name}", hint="it is incomplete; fetch it again")
            return found[name]

        yield reading


def _swapped(converters: Sequence[WeightConverter], pattern: str) -> tuple[int, ...]:
    """Return the two sides that the converter of `pattern` swaps, where it does nothing else."""
    found = next(entry.operations for entry in converters if pattern in entry.source_patterns)
    only = found[0] if len(found) == 1 else None
    return (only.dim0, only.dim1) if isinstance(only, Transpose) else ()


def _turned(shape: list[int], swapped: tuple[int, ...]) -> list[int]:
    """Return `shape` with two sides swapped, if any."""
    return list(torch.empty(shape, device="meta").transpose(*swapped).shape) if swapped else shape


def _slice(opened: Any, key: str, swapped: tuple[int, ...] = ()) -> Callable[[], Tensor]:
    if not swapped:
        return lambda: opened.get_tensor(key)
    return lambda: opened.get_tensor(key).transpose(*swapped).contiguous()


def stored(file: Path, name: str) -> Callable[[], Tensor]:
    """Return what reads a tensor of a safetensors file."""

    def read() -> Tensor:
        with safe_open(file, framework="pt", backend="pread") as opened:
            return _slice(opened, name)()

    return read


def _fill_unstored(model: Any) -> None:
    """Give buffers that no checkpoint stores the values they have in a new model, as transformers does when it loads one."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._buffers[own] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()
