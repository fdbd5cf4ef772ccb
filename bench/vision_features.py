"""Vision features of many pictures on disk, computed once: the frozen tower's work is not repeated while a decoder trains.

The file is a NumPy memory map (pictures, N patches, C) in fp16 beside a count of the pictures done, so that an interrupted run
goes on where it stopped.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessorPil, Dinov2Model

CHUNK = 32


def patch_features(tower: Dinov2Model, images: BitImageProcessorPil, pictures: Sequence[Image.Image]) -> Tensor:
    """The patches of the last block's output, without class token: (B, N, C) in float32; the tower runs in its own dtype."""
    pixels = images(list(pictures), return_tensors="pt")["pixel_values"].to(tower.dtype)
    with torch.inference_mode():
        states = tower(pixels, output_hidden_states=True).hidden_states
    return states[-1][:, 1:].float()


def cached_features(
    folder: Path, count: int, picture: Callable[[int], Image.Image], tower: Dinov2Model, images: BitImageProcessorPil
) -> np.ndarray:
    """Features of the pictures 0..count-1, read-only: (count, N, C) fp16; computes what `folder` does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    file, progress = folder / "features.npy", folder / "done"
    patches, width = (tower.config.image_size // tower.config.patch_size) ** 2, tower.config.hidden_size
    done = int(progress.read_text()) if progress.exists() else 0
    if done < count:
        mode = "r+" if done else "w+"
        table = np.lib.format.open_memmap(file, mode=mode, dtype=np.float16, shape=(count, patches, width))
        for start in range(done, count, CHUNK):
            rows = range(start, min(start + CHUNK, count))
            features = patch_features(tower, images, [picture(row) for row in rows])
            table[start : rows.stop] = features.half().numpy()
            if start // CHUNK % 20 == 19 or rows.stop == count:
                table.flush()
                progress.write_text(str(rows.stop))
                print(f"features of {rows.stop} of {count} pictures", flush=True)
    return np.load(file, mmap_mode="r")
