"""A merged tower as an ONNX graph: same numbers at every batch size, and nothing in it that TensorRT refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context
from mmcompress.passes.merge_tokens import MergeTokens
from tests import tiny

OTHERS: list[tuple[str, Any]] = [
    *(("clip", method) for method in ("pitome", "crossget", "evit", "pool", "random")),
    *(("siglip", method) for method in ("crossget", "evit")),
]


class VisionTower(nn.Module):
    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.model = bundle.model
        self.bundle = bundle

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.bundle.family.encode(self.model, "vision", {"pixel_values": pixel_values})


def exported(family: str, settings: MergeTokens, path: Path) -> Bundle:
    bundle = tiny.bundle(family)
    settings.apply(bundle, settings.plan(bundle, Context()))
    batch = torch.export.Dim("batch")
    program: Any = torch.onnx.export(
        VisionTower(bundle).eval(),
        (bundle.example_inputs("vision", 2)["pixel_values"],),
        dynamo=True,
        verbose=False,
        opset_version=20,
        input_names=["pixel_values"],
        dynamic_shapes={"pixel_values": {0: batch}},
    )
    program.save(str(path))
    return bundle


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("clip", MergeTokens(keep=0.6)),
        ("dual_encoder_dinov2", MergeTokens(merged=(9, 0, 5))),
        ("siglip", MergeTokens(keep=0.6)),
        *((family, MergeTokens(keep=0.6, method=method)) for family, method in OTHERS),
    ],
    ids=["class", "class-masked", "attention-pool", *(f"{family}-{method}" for family, method in OTHERS)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_graph(family: str, settings: MergeTokens, tmp_path: Path) -> None:
    path = tmp_path / "vision.onnx"
    bundle = exported(family, settings, path)
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert not [kind for kind in kinds if "Scatter" in kind]
    assert not {"Loop", "NonZero"} & set(kinds)
    if family == "dual_encoder_dinov2":
        # transformers makes an all-true mask while exporting. Taken for padding it would cost a dozen operations per block; in the
        # graph there are two Where per merging block, to build the rows, and none for masks.
        assert "IsNaN" not in kinds
        assert kinds.count("Where") == 4
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        inputs = bundle.example_inputs("vision", batch)
        with torch.no_grad():
            expected = bundle.encode("vision", inputs).numpy()
        got = session.run(None, {"pixel_values": inputs["pixel_values"].numpy()})[0]
        assert got.shape == expected.shape
        assert abs(got - expected).max() <= 2e-5 * abs(expected).max()

    rtx = pytest.importorskip("tensorrt_rtx_bindings")
    logger = rtx.Logger(rtx.Logger.ERROR)
    network = rtx.Builder(logger).create_network(0)
    parser = rtx.OnnxParser(network, logger)
    assert parser.parse(path.read_bytes()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
