"""The mini-VLM put together: DINOv2-S blocks, Llava's projector and a small Llama decoder as LlavaForConditionalGeneration.

Nine of DINOv2's blocks are used: across vendors, the mean of block 9's patches finds the same concept more often than that of
any other block (200 concepts, Noto to Fluent flat: 0.49; block 8 0.475, block 10 0.43, block 11 0.345).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from bench.pretrained import IMAGENET_MEAN, IMAGENET_STD, PATCH, dinov2_small

IMAGE_SIZE, VISION_BLOCKS = 224, 9
PATCHES = (IMAGE_SIZE // PATCH) ** 2
VOCABULARY = 3072
PAD, START, END, IMAGE, USER, ASSISTANT = SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
LONGEST_ANSWER = 24

# The words of a message, and the places of its pictures.
CONTENT = """\
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
"""
CHAT_TEMPLATE = (
    """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ('user', 'assistant') -%}
{{- raise_exception('this model knows the roles user and assistant, not ' ~ message['role']) -}}
{%- endif -%}
{{- '<' ~ message['role'] ~ '>' -}}
"""
    + CONTENT
    + """\
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""
)


def train_tokenizer(corpus: Sequence[str]) -> str:
    """A byte-level BPE tokenizer of at most VOCABULARY tokens, as the text of its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return str(tokenizer.to_str())


def fast_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """transformers' tokenizer around the text of a tokenizer.json; texts are padded on the left, as generation wants it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        padding_side="left",
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    )


def image_processor() -> BitImageProcessorPil:
    """Resizes to the model's square, nothing cut off."""
    return BitImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        do_convert_rgb=True,
    )


def text_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The decoder: 6 blocks, 256 wide, grouped-query attention with 4 key-value heads."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=832,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def vision(onnx_file: Path) -> Dinov2Model:
    """The frozen vision tower."""
    return dinov2_small(onnx_file, IMAGE_SIZE, VISION_BLOCKS)


def assembled(tower: Dinov2Model, language: LlamaConfig, image_token: int) -> LlavaForConditionalGeneration:
    """The whole model around `tower`, its other parameters freshly initialised."""
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language,
        image_token_index=image_token,
        image_seq_length=PATCHES,
        # Block 9's output as it leaves the block, without its class token.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
    model.model.vision_tower.requires_grad_(False)
    return model


def trained_parameters(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The parameters that learn, by name: projector and decoder, the tied output layer once."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def save_trained(parameters: dict[str, Tensor], language: LlamaConfig, tokenizer: str, file: Path) -> None:
    """Writes the committed file: fp16 tensors, the decoder's config and the tokenizer as metadata."""
    facts = {"format": "pt", "text_config": json.dumps(language.to_diff_dict()), "tokenizer": tokenizer}
    file.parent.mkdir(exist_ok=True)
    tensors = {name: value.detach().to(torch.float16).contiguous() for name, value in parameters.items()}
    save_file(tensors, file, facts)


def _facts(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as stored:
        return dict(stored.metadata())


def build_mini_vlm(onnx_file: Path, trained_file: Path, out: Path) -> None:
    """Writes the LlavaForConditionalGeneration folder (weights, tokenizer, chat template, processors) to `out`.

    Raises KeyError or RuntimeError when the trained file is not one of this model.
    """
    facts = _facts(trained_file)
    tokenizer = fast_tokenizer(facts["tokenizer"])
    language = LlamaConfig(**json.loads(facts["text_config"]))
    model = assembled(vision(onnx_file), language, tokenizer.convert_tokens_to_ids(IMAGE)).eval()
    parameters = trained_parameters(model)
    trained = load_file(trained_file)
    if set(parameters) != set(trained):
        raise RuntimeError(f"{trained_file.name} holds other parameters: {sorted(set(parameters) ^ set(trained))[:4]}")
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(trained[name])
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=LONGEST_ANSWER,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(out)
    processor = LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,  # the class token, which the strategy "default" takes off again
    )
    processor.save_pretrained(out)
    image_processor().save_pretrained(out)
