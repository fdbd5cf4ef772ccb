"""What the demo CLIP learns from: the dual encoder's view of the training drawings, augmented in several ways, and of texts."""

import hashlib
import json
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench import assets
from bench.pretrained import IMAGENET_MEAN, IMAGENET_STD
from bench.quality import Checkpoint
from bench.training import Drawings, augmented, normalised
from mmcompress.packed import cache_dir

# The student's four blocks stand for groups of the teacher's; these are the last blocks of the groups.
GROUP_ENDS = (2, 5, 8, 10)
VERSIONS = 2


@dataclass(frozen=True)
class Lessons:
    """Inputs and goals, V versions of B drawings.

    pixels: (V, B, 3, S, S) uint8; hidden: (4, V, B, N, C) bfloat16, the teacher's tokens at the end of each group of blocks;
    image: (V, B, E) its embeddings; texts: T strings, captions first; text: (T, E) their embeddings; scale: () its logit scale;
    projection: (E, C) its visual projection.
    """

    pixels: Tensor
    hidden: Tensor
    image: Tensor
    texts: list[str]
    text: Tensor
    scale: Tensor
    projection: Tensor

    def only(self, keep: Tensor) -> "Lessons":
        """The drawings where `keep` (B,) is true."""
        return replace(self, pixels=self.pixels[:, keep], hidden=self.hidden[:, :, keep], image=self.image[:, keep])


def prompts(drawings: Drawings) -> list[str]:
    """Every text the student's text tower learns; the captions come first, in concept order."""
    classes = json.loads((assets.DEMO / "classes.json").read_text(encoding="utf-8"))
    texts = list(drawings.captions)
    texts += [template.format(text) for template in classes["templates"] for text in drawings.captions]
    texts += [", ".join(tags) for tags in drawings.tags if tags]
    texts += [f"{text}, {', '.join(tags[:2])}" for text, tags in zip(drawings.captions, drawings.tags, strict=True)]
    texts += [tag for tags in drawings.tags for tag in tags]
    texts += 8 * [template.format(name) for template in classes["templates"] for name in classes["classes"]]
    return texts


def lessons(drawings: Drawings, seed: int) -> Lessons:
    """Runs the teacher over VERSIONS versions of every drawing, the first as it is, and over all texts. Cached."""
    texts = prompts(drawings)
    facts = (texts, assets.dual_encoder().name, len(drawings), GROUP_ENDS, VERSIONS, seed)
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    file = cache_dir() / "training" / f"lessons-{key}.safetensors"
    if not file.exists():
        partial = file.with_suffix(".partial")
        save_file(_lessons(drawings, texts, seed), partial)
        partial.replace(file)
    return Lessons(texts=texts, **load_file(file))


@torch.inference_mode()
def _lessons(drawings: Drawings, texts: list[str], seed: int) -> dict[str, Tensor]:
    teacher = Checkpoint(assets.dual_encoder())
    unique = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(unique)}
    with torch.autocast("cpu", torch.bfloat16):
        text = teacher.embed_texts(unique)[[place[one] for one in texts]].float()
    tower, projection = teacher.model.vision_model.bfloat16(), teacher.model.visual_projection.weight.float()
    generator = torch.Generator().manual_seed(seed)
    pixels = drawings.pixels.repeat(VERSIONS, 1, 1, 1, 1)
    shape = (
        len(GROUP_ENDS),
        VERSIONS,
        len(drawings),
        tower.embeddings.position_embeddings.shape[1],
        tower.config.hidden_size,
    )
    hidden = torch.empty(shape, dtype=torch.bfloat16)
    image = torch.empty(VERSIONS, len(drawings), len(projection))
    for version in range(VERSIONS):
        for rows in torch.arange(len(drawings)).split(128):
            if version:
                pixels[version, rows] = augmented(drawings.pixels[rows], drawings.flippable[rows], generator)
            tokens = tower.embeddings(normalised(pixels[version, rows], IMAGENET_MEAN, IMAGENET_STD).bfloat16())
            for number, block in enumerate(tower.encoder.layer):
                tokens = block(tokens)
                if number in GROUP_ENDS:
                    hidden[GROUP_ENDS.index(number), version, rows] = tokens
            pooled = tower.layernorm(tokens)[:, 0].float() @ projection.T
            image[version, rows] = nn.functional.normalize(pooled, dim=-1)
        print(f"version {version + 1} of {VERSIONS} through the teacher", flush=True)
    scale = teacher.model.logit_scale.exp()
    found = {"pixels": pixels, "hidden": hidden, "image": image, "text": text, "scale": scale, "projection": projection}
    return {name: value.clone() for name, value in found.items()}
