"""Images and videos of Qwen-VL models as patches and in prompts; a video's patches are made from those of its frames.

transformers' video processors need torchvision. They cut a frame as image processors cut an image, but lay two frames that follow
one another into each patch where an image lies twice. So each frame goes through the image processor, at the size a video's frames
are drawn at, and half of each patch is taken from one frame and half from the next.

Shape alphabet: P patches of an image, C colours, F frames in a patch, S pixels of a patch in one frame, T layers of F frames.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmcompress.data import Video

SETTINGS = "video_preprocessor_config.json"


def image_patches(processor: Processor, image: Image) -> tuple[Tensor, Tensor]:
    """Return the patches (P, C * F * S) of an image and its grid (3,): 1, rows, columns."""
    made = processor.image(images=[image], return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"][0]


def video_patches(processor: Processor, video: Video, kind: str) -> tuple[Tensor, Tensor]:
    """Return the patches (T * P, C * F * S) of a video and its grid (3,): T, rows, columns. `kind` is the config's model_type.

    Where the last layer lacks frames the last one is repeated, as transformers does.
    """
    layer = processor.image.temporal_patch_size
    size = frame_pixels(processor, len(video.frames), kind)
    made = processor.image(images=list(video.frames), return_tensors="pt", **({"size": size} if size else {}))
    grid = made["image_grid_thw"][0]
    frames = made["pixel_values"].unflatten(0, (len(video.frames), -1))
    missing = -len(frames) % layer
    frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1)])
    side = processor.image.patch_size**2
    # An image processor puts one frame into all F places of its patches: any of them will do.
    cut = frames.unflatten(-1, (-1, layer, side))[..., 0, :]
    layers = cut.unflatten(0, (-1, layer)).permute(0, 2, 3, 1, 4)
    return layers.flatten(2).flatten(0, 1), torch.stack([torch.tensor(len(layers)), *grid[1:]])


def frame_pixels(processor: Processor, frames: int, kind: str) -> dict[str, int] | None:
    """Return the least and the most pixels of a frame, as image processors take them; None: as many as an image.

    From the video processor's settings of the checkpoint. Qwen3 counts the pixels of all frames together.
    """
    settings = video_settings(processor)
    size = settings.get("size") or {}
    least = settings.get("min_pixels", size.get("shortest_edge"))
    most = settings.get("max_pixels", size.get("longest_edge"))
    if not least or not most:
        return None
    share = frames if kind == "qwen3_vl" else 1
    return {"shortest_edge": max(1, least // share), "longest_edge": max(1, most // share)}


def video_settings(processor: Processor) -> dict[str, Any]:
    """Return the settings of the checkpoint's video processor: of its own file, or inside processor_config.json."""
    for name, key in ((SETTINGS, None), ("processor_config.json", "video_processor")):
        if name in processor.files:
            try:
                found = json.loads(processor.files[name])
            except ValueError as error:
                raise UsageError(f"{name} is not JSON: {error}", hint="fetch the model again") from error
            found = found.get(key) if key and isinstance(found, dict) else found
            if isinstance(found, dict):
                return found
    return {}


def in_words(times: Sequence[float], token: str, count: int, around: tuple[str, str]) -> str:
    """Return how Qwen3 is told of a video: of each layer its time in seconds, then `count` tokens with what is `around`."""
    before, after = around
    return "".join(f"<{seconds:.1f} seconds>{before}{token * count}{after}" for seconds in times)


def by_kind(images: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the inputs of images and of videos, as far as there are some, under "image" and "video"."""
    if not images:
        return {}
    if "grid_seconds" not in images:
        return {"image": images}
    moving = images["grid_seconds"] > 0
    parts = {"image": ~moving, "video": moving}
    return {kind: {key: value[rows] for key, value in images.items()} for kind, rows in parts.items() if rows.any()}


def packed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return pictures (B, patches, …) with the patches of all in one row."""
    if not inputs:
        return {}
    counts = inputs["image_grid_thw"].prod(-1).tolist()
    rows = [patches[:count] for patches, count in zip(inputs["pixel_values"], counts, strict=True)]
    return {**inputs, "pixel_values": torch.cat(rows)}
