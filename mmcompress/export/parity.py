"""Does the exported graph compute what the torch model computes, at every corner of its shapes?

The reference is the torch module that was exported, in the same precision. Float graphs must agree to a small error
relative to the largest output. Quantized and half-precision graphs round at other places than torch (a value in the
middle between two integers may go either way in fused kernels), so they are held to a cosine as well. A graph that
fails is an error that names the shape and the first block whose output differs.

Shape alphabet: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.errors import GateFailed
from mmcompress.export.trace import Encoder, token_limit

Kind = Literal["float32", "float16", "bfloat16", "quantized"]
Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal: `relative` to the largest absolute output, `cosine` per row."""

    relative: float
    cosine: float


TOLERANCES: dict[Kind, Tolerance] = {
    "float32": Tolerance(relative=1e-4, cosine=0.99999),
    "float16": Tolerance(relative=2e-2, cosine=0.999),
    "bfloat16": Tolerance(relative=1.5e-1, cosine=0.99),
    "quantized": Tolerance(relative=float("inf"), cosine=0.999),
}


@dataclass(frozen=True)
class ParityRow:
    """One comparison. `tokens` is 0 for inputs without a token axis."""

    batch: int
    tokens: int
    max_abs: float
    relative: float
    cosine: float
    runner: str


def corners(module: Encoder, batches: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Yield inputs at every corner of the shapes: each batch, with few and more tokens, and once the longest text.

    Texts keep their last token, which is where some towers read.
    """
    for batch in batches:
        example = module.family.example_inputs(module.model, module.tower, batch)
        if "input_ids" not in example:
            yield example
            continue
        length = example["input_ids"].shape[1]
        for tokens in sorted({max(2, length // 2), length}):
            yield _resized(example, tokens)
    example = module.family.example_inputs(module.model, module.tower, 1)
    if "input_ids" in example:
        limit = token_limit(module)
        if limit > example["input_ids"].shape[1]:
            yield _resized(example, limit)


def _resized(example: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
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


def check_parity(
    bundle: Bundle, module: Encoder, path: Path, *, kind: Kind, batches: Sequence[int] = (1, 2, 7)
) -> tuple[ParityRow, ...]:
    """Compare the graph at `path` with the torch module at every corner.

    Raises GateFailed naming the tower, the shape, the difference and the first block that differs.
    """
    limit = TOLERANCES[kind]
    run, runner = open_graph(path)
    rows = []
    for inputs in corners(module, batches):
        want = _reference(module, inputs)
        row = compare(want, run(_arrays(inputs))[0], inputs, runner)
        if not (row.relative <= limit.relative and row.cosine >= limit.cosine):
            where = first_divergence(bundle, module, path, inputs, limit)
            tokens = f", {row.tokens} tokens" if row.tokens else ""
            raise GateFailed(
                f"the exported {module.tower} tower differs from torch at batch {row.batch}{tokens}: "
                f"cosine {row.cosine:.5f} (limit {limit.cosine}), relative error {row.relative:.2e} (limit {limit.relative}); "
                f"first in {where or 'what follows the blocks'}",
                hint="report it with the model's config; --precision float32 without quantize tells whether rounding is the cause",
            )
        rows.append(row)
    return tuple(rows)


def compare(want: np.ndarray, got: np.ndarray, inputs: dict[str, Tensor], runner: str) -> ParityRow:
    """Return the differences between two outputs (B, C); NaN where one has NaN, which no tolerance accepts."""
    want, got = want.astype(np.float64).reshape(len(want), -1), got.astype(np.float64).reshape(len(got), -1)
    largest = float(np.abs(want - got).max())
    norms = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    cosines = (want * got).sum(axis=1) / np.maximum(norms, 1e-30)
    return ParityRow(
        batch=len(want),
        tokens=int(inputs["input_ids"].shape[1]) if "input_ids" in inputs else 0,
        max_abs=largest,
        relative=largest / max(float(np.abs(want).max()), 1e-30),
        cosine=float(cosines.min()),
        runner=runner,
    )


def as_records(rows: Sequence[ParityRow]) -> tuple[dict[str, Any], ...]:
    """Return rows as JSON-able values, rounded to what is meaningful."""
    return tuple(
        {**asdict(row), "max_abs": float(f"{row.max_abs:.2e}"), "relative": float(f"{row.relative:.2e}"),
         "cosine": round(row.cosine, 6)}
        for row in rows
    )  # fmt: skip


def first_divergence(
    bundle: Bundle, module: Encoder, path: Path, inputs: dict[str, Tensor], limit: Tolerance
) -> str | None:
    """Return the path of the first block whose output differs from torch by more than `limit`, or None.

    A block's output in the graph is the last node named after it, so a block that was optimised away is skipped.
    """
    blocks = [
        block.path
        for tower in bundle.family.towers(module.model)
        if tower.name == module.tower
        for block in tower.blocks
    ]
    graph = onnx.load(path)
    values = _block_outputs(graph, blocks)
    for name in values.values():
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    run, runner = _open(graph)
    got = dict(zip(values, run(_arrays(inputs))[1:], strict=True))
    for block, want in _torch_blocks(module, inputs, list(values)).items():
        if want.shape != got[block].shape:
            return block
        row = compare(want, got[block], inputs, runner)
        if not (row.relative <= limit.relative and row.cosine >= limit.cosine):
            return block
    return None


def _block_outputs(graph: onnx.ModelProto, blocks: Sequence[str]) -> dict[str, str]:
    found = {}
    for block in blocks:
        last = [node for node in graph.graph.node if node.name.startswith((f"{block}/", f"{block}."))]
        if last:
            found[block] = last[-1].output[0]
    return found


def _torch_blocks(module: Encoder, inputs: dict[str, Tensor], blocks: Sequence[str]) -> dict[str, np.ndarray]:
    outputs: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            outputs[path] = tensor.float().numpy()

        return hook

    handles = [module.model.get_submodule(path).register_forward_hook(keep(path)) for path in blocks]
    try:
        _reference(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


@torch.inference_mode()
def _reference(module: Encoder, inputs: dict[str, Tensor]) -> np.ndarray:
    return np.asarray(module(*inputs.values()).numpy())


def _arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}


def open_graph(path: Path) -> tuple[Run, str]:
    """Return a function that runs the graph, and the name of what runs it: onnxruntime, else the (slow) onnx reference."""
    return _open(onnx.load(path))


def _open(graph: onnx.ModelProto) -> tuple[Run, str]:
    _widen_bfloat16(graph)
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(graph)
        return (lambda inputs: [np.asarray(output) for output in evaluator.run(None, inputs)]), "onnx.reference"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # onnxruntime quantizes the activations of weight-only linears as well unless told that float32 is wanted.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return (lambda inputs: session.run(None, inputs)), "onnxruntime"


def _widen_bfloat16(graph: onnx.ModelProto) -> None:
    """Turn bfloat16 into float32 in place: no CPU runtime has its kernels, and the rounded weights stay what they are."""
    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    found = False
    for tensor in graph.graph.initializer:
        if tensor.data_type == narrow:
            found = True
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            )
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == narrow:
                found, attribute.i = True, wide
            if attribute.HasField("t") and attribute.t.data_type == narrow:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, attribute.t.name))
    if found:
        del graph.graph.value_info[:]
