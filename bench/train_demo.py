"""Trains the CLIP that ships with the package (mmcompress/demo/clip) by distillation from the dual encoder.

The student sees augmented drawings of the training vendors; it learns (a) to name them among the captions of *all* training
concepts, against the teacher's text embeddings and against its own, (b) the teacher's distribution over those captions and
the teacher's image embedding, and (c), in its text tower, the teacher's text embeddings of captions, tags and class prompts.
No drawing of a held-out vendor is ever seen.

    python -m bench.train_demo [--steps 1000] [--validate fxemoji]
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from bench import assets
from bench.demo_student import TEXT_LENGTH, caption_tokenizer, empty_student, inherit
from bench.pretrained import HEADS, IMAGENET_MEAN, IMAGENET_STD, PATCH, WIDTH, dinov2_small
from bench.quality import Checkpoint, brief, measure, retrieval
from bench.training import Average, Drawings, augmented, load_drawings, normalised

BLOCKS, JOINT, BATCH, TEXTS = (0, 1, 2, 3), 256, 256, 384


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


@torch.inference_mode()
def teacher_embeddings(teacher: Checkpoint, drawings: Drawings, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The teacher's normalised embeddings of all drawings (B, C) and texts (T, C); images are kept in the cache folder."""
    unique = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(unique)}
    text = teacher.embed_texts(unique)[[place[one] for one in texts]]
    file = assets.cache_dir() / "training" / f"{assets.dual_encoder().name}-images-{len(drawings)}.safetensors"
    if file.exists():
        return load_file(file)["image"], text.clone()
    parts = []
    with torch.autocast("cpu", torch.bfloat16):
        for pixels in drawings.pixels.split(128):
            inputs = normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)
            parts.append(teacher.model.get_image_features(pixel_values=inputs).pooler_output.float())
    image = nn.functional.normalize(torch.cat(parts), dim=-1)
    file.parent.mkdir(exist_ok=True)
    save_file({"image": image}, file.with_suffix(".partial"))
    file.with_suffix(".partial").replace(file)
    return image.clone(), text.clone()


