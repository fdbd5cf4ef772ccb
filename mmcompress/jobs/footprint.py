"""Peak memory of one tower in one runner: loaded and run once in a fresh process that imports nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcompress.export.artifact import TensorSpec
from mmcompress.measure.memory import PeakMemory, peak_rss_of

MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "torch": "torch"}


def footprint(
    runner: str, path: Path, tower: str, specs: tuple[TensorSpec, ...], *, batch: int, tokens: int, threads: int
) -> PeakMemory | None:
    """Return the peak of loading `path` (a graph, or a checkpoint for torch) and encoding one batch; None on a device of its own.

    `added` leaves out the interpreter and the engine's own libraries.
    """
    if runner not in MODULES:
        return None
    inputs = [[spec.name, spec.dtype, list(spec.dims)] for spec in specs]
    imports = ("numpy", MODULES[runner], *(("transformers",) if runner == "torch" else ()))
    return peak_rss_of(
        "mmcompress.jobs.footprint:encode_once",
        [runner, str(path), tower, inputs, batch, tokens, threads],
        imports=imports,
    )


def encode_once(
    runner: str, path: str, tower: str, inputs: list[list[Any]], batch: int, tokens: int, threads: int
) -> None:
    """Load and encode one batch; what the fresh process runs."""
    from mmcompress.jobs.arrays import arrays_for

    arrays = arrays_for([TensorSpec(name, dtype, tuple(dims)) for name, dtype, dims in inputs], batch, tokens)
    if runner == "torch":
        import torch

        from mmcompress import checkpoint

        torch.set_num_threads(threads)
        bundle = checkpoint.load(path)
        with torch.inference_mode():
            bundle.encode(tower, {name: torch.from_numpy(array) for name, array in arrays.items()})
        return
    from mmcompress.measure.runners import open_runner

    opened = open_runner(runner, Path(path), threads)
    opened.run(arrays)
    opened.close()
