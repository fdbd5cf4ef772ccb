"""Trains the mini-VLM's projector and decoder (bench/trained/mini_vlm.safetensors) on cached vision features.

A sequence is one picture and several turns about it in random order, so the picture is paid for once and talk in several turns
is learnt; the loss is on the answers only. Pictures are the training vendors' drawings and rendered scenes. Only some patches
of a picture are shown (positions kept), which is faster and works like dropout: of a drawing any, of a scene first those with
something on them, for a letter without its patches cannot be read. The last steps see everything.

    python -m bench.build_mini_vlm [--steps N]     resumes by itself; then: python -m bench.vlm_quality
"""

import argparse
import copy
import hashlib
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from bench import assets, scenes
from bench.mini_vlm import (
    IMAGE,
    PATCHES,
    assembled,
    fast_tokenizer,
    image_processor,
    save_trained,
    text_config,
    train_tokenizer,
    trained_parameters,
    vision,
)
from bench.training import Average
from bench.vision_features import cached_features
from bench.vlm_batches import Pictures, Talk, answer_loss, choose_patches, load_pictures
from bench.vqa_data import corpus, drawn
from mmcompress.packed import cache_dir

SCENES = 3500
# Black shapes only, the furthest from any other vendor; and an older version of another one: time is short.
LEFT_OUT = ("fluent-emoji-high-contrast", "noto-v1")
BATCH_DRAWINGS, BATCH_SCENES = 24, 10
# Patches of a picture while training, drawn anew each step: a decoder that always saw 32 of them is lost among 256 (the loss
# of held-out names rose from 2.31 to 2.96).
SHOWN_OF_DRAWING, SHOWN_OF_SCENE = (32, 32, 64, 64, 128, PATCHES), (128, 128, PATCHES)
ALL_SHOWN = 0.02  # the last part of the steps shows all
RATE, WARMUP, DECAY = 3e-3, 50, 0.05
SAVE_EVERY = 50


@torch.no_grad()
def whiten(projector: nn.Module, features: Tensor) -> None:
    """Starts the projector's first layer as the whitening of patch features (n, C), n >= C: principal parts of equal size.

    Patches share a large mean and few large directions; without this a decoder sees one and the same patch for long.
    """
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(features.T))  # rising
    width = projector.linear_1.out_features
    values, vectors = values[-width:], vectors[:, -width:]
    projector.linear_1.weight.copy_((vectors / values.clamp(min=1e-6).sqrt()).T)
    projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
    nn.init.normal_(projector.linear_2.weight, std=0.2 / math.sqrt(width))


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: linear warm-up, then half a cosine down to 2 %."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


class Training:
    """One run: model, optimizer, average, and the step it is at; everything random comes from the step's number."""

    def __init__(
        self, model: LlavaForConditionalGeneration, talk: Talk, pictures: Pictures, features: dict[str, np.ndarray]
    ) -> None:
        self.model, self.talk, self.pictures, self.features = model, talk, pictures, features
        self.inked = pictures.inked().float()
        self.trained = trained_parameters(model)
        # Muon (Jordan et al. 2024) needs far fewer steps than AdamW where it applies: weight matrices between hidden states.
        hidden = [value for name, value in self.trained.items() if value.ndim == 2 and "embed" not in name]
        others = [value for name, value in self.trained.items() if value.ndim != 2 or "embed" in name]
        self.optimizers = (
            torch.optim.Muon(hidden, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        )
        self.average = Average(self.trained, 0.99)
        self.step = 0

    def batch_loss(
        self, what: str, numbers: list[int], turns: list[list[tuple[str, str]]], preference: Tensor, count: int
    ) -> Tensor:
        """Loss over so numbered drawings or scenes, `count` patches of each shown."""
        shown = choose_patches(preference, count, torch.Generator().manual_seed(self.step))
        whole = torch.from_numpy(self.features[what][numbers])
        features = whole.gather(1, shown[..., None].expand(-1, -1, whole.shape[-1])).float()
        with torch.autocast("cpu", torch.bfloat16):
            return answer_loss(self.model, self.talk, features, shown, turns)

    def run_step(self, steps: int) -> tuple[float, float]:
        """One update; returns the losses on drawings and on scenes."""
        choose, pictures = random.Random(self.step), self.pictures
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate(self.step, steps)
        everything = self.step >= steps * (1 - ALL_SHOWN)
        numbers = choose.sample(range(len(pictures.drawings)), BATCH_DRAWINGS)
        turns = [pictures.drawing_turns(number, choose) for number in numbers]
        alike = torch.zeros(BATCH_DRAWINGS, PATCHES)
        named = self.batch_loss(
            "drawings", numbers, turns, alike, PATCHES if everything else choose.choice(SHOWN_OF_DRAWING)
        )
        named.backward()
        numbers = choose.sample(range(pictures.scenes), BATCH_SCENES)
        turns = [pictures.scene_turns(number, choose) for number in numbers]
        inked = self.inked[numbers]
        seen = self.batch_loss(
            "scenes", numbers, turns, inked, PATCHES if everything else choose.choice(SHOWN_OF_SCENE)
        )
        seen.backward()
        nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update(self.trained)
        self.step += 1
        return named.item(), seen.item()

    def save(self, file: Path) -> None:
        """Writes everything that a later `load` needs."""
        state = {
            "step": self.step,
            "trained": {name: value.detach() for name, value in self.trained.items()},
            "average": self.average.values,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)

    def load(self, file: Path) -> None:
        """Goes back to where `save` was called."""
        state = torch.load(file, weights_only=True)
        self.step = self.average.steps = state["step"]
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(state["trained"][name])
        self.average.values = state["average"]
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)


