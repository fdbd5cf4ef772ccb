"""A graph is refused where the exporter copied weights or unpacked integers, and only there."""

from __future__ import annotations

import numpy as np
import pytest
from onnxscript import ir

from mmcompress.errors import GateFailed
from mmcompress.export.promises import SLACK_BYTES, Promise, check_promise

FLOATS = 100_000
PROMISED = Promise(bytes=FLOATS * 4 + 500, quantized=1, quantized_bytes=500)


def graph(*arrays: np.ndarray) -> ir.Model:
    """A graph that is nothing but its initialisers."""
    values = [ir.Value(name=f"w{index}", const_value=ir.tensor(array)) for index, array in enumerate(arrays)]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20}), ir_version=10)


def floats(count: int) -> np.ndarray:
    return np.zeros(count, np.float32)


INTEGERS = np.zeros((25, 20), np.int8)


def test_what_was_promised_passes_with_masks_and_small_constants() -> None:
    mask = np.zeros(2 * FLOATS * 4, bool)
    check_promise(graph(floats(FLOATS), INTEGERS, mask, floats(SLACK_BYTES // 4)), PROMISED, "vision")


def test_copied_weights_are_refused() -> None:
    more = int(FLOATS * 0.01) + SLACK_BYTES // 4 + 3
    with pytest.raises(GateFailed, match=r"holds \d+ bytes of weights; the model has 400500"):
        check_promise(graph(floats(FLOATS), floats(more), INTEGERS), PROMISED, "vision")


def test_codes_of_4_bits_with_a_byte_each_are_refused() -> None:
    packed = Promise(bytes=FLOATS, quantized=1, quantized_bytes=FLOATS)
    check_promise(graph(np.zeros((100, FLOATS // 100), np.uint8)), packed, "language")
    with pytest.raises(GateFailed, match=f"holds {2 * FLOATS} bytes of weights; the model has {FLOATS}"):
        check_promise(graph(np.zeros((100, FLOATS // 50), np.uint8)), packed, "language")


def test_unpacked_integers_are_refused() -> None:
    with pytest.raises(GateFailed, match="holds 0 bytes of integer weights; the model has 500"):
        check_promise(graph(floats(FLOATS), floats(500)), PROMISED, "vision")
