"""Retrieval and zero-shot accuracy of a two-tower checkpoint on drawings, with plain transformers only.

This is the reference that the product's own evaluation is compared with, so it shares no code with it.

    python -m bench.quality MODEL_FOLDER
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from bench import assets


def ranks(queries: Tensor, keys: Tensor) -> Tensor:
    """Rank (0 = first) of key i for query i, both (B, C) and normalised; ties count against the model."""
    scores = queries @ keys.T
    return (scores >= scores.diagonal().unsqueeze(1)).sum(1) - 1


def recall(found: Tensor, within: int, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Share of ranks below `within` with its 95% bootstrap interval over the queries."""
    hits = (found < within).double().numpy()
    draws = np.random.default_rng(seed).integers(0, len(hits), (resamples, len(hits)))
    low, high = np.quantile(hits[draws].mean(1), (0.025, 0.975))
    return {"value": round(float(hits.mean()), 4), "interval95": [round(float(low), 4), round(float(high), 4)]}


def retrieval(image: Tensor, text: Tensor) -> dict[str, Any]:
    """R@1/5/10 both ways for paired, normalised embeddings (B, C): one caption per image, all B captions to choose from."""
    ways = {"image_to_text": ranks(image, text), "text_to_image": ranks(text, image)}
    table = {way: {f"R@{k}": recall(found, k) for k in (1, 5, 10)} for way, found in ways.items()}
    return {"n": len(image), **table}


def zero_shot(image: Tensor, label: Tensor, classes: Tensor) -> dict[str, Any]:
    """Top-1/5 for image embeddings (B, C), class numbers (B,) and class embeddings (K, C)."""
    scores = image @ classes.T
    place = (scores > scores.gather(1, label[:, None])).sum(1)
    return {"classes": len(classes), **{f"top{k}": recall(place, k) for k in (1, 5)}}


def brief(result: dict[str, Any]) -> str:
    """One line of a retrieval result."""
    ways = ("image_to_text", "text_to_image")
    return " ".join(f"{way} {k} {result[way][k]['value']:.3f}" for way in ways for k in ("R@1", "R@5"))


class Checkpoint:
    """A CLIPModel or VisionTextDualEncoderModel folder in eval mode, fp32, with its image processor and tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.images = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Normalised embeddings (B, C)."""
        parts = []
        for start in range(0, len(texts), 256):
            batch = self.tokenizer(texts[start : start + 256], padding=True, truncation=True, return_tensors="pt")
            parts.append(self.model.get_text_features(**batch).pooler_output)
        return nn.functional.normalize(torch.cat(parts), dim=-1)

    @torch.inference_mode()
    def embed_images(self, files: list[Path]) -> Tensor:
        """Normalised embeddings (B, C)."""
        parts = []
        for start in range(0, len(files), 64):
            batch = self.images([Image.open(file) for file in files[start : start + 64]], return_tensors="pt")
            parts.append(self.model.get_image_features(**batch).pooler_output)
        return nn.functional.normalize(torch.cat(parts), dim=-1)


def measure(folder: Path) -> dict[str, Any]:
    """Retrieval and zero-shot accuracy of a checkpoint folder on the held-out vendor's drawings."""
    torch.set_num_threads(2)
    checkpoint = Checkpoint(folder)
    files, rows = [], []
    for table in sorted(assets.heldout_drawings().glob("*/metadata.jsonl")):
        for line in table.read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
            files.append(table.parent / rows[-1]["file_name"])
    image = checkpoint.embed_images(files)
    result = retrieval(image, checkpoint.embed_texts([row["text"] for row in rows]))
    prompts = json.loads((assets.DEMO / "classes.json").read_text(encoding="utf-8"))
    frames = [checkpoint.embed_texts([t.format(name) for name in prompts["classes"]]) for t in prompts["templates"]]
    classes = nn.functional.normalize(torch.stack(frames).mean(0), dim=-1)
    label = torch.tensor([prompts["classes"].index(row["label"]) for row in rows])
    result["zero_shot"] = zero_shot(image, label, classes)
    return result


def main() -> None:
    """Prints the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(json.dumps(measure(parser.parse_args().folder), indent=2))


if __name__ == "__main__":
    main()