def image_embedding(model: CLIPModel, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> (B, C) normalised."""
    inputs = normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)
    return nn.functional.normalize(model.get_image_features(pixel_values=inputs).pooler_output.float(), dim=-1)


def text_embedding(model: CLIPModel, tokens: Tensor) -> Tensor:
    """(B, T) token numbers, padded with the end token -> (B, C) normalised."""
    longest = int((tokens != model.config.text_config.eos_token_id).sum(1).max()) + 1
    features = model.get_text_features(input_ids=tokens[:, :longest]).pooler_output
    return nn.functional.normalize(features.float(), dim=-1)


def tokenized(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(B, TEXT_LENGTH) token numbers."""
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    return batch["input_ids"]


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Mean cross entropy against the softmax of `target_logits`, both (B, K)."""
    return -(target_logits.softmax(1) * nn.functional.log_softmax(logits, 1)).sum(1).mean()


def train(
    model: CLIPModel,
    drawings: Drawings,
    tokens: Tensor,
    teacher: tuple[Tensor, Tensor, float],
    steps: int,
    seed: int,
    watch: Drawings | None,
) -> None:
    """Trains in place and leaves the averaged parameters in the model.

    tokens: (T, TEXT_LENGTH), captions first; teacher: image embeddings (B, C), text embeddings (T, C), logit scale.
    """
    generator = torch.Generator().manual_seed(seed)
    image_goal, text_goal, sharpness = teacher
    concepts = drawings.concept.unique()
    captions = text_goal[concepts]
    parameters = dict(model.named_parameters())
    inherited = [v for n, v in parameters.items() if n.startswith("vision_model.") and v.ndim > 1]
    fresh = [v for n, v in parameters.items() if not n.startswith("vision_model.") and v.ndim > 1]
    plain = [v for v in parameters.values() if v.ndim <= 1]
    groups = [
        {"params": inherited, "lr": 6e-4, "weight_decay": 0.05},
        {"params": fresh, "lr": 1.5e-3, "weight_decay": 0.05},
        {"params": plain, "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1, step / steps))))
    )
    average = Average(parameters, 0.995)
    order = torch.empty(0, dtype=torch.long)
    started = time.monotonic()
    model.train()
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.cat((order, torch.randperm(len(drawings), generator=generator)))
        rows, order = order[:BATCH], order[BATCH:]
        pixels = augmented(drawings.pixels[rows], drawings.flippable[rows], generator)
        named, position = drawings.concept[rows].unique(return_inverse=True)
        more = torch.randint(len(tokens), (TEXTS - len(named),), generator=generator)
        chosen = torch.cat((named, more))
        with torch.autocast("cpu", torch.bfloat16):
            image, text = image_embedding(model, pixels), text_embedding(model, tokens[chosen])
        # Against the teacher's captions: the right one, and the teacher's view of all of them.
        scale = model.logit_scale.exp().clamp(max=100)
        goal = image_goal[rows]
        logits = image @ captions.T * scale
        name = nn.functional.cross_entropy(logits, torch.searchsorted(concepts, drawings.concept[rows]))
        view = soft_cross_entropy(logits, goal @ captions.T * sharpness)
        # Against its own texts, so that both towers agree with each other and not only with the teacher.
        own = nn.functional.cross_entropy(image @ text[: len(named)].T * scale, position)
        follow = (1 - (image * goal).sum(1)).mean() + 2 * (1 - (text * text_goal[chosen]).sum(1)).mean()
        loss = 0.5 * name + 0.5 * view + 0.3 * own + 3 * follow
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        schedule.step()
        average.update(parameters)
        if step % 25 == 24:
            losses = " ".join(f"{part.item():.3f}" for part in (name, view, own, follow))
            pace = (time.monotonic() - started) / (step + 1)
            print(f"step {step + 1}/{steps} name, view, own, follow {losses} {pace:.2f} s/step", flush=True)
        if watch and step % 100 == 99:
            print("validation", brief(evaluate(model, watch, tokens)), flush=True)
    with torch.no_grad():
        for key, value in parameters.items():
            value.copy_(average.values[key])


@torch.inference_mode()
def evaluate(model: CLIPModel, drawings: Drawings, tokens: Tensor) -> dict[str, Any]:
    """Retrieval among the drawings' own captions, in bfloat16."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        image = torch.cat([image_embedding(model, part) for part in drawings.pixels.split(256)])
        text = torch.cat([text_embedding(model, part) for part in tokens[drawings.concept].split(256)])
    model.train()
    return retrieval(image, text)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the fp16 checkpoint with its processor."""
    model.set_attn_implementation("sdpa")
    model.half().save_pretrained(folder)
    size = {"height": assets.IMAGE_SIZE, "width": assets.IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def main() -> None:
    """Trains, measures the saved checkpoint on the held-out vendor, writes weights and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="the DINOv2 blocks that are inherited")
    parser.add_argument("--validate", help="a training vendor to leave out and watch; nothing is written then")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(options.seed)
    drawings = load_drawings(assets.training_drawings())
    texts = prompts(drawings)
    tokenizer = caption_tokenizer(texts)
    teacher = Checkpoint(assets.dual_encoder())
    image_goal, text_goal = teacher_embeddings(teacher, drawings, texts)
    sharpness = teacher.model.logit_scale.exp().item()
    dinov2 = dinov2_small(assets.dinov2_onnx(), assets.IMAGE_SIZE, max(options.blocks) + 1)
    model = empty_student(tokenizer, assets.IMAGE_SIZE, PATCH, WIDTH, HEADS, len(options.blocks), JOINT)
    inherit(model, dinov2, options.blocks, normalised(drawings.pixels[::36], IMAGENET_MEAN, IMAGENET_STD))
    print(
        f"{sum(v.numel() for v in model.parameters()):,} parameters, {len(tokenizer)} tokens, {len(texts)} texts",
        flush=True,
    )
    watch = None
    if options.validate:
        held = torch.tensor([name == options.validate for name in drawings.vendor])
        watch, drawings, image_goal = drawings.only(held), drawings.only(~held), image_goal[~held]
    tokens = tokenized(tokenizer, texts)
    train(model, drawings, tokens, (image_goal, text_goal, sharpness), options.steps, options.seed, watch)
    if watch:
        print("validation, averaged", brief(evaluate(model, watch, tokens)))
        return
    save(model, tokenizer, assets.DEMO / "clip")
    result = measure(assets.DEMO / "clip")
    result |= {
        "command": f"python -m bench.train_demo --steps {options.steps} --seed {options.seed}",
        "trained_on": {name: drawings.vendor.count(name) for name in sorted(set(drawings.vendor))},
        "parameters": sum(value.numel() for value in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (assets.RESULTS / "demo_model.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("held out", brief(result))


if __name__ == "__main__":
    main()
