"""TensorRT engines from exported ONNX files, through `tensorrt` or through TensorRT-RTX, which share their API.

Both know strongly typed networks only: precision is in the ONNX (casts, QuantizeLinear), not in builder flags. TensorRT builds
on the GPU it will run on; TensorRT-RTX builds ahead of time without one, for compute capabilities one names.

Activations must be quantized symmetrically (int8, zero point 0): 8-bit unsigned ones, which CPUs want, are refused early.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mmcompress.bundle import Bundle, DualEncoder
from mmcompress.errors import UsageError
from mmcompress.export.artifact import Artifact, Component, sha256
from mmcompress.export.onnx import ExportReport, write_onnx
from mmcompress.export.tensorrt_api import Api, ApiName, load_api, logger_of
from mmcompress.progress import Progress, Silent
from mmcompress.staging import staging
from mmcompress.surgery.quantized_base import Quantized

FILE_NAME = "engine.json"


@dataclass(frozen=True)
class Profile:
    """Sizes a dynamic axis may have: `least` and `most` are what the engine accepts, `usual` is what it is tuned for."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most:
            raise UsageError(
                f"a profile is {self.least}:{self.usual}:{self.most}; expected 1 <= least <= usual <= most",
                hint="such as --batch 1:8:32",
            )


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built."""

    api: ApiName = "auto"
    batch: Profile = Profile(1, 8, 32)
    tokens: Profile | None = None
    """None: 1, 16 (or fewer) and the model's limit."""
    workspace_mib: int = 4096
    timing_cache: Path | None = None
    """Read when it exists, written back; makes later builds on the same GPU fast (TensorRT only)."""
    version_compatible: bool = False
    """The engine also loads in later versions of TensorRT (TensorRT only)."""
    hardware_compatible: bool = False
    """The engine also runs on later GPUs than the one it is built on, from Ampere on (TensorRT only)."""
    capabilities: tuple[str, ...] = ()
    """Compute capabilities such as "SM89" the engine must run on (TensorRT-RTX only); empty: SM80 and later."""


@dataclass(frozen=True)
class Engine:
    """One built engine: the entry of engine.json."""

    name: str
    file: str
    bytes: int
    sha256: str
    onnx_sha256: str
    precision: str
    profiles: dict[str, dict[str, list[int]]]
    """Shapes per input, as least, usual and most."""
    layers: int
    seconds: float


@dataclass(frozen=True)
class EngineReport:
    """What was built, and with what."""

    directory: Path
    api: str
    version: str
    engines: tuple[Engine, ...]
    artifact: Artifact


def export_tensorrt(
    source: Bundle | Artifact,
    out: Path,
    options: EngineOptions | None = None,
    *,
    towers: Sequence[str] | None = None,
    precision: str = "float16",
    batches: Sequence[int] = (1, 2, 7),
    progress: Progress | None = None,
) -> EngineReport:
    """Write ONNX files (from a bundle, or copied from an ONNX artifact), an engine per tower and engine.json into `out`.

    `towers`, `precision` and `batches` concern a bundle; an artifact has them already.

    Raises MissingError (no TensorRT, or no GPU where one is needed), UsageError (existing output, a graph TensorRT cannot
    parse), GateFailed (see `export_onnx`).
    """
    options, progress = options or EngineOptions(), progress or Silent()
    if not source.embedding if isinstance(source, Artifact) else not isinstance(source.family, DualEncoder):
        raise UsageError(
            "engines are built of models that embed; the cache of one that answers in text starts empty, and no engine takes that",
            hint="mmc export --to onnx, and run it in onnxruntime (--device cuda uses the GPU)",
        )
    if not isinstance(source, Artifact):
        _refuse_unsigned_layers(source, towers)
    api = load_api(options.api)
    _refuse_unused(api, options)
    with staging(Path(out)) as directory:
        if isinstance(source, Artifact):
            shutil.copytree(source.directory, directory, dirs_exist_ok=True)
            artifact = Artifact(**{**vars(source), "directory": directory})
        else:
            report: ExportReport = write_onnx(
                source, directory, towers=towers, precision=precision, batches=batches, progress=progress
            )
            artifact = report.artifact
        engines = build_engines(artifact, api, options, progress)
        _write(directory, api, options, engines)
    final = Artifact(**{**vars(artifact), "directory": Path(out)})
    return EngineReport(Path(out), api.name, api.version, engines, final)


def build_engines(
    artifact: Artifact, api: Api, options: EngineOptions, progress: Progress | None = None
) -> tuple[Engine, ...]:
    """Build one engine per component beside its ONNX file. Raises UsageError when a graph does not parse or build."""
    progress = progress or Silent()
    progress.start("engines", len(artifact.components))
    made = []
    try:
        for component in artifact.components:
            made.append(_build(artifact, component, api, options))
            progress.advance(note=component.name)
    finally:
        progress.finish()
    return tuple(made)


