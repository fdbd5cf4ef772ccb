"""Running one graph and the torch module it came from on the same inputs, for comparing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from mmcompress.errors import MissingError
from mmcompress.export.four_bit_floats import has_four_bit_floats
from mmcompress.export.trace import Traced

Run = Callable[[dict[str, Tensor]], list[np.ndarray]]


def open_graph(graph: onnx.ModelProto | Path) -> tuple[Run, str]:
    """Return a function that runs the graph, and the name of what runs it: onnxruntime, else the (slow) onnx reference.

    A file is not read into a protobuf, which may hold 2 GiB only. A bfloat16 graph must be given in memory; it is widened
    in place, see `widen_bfloat16`.
    """
    if not isinstance(graph, Path):
        widen_bfloat16(graph)
    if has_four_bit_floats(onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph):
        return _in_openvino(graph)
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(str(graph) if isinstance(graph, Path) else graph)
        return (
            lambda inputs: [np.asarray(output) for output in evaluator.run(None, _arrays(inputs))]
        ), "onnx.reference"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # onnxruntime quantizes the activations of weight-only linears as well unless told that float32 is wanted.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    source = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return (lambda inputs: session.run(None, _arrays(inputs))), "onnxruntime"


def _in_openvino(graph: onnx.ModelProto | Path) -> tuple[Run, str]:
    """Return what runs a graph with types that onnxruntime does not know on CPUs."""
    try:
        import openvino
    except ImportError as error:
        raise MissingError(
            "a graph of 4-bit floats is compared with torch in OpenVINO, which is not installed",
            hint="pip install 'mmcompress[openvino]'",
        ) from error
    core = openvino.Core()
    read = core.read_model(graph if isinstance(graph, Path) else BytesIO(graph.SerializeToString()))
    hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = core.compile_model(read, "CPU", hints)

    def run(inputs: dict[str, Tensor]) -> list[np.ndarray]:
        found = compiled(_arrays(inputs))
        return [np.asarray(found[output]) for output in compiled.outputs]

    return run, "openvino"


@torch.inference_mode()
def run_torch(module: Traced, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    """Return the torch module's outputs, (B, …) each."""
    return [np.asarray(output.numpy()) for output in module(*inputs.values())]


def run_torch_blocks(module: Traced, inputs: dict[str, Tensor], blocks: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the outputs of the modules at the paths `blocks`, in the order they are called."""
    outputs: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            outputs[path] = tensor.float().numpy()

        return hook

    handles = [module.model.get_submodule(path).register_forward_hook(keep(path)) for path in blocks]
    try:
        run_torch(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def widen_bfloat16(graph: onnx.ModelProto) -> None:
    """Turn bfloat16 into float32 in place: no CPU runtime has its kernels, and the rounded weights stay what they are."""
    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    found = False
    for tensor in graph.graph.initializer:
        if tensor.data_type == narrow:
            found = True
            tensor.CopyFrom(_widened(tensor))
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == narrow:
                found, attribute.i = True, wide
            if attribute.HasField("t") and attribute.t.data_type == narrow:
                attribute.t.CopyFrom(_widened(attribute.t))
    if found:
        del graph.graph.value_info[:]


def _widened(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}
