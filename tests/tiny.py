"""Small random models of every family, with real processors, made offline in milliseconds."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AltCLIPConfig,
    BertConfig,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessorPil,
    ClapConfig,
    ClapFeatureExtractor,
    CLIPConfig,
    CLIPImageProcessorPil,
    Dinov2Config,
    FlavaConfig,
    FlavaImageProcessorPil,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    SiglipConfig,
    SiglipImageProcessorPil,
    VisionTextDualEncoderConfig,
    ViTConfig,
    ViTImageProcessorPil,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from mmcompress.bundle import Bundle, Processor
from mmcompress.data import Dataset, Memory, Sample, Waveform
from mmcompress.families import family_for
from mmcompress.manifest import Source
from tests import tiny_joint, tiny_vlm

FAMILIES = (
    "clip",
    "siglip",
    "siglip2",
    "dual_encoder_vit",
    "dual_encoder_dinov2",
    "altclip",
    "chinese_clip",
    "flava",
)
"""The dual encoders of images and texts."""
WHOLE = ("blip_retrieval",)
"""Those of them whose vision tower keeps its heads."""
MERGING = tuple(name for name in FAMILIES if name != "flava")
"""Those of them whose image tokens can be merged."""
HEARING = ("clap",)
"""The dual encoders of sound and texts."""
GENERATORS = ("whisper", "blip", "blip_vqa", "vilt", *tiny_vlm.MODELS)
"""Families that answer in text."""
MIXTURES = tiny_vlm.MIXTURES
"""Generators that others stand for, but where experts are concerned: not among those that all tests go through."""
JUDGES = ("vilt_retrieval", "layoutlm", "layoutlm_pages", "layoutlm_words")
"""Those that neither embed nor answer."""
EVERY = (*FAMILIES, *WHOLE, *HEARING, *GENERATORS, *JUDGES)
SHOWN = (*tiny_vlm.MODELS, *MIXTURES)
"""Those that are shown pictures and answer in text, through a language model of their own."""
TOWERS = {
    "blip_retrieval": ("vision", "text"),
    "vilt": ("joint",),
    **dict.fromkeys(("vilt_retrieval", "layoutlm", "layoutlm_pages", "layoutlm_words"), ("joint",)),
    "clap": ("audio", "text"),
    "whisper": ("audio", "decoder"),
    "blip": ("vision", "decoder"),
    "blip_vqa": ("vision", "text", "decoder"),
    **dict.fromkeys(SHOWN, ("vision", "language")),
}
"""The towers of all but FAMILIES, which have "vision" and "text"."""
WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "house",
    "tree",
    "car",
    "drawing",
    "of",
    "the",
    "big",
    "small",
    "two",
    "three",
    "on",
    "in",
    "with",
    "and",
]
SIDE = 56
RATE = 16_000


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; [CLS] … [SEP] around, [SEP] = 3 ends the text."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[UNK]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        unk_token="[UNK]",
    )


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
        **more,
    }


def _text(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 32,
        "max_position_embeddings": 20,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 0,
        **more,
    }


def _config(name: str) -> tuple[Any, Any]:
    size = {"height": SIDE, "width": SIDE}
    if name == "clip":
        config = CLIPConfig(
            vision_config=_vision(intermediate_size=96),
            text_config=_text(),
            projection_dim=24,
        )
        return config, CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    if name == "altclip":
        config = AltCLIPConfig(
            vision_config=_vision(intermediate_size=96),
            text_config=_text(project_dim=40),
            projection_dim=24,
        )
        return config, CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    if name == "chinese_clip":
        config = ChineseCLIPConfig(
            vision_config=_vision(intermediate_size=96),
            text_config=_text(),
            projection_dim=24,
        )
        return config, ChineseCLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    if name == "flava":
        config = FlavaConfig(
            image_config=_vision(intermediate_size=96),
            text_config=_text(),
            multimodal_config={
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 64,
            },
            projection_dim=24,
        )
        return config, FlavaImageProcessorPil(size=size, crop_size=size)
    if name == "siglip":
        config = SiglipConfig(vision_config=_vision(intermediate_size=96, hidden_size=32), text_config=_text())
        return config, SiglipImageProcessorPil(size=size)
    if name == "siglip2":
        config = Siglip2Config(
            vision_config=_vision(intermediate_size=96, hidden_size=32, num_patches=49), text_config=_text()
        )
        return config, Siglip2ImageProcessorPil(patch_size=8, max_num_patches=49)
    vision = (
        ViTConfig(**_vision(intermediate_size=96))
        if name == "dual_encoder_vit"
        else Dinov2Config(**_vision(mlp_ratio=2, layerscale_value=0.7))
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, BertConfig(**_text()), projection_dim=24)
    return config, ViTImageProcessorPil(size=size)


def _whisper() -> tuple[Any, Any]:
    """One second of sound in 100 frames of 20 mel bins, 50 states; texts start with [CLS] and an id without a word."""
    config = WhisperConfig(
        vocab_size=25,
        d_model=48,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=96,
        num_mel_bins=20,
        max_source_positions=50,
        max_target_positions=24,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
        begin_suppress_tokens=None,
    )
    return config, WhisperFeatureExtractor(feature_size=20, sampling_rate=RATE, chunk_length=1)


def _clap() -> tuple[Any, Any]:
    """One second of sound in 63 frames of 16 mel bins, stretched to 64 and folded to 32 x 32; two stages of two blocks."""
    audio = {
        "spec_size": 32,
        "num_mel_bins": 16,
        "window_size": 4,
        "depths": [2, 2],
        "num_attention_heads": [4, 8],
        "patch_embeds_hidden_size": 32,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
    }
    config = ClapConfig(audio_config=audio, text_config=_text(), projection_dim=24)
    extractor = ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        hop_length=256,
        max_length_s=1,
        fft_window_size=512,
        frequency_max=8000,
        truncation="rand_trunc",
    )
    return config, extractor


def bundle(name: str, seed: int = 0) -> Bundle:
    """Return a small random model of the family `name`, in evaluation mode; the same weights for the same seed."""
    words = tokenizer()
    if name in SHOWN:
        config, preprocessor, words = tiny_vlm.parts(name, tuple(WORDS))
    elif name in tiny_joint.ARCHITECTURES:
        config, preprocessor = tiny_joint.parts(name)
        words = tiny_joint.words(name) or words
    else:
        config, preprocessor = SOUND[name]() if name in SOUND else _config(name)
    family = family_for({"model_type": config.model_type, "architectures": tiny_joint.named(name)})
    torch.manual_seed(seed)
    model = family.model_class(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start at 0 and 1; laws about them would hold for the wrong reason.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif not parameter.is_meta and not parameter.any():
                # Tables of biases and class tokens start at 0.
                parameter.normal_(std=0.5)
            elif parameter.dim() == 2:
                parameter.mul_(3)
    if name == "whisper":
        with torch.no_grad():
            # Fresh convolutions hardly let anything through: the answer would not depend on what is heard.
            for conv in (model.model.encoder.conv1, model.model.encoder.conv2):
                conv.weight.mul_(10)
        model.generation_config = GenerationConfig(
            decoder_start_token_id=1,
            bos_token_id=1,
            eos_token_id=3,
            pad_token_id=0,
            no_timestamps_token_id=24,
            suppress_tokens=[0, 1, 2, 24],
        )
    if name in SHOWN:
        model.generation_config = tiny_vlm.settings()
        with torch.no_grad():
            # Else what the blocks add is small beside the last token's own embedding, and every answer is the same.
            for name_, parameter in model.named_parameters():
                if name_.endswith(("o_proj.weight", "down_proj.weight")) and "vision" not in name_:
                    parameter.mul_(9)
                # What is stacked has three dimensions, and was passed by above.
                elif name_.endswith(("experts.gate_up_proj", "experts.down_proj")):
                    parameter.mul_(3 if "gate" in name_ else 27)
    tiny_joint.strengthen(model, name)
    model.eval()
    part = {"audio" if name in SOUND else "image": preprocessor}
    as_read = json.loads(json.dumps(config.to_dict()))  # its keys are strings
    made_source = Source(id=name, config=as_read | {"architectures": [type(model).__name__]})
    return Bundle(
        model=model,
        processor=Processor(tokenizer=words, **part),
        family=family,
        source=made_source,
    )


SOUND = {"whisper": _whisper, "clap": _clap}


def images(count: int, seed: int = 0) -> list[Image.Image]:
    """Return `count` different coloured images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for pixels in coarse]


