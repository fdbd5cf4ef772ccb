"""A tiny vision block, exported once for all tests of the measurements."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn


def pixels(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixel_values": np.random.default_rng(seed).normal(size=(batch, 3, 8, 8)).astype(np.float32)}


class TinyVision(nn.Module):
    """Pixels (B,3,8,8) -> embeddings (B,5): convolution to 4 tokens, attention, MLP, mean."""

    output_names = ("embeddings",)

    def __init__(self, neurons: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.qkv = nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, neurons), nn.Linear(neurons, 8)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.down(torch.relu(self.up(mixed)))
        return self.head(tokens.mean(1))


@pytest.fixture(scope="session")
def tiny_vision() -> TinyVision:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyVision().eval()


@pytest.fixture(scope="session")
def tiny_onnx(tiny_vision: TinyVision, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same block as ONNX with an open batch, its weights in a file beside the graph."""
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tiny_vision,
            (torch.zeros(2, 3, 8, 8),),
            str(path),
            dynamo=True,
            external_data=True,
            input_names=["pixel_values"],
            output_names=["embeddings"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    return path
