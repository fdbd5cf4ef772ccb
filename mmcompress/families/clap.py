"""ClapModel: sound in a Swin-like tower of four stages, texts in RoBERTa, joined by two small projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ClapModel

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.anatomy import example_pixels, read_blocks, roberta_positions, widths
from mmcompress.families.block_names import CLAP_AUDIO_BLOCK
from mmcompress.families.text_encoders import bert_text
from mmcompress.families.two_tower import TwoTowers, in_dtype_of
from mmcompress.views import Block, Tower

if TYPE_CHECKING:
    from mmcompress.data import Sample

STAGES = "audio_model.audio_encoder.layers"


class Clap(TwoTowers):
    """LAION's CLAP without feature fusion (clap-htsat-unfused, larger_clap_general)."""

    name = "clap"
    model_types: tuple[str, ...] = ("clap",)
    architectures: tuple[str, ...] = ("ClapModel",)
    media: Literal["vision", "audio"] = "audio"

    def model_class(self, config: Any) -> type[nn.Module]:
        if config.audio_config.enable_fusion:
            raise UsageError(
                "CLAP with feature fusion is not supported: what it hears of a recording is drawn at random",
                hint="use a checkpoint without, such as clap-htsat-unfused",
            )
        return ClapModel

    def towers(self, model: Any) -> tuple[Tower, ...]:
        return (
            Tower(
                name="audio",
                path="audio_model",
                blocks_path=STAGES,
                blocks=self._audio_blocks(model),
                config="audio_config",
                depth_key="depths",
                heads=("audio_projection",),
                embeddings=("audio_model.audio_encoder.patch_embed.proj",),
                why_fixed_depth="they come in pairs, of plain and of shifted windows, in stages of different widths",
                packed=True,
                why_no_stream="its tokens are a grid that is cut into windows",
            ),
            bert_text(model, first=self.text_config(model).pad_token_id + 1),
        )

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return the embeddings (B, C) of one tower, before the model normalises them; see `Family.encode`."""
        encoder, projection = (
            (model.audio_model, model.audio_projection)
            if tower == "audio"
            else (model.text_model, model.text_projection)
        )
        made: Tensor = projection(encoder(**in_dtype_of(model, inputs)).pooler_output)
        return made

    def similarity(self, model: Any) -> tuple[Tensor, Tensor]:
        """Return (scale, 0) of the logits of a recording over texts; those of a text over recordings have a scale of their own."""
        scale = model.logit_scale_a.exp()
        return scale, torch.zeros_like(scale)

    def text_limit(self, model: Any) -> int:
        return roberta_positions(self.text_config(model))

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return the sample itself where it has a recording, or its texts; see `Family.items`."""
        if tower == "text":
            return list(sample.texts)
        return [] if sample.audio is None else [sample]

    def prepare(self, model: Any, processor: Processor, tower: str, items: Sequence[Any]) -> dict[str, Tensor]:
        """Return input_features (B, 1, frames, mel bins) of samples, or tokens of texts.

        CLAP hears a few seconds. It repeats shorter recordings; of longer ones it would take a part at random, here it is the
        middle, so that the same recording always sounds the same. The frames are stretched to as many as the audio tower works
        on, which it else does itself, so that an exported graph has one shape. Raises what `Sample.waveform` raises.
        """
        if tower == "text":
            return self.prepare_texts(model, processor, items)
        extractor = processor.audio
        if extractor is None:
            raise UsageError("this checkpoint has no feature extractor", hint="add its preprocessor_config.json")
        waves = [_middle(sample.waveform(extractor.sampling_rate), extractor.nb_max_samples) for sample in items]
        features = extractor(
            waves, sampling_rate=extractor.sampling_rate, truncation="rand_trunc", return_tensors="pt"
        )["input_features"]
        bins, (width, height) = model.config.audio_config.num_mel_bins, _spectrogram(model)
        if features.shape[-1] != bins or features.shape[-2] > width:
            raise UsageError(
                f"the feature extractor makes {tuple(features.shape[2:])} (frames, mel bins), "
                f"config.json allows ({width}, {bins})",
                hint="use the preprocessor_config.json that belongs to this checkpoint",
            )
        if features.shape[-2] < width:
            features = nn.functional.interpolate(features, (width, bins), mode="bicubic", align_corners=True)
        assert height == bins, "CLAP lays the mel bins out over the height of its spectrogram"
        return in_dtype_of(model, {"input_features": features})

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        """Return smooth spectrograms, or tokens; see `Family.example_inputs`."""
        if tower == "audio":
            return {"input_features": example_pixels(batch, 1, *_spectrogram(model))}
        return super().example_inputs(model, tower, batch)

    def end_of_text(self, config: Any) -> int:
        return int(config.eos_token_id)

    def write_config(self, model: Any) -> None:
        """Write depth and MLP width of the text tower, and the one ratio of all MLPs of the audio tower where they have one."""
        audio, text = self.towers(model)
        config = model.config.text_config
        config.num_hidden_layers = len(text.blocks)
        found = widths(text.blocks)
        if found:
            config.intermediate_size = found[1]
        inputs = [model.get_submodule(block.attention.reader).out_features for block in audio.blocks]
        neurons = [block.feeding.neurons for block in audio.blocks]
        ratio = neurons[0] / inputs[0]
        if all(int(ratio * width) == own for width, own in zip(inputs, neurons, strict=True)):
            model.config.audio_config.mlp_ratio = ratio

    @staticmethod
    def _audio_blocks(model: Any) -> tuple[Block, ...]:
        """Return the blocks of all stages, numbered on."""
        config = model.config.audio_config
        found: list[Block] = []
        for stage in range(len(config.depths)):
            blocks = read_blocks(model, f"{STAGES}.{stage}.blocks", CLAP_AUDIO_BLOCK, config.hidden_act)
            for block in blocks:
                attention = replace(block.attention, window=config.window_size**2)
                found.append(replace(block, index=len(found), attention=attention))
        return tuple(found)


def _spectrogram(model: Any) -> tuple[int, int]:
    """Return (frames, mel bins) of the spectrogram that is folded into a square image."""
    config = model.config.audio_config
    folds = config.spec_size // config.num_mel_bins
    return config.spec_size * folds, config.spec_size // folds


def _middle(wave: np.ndarray, limit: int) -> np.ndarray:
    start = max(0, len(wave) - limit) // 2
    return wave[start : start + limit]


FAMILY = Clap()
