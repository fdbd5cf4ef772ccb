"""ONNX export: one file per part of a model, checked against torch, with everything needed to use it beside it.

The output directory appears only when every part is exported, passes onnx.checker, keeps its dynamic axes, holds the promised
integers and agrees with torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from onnxscript import ir

import mmcompress
from mmcompress.bundle import Bundle, DualEncoder
from mmcompress.errors import UsageError, closest
from mmcompress.export.artifact import Artifact, Component, TensorSpec, sha256
from mmcompress.export.graph import simplify
from mmcompress.export.parity import ParityRow, as_records, check_parity
from mmcompress.export.promises import check_promise, promise, quantized_matrices, weights
from mmcompress.export.trace import PRECISIONS, Traced, trace, traced_parts
from mmcompress.parts import Exportable
from mmcompress.progress import Progress, Silent
from mmcompress.staging import staging

OPSETS = (20, 23)
"""What is tested: 20 is the first with Gelu, 23 the last the exporter of torch 2.13 writes."""

DEFAULT_OPSETS = {"float32": 20, "float16": 20, "bfloat16": 22}
"""The oldest that can say it, which most runtimes read: Conv takes bfloat16 from 22 on."""

EXTERNAL_BYTES = 1_800_000_000
"""Protobuf holds at most 2 GiB; larger weights go into a file beside the graph."""

Experts = Literal["auto", "chosen", "every"]
"""Which experts a token goes through in a graph."""

_PREPROCESSING = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)


@dataclass(frozen=True)
class ComponentReport:
    """How the export of one part went."""

    component: Component
    parity: tuple[ParityRow, ...]
    rewrites: dict[str, int]
    seconds: float
    opset: int
    """The operator set of the file, which some types of weights raise."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how long it took."""

    artifact: Artifact
    components: tuple[ComponentReport, ...]
    seconds: float


def export_onnx(
    bundle: Bundle,
    out: Path,
    *,
    towers: Sequence[str] | None = None,
    precision: str = "float32",
    opset: int | None = None,
    batches: Sequence[int] = (1, 2, 7),
    experts: Experts = "auto",
    progress: Progress | None = None,
) -> ExportReport:
    """Write an ONNX file for each part, the preprocessing files and artifact.json into the new directory `out`.

    A part is a tower that embeds, or what a family whose models answer in text is cut into. `precision` is the dtype of weights and
    arithmetic; inputs and outputs stay float32. `opset` None takes the oldest that can say it. `batches` are the batch sizes at
    which the graph is compared with torch. `experts`: see `through_chosen`.

    Raises UsageError (existing output, unknown tower or precision, a model torch cannot trace), GateFailed (the graph
    does not compute or hold what the model does), OutOfMemory (disk full).
    """
    with staging(Path(out)) as directory:
        report = write_onnx(
            bundle,
            directory,
            towers=towers,
            precision=precision,
            opset=opset,
            batches=batches,
            experts=experts,
            progress=progress,
        )
    final = Artifact(**{**vars(report.artifact), "directory": Path(out)})
    return ExportReport(final, report.components, report.seconds)


def write_onnx(
    bundle: Bundle,
    directory: Path,
    *,
    towers: Sequence[str] | None = None,
    precision: str = "float32",
    opset: int | None = None,
    batches: Sequence[int] = (1, 2, 7),
    experts: Experts = "auto",
    progress: Progress | None = None,
) -> ExportReport:
    """Do what `export_onnx` does, into a directory that the caller has made and stages."""
    opset = _check_options(precision, opset, batches)
    chosen = through_chosen(bundle, experts, precision)
    modules = {module.part.name: module for module in traced_parts(bundle, precision)}
    for name in towers or ():
        if name not in modules:
            raise UsageError(f"{bundle.family.name} has no part '{name}' to export", hint=closest(name, modules))
    if towers and not isinstance(bundle.family, DualEncoder) and set(towers) != set(modules):
        raise UsageError(
            f"{', '.join(towers)} alone cannot answer: {bundle.family.name} is {', '.join(modules)}",
            hint="export all parts: leave --tower out",
        )
    progress = progress or Silent()
    begun = time.perf_counter()
    reports = []
    progress.start("export", 3 * len(towers or modules))
    try:
        for name in towers or modules:
            reports.append(_export_part(bundle, directory, modules[name], precision, opset, chosen, batches, progress))
    finally:
        progress.finish()
    bundle.processor.save(str(directory))
    artifact = _describe(bundle, directory, reports, precision, max(report.opset for report in reports))
    artifact.write()
    return ExportReport(artifact, tuple(reports), time.perf_counter() - begun)


