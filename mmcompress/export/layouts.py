"""The layouts of quantized checkpoints that other tools load, by name.

A new one is a file with a `Layout` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmcompress.bundle import Bundle
from mmcompress.export.layout import Layout
from mmcompress.export.layout_compressed_tensors import CompressedTensors
from mmcompress.export.layout_four_bits import Awq, Gptq
from mmcompress.surgery.quantized_base import Quantized

LAYOUTS: dict[str, Callable[[Bundle, Mapping[str, Quantized]], Layout]] = {
    "compressed-tensors": CompressedTensors.of,
    "gptq": Gptq.of,
    "awq": Awq.of,
}
"""Name -> what makes a layout for a model and its quantized layers."""
