"""From one tower of a bundle to an ONNX graph in memory: torch.export with a dynamic batch, then torch's ONNX exporter.

Inputs and outputs keep their dtype whatever the precision inside: pixel values come in and embeddings go out as float32, so that
one client serves every precision. Half precision is cast in torch (weights and activations), not in the graph: LayerNormalization
still accumulates in float32 (`stash_type` 1) and TensorRT sees a strongly typed network.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from onnxscript import ir, optimizer
from torch import Tensor, nn

from mmcompress.bundle import Bundle, DualEncoder, Family, Processor
from mmcompress.errors import UsageError
from mmcompress.export.translations import translations

OUTPUT = "embeddings"
AXES = ("batch", "tokens")
"""Names of the dynamic axes: the first of every input, and the second of token ids and their masks."""

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_HARMLESS = (
    # torch 2.13 copies its own pytree specs while exporting.
    (FutureWarning, "`isinstance(treespec, LeafSpec)` is deprecated"),
)
_HARMLESS_LOGS = {
    # torchvision is not a dependency; folding of packed weights is done by `graph.split_constants`.
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
    "onnxscript.optimizer._constant_folding": "Skipping constant folding for op Split",
    # What it says comes back as an exception, which `trace` turns into one line.
    "torch._subclasses.fake_tensor": "failed while attempting to run meta",
}


class Encoder(nn.Module):
    """One tower as a module with positional tensors in and float32 embeddings (B, C) out."""

    def __init__(
        self, family: Family, model: nn.Module, tower: str, names: tuple[str, ...], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.tower = tower
        self.names = names
        self.dtype = dtype

    def forward(self, *values: Tensor) -> Tensor:
        inputs = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in zip(self.names, values, strict=True)
        }
        return self.family.encode(self.model, self.tower, inputs).float()


def encoder(bundle: Bundle, tower: str, precision: str) -> Encoder:
    """Return the tower on the CPU in evaluation mode, cast to `precision`; the bundle itself is not changed."""
    dtype = PRECISIONS[precision]
    model = bundle.model
    stored = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if stored != {dtype} or bundle.device.type != "cpu" or model.training:
        model = copy.deepcopy(model).to(device="cpu", dtype=dtype).eval()
    names = tuple(bundle.family.example_inputs(model, tower, 1))
    return Encoder(bundle.family, model, tower, names, dtype)


def token_limit(module: Encoder) -> int:
    """Return the most tokens a text may have, 0 where the config does not say."""
    if isinstance(module.family, DualEncoder):
        return module.family.cut_texts(module.model, Processor(), ())[1]
    config: Any = module.model.config
    return int(getattr(config.get_text_config(), "max_position_embeddings", 0))


def dynamic_axes(inputs: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Return the dynamic axes of each input: the batch, and the tokens of integer inputs shaped like token ids."""
    return {
        name: AXES if value.dim() == 2 and "input_ids" in inputs and not value.is_floating_point() else AXES[:1]
        for name, value in inputs.items()
    }


def trace(module: Encoder, inputs: dict[str, Tensor], opset: int) -> ir.Model:
    """Return the tower as an ONNX graph that takes any batch (and any number of tokens).

    `inputs` is an example of at least two items. Raises UsageError when torch cannot trace the tower, or when an axis
    declared dynamic came out fixed.
    """
    axes = dynamic_axes(inputs)
    shapes = tuple(dict.fromkeys(range(len(names)), torch.export.Dim.DYNAMIC) for names in axes.values())
    with quiet(), torch.no_grad(), module.family.exporting(module.model):
        try:
            program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(shapes,), strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=[OUTPUT],
                custom_translation_table=translations(),
                verbose=False,
                verify=False,
                optimize=False,
            )
            assert exported is not None
            model = exported.model
            optimizer.optimize_ir(model, should_fold=_should_fold)
        except (torch._dynamo.exc.UserError, torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(
                f"the {module.tower} tower cannot be exported: {reason.strip()}",
                hint="mmc passes NAME says what each pass supports; export the model before the last pass to find the one",
            ) from error
    _name_axes(model, axes)
    return model


def _should_fold(node: ir.Node) -> bool | None:
    """Keep small integer tables integers: rows looked up at fixed positions are constant, and would be folded to floats.

    None leaves the choice to the optimizer.
    """
    source = node.inputs[0] if node.op_type == "Cast" else None
    return False if source is not None and source.dtype in (ir.DataType.INT8, ir.DataType.UINT8) else None


def _name_axes(model: ir.Model, axes: dict[str, tuple[str, ...]]) -> None:
    """Give the exporter's symbols (s48) the names of the axes they stand for, everywhere in the graph."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        for axis, name in enumerate(axes[str(value.name)]):
            dim = value.shape[axis]
            if not isinstance(dim, ir.SymbolicDim):
                raise UsageError(
                    f"axis {axis} ({name}) of '{value.name}' came out fixed at {dim}",
                    hint="the model's code depends on this size; it cannot be exported with a dynamic one",
                )
            names[str(dim.value)] = name
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, pattern, names) for dim in value.shape])


def _renamed(dim: Any, pattern: re.Pattern[str], names: dict[str, str]) -> Any:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return ir.SymbolicDim(pattern.sub(lambda found: names[found.group()], dim.value))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's known harmless messages, each by its text; anything else still shows."""

    def unknown(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_HARMLESS_LOGS[record.name])

    logs = [logging.getLogger(name) for name in _HARMLESS_LOGS]
    for log in logs:
        log.addFilter(unknown)
    try:
        with warnings.catch_warnings():
            for category, text in _HARMLESS:
                warnings.filterwarnings("ignore", message=re.escape(text), category=category)
            yield
    finally:
        for log in logs:
            log.removeFilter(unknown)