def _export_part(
    bundle: Bundle,
    directory: Path,
    module: Traced,
    precision: str,
    opset: int,
    chosen: bool,
    batches: Sequence[int],
    progress: Progress,
) -> ComponentReport:
    begun, name = time.perf_counter(), module.part.name
    graph = trace(module, opset, chosen)
    model = graph.model
    progress.advance(note=f"{name} traced")
    rewrites = simplify(model)
    promised = promise(module, graph)
    check_promise(model, promised, name)
    _stamp(model, bundle, name)
    path = directory / f"{name}.onnx"
    data = f"{path.name}.data" if sum(weights(model).values()) > EXTERNAL_BYTES else ""
    ir.save(model, path, external_data=data or None)
    files = [path, directory / data] if data else [path]
    onnx.checker.check_model(str(path), full_check=True)
    progress.advance(note=f"{name} written")
    operators = Counter(node.op_type for node in model.graph)
    rows = check_parity(module, path, precision=precision, batches=batches, used=graph.used)
    progress.advance(note=f"{name} agrees with torch")
    component = Component(
        name=name,
        file=path.name,
        bytes=sum(file.stat().st_size for file in files),
        sha256=sha256(*files),
        data=data,
        inputs=_specs(model.graph.inputs),
        outputs=_specs(model.graph.outputs),
        nodes=dict(sorted(operators.items())),
        weights=weights(model),
        tokens=module.part.most_tokens,
        quantized=quantized_matrices(model),
        parity=as_records(rows),
    )
    return ComponentReport(component, rows, rewrites, time.perf_counter() - begun, model.opset_imports[""])


def through_chosen(bundle: Bundle, experts: Experts, precision: str) -> bool:
    """Return whether tokens go through the experts chosen for them alone: onnxruntime has operators for that, no other runtime.

    "auto": they do in float32, unless a model was quantized for another target. Raises UsageError where that is asked for and
    cannot be.
    """
    if experts == "chosen" and precision != "float32":
        raise UsageError(
            f"experts are to be 'chosen' in {precision}, and onnxruntime's CPU operator of floats takes float32 alone",
            hint="leave --precision out, or use --experts every",
        )
    if experts == "chosen" and not any(block.experts for tower in bundle.towers() for block in tower.blocks):
        raise UsageError(
            f"experts are to be 'chosen', and {bundle.family.name} models have none", hint="leave --experts out"
        )
    targets = [record.params.get("target", "cpu") for record in bundle.history if record.name == "quantize"]
    return precision == "float32" and (experts == "chosen" or (experts == "auto" and set(targets) <= {"cpu"}))


def experts_for(runners: Collection[str]) -> Experts:
    """Return the form of experts that all of `runners` have."""
    return "auto" if set(runners) <= {"torch", "onnxruntime"} else "every"


def _check_options(precision: str, opset: int | None, batches: Sequence[int]) -> int:
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision is '{precision}'; expected one of {', '.join(PRECISIONS)}", hint=closest(precision, PRECISIONS)
        )
    least = DEFAULT_OPSETS[precision]
    opset = least if opset is None else opset
    if not least <= opset <= OPSETS[1]:
        raise UsageError(
            f"opset is {opset}; expected {least} to {OPSETS[1]} for {precision}", hint=f"{least} is read most widely"
        )
    if not batches or min(batches) < 1:
        raise UsageError(f"batches is {tuple(batches)}; expected sizes of at least 1", hint="such as 1,2,7")
    return opset


def _stamp(model: ir.Model, bundle: Bundle, part: str) -> None:
    """Say in the file itself what it is and where it came from."""
    model.producer_name, model.producer_version = "mmcompress", mmcompress.__version__
    model.graph.name = f"{bundle.family.name}.{part}"
    model.metadata_props.update(
        {
            "mmc.version": mmcompress.__version__,
            "mmc.source": bundle.source.id,
            "mmc.source_sha256": bundle.source.sha256,
            "mmc.passes": ", ".join(record.name for record in bundle.history),
        }
    )


def _specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    made = []
    for value in values:
        assert value.shape is not None
        assert value.dtype is not None
        dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        made.append(TensorSpec(str(value.name), value.dtype.numpy().name, dims))
    return tuple(made)


def _generation(bundle: Bundle) -> dict[str, Any] | None:
    if not isinstance(bundle.family, Exportable):
        return None
    settings = getattr(bundle.model, "generation_config", None)  # those that choose among given answers have none
    return settings.to_dict() if settings is not None else {}


def _describe(
    bundle: Bundle, directory: Path, reports: Sequence[ComponentReport], precision: str, opset: int
) -> Artifact:
    dual = isinstance(bundle.family, DualEncoder)
    scale, bias = bundle.dual.similarity(bundle.model) if dual else (torch.ones(()), torch.zeros(()))
    source = asdict(bundle.source)
    del source["config"]  # of the original; the exported model's own is kept below
    width = reports[0].component.outputs[0].dims[-1] if dual else 0
    assert isinstance(width, int)
    return Artifact(
        directory=directory,
        components=tuple(report.component for report in reports),
        family=bundle.family.name,
        config=json.loads(bundle.model.config.to_json_string(use_diff=False))
        | {"architectures": [type(bundle.model).__name__]},
        source=source,
        records=tuple({**asdict(record), "seconds": round(record.seconds, 3)} for record in bundle.history),
        embedding=width,
        similarity=(float(scale.detach()), float(bias.detach())),
        generation=_generation(bundle),
        precision=precision,
        opset=opset,
        preprocessing=tuple(name for name in _PREPROCESSING if (directory / name).is_file()),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
        mmc=mmcompress.__version__,
    )
