"""From one part of a bundle to an ONNX graph in memory: torch.export with dynamic axes, then torch's ONNX exporter.

Inputs and outputs keep their dtype whatever the precision inside: pixel values come in and embeddings go out as float32, so that
one client serves every precision. Half precision is cast in torch (weights and activations), not in the graph: LayerNormalization
still accumulates in float32 (`stash_type` 1) and TensorRT sees a strongly typed network.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnxscript import ir, optimizer
from torch import Tensor, nn

from mmcompress.bundle import Bundle, DualEncoder, Family, Processor
from mmcompress.errors import NotExportable, UsageError, closest
from mmcompress.export.translations import translations
from mmcompress.parts import BATCH, TOKENS, Divided, Exportable, Part, Sizes
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.routing import chosen_alone
from mmcompress.views import Tower

OUTPUT = "embeddings"
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


class Traced(nn.Module):
    """One part of a model as a module with positional tensors in and out, floats as float32 whatever the precision inside."""

    def __init__(self, family: Family, model: nn.Module, part: Part, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.part = part
        self.dtype = dtype

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        made = self.part.compute(self.model, *(_cast(value, self.dtype) for value in values))
        return tuple(_cast(value, torch.float32) for value in ((made,) if isinstance(made, Tensor) else made))

    def example(self, sizes: Sizes) -> dict[str, Tensor]:
        """Return valid inputs of the sizes asked for, by name."""
        found = self.part.example(sizes)
        return {name: found[name] for name in self.part.axes}


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


@dataclass(frozen=True)
class Graph:
    """A traced part."""

    model: ir.Model
    used: frozenset[str]
    """Names, within the model, of the parameters and buffers it computes with."""


def on_cpu(bundle: Bundle, precision: str) -> nn.Module:
    """Return the model on the CPU in evaluation mode, cast to `precision`; the bundle itself is not changed."""
    dtype = PRECISIONS[precision]
    model: nn.Module = bundle.model
    stored = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if stored != {dtype} or bundle.device.type != "cpu" or model.training:
        model = copy.deepcopy(model).to(device="cpu", dtype=dtype).eval()
    return model


def traced_parts(bundle: Bundle, precision: str) -> tuple[Traced, ...]:
    """Return what a bundle is exported as: the parts its family names, or one for each tower that embeds.

    Raises NotExportable for settings and layers that no graph can say.
    """
    coded = [path for path, module in bundle.model.named_modules() if is_float_coded(module)]
    if coded:
        raise NotExportable(
            f"{coded[0]} and {len(coded) - 1} more have weights of 4-bit floats, which ONNX has no product for",
            hint="quantize the original with --scheme W4A16, whose 4-bit integers export",
        )
    model, family = on_cpu(bundle, precision), bundle.family
    if isinstance(family, DualEncoder):
        parts = tuple(_tower(family, model, tower) for tower in family.towers(model))
    else:
        assert isinstance(family, Divided), "a family embeds or names its parts"
        if isinstance(family, Exportable):
            family.decoding(model)  # refuses early what the loop around the graphs cannot say
        parts = family.parts(model)
    return tuple(Traced(family, model, part, PRECISIONS[precision]) for part in parts)


def traced(bundle: Bundle, name: str, precision: str) -> Traced:
    """Return the part called `name`. Raises UsageError naming those there are."""
    found = {module.part.name: module for module in traced_parts(bundle, precision)}
    if name not in found:
        raise UsageError(f"{bundle.family.name} has no part '{name}' to export", hint=closest(name, found))
    return found[name]


def _tower(family: Family, model: Any, tower: Tower) -> Part:
    """Return a tower that embeds as a part: its inputs in, embeddings (B, C) out."""
    example = family.example_inputs(model, tower.name, 1)
    tokens = example["input_ids"].shape[1] if "input_ids" in example else 0
    limit = family.cut_texts(model, Processor(), ())[1] if tokens and isinstance(family, DualEncoder) else 0
    corners = tuple({TOKENS: count} for count in sorted({max(2, tokens // 2), tokens})) if tokens else ({},)

    def encode(model: Any, *values: Tensor) -> Tensor:
        return family.encode(model, tower.name, dict(zip(example, values, strict=True)))

    def resized(sizes: Sizes) -> dict[str, Tensor]:
        made = family.example_inputs(model, tower.name, sizes[BATCH])
        return _resized_text(made, sizes[TOKENS]) if TOKENS in sizes else made

    return Part(
        name=tower.name,
        compute=encode,
        outputs=(OUTPUT,),
        axes={
            name: (BATCH, TOKENS) if tokens and value.dim() == 2 and not value.is_floating_point() else (BATCH,)
            for name, value in example.items()
        },
        example=resized,
        traced={TOKENS: tokens} if tokens else {},
        corners=corners,
        longest={TOKENS: limit} if limit > tokens else None,
        most_tokens=limit,
        tower=tower.name,
    )


def _resized_text(example: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Cut or repeat token inputs to (B, `tokens`), keeping the last; every second row ends in padding where there is a mask."""
    made = {}
    for name, value in example.items():
        repeats = -(-tokens // value.shape[1])
        body = value[:, :-1].repeat(1, repeats + 1)[:, : tokens - 1]
        made[name] = torch.cat([body, value[:, -1:]], dim=1)
    if "attention_mask" in made:
        padding = tokens // 4
        if padding:
            made["attention_mask"][1::2, -padding:] = 0
            # What stands in the padding is the last token again, so that a tower that looks for it by id finds the first.
            made["input_ids"][1::2, -padding - 1 :] = made["input_ids"][1::2, -1:]
    return made


def trace(module: Traced, opset: int, chosen: bool = False) -> Graph:
    """Return the part as an ONNX graph that takes any batch (and any size of its other dynamic axes).

    `chosen`: tokens go through the experts chosen for them alone, where there are experts and onnxruntime's operators can say them.

    Raises UsageError when torch cannot trace it, or when an axis declared dynamic came out fixed.
    """
    part = module.part
    # Three items: a batch of 1 would be taken as fixed, and 3 is in no usual list of batches to check.
    # Copied: of a view torch would guard the base, which is not there when it looks (2.13).
    inputs = {name: value.clone() for name, value in module.example({BATCH: 3, **part.traced}).items()}
    shapes = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, name in enumerate(names) if name} for names in part.axes.values()
    )
    with quiet(), uncollected(), torch.no_grad(), chosen_alone(chosen), module.family.exporting(module.model):
        try:
            program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(shapes,), strict=False)
            model = to_onnx(program, list(inputs), list(part.outputs), opset)
        except (torch._dynamo.exc.UserError, torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(
                f"the {part.name} part cannot be exported: {reason.strip()}",
                hint="mmc passes NAME says what each pass supports; export the model before the last pass to find the one",
            ) from error
    _name_axes(model, part.axes)
    return Graph(model, _used(program))


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Leave cycles of garbage alone for a while: tracing makes millions of small objects, and looking through them again and again
    took a fifth of its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def to_onnx(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str], opset: int) -> ir.Model:
    """Return the graph of what torch has exported, quantized layers and attention in the forms that runtimes know."""
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=inputs,
        output_names=outputs,
        custom_translation_table=translations(),
        verbose=False,
        verify=False,
        optimize=False,
    )
    assert exported is not None
    optimizer.optimize_ir(exported.model, should_fold=_should_fold)
    return exported.model


def _used(program: torch.export.ExportedProgram) -> frozenset[str]:
    """Names of the parameters and buffers that the outputs are computed from, without the module around the model.

    Not of those that are computed with for nothing, as the last block of a vision tower whose connector reads the one before:
    the exporter drops such operators.
    """
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    reached, waiting = set[str](), [node for node in program.graph.nodes if node.op == "output"]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node.name not in reached:
                reached.add(node.name)
                waiting.append(node)
    return frozenset(targets[name].removeprefix("model.") for name in reached & targets.keys())


def _should_fold(node: ir.Node) -> bool | None:
    """Keep small integer tables integers: rows looked up at fixed positions are constant, and would be folded to floats.

    None leaves the choice to the optimizer.
    """
    source = node.inputs[0] if node.op_type == "Cast" else None
    return False if source is not None and source.dtype in (ir.DataType.INT8, ir.DataType.UINT8) else None


def _name_axes(model: ir.Model, axes: Mapping[str, tuple[str, ...]]) -> None:
    """Give the exporter's symbols (s48) the names of the axes they stand for, everywhere in the graph."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        for axis, name in enumerate(axes[str(value.name)]):
            if not name:
                continue
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