def train(training: Training, steps: int, file: Path) -> None:
    """Runs up to step `steps`, saving to `file` now and then, from `file` on when it is there."""
    if file.exists():
        training.load(file)
        print(f"going on at step {training.step}", flush=True)
    started, first = time.monotonic(), training.step
    while training.step < steps:
        named, seen = training.run_step(steps)
        if training.step % 20 == 0:
            pace = (time.monotonic() - started) / (training.step - first)
            print(f"step {training.step}/{steps} drawings {named:.3f} scenes {seen:.3f} {pace:.2f} s/step", flush=True)
        if training.step % SAVE_EVERY == 0 or training.step == steps:
            training.save(file)


def main() -> None:
    """Trains, writes the trained part, measures the built model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawings", type=int, help="a quick trial with so many drawings and scenes")
    parser.add_argument("--finish", action="store_true", help="train no further; write what the last checkpoint holds")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    everything = [each for each in drawn(assets.training_drawings()) if each.file.parent.name not in LEFT_OUT]
    text = train_tokenizer(corpus(everything))
    tokenizer = fast_tokenizer(text)
    few = random.Random(0).sample(everything, options.drawings) if options.drawings else everything
    pictures = load_pictures(options.drawings or SCENES, few)
    drawing_code = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()[:6]
    folder = cache_dir() / f"mini-vlm-training-{len(few)}-{pictures.scenes}-{drawing_code}"
    tower = vision(assets.dinov2_onnx())
    frozen = copy.deepcopy(tower).to(torch.bfloat16)
    features = {
        "drawings": cached_features(folder / "drawings", len(few), pictures.drawing, frozen, image_processor()),
        "scenes": cached_features(folder / "scenes", pictures.scenes, pictures.scene, frozen, image_processor()),
    }
    model = assembled(tower, text_config(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE))
    # The backward pass of the fused CPU attention takes longer than all matrix products together; the plain one does not.
    model.model.language_model.set_attn_implementation("eager")
    sample = [torch.tensor(table[:: max(1, len(table) // 150)]).float() for table in features.values()]
    whiten(model.model.multi_modal_projector, torch.cat(sample).flatten(0, 1))
    training = Training(model, Talk(tokenizer), pictures, features)
    print(f"{sum(value.numel() for value in training.trained.values()):,} trained parameters", flush=True)
    checkpoint = folder / f"seed-{options.seed}.pt"
    if options.finish:
        training.load(checkpoint)
    else:
        train(training, options.steps, checkpoint)
    save_trained(training.average.values, text_config(tokenizer), text, assets.TRAINED_VLM)
    facts = {
        "command": f"python -m bench.build_mini_vlm --steps {options.steps} --seed {options.seed}",
        "steps": training.step,
        "drawings": dict(sorted(Counter(each.file.parent.name for each in few).items())),
        "scenes": pictures.scenes,
        "parameters": sum(value.numel() for value in training.trained.values()),
    }
    assets.TRAINED_VLM.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
