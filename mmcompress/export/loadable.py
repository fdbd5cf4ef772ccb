"""`mmc export --to compressed-tensors|gptq|awq`: a checkpoint that other tools load without mmcompress.

Every layer that the layout can say keeps its integers; everything else that was quantized is written as the floats it computes
with. What plain transformers could not rebuild from config.json (reduced tokens, uneven widths) is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.checkpoint import DTYPES, save_configs, set_config_dtype
from mmcompress.errors import UsageError, closest
from mmcompress.export.layout import Layout, loses_rounding
from mmcompress.export.layouts import LAYOUTS
from mmcompress.export.loadable_card import card
from mmcompress.plainly import loads_plainly, plain_model
from mmcompress.progress import Progress, Silent
from mmcompress.staging import staging
from mmcompress.streamed import Shards
from mmcompress.surgery.experts import NAMES, QuantizedExperts, quantized_layers
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.quantized_base import Quantized, weights_unread

SHARD_BYTES = 2**32


@dataclass(frozen=True)
class LayoutReport:
    """What was written."""

    directory: Path
    layout: str
    loaded_by: str
    precision: str
    """What the tensors that are no integers are stored as."""
    kinds: dict[str, int]
    """How many layers became what."""
    floats: dict[str, str]
    """Path of each quantized layer that became floats -> why."""
    unrounded: tuple[str, ...]
    """Quantized layers whose input was rounded, and is not any more: those among them, and those that round token by token."""
    float_outputs: tuple[str, ...]
    """Query and key Linears whose output was rounded, which no layout says."""
    scales_off: float
    """The most a scale was rounded by, relative to itself."""
    bytes: int
    """Of all weight files."""
    integer_bytes: int
    """Of the layers the layout says, their scales included."""


def export_layout(
    bundle: Bundle, out: Path, name: str, *, precision: str | None = None, progress: Progress | None = None
) -> LayoutReport:
    """Write the bundle as a checkpoint in the layout `name` into the new directory `out`.

    `precision` is what floats are stored as; None: as the checkpoint has them, and for layouts with half scales never float32.
    Raises UsageError for an unknown layout, a model with nothing the layout can say, and one that plain transformers cannot
    rebuild.
    """
    if name not in LAYOUTS:
        raise UsageError(f"there is no layout '{name}'", hint=closest(name, LAYOUTS))
    quantized = quantized_layers(bundle.model)
    if any(is_float_coded(module) for module in bundle.model.modules()):
        raise UsageError(
            f"{bundle.source.id} has bitsandbytes' layers, which {name} cannot say",
            hint="load it as it is with transformers or vLLM and bitsandbytes, or quantize the original with --scheme W4A16",
        )
    if not quantized:
        raise UsageError(f"nothing of {bundle.source.id} is quantized", hint="mmc quantize MODEL -o OUT --scheme W4A16")
    layout = LAYOUTS[name](bundle, quantized)
    floats = {path: reason for path, layer in quantized.items() if (reason := _refusal(layout, path, layer))}
    said = {path: layer for path, layer in quantized.items() if path not in floats}
    _require_sayable(bundle, name, said, floats)
    stored = precision or bundle.source.dtype
    if precision is None and layout.scales is not None and stored == "float32":
        stored = "float16"
    (progress or Silent()).say(f"{len(said)} layers keep their integers, {len(floats)} become floats")
    with staging(Path(out)) as directory:
        plain = plain_model(bundle)
        linears = [path for path, module in plain.named_modules() if isinstance(module, nn.Linear) and path not in said]
        # Linears of other tools, which have no experts in one.
        linears += [block.experts.router for tower in bundle.towers() for block in tower.blocks if block.experts]
        save_configs(bundle.model, directory)
        set_config_dtype(directory / "config.json", stored)
        _add_to_config(directory / "config.json", layout.config(said, linears))
        shards = Shards(directory, DTYPES[stored], SHARD_BYTES)
        integers = 0
        for tensor_name, tensor, parameter in _tensors(bundle, layout, said, plain.all_tied_weights_keys):
            shards.add(tensor_name, tensor, parameter)
            integers += tensor.nbytes if tensor_name.rpartition(".")[0] in said and not parameter else 0
        shards.finish()
        bundle.processor.save(str(directory))
        report = LayoutReport(
            directory=Path(out),
            layout=name,
            loaded_by=layout.loaded_by,
            precision=stored,
            kinds=dict(Counter(layout.kind(layer) for layer in said.values()).most_common()),
            floats=floats,
            unrounded=tuple(path for path, layer in quantized.items() if loses_rounding(layer, path in said)),
            float_outputs=tuple(path for path, layer in quantized.items() if layer.output_grid() is not None),
            scales_off=_scales_off(layout, said.values()),
            bytes=sum(file.stat().st_size for file in directory.glob("*.safetensors")),
            integer_bytes=integers,
        )
        (directory / "README.md").write_text(card(bundle, report))
    return report


def _refusal(layout: Layout, path: str, layer: Quantized) -> str:
    """Return why a layer becomes floats; "" where it keeps its integers."""
    reason = layout.refusal(path, layer)
    gained = not reason and getattr(layer, "input_gain", None) is not None
    return "its input is multiplied by a gain that nothing before could take over" if gained else reason


def _require_sayable(bundle: Bundle, name: str, said: dict[str, Quantized], floats: dict[str, str]) -> None:
    """Raise UsageError where a loader could not make this model of the files."""
    if not said:
        reason = Counter(floats.values()).most_common(1)[0][0]
        path = next(path for path, why in floats.items() if why == reason)
        raise UsageError(
            f"{name} can say none of the {len(floats)} quantized layers ({path}: {reason})",
            hint="gptq and awq hold 4-bit Linears (--scheme W4A16); compressed-tensors holds 8-bit ones too",
        )
    bundle.family.write_config(bundle.model)
    plain, why = loads_plainly(bundle, _shapes(bundle))
    if not plain:
        raise UsageError(
            f"other tools cannot rebuild this model: {why.removesuffix('; load with mmcompress.load')}",
            hint="quantize the original alone, or use mmcompress.load",
        )


def _shapes(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model were its quantized layers floats."""
    made = {}
    with weights_unread():
        for name, tensor in _floats(bundle):
            made[name] = tuple(tensor.shape)
    return made


