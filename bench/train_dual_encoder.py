"""Trains the small part that joins DINOv2-S and MiniLM into a VisionTextDualEncoderModel (bench/trained/dual_encoder.safetensors).

Both towers stay frozen, except for low-rank updates (LoRA, Hu et al. 2021, section 4.1) of the upper vision blocks, which are
folded into the weights when the model is built. The loss is a softmax over the captions of *all* training concepts, so a batch
need not hold its own negatives; the caption of a concept is drawn anew each step from its name, its tags and a few frames, so
that the text side learns more than 1,600 fixed strings. No drawing of a held-out vendor is ever seen.

    python -m bench.train_dual_encoder [--steps 300] [--validate fxemoji]
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, Dinov2Model

from bench import assets
from bench.pretrained import IMAGENET_MEAN, IMAGENET_STD, LOW_RANK_DOWN, LOW_RANK_UP, dinov2_small, minilm
from bench.quality import brief, measure, retrieval
from bench.training import Average, Drawings, augmented, load_drawings, normalised
from mmcompress.packed import cache_dir

FIRST_TUNED, RANK, WIDTH, BATCH, VIEWS = 7, 16, 256, 256, 4
FRAMES = ("{}", "{}", "{}", "a drawing of {}", "an emoji of {}")


class LowRank(nn.Module):
    """A frozen linear layer plus a trained low-rank update: y = Wx + b + up(down(x)); starts as the layer itself."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        update = nn.functional.linear(nn.functional.linear(inputs, self.down), self.up)
        return self.layer(inputs) + update


class Joint(nn.Module):
    """The trained head around the frozen towers; the text side starts at MiniLM's cached class token."""

    def __init__(self, vision: Dinov2Model) -> None:
        super().__init__()
        self.vision = vision.requires_grad_(False)
        for block in vision.encoder.layer[FIRST_TUNED:]:
            for owner, name in tuned_layers(block):
                setattr(owner, name, LowRank(getattr(owner, name), RANK))
        self.visual_projection = nn.Linear(vision.config.hidden_size, WIDTH, bias=False)
        self.text_projection = nn.Linear(384, WIDTH, bias=False)
        self.pooler = nn.Linear(384, 384)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    @torch.inference_mode()
    def lower(self, pixels: Tensor) -> Tensor:
        """The frozen part: (B, 3, S, S) uint8 -> tokens (B, N, C) in bfloat16 before the first tuned block."""
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self.vision.embeddings(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD))
            for block in self.vision.encoder.layer[:FIRST_TUNED]:
                tokens = block(tokens)
        return tokens.bfloat16()

    def image(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) before the first tuned block -> normalised embeddings (B, C)."""
        for block in self.vision.encoder.layer[FIRST_TUNED:]:
            tokens = block(tokens)
        pooled = self.vision.layernorm(tokens)[:, 0]
        return nn.functional.normalize(self.visual_projection(pooled).float(), dim=-1)

    def text(self, first_token: Tensor) -> Tensor:
        """MiniLM's last hidden state at the class token (B, 384) -> normalised embeddings (B, C)."""
        pooled = self.text_projection(torch.tanh(self.pooler(first_token)))
        return nn.functional.normalize(pooled.float(), dim=-1)

    def trained(self) -> dict[str, Tensor]:
        """The parameters that learn, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


def tuned_layers(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The six linear layers of one DINOv2 block, as (owner, attribute)."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield block.get_submodule("attention"), name
    for name in ("fc1", "fc2"):
        yield block.get_submodule("mlp"), name


@torch.inference_mode()
def first_tokens(bert: BertModel, tokenizer: Any, texts: list[str]) -> Tensor:
    """MiniLM's class token after the last block for each text: (B, 384)."""
    parts = []
    for start in range(0, len(texts), 256):
        batch = tokenizer(texts[start : start + 256], padding=True, truncation=True, max_length=64, return_tensors="pt")
        parts.append(bert(**batch).last_hidden_state[:, 0])
    return torch.cat(parts).clone()


def caption_bank(bert: BertModel, tokenizer: Any, drawings: Drawings) -> Tensor:
    """Cached text features of several wordings per concept: (wordings, concepts, 384); the first is the caption itself."""
    wordings: list[list[str]] = [[frame.format(text) for text in drawings.captions] for frame in dict.fromkeys(FRAMES)]
    pairs = list(zip(drawings.captions, drawings.tags, strict=True))
    wordings.append([f"{text}, {', '.join(tags[:2])}" if tags else text for text, tags in pairs])
    wordings.append([", ".join(tags) or text for text, tags in pairs])
    return torch.stack([first_tokens(bert, tokenizer, texts) for texts in wordings])


def lower_views(model: Joint, drawings: Drawings, seed: int) -> Tensor:
    """Each drawing as it is and VIEWS - 1 times augmented, through the frozen blocks: (VIEWS, B, N, C) bfloat16.

    Kept in the cache folder, for it takes longer than the training itself.
    """
    file = cache_dir() / "training" / f"dinov2-block{FIRST_TUNED}-{VIEWS}views-seed{seed}-{len(drawings)}.safetensors"
    if file.exists():
        return load_file(file)["tokens"]
    generator = torch.Generator().manual_seed(seed)
    views = []
    for view in range(VIEWS):
        parts = []
        for rows in torch.arange(len(drawings)).split(256):
            pixels = drawings.pixels[rows]
            if view:
                pixels = augmented(pixels, drawings.flippable[rows], generator)
            parts.append(model.lower(pixels))
        views.append(torch.cat(parts))
        print(f"view {view + 1} of {VIEWS} through the frozen blocks", flush=True)
    tokens = torch.stack(views)
    file.parent.mkdir(exist_ok=True)
    save_file({"tokens": tokens}, file.with_suffix(".partial"))
    file.with_suffix(".partial").replace(file)
    return tokens


