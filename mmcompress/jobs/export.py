"""`mmc export --to tensorrt`: engines from a checkpoint, or from a directory that was exported to ONNX before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.artifact import Artifact, is_artifact, open_artifact
from mmcompress.export.tensorrt import ApiName, EngineOptions, EngineReport, Profile, export_tensorrt, load_api
from mmcompress.progress import Progress


def export_engines(
    model: str | Path,
    output: Path,
    *,
    towers: Sequence[str],
    precision: str | None,
    batches: Sequence[int],
    batch: Profile,
    tokens: Profile | None,
    api: ApiName,
    capabilities: tuple[str, ...],
    workspace: int,
    timing_cache: Path | None,
    progress: Progress,
) -> EngineReport:
    """Build engines from `model` into `output`.

    Raises UsageError when something is asked of an exported directory that was decided when it was exported, and what
    `export_tensorrt` raises.
    """
    load_api(api)  # before minutes of tracing
    source: Bundle | Artifact
    if is_artifact(model):
        source = open_artifact(model)
        for name, given in (("--tower", towers), ("--precision", precision)):
            if given:
                raise UsageError(f"{model} is exported already; {name} was decided then", hint="give the checkpoint")
    else:
        source = checkpoint.load(model)
    options = EngineOptions(
        api=api,
        batch=batch,
        tokens=tokens,
        workspace_mib=workspace,
        timing_cache=timing_cache,
        capabilities=capabilities,
    )
    return export_tensorrt(
        source,
        output,
        options,
        towers=towers or None,
        precision=precision or "float16",
        batches=batches,
        progress=progress,
    )