def texts(count: int, seed: int = 0) -> list[str]:
    """Return `count` texts of 2 to 9 known words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator).tolist()) for n in lengths
    ]


def wide(family: str = "siglip") -> Bundle:
    """Return a small random model of 64 channels and 128 neurons: what kernels and blocks of 4 bits divide."""
    made = bundle(family)
    config = made.model.config
    for part in (config.vision_config, config.text_config):
        part.hidden_size, part.intermediate_size = 64, 128
    torch.manual_seed(0)
    model = type(made.model)(config).eval()
    as_read = json.loads(json.dumps(config.to_dict())) | {"architectures": [type(model).__name__]}
    return Bundle(model, made.processor, made.family, Source(id="wide", config=as_read))


def dataset(count: int, seed: int = 0) -> Dataset:
    """Return `count` samples of an image with one text each, in memory."""
    pairs = zip(images(count, seed), texts(count, seed), strict=True)
    return Dataset(
        Memory([Sample(f"{i:04d}", (text,), picture=image) for i, (image, text) in enumerate(pairs)]), "tiny"
    )


def write_pairs(folder: Path, count: int, name: str = "") -> Path:
    """Write `count` images with a text each as a data folder, files called by number and `name`, and return it."""
    folder.mkdir()
    rows = []
    for number, (image, text) in enumerate(zip(images(count), texts(count), strict=True)):
        image.save(folder / f"{number}{name}.png")
        rows.append(json.dumps({"file_name": f"{number}{name}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def asked(count: int, seed: int = 0, turns: bool = True) -> Dataset:
    """Return `count` samples of an image with a question and its answer, in memory; one in four without an image.

    One in four was asked something before, unless `turns` is false.
    """
    found = list(dataset(count, seed))
    return Dataset(
        Memory(
            [
                Sample(
                    sample.key,
                    sample.texts,
                    picture=None if index % 4 == 3 else sample.picture,
                    question=f"what is this {' '.join(WORDS[: index % 3])} ?",
                    turns=(("how many ?", "two"),) if turns and index % 4 == 1 else (),
                )
                for index, sample in enumerate(found)
            ]
        ),
        "asked",
    )


def recordings(count: int, seed: int = 0) -> list[Waveform]:
    """Return `count` different recordings of 0.4 to 1 second: a few tones that swell and fade."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        time = np.arange(int(RATE * generator.uniform(0.4, 1))) / RATE
        tones = [np.sin(2 * np.pi * pitch * time) for pitch in generator.uniform(100, 4000, 3)]
        swell = np.sin(2 * np.pi * generator.uniform(0.5, 4) * time)
        made.append(Waveform((0.3 * swell * sum(tones)).astype(np.float32), RATE))
    return made


def spoken(count: int, seed: int = 0) -> Dataset:
    """Return `count` samples of a recording with its text, in memory."""
    pairs = zip(recordings(count, seed), texts(count, seed), strict=True)
    return Dataset(
        Memory([Sample(f"{i:04d}", (text,), audio=audio) for i, (audio, text) in enumerate(pairs)]), "spoken"
    )


def data(family: str, count: int, seed: int = 0) -> Dataset:
    """Return `count` samples of the kind the tiny model `family` is used on."""
    if family in SOUND:
        return spoken(count, seed)
    if family in tiny_joint.ASKED:
        pairs = zip(asked(count, seed, turns=False), images(count, seed), strict=True)
        return Dataset(Memory([replace(sample, picture=image) for sample, image in pairs]), "asked of pictures")
    if family in SHOWN:
        return asked(count, seed, turns=family != "paligemma")
    return dataset(count, seed)
