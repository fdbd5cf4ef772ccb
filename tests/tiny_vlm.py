"""Small random vision-language models of every family, with real processors."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    GenerationConfig,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    PaliGemmaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
)

SIDE, PATCH = 56, 14
PAD, BEGIN, END, IMAGE, VIDEO, SEEN, LOOKED = range(7)
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<video>", "<vision>", "</vision>")
TILES = ("<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)))
SAID = ("User", "Assistant", ":", ".", "?", "Describe", "image", "caption", "en", "what", "is", "this", "how", "many")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ 'User' if message.role == 'user' else 'Assistant' }} : "
    "{% for part in message.content %}{% if part.type == 'image' %}BEFORE<image>AFTER{% elif part.type == 'video' %}"
    "BEFORE<video>AFTER{% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}Assistant : {% endif %}"
)


@functools.cache
def tokenizer(words: tuple[str, ...], before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """Whole words, spaces lost; a chat template that writes `before` and `after` around the image token."""
    said = (*SPECIAL, "<unk>", *TILES, *SAID, *words)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(said))}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (*SPECIAL, *TILES)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE.replace("BEFORE", before).replace("AFTER", after)
    return made


def _vision(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return {**sizes, "image_size": SIDE, "patch_size": PATCH, **more}


def _text(size: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 144,
        "vocab_size": size,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        **more,
    }


def _qwen(size: int, **more: Any) -> dict[str, Any]:
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": SEEN,
        "vision_end_token_id": LOOKED,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return {"text_config": _text(size, rope_parameters=rope, head_dim=8), **ids, **more}


MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
"""The middle one of three blocks has one feed-forward for all tokens."""
SQUARE = {"height": SIDE, "width": SIDE}
CLIP_PIXELS = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
QWEN_PIXELS = {"min_pixels": SIDE**2, "max_pixels": (4 * SIDE) ** 2, "patch_size": PATCH, "merge_size": 2}
TILED = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def _made(name: str, size: int) -> tuple[Any, Any]:
    if name == "llava_clip":
        vision: Any = CLIPVisionConfig(**_vision(intermediate_size=144))
        config: Any = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**_text(size)), image_token_index=IMAGE)
        return config, CLIPImageProcessorPil(**CLIP_PIXELS)
    if name == "llava_siglip":
        vision = SiglipVisionConfig(**_vision(intermediate_size=144, vision_use_head=False))
        config = LlavaConfig(
            vision_config=vision,
            text_config=Qwen3Config(**_text(size, head_dim=8)),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        return config, SiglipImageProcessorPil(size=SQUARE)
    if name == "llava_dinov2":
        vision = Dinov2Config(**_vision(mlp_ratio=4, layerscale_value=0.7))
        text = LlamaConfig(**_text(size, tie_word_embeddings=True))
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
        return config, CLIPImageProcessorPil(**CLIP_PIXELS)
    if name == "llava_next":
        vision = CLIPVisionConfig(**_vision(intermediate_size=144))
        grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
        config = LlavaNextConfig(
            vision_config=vision,
            text_config=Qwen2Config(**_text(size)),
            image_token_index=IMAGE,
            image_grid_pinpoints=grid,
        )
        return config, LlavaNextImageProcessorPil(**CLIP_PIXELS, image_grid_pinpoints=grid)
    if name == "qwen2_vl":
        vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 4, "patch_size": PATCH}
        return Qwen2VLConfig(vision_config=vision, **_qwen(size)), Qwen2VLImageProcessorPil(**QWEN_PIXELS)
    if name == "qwen2_5_vl":
        vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 144, "num_heads": 4}
        vision |= {"patch_size": PATCH, "window_size": SIDE, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(vision_config=vision, **_qwen(size)), Qwen2VLImageProcessorPil(**QWEN_PIXELS)
    if name in ("qwen3_vl", "qwen3_vl_moe"):
        vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 144, "num_heads": 4}
        vision |= {"patch_size": PATCH, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        if name == "qwen3_vl":
            return Qwen3VLConfig(vision_config=vision, **_qwen(size)), Qwen2VLImageProcessorPil(**QWEN_PIXELS)
        made = _qwen(size)
        made["text_config"] |= MIXED
        return Qwen3VLMoeConfig(vision_config=vision, **made), Qwen2VLImageProcessorPil(**QWEN_PIXELS)
    if name == "paligemma":
        vision = _vision(intermediate_size=144, projection_dim=32, vision_use_head=False)
        vision["model_type"] = "siglip_vision_model"
        text = _text(size, head_dim=8, model_type="gemma")
        config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32)
        return config, SiglipImageProcessorPil(size=SQUARE)
    kind, pixels = {
        "smolvlm": (SmolVLMConfig, SmolVLMImageProcessorPil),
        "idefics3": (Idefics3Config, Idefics3ImageProcessorPil),
    }[name]
    text = _text(size, model_type="llama")
    vision = _vision(intermediate_size=144)
    return kind(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2), pixels(**TILED)


MODELS = (
    "llava_clip",
    "llava_siglip",
    "llava_dinov2",
    "llava_next",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "idefics3",
    "paligemma",
)
MIXTURES = ("qwen3_vl_moe",)
"""Those with several feed-forwards in a block, of which a router chooses a few for each token."""


def parts(name: str, words: tuple[str, ...]) -> tuple[Any, Any, PreTrainedTokenizerFast]:
    """Return the config, image processor and tokenizer of `name`."""
    around = ("<vision>", "</vision>") if name.startswith("qwen") else ("", "")
    said = tokenizer(words, *around)
    config, pixels = _made(name, len(said))
    return config, pixels, said


def settings() -> GenerationConfig:
    return GenerationConfig(
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
        max_new_tokens=8,
        suppress_tokens=[PAD, BEGIN, IMAGE, VIDEO, SEEN, LOOKED],
    )
