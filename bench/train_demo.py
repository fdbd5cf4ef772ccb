"""Trains the CLIP that ships with the package (mmcompress/demo/clip) by distillation from the dual encoder.

From drawings of the training vendors the four vision blocks learn the teacher's hidden tokens, first each block by itself, then
together with the teacher's embedding, its distribution over the captions of *all* training concepts, and the right caption;
the text tower learns the teacher's text embeddings of captions, tags and class prompts, and to fit its own vision tower. No
drawing of a held-out vendor is ever seen.

    python -m bench.train_demo [--steps 300 500] [--validate fxemoji]
"""

import argparse
import functools
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
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, VisionTextDualEncoderModel

from bench import assets
from bench.demo_student import TEXT_LENGTH, caption_tokenizer, empty_student, inherit
from bench.demo_teacher import Lessons, lessons
from bench.pretrained import HEADS, IMAGENET_MEAN, IMAGENET_STD, PATCH, WIDTH
from bench.quality import brief, measure, retrieval
from bench.training import Average, Drawings, load_drawings, normalised
from mmcompress.packed import cache_dir

BLOCKS, JOINT, BATCH = (0, 4, 7, 10), 256, 128
# The whole starts from blocks that already work: a rate at which blocks learn by themselves would undo them.
VISION_RATES, TEXT_RATE = (1.2e-3, 2.5e-4), 1.5e-3
RIVALS, OTHERS = 192, 96  # texts per step beside the batch's captions: other captions; tags, prompts, whatever is there


def vision_levels(
    model: CLIPModel, pixels: Tensor, goals: Tensor | None = None, forced: Tensor | None = None
) -> list[Tensor]:
    """(B, 3, S, S) uint8 -> the tokens (B, N, C) after each block.

    With `forced` (B, 1, 1) each block's input is cut off from the one below: the teacher's tokens (goals: (4, B, N, C)) where
    true, else the output of the block below.
    """
    vision = model.vision_model
    tokens = vision.pre_layrnorm(vision.embeddings(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD).to(model.dtype)))
    levels = []
    for number, layer in enumerate(vision.encoder.layers):
        tokens = layer(tokens, None)
        levels.append(tokens)
        if forced is not None and goals is not None:
            tokens = torch.where(forced, goals[number].to(tokens.dtype), tokens.detach())
    return levels


def image_embedding(model: CLIPModel, tokens: Tensor) -> Tensor:
    """Tokens after the last block (B, N, C) -> (B, E) normalised."""
    pooled = model.visual_projection(model.vision_model.post_layernorm(tokens[:, 0]))
    return nn.functional.normalize(pooled.float(), dim=-1)


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


class MasterWeights:
    """Float32 copies of a bfloat16 model's parameters: the model computes in bfloat16 throughout, the optimizer does not."""

    def __init__(self, model: CLIPModel) -> None:
        self.pairs = {name: (value, value.detach().float().clone()) for name, value in model.named_parameters()}
        self.masters = {name: master for name, (_, master) in self.pairs.items()}

    def take_gradients(self) -> None:
        """Moves the model's gradients over."""
        for value, master in self.pairs.values():
            master.grad = None if value.grad is None else value.grad.float()
            value.grad = None

    @torch.no_grad()
    def give_values(self) -> None:
        """Rounds the copies back into the model."""
        for value, master in self.pairs.values():
            value.copy_(master)


