"""Bytes and parameters: everything that belongs to an artifact counts, and counts once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from mmcompress.errors import UsageError
from mmcompress.measure.size import artifact_size, parameters


def test_a_folder_is_summed_per_kind_and_links_count_once(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_bytes(b"x" * 7)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "vocab.model").write_bytes(b"x" * 5)
    os.link(tmp_path / "model.safetensors", tmp_path / "again.safetensors")
    (tmp_path / "once-more.safetensors").symlink_to(tmp_path / "model.safetensors")
    found = artifact_size(tmp_path)
    assert found.by_kind == {"config": 7, "other": 5, "weights": 100}
    assert (found.total, found.files) == (112, 3)
    assert json.loads(json.dumps(found.to_json()))["total"] == 112


def test_a_graph_counts_with_its_external_data(tiny_onnx: Path, tmp_path: Path) -> None:
    found = artifact_size(tiny_onnx)
    data = tiny_onnx.with_name("tiny.onnx.data").stat().st_size
    assert found.by_kind == {"graph": tiny_onnx.stat().st_size, "graph data": data}
    shutil.copy(tiny_onnx, tmp_path / "alone.onnx")
    with pytest.raises(UsageError, match="not beside it"):
        artifact_size(tmp_path / "alone.onnx")


def test_an_openvino_graph_counts_with_its_weights(tmp_path: Path) -> None:
    (tmp_path / "net.xml").write_bytes(b"x" * 3)
    (tmp_path / "net.bin").write_bytes(b"x" * 11)
    assert artifact_size(tmp_path / "net.xml").by_kind == {"graph": 3, "weights": 11}


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file or folder"):
        artifact_size(tmp_path / "absent")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("codes", torch.zeros(6, 4, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(6))
        self.register_buffer("passing", torch.zeros(99, 99), persistent=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_tensors_count_once_and_quantized_buffers_count(device: str) -> None:
    with torch.device(device):
        found = parameters(Tied())
    assert found.trainable == 40 + 10
    assert found.elements == 40 + 10 + 3 + 24
    assert found.by_dtype == {"float32": 4 * (40 + 10 + 3 + 6), "int8": 24}
    assert found.bytes == sum(found.by_dtype.values())


def test_a_pruned_layer_has_fewer_parameters_exactly() -> None:
    assert parameters(nn.Linear(8, 5)).elements - parameters(nn.Linear(8, 3)).elements == 2 * 8 + 2
