"""The untrained demo CLIP: its vision tower inherits four DINOv2 blocks, its tokenizer is trained on the captions.

A CLIP block is a DINOv2 block without LayerScale, so the scale is folded into the layer before it. Two things differ: CLIP's patch
embedding has no bias (it moves into the position table) and CLIP normalises the embeddings before the first block (fitted by
least squares to disturb the tokens as little as possible). MLP neurons are thinned by their contribution, the mean square of
the activation times the squared norm of its output column.
"""

import json
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Model

START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_LENGTH, VOCABULARY = 32, 2800
TEXT_WIDTH, TEXT_BLOCKS, TEXT_HEADS, TEXT_NEURONS = 128, 4, 4, 512
VISION_NEURONS = 640


def caption_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE, lower case) whose merges are learned from `texts`.

    As in CLIP the vocabulary begins with all bytes, alone and word-final, so that no text is ever unknown: the unknown token is
    the end token, and would move the place where the text is read out.
    """
    pipeline = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    learned = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learned.normalizer, learned.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = letters + [letter + "</w>" for letter in letters]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    learned.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(learned.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY - len(base) - 2]
    tokens = list(dict.fromkeys(base + ["".join(merge) for merge in merges] + [START, END]))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def empty_student(
    tokenizer: CLIPTokenizer, image_size: int, patch: int, width: int, heads: int, blocks: int, joint: int
) -> CLIPModel:
    """The demo's architecture with random weights."""
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": TEXT_NEURONS,
            "num_hidden_layers": TEXT_BLOCKS,
            "num_attention_heads": TEXT_HEADS,
            "max_position_embeddings": TEXT_LENGTH,
            "hidden_act": "gelu",
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "projection_dim": joint,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": VISION_NEURONS,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patch,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "projection_dim": joint,
        },
        projection_dim=joint,
        attn_implementation="eager",
    )
    return CLIPModel(config)


def _copy_linear(target: nn.Linear, source: nn.Linear, scale: Tensor | None = None) -> None:
    """Copies a linear layer, its outputs multiplied by `scale` (out,)."""
    factor = torch.ones(source.out_features) if scale is None else scale
    target.weight.copy_(source.weight * factor[:, None])
    target.bias.copy_(source.bias * factor)


@torch.no_grad()
def _kept_neurons(teacher: Dinov2Model, pixels: Tensor) -> list[Tensor]:
    """For each block, the numbers of the VISION_NEURONS neurons that contribute most on `pixels` (B, 3, S, S)."""
    energy: dict[int, Tensor] = {}
    hooks = []
    for number, block in enumerate(teacher.encoder.layer):

        def watch(layer: nn.Module, inputs: tuple[Tensor, ...], number: int = number) -> None:
            energy[number] = inputs[0].float().square().mean((0, 1))

        hooks.append(block.mlp.fc2.register_forward_pre_hook(watch))
    teacher(pixels)
    for hook in hooks:
        hook.remove()
    kept = []
    for number, block in enumerate(teacher.encoder.layer):
        column = (block.mlp.fc2.weight * block.layer_scale2.lambda1[:, None]).square().sum(0)
        kept.append((energy[number] * column).topk(VISION_NEURONS).indices.sort().values)
    return kept


@torch.no_grad()
def inherit(student: CLIPModel, teacher: Dinov2Model, blocks: Sequence[int], pixels: Tensor) -> None:
    """Fills the student's vision tower from the teacher's `blocks`; `pixels` (B, 3, S, S), normalised, calibrates."""
    vision, embeddings = student.vision_model, teacher.embeddings
    vision.embeddings.class_embedding.copy_(embeddings.cls_token[0, 0])
    patches = embeddings.patch_embeddings.projection
    vision.embeddings.patch_embedding.weight.copy_(patches.weight)
    positions = embeddings.position_embeddings[0].clone()
    positions[1:] += patches.bias
    vision.embeddings.position_embedding.weight.copy_(positions)
    norm, tokens = vision.pre_layrnorm, embeddings(pixels).flatten(0, 1)
    standard = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps)
    shift = standard - standard.mean(0)
    slope = (shift * (tokens - tokens.mean(0))).mean(0) / shift.square().mean(0)
    norm.weight.copy_(slope)
    norm.bias.copy_(tokens.mean(0) - slope * standard.mean(0))
    kept = _kept_neurons(teacher, pixels)
    for layer, number in zip(vision.encoder.layers, blocks, strict=True):
        block, neurons = teacher.encoder.layer[number], kept[number]
        layer.layer_norm1.load_state_dict(block.norm1.state_dict())
        layer.layer_norm2.load_state_dict(block.norm2.state_dict())
        for name in ("q_proj", "k_proj", "v_proj"):
            _copy_linear(getattr(layer.self_attn, name), getattr(block.attention, name))
        _copy_linear(layer.self_attn.out_proj, block.attention.o_proj, block.layer_scale1.lambda1)
        layer.mlp.fc1.weight.copy_(block.mlp.fc1.weight[neurons])
        layer.mlp.fc1.bias.copy_(block.mlp.fc1.bias[neurons])
        scale = block.layer_scale2.lambda1
        layer.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, neurons] * scale[:, None])
        layer.mlp.fc2.bias.copy_(block.mlp.fc2.bias * scale)
    vision.post_layernorm.load_state_dict(teacher.layernorm.state_dict())