def _floats(bundle: Bundle, said: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by its name, the weight of a quantized layer as floats; not those of experts that are `said`."""
    for name, tensor in bundle.model.state_dict(keep_vars=True).items():
        if not isinstance(bundle.model.get_submodule(name.rpartition(".")[0]), Quantized) or name.endswith(".bias"):
            yield name, tensor
    for path, layer in bundle.model.named_modules():
        if isinstance(layer, QuantizedExperts):
            if f"{path}.0.down_proj" not in said:
                yield from ((f"{path}.{name}", layer.floats(name)) for name in NAMES)
        elif isinstance(layer, Quantized) and not isinstance(_owner(bundle, path), QuantizedExperts):
            gain = getattr(layer, "input_gain", None)
            yield f"{path}.weight", layer.weight if gain is None else layer.weight * gain


def _owner(bundle: Bundle, path: str) -> nn.Module:
    return bundle.module(path.rpartition(".")[0])


def _tensors(
    bundle: Bundle, layout: Layout, said: dict[str, Quantized], ties: dict[str, str]
) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name, tensor, whether it is stored in the precision of floats), one layer's at a time; tied ones once."""
    for path, layer in said.items():
        for name, tensor in layout.tensors(layer).items():
            yield f"{path}.{name}", tensor, False
    for name, tensor in _floats(bundle, said):
        path, _, own = name.rpartition(".")
        if name not in ties and not (path in said and own == "weight"):
            layer = bundle.model.get_submodule(path)
            yield name, tensor, isinstance(tensor, nn.Parameter) or isinstance(layer, Quantized | QuantizedExperts)


def _scales_off(layout: Layout, layers: Iterable[Quantized]) -> float:
    if layout.scales is None:
        return 0.0
    found = [layer.weight_scale.float() for layer in layers]
    return max(float(((scale.to(layout.scales).float() - scale).abs() / scale).max()) for scale in found)


def _add_to_config(path: Path, quantization: dict[str, Any]) -> None:
    document = json.loads(path.read_text())
    document["quantization_config"] = quantization
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
