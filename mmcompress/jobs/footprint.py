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


def answer_footprint(runner: str, path: Path, *, batch: int, new_tokens: int, threads: int) -> PeakMemory | None:
    """Return the peak of loading `path` (an exported directory, or a checkpoint for torch) and answering one batch."""
    if runner not in MODULES:
        return None
    imports = tuple(dict.fromkeys(("numpy", MODULES[runner], "torch", "transformers")))
    return peak_rss_of(
        "mmcompress.jobs.footprint:answer_once", [runner, str(path), batch, new_tokens, threads], imports=imports
    )


def answer_once(runner: str, path: str, batch: int, new_tokens: int, threads: int) -> None:
    """Answer one batch; what the fresh process runs."""
    from mmcompress import checkpoint
    from mmcompress.export.artifact import open_artifact
    from mmcompress.jobs.bench_answers import example_sample
    from mmcompress.measure.answerer import artifact_answerer, bundle_answerer

    if runner == "torch":
        answerer = bundle_answerer(checkpoint.load(path), threads=threads)
    else:
        answerer = artifact_answerer(open_artifact(path, verify=False), runner, threads=threads)
    answerer.writer.write(answerer.asked([example_sample(answerer.decoding)] * batch), new_tokens, to_the_end=True)


def encode_once(
    runner: str, path: str, tower: str, inputs: list[list[Any]], batch: int, tokens: int, threads: int
) -> None:
    """Load and encode one batch; what the fresh process runs."""
    from mmcompress.jobs.arrays import arrays_for

    arrays = arrays_for([TensorSpec(name, dtype, tuple(dims)) for name, dtype, dims in inputs], batch, tokens)
    if runner == "torch":
        import torch

        from mmcompress import checkpoint
        from mmcompress.jobs.bench_targets import encoder

        torch.set_num_threads(threads)
        bundle = checkpoint.load(path)
        with torch.inference_mode():
            encoder(bundle, tower)(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        return
    from mmcompress.measure.runners import open_runner

    opened = open_runner(runner, Path(path), threads)
    opened.run(arrays)
    opened.close()