@torch.inference_mode()
def embed_images(model: Joint, tokens: Tensor) -> Tensor:
    """Tokens (B, N, C) before the first tuned block -> (B, C), in bfloat16 batches."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model.image(part) for part in tokens.split(256)])


def train(
    model: Joint,
    views: Tensor,
    concept: Tensor,
    bank: Tensor,
    steps: int,
    seed: int,
    watch: tuple[Tensor, Tensor] | None,
) -> None:
    """Trains in place and leaves the averaged parameters in the model.

    views: (VIEWS, B, N, C) tokens; concept: (B,); bank: (wordings, concepts, 384); watch: tokens and concepts to validate on.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = model.trained()
    groups = [
        {"params": [v for n, v in trained.items() if n.startswith("vision.")], "lr": 1.0e-3, "weight_decay": 0.02},
        {"params": [v for n, v in trained.items() if not n.startswith("vision.")], "lr": 1.5e-3, "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * min(1, step / steps)))
    )
    average = Average(trained, 0.99)
    seen = concept.unique()
    # the caption itself half of the time, another wording otherwise
    odds = torch.tensor([0.5] + [0.5 / (len(bank) - 1)] * (len(bank) - 1))
    order = torch.empty(0, dtype=torch.long)
    started = time.monotonic()
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.cat((order, torch.randperm(len(concept), generator=generator)))
        rows, order = order[:BATCH], order[BATCH:]
        tokens = views[torch.randint(len(views), (BATCH,), generator=generator), rows]
        wording = torch.multinomial(odds, bank.shape[1], replacement=True, generator=generator)
        features = bank[wording, torch.arange(bank.shape[1])]
        with torch.autocast("cpu", torch.bfloat16):
            image, text = model.image(tokens), model.text(features[seen])
        position = torch.searchsorted(seen, concept[rows])
        logits = image @ text.T * model.logit_scale.exp().clamp(max=100)
        loss = nn.functional.cross_entropy(logits, position, label_smoothing=0.1)
        # text to image: among the drawings of this batch, all of the same concept count as right
        targets = (position[:, None] == position[None, :]).float()
        reverse = nn.functional.log_softmax(logits[:, position].T, dim=1)
        loss = loss + 0.3 * -(targets / targets.sum(1, keepdim=True) * reverse).sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        schedule.step()
        average.update(trained)
        if step % 25 == 24:
            message = f"step {step + 1}/{steps} loss {loss.item():.3f} scale {model.logit_scale.exp().item():.1f}"
            print(f"{message} {(time.monotonic() - started) / (step + 1):.2f} s/step", flush=True)
        if watch and step % 100 == 99:
            print("validation", brief(evaluate(model, *watch, bank[0])), flush=True)
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(average.values[name])


def evaluate(model: Joint, tokens: Tensor, concept: Tensor, captions: Tensor) -> dict[str, Any]:
    """Retrieval among the drawings' own captions; captions: (concepts, 384) text features."""
    with torch.inference_mode():
        text = model.text(captions[concept])
    return retrieval(embed_images(model, tokens), text)


def trained_file(model: Joint) -> dict[str, Tensor]:
    """The committed tensors (fp16), under the names of the built VisionTextDualEncoderModel."""
    out = {}
    for name, value in model.trained().items():
        if name.startswith("vision."):
            owner, _, kind = name.removeprefix("vision.").rpartition(".")
            name = f"vision_model.{owner}.{LOW_RANK_DOWN if kind == 'down' else LOW_RANK_UP}"
        elif name.startswith("pooler."):
            name = f"text_model.pooler.dense.{name.removeprefix('pooler.')}"
        out[name] = value.detach().half().contiguous()
    return out


def main() -> None:
    """Trains, measures the built model on the held-out vendor, writes weights and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", help="a training vendor to leave out and watch; nothing is written then")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(options.seed)
    drawings = load_drawings(assets.training_drawings())
    bert = minilm(assets.minilm_folder())
    bank = caption_bank(bert, AutoTokenizer.from_pretrained(assets.minilm_folder()), drawings)
    vision = dinov2_small(assets.dinov2_onnx(), assets.IMAGE_SIZE, assets.VISION_BLOCKS)
    # The backward pass of the fused CPU attention takes longer than all matrix products together; the plain one does not.
    vision.set_attn_implementation("eager")
    model = Joint(vision.to(torch.bfloat16))
    print(
        f"{len(drawings)} drawings, {sum(v.numel() for v in model.trained().values()):,} trained parameters", flush=True
    )
    views, concept, watch = lower_views(model, drawings, options.seed), drawings.concept, None
    if options.validate:
        held = torch.tensor([name == options.validate for name in drawings.vendor])
        watch = (views[0, held], concept[held])
        views, concept = views[:, ~held], concept[~held]
    train(model, views, concept, bank, options.steps, options.seed, watch)
    if watch:
        print("validation, averaged", brief(evaluate(model, *watch, bank[0])))
        return
    assets.TRAINED.parent.mkdir(exist_ok=True)
    facts = {"format": "pt", "image_size": str(assets.IMAGE_SIZE), "vision_blocks": str(assets.VISION_BLOCKS)}
    save_file(trained_file(model), assets.TRAINED, facts)
    result = measure(assets.dual_encoder())
    result |= {
        "command": f"python -m bench.train_dual_encoder --steps {options.steps} --seed {options.seed}",
        "trained_on": {name: drawings.vendor.count(name) for name in sorted(set(drawings.vendor))},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    Path(assets.RESULTS / "dual_encoder.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("held out", brief(result))


if __name__ == "__main__":
    main()