def optimizer_for(masters: dict[str, Tensor], vision_rate: float) -> torch.optim.AdamW:
    """AdamW with its own rate for the vision tower; vectors do not decay."""
    vision = {name: name.startswith(("vision_model.", "visual_projection.")) for name in masters}
    groups = [
        {
            "params": [v for n, v in masters.items() if vision[n] == inherited and (v.ndim > 1) == matrix],
            "lr": vision_rate if inherited else TEXT_RATE,
            "weight_decay": 0.05 if matrix else 0.0,
        }
        for inherited in (True, False)
        for matrix in (True, False)
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


class HiddenError:
    """Mean square error of hidden tokens in units of each channel's own spread, class token and patches apart: a few channels of
    DINOv2 are a hundred times larger than the rest and would drown them."""

    def __init__(self, hidden: Tensor) -> None:
        some = hidden[:, 0, :: max(1, hidden.shape[2] // 500)].float()
        self.first = some[:, :, :1].std((1, 2), keepdim=True) + 0.02
        self.rest = some[:, :, 1:].std((1, 2), keepdim=True) + 0.02

    def __call__(self, level: int, found: Tensor, goal: Tensor) -> Tensor:
        """found, goal: (B, N, C) -> (); 2 when nothing is explained, 0 when all is."""
        error = found.float() - goal.float()
        first, rest = error[:, :1] / self.first[level], error[:, 1:] / self.rest[level]
        return first.square().mean() + rest.square().mean()


def train(
    model: CLIPModel,
    drawings: Drawings,
    given: Lessons,
    tokens: Tensor,
    steps: tuple[int, int],
    seed: int,
    watch: Drawings | None,
) -> None:
    """Trains the bfloat16 model in place and leaves the averaged parameters in it, as float32.

    In the first stage each block learns its group of teacher blocks by itself: it is fed the teacher's tokens or, as often,
    the detached output of the block below, and no gradient crosses blocks. The second stage trains the whole.
    tokens: (T, TEXT_LENGTH) token numbers of the lessons' texts, captions first; steps: of both stages.
    """
    generator = torch.Generator().manual_seed(seed)
    concepts = drawings.concept.unique()
    captions = given.text[concepts]
    hidden_error = HiddenError(given.hidden)
    weights = MasterWeights(model)
    masters = weights.masters
    order = torch.empty(0, dtype=torch.long)
    started = time.monotonic()
    model.train()
    for stage, length in enumerate(steps):
        saved = cache_dir() / "training" / f"demo-stage{stage}.safetensors"
        if length == 0:
            set_values(masters, load_file(saved))
            weights.give_values()
            continue
        optimizer = optimizer_for(masters, VISION_RATES[stage])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(pace, length))
        average = Average(masters, 0.99)
        for step in range(length):
            if len(order) < BATCH:
                order = torch.cat((order, torch.randperm(len(drawings), generator=generator)))
            rows, order = order[:BATCH], order[BATCH:]
            version = torch.randint(len(given.pixels), (BATCH,), generator=generator)
            goals = given.hidden[:, version, rows]
            forced = torch.rand(BATCH, 1, 1, generator=generator) < 0.5 if stage == 0 else None
            levels = vision_levels(model, given.pixels[version, rows], goals, forced)
            errors = [hidden_error(level, found, goals[level]) for level, found in enumerate(levels)]
            said = [error.item() for error in errors]
            loss = sum(errors, start=torch.zeros(()))
            scaled, concept = None, drawings.concept[rows]
            if stage == 1:
                scale, target = model.logit_scale.float().exp().clamp(max=60), given.image[version, rows]
                image = image_embedding(model, levels[-1])
                logits = image @ captions.T * scale
                # The right caption, the teacher's view of all of them, and the teacher's embedding.
                name = nn.functional.cross_entropy(logits, torch.searchsorted(concepts, concept))
                view = soft_cross_entropy(logits, target @ captions.T * given.scale)
                follow = (1 - (image * target).sum(1)).mean()
                said += [name.item(), view.item(), follow.item()]
                scaled = image * scale
                loss = 0.3 * loss + errors[-1] + 0.5 * name + 0.5 * view + 2 * follow
            if step % 2:  # the text tower has the easier task
                loss = loss + text_lesson(model, scaled, concept, given.text, tokens, generator)
            loss.backward()
            weights.take_gradients()
            nn.utils.clip_grad_norm_(list(masters.values()), 2.0)
            optimizer.step()
            schedule.step()
            weights.give_values()
            average.update(masters)
            if step % 25 == 24:
                losses = " ".join(f"{value:.3f}" for value in said)
                spent = time.monotonic() - started
                print(
                    f"stage {stage} step {step + 1}/{length} levels, name, view, follow {losses} {spent:.0f} s",
                    flush=True,
                )
            if step % 50 == 49:
                save_file(average.values, saved)
            if watch and step % 100 == 99:
                print("validation", brief(evaluate(model, watch, tokens)), flush=True)
        set_values(masters, average.values)
        weights.give_values()
    model.float()
    set_values(dict(model.named_parameters()), masters)


@torch.no_grad()
def set_values(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copies values in by name."""
    for name, value in parameters.items():
        value.copy_(values[name])


def pace(length: int, step: int) -> float:
    """Learning rate factor: linear warm-up over 30 steps, then a cosine to 2%."""
    return min(1, (step + 1) / 30) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1, step / length))))


def text_lesson(
    model: CLIPModel, image: Tensor | None, concept: Tensor, goals: Tensor, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """Loss of the text tower: follow the teacher's embeddings, and let the batch's (scaled) image embeddings (B, E), where given,
    find their captions among others."""
    named, position = concept.unique(return_inverse=True)
    rivals = torch.randperm(int(concept.max()) + 1, generator=generator)[:RIVALS]
    captioned = torch.cat((named, rivals[~torch.isin(rivals, named)]))
    others = torch.randint(len(tokens), (OTHERS,), generator=generator)
    text = torch.cat([text_embedding(model, tokens[captioned]), text_embedding(model, tokens[others])])
    follow = 8 * (1 - (text * goals[torch.cat((captioned, others))]).sum(1)).mean()
    if image is None:
        return follow
    return follow + 0.5 * nn.functional.cross_entropy(image @ text[: len(captioned)].T, position)


@torch.inference_mode()
def evaluate(model: CLIPModel, drawings: Drawings, tokens: Tensor) -> dict[str, Any]:
    """Retrieval among the drawings' own captions, in the model's present precision."""
    image = torch.cat([image_embedding(model, vision_levels(model, part)[-1]) for part in drawings.pixels.split(128)])
    text = torch.cat([text_embedding(model, part) for part in tokens[drawings.concept].split(256)])
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
    words = folder / "tokenizer.json"  # indented, it takes twice as much
    words.write_text(json.dumps(json.loads(words.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n")


def main() -> None:
    """Trains, measures the saved checkpoint on the held-out vendor, writes weights and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(300, 500), help="block by block, then the whole; 0: take the saved stage"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="the DINOv2 blocks that are inherited")
    parser.add_argument("--validate", help="a training vendor to leave out and watch; nothing is written then")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    drawings = load_drawings(assets.training_drawings())
    given = lessons(drawings, seed=0)
    tokenizer = caption_tokenizer(given.texts)
    dinov2 = VisionTextDualEncoderModel.from_pretrained(assets.dual_encoder()).vision_model.eval()
    model = empty_student(tokenizer, assets.IMAGE_SIZE, PATCH, WIDTH, HEADS, len(options.blocks), JOINT)
    inherit(model, dinov2, options.blocks, normalised(drawings.pixels[::36], IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        model.visual_projection.weight.copy_(given.projection)
        model.logit_scale.copy_(given.scale.log())
    print(f"{sum(v.numel() for v in model.parameters()):,} parameters, {len(given.texts)} texts", flush=True)
    watch = None
    if options.validate:
        held = torch.tensor([name == options.validate for name in drawings.vendor])
        watch, drawings, given = drawings.only(held), drawings.only(~held), given.only(~held)
    tokens = tokenized(tokenizer, given.texts)
    train(model.bfloat16(), drawings, given, tokens, tuple(options.steps), options.seed, watch)
    if watch:
        print("validation, averaged", brief(evaluate(model, watch, tokens)))
        return
    save(model, tokenizer, assets.DEMO / "clip")
    result = measure(assets.DEMO / "clip")
    result |= {
        "command": f"python -m bench.train_demo --steps {options.steps[0]} {options.steps[1]} --seed {options.seed}",
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