def _build(artifact: Artifact, component: Component, api: Api, options: EngineOptions) -> Engine:
    begun, trt, path = time.perf_counter(), api.trt, artifact.path(component.name)
    refuse_unsigned(path)
    logger = logger_of(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise UsageError(
            f"{api.name} {api.version} cannot parse {component.file}: {_parse_errors(parser)}", hint=_PARSE_HINT
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    shapes = profile_shapes(component, options)
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, least, usual, most)
    config.add_optimization_profile(profile)
    _configure(config, api, options)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reason = "; ".join(logger.errors[-3:]) or "no reason given"
        raise UsageError(
            f"{api.name} {api.version} cannot build {component.file}: {reason}", hint="a larger --workspace may help"
        )
    if api.name == "tensorrt" and options.timing_cache is not None:
        options.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    engine = artifact.directory / f"{component.name}.engine"
    engine.write_bytes(bytes(serialized))
    return Engine(
        name=component.name,
        file=engine.name,
        bytes=engine.stat().st_size,
        sha256=sha256(engine),
        onnx_sha256=component.sha256,
        precision=artifact.precision,
        profiles={
            name: {"least": list(least), "usual": list(usual), "most": list(most)}
            for name, (least, usual, most) in shapes.items()
        },
        layers=int(network.num_layers),
        seconds=round(time.perf_counter() - begun, 2),
    )


_PARSE_HINT = "export at another --precision, or report the operator with the version"


def _configure(config: Any, api: Api, options: EngineOptions) -> None:
    trt = api.trt
    if api.name == "tensorrt":
        cache = options.timing_cache
        if cache is not None:
            content = cache.read_bytes() if cache.exists() else b""
            config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.capabilities:
        config.num_compute_capabilities = len(options.capabilities)
        for index, name in enumerate(options.capabilities):
            known = trt.ComputeCapability.__members__
            if name not in known:
                raise UsageError(f"there is no compute capability '{name}'", hint="known: " + ", ".join(known))
            config.set_compute_capability(known[name], index)


def profile_shapes(
    component: Component, options: EngineOptions
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return (least, usual, most) shapes per input. Raises UsageError when more tokens are asked for than there are."""
    limit = component.tokens
    tokens = options.tokens or Profile(1, max(1, min(16, limit)), max(1, limit))
    if limit and tokens.most > limit:
        raise UsageError(
            f"the profile asks for {tokens.most} tokens; {component.name} takes {limit}", hint="lower --tokens"
        )
    sizes = {"batch": options.batch, "tokens": tokens}

    def shape(dims: tuple[int | str, ...], which: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else int(getattr(sizes[dim], which)) for dim in dims)

    return {
        spec.name: (shape(spec.dims, "least"), shape(spec.dims, "usual"), shape(spec.dims, "most"))
        for spec in component.inputs
    }


def _refuse_unused(api: Api, options: EngineOptions) -> None:
    """Raise UsageError for an option that the library in use would ignore."""
    given = {
        "tensorrt": {
            "timing_cache": options.timing_cache is not None,
            "version_compatible": options.version_compatible,
            "hardware_compatible": options.hardware_compatible,
        },
        "tensorrt_rtx": {"capabilities": bool(options.capabilities)},
    }
    for owner, fields in given.items():
        for field, used in fields.items():
            if used and owner != api.name:
                raise UsageError(
                    f"{field} is an option of {owner}; {api.name} is used", hint=f"leave it out, or take --api {owner}"
                )


def _refuse_unsigned_layers(bundle: Bundle, names: Sequence[str] | None) -> None:
    """Say before minutes of tracing what `refuse_unsigned` would say after them."""
    towers = [tower for tower in bundle.towers() if not names or tower.name in names]
    for layer, module in bundle.model.named_modules():
        if isinstance(module, Quantized) and module.reason_for_cpus and any(tower.owns(layer) for tower in towers):
            raise UsageError(f"{layer} {module.reason_for_cpus}", hint="quantize with --target tensorrt")


def refuse_unsigned(path: Path) -> None:
    """Raise UsageError for a graph with zero points other than 0: no GPU kernel takes them."""
    graph = onnx.load(path, load_external_data=False).graph
    points = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    for tensor in graph.initializer:
        if tensor.name in points and (
            tensor.data_type == onnx.TensorProto.UINT8 or np.any(onnx.numpy_helper.to_array(tensor))
        ):
            raise UsageError(
                f"{path.name} has activations with a zero point ({tensor.name}); TensorRT takes symmetric int8 only",
                hint="quantize with --target tensorrt",
            )


def _parse_errors(parser: Any) -> str:
    """One line for all parser errors: where, and the first line of what."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(f"{error.node_name()} ({error.node_operator()}): {error.desc().splitlines()[0]}")
    return "; ".join(dict.fromkeys(found)) or "no reason given"


def _write(directory: Path, api: Api, options: EngineOptions, engines: Sequence[Engine]) -> None:
    document = {
        "schema": 1,
        "api": api.name,
        "version": api.version,
        "capabilities": list(options.capabilities),
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "workspace_mib": options.workspace_mib,
        "engines": [asdict(engine) for engine in engines],
    }
    (directory / FILE_NAME).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
