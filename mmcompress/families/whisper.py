"""WhisperForConditionalGeneration: an encoder that listens to 30 seconds of sound, a decoder that writes down what was said."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.anatomy import example_pixels, example_tokens, read_blocks, widths
from mmcompress.families.answers import FORCED_TOKENS, greedy, next_token_roots, quiet
from mmcompress.families.block_names import WHISPER_DECODER_BLOCK, WHISPER_ENCODER_BLOCK
from mmcompress.families.whisper_parts import whisper_decoding, whisper_parts
from mmcompress.parts import Decoding, Part
from mmcompress.surgery.coarsening import coarsening_of, openers
from mmcompress.surgery.ledger import putting_back
from mmcompress.surgery.reduction import ledger_of, tokens_left
from mmcompress.views import Line, TokenStream, Tower

if TYPE_CHECKING:
    import numpy as np

    from mmcompress.data import Sample


class Whisper:
    """OpenAI's Whisper, English-only or multilingual, and what is saved in its class (distil-whisper).

    Its towers are "audio", which makes 1500 states of a recording, and "decoder", which predicts the next token from them. The
    decoder's `encode` is judged by itself: the encoder's states go in without gradient, or ready-made where inputs hold them.
    """

    name = "whisper"
    model_types: tuple[str, ...] = ("whisper",)
    architectures: tuple[str, ...] = ("WhisperForConditionalGeneration",)
    answering = "decoder"

    def model_class(self, config: Any) -> type[nn.Module]:
        return WhisperForConditionalGeneration

    def towers(self, model: Any) -> tuple[Tower, ...]:
        activation = model.config.activation_function
        listening = read_blocks(model, "model.encoder.layers", WHISPER_ENCODER_BLOCK, activation)
        return (
            Tower(
                name="audio",
                path="model.encoder",
                blocks_path="model.encoder.layers",
                blocks=listening,
                config="",
                depth_key="encoder_layers",
                embeddings=("model.encoder.embed_positions",),
                stream=TokenStream(tokens=model.config.max_source_positions, protected=0, readout="states"),
                line=Line(protected=0),
                needed=openers(model, [block.path for block in listening]),
                why_no_residual="what goes in first comes out of an activation, behind which no Linear stands",
            ),
            Tower(
                name="decoder",
                path="model.decoder",
                blocks_path="model.decoder.layers",
                blocks=read_blocks(model, "model.decoder.layers", WHISPER_DECODER_BLOCK, activation),
                config="",
                depth_key="decoder_layers",
                heads=("proj_out",),
                embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
                tied=(("model.decoder.embed_tokens", "proj_out"),) if model.config.tie_word_embeddings else (),
                why_no_stream="the decoder writes one token after the other, and each is needed",
            ),
        )

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return one row per sample whose cosine between two models is how alike they are; see `Family.encode`.

        - "audio": the encoder's last hidden states (B, 1500, C) as (B, 1500 * C); merged ones stand in all their places.
        - "decoder", led through the reference transcript: its next-token distributions, see `next_token_roots`.
        """
        if tower == "audio":
            with putting_back(ledger_of(model.model.encoder.layers[-1])):
                states: Tensor = model.model.encoder(inputs["input_features"]).last_hidden_state
            return states.flatten(1)
        if "encoder_hidden_states" in inputs:
            heard = inputs["encoder_hidden_states"]
        else:
            with torch.no_grad():
                heard = model.model.encoder(inputs["input_features"]).last_hidden_state
        # Padding lies behind the text, where a causal decoder does not look: it needs no mask inside.
        written = model.model.decoder(
            input_ids=inputs["decoder_input_ids"], encoder_hidden_states=heard, use_cache=False
        ).last_hidden_state
        return next_token_roots(model.proj_out(written), inputs["decoder_mask"])

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return the sample itself where it has a recording and, for the decoder, a transcript; see `Family.items`."""
        return [sample] if sample.audio is not None and (tower == "audio" or sample.texts) else []

    def prepare(self, model: Any, processor: Processor, tower: str, items: Sequence[Any]) -> dict[str, Tensor]:
        """Return input_features (B, mel bins, frames) of samples, for the decoder also ids and mask (B, T) of their transcripts.

        A transcript is the sample's first text, cut at `FORCED_TOKENS`; of a recording longer than the model hears at once that is
        the beginning, so of these the first window is taken. Raises what `Sample.waveform` raises.
        """
        first = [self.pieces(processor, sample)[0] for sample in items]
        inputs = {"input_features": self._features(model, processor, first)}
        if tower == "audio":
            return inputs
        start = self.start_tokens(model)
        limit = self._forced_limit(model)
        # Whisper writes a space before the first word too.
        texts = [" " + sample.texts[0].strip() for sample in items]
        tokens = [start + ids[:limit] for ids in _tokenizer(processor)(texts, add_special_tokens=False)["input_ids"]]
        longest = max(map(len, tokens))
        padding = model.config.pad_token_id or 0
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in tokens])
        counts = torch.tensor([len(row) for row in tokens])
        mask = (torch.arange(longest) < counts[:, None]).long()
        return {**inputs, "decoder_input_ids": ids, "decoder_mask": mask}

    def next_tokens(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return (B, T): the transcript's next token at each place, the end after its last; -1 at start tokens and padding.

        What comes after `FORCED_TOKENS` tokens is -1 too: more of the text may have been cut off.
        """
        ids, counts = inputs["decoder_input_ids"], inputs["decoder_mask"].sum(1, keepdim=True)
        start = len(self.start_tokens(model))
        place = torch.arange(ids.shape[1], device=ids.device)
        tokens = torch.where(place == counts - 1, _end(model.config), ids.roll(-1, 1))
        cut = (place == counts - 1) & (counts >= start + self._forced_limit(model))
        return tokens.masked_fill((place < start - 1) | (place >= counts) | cut, -1)

    def generate(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> list[str]:
        """Return the greedy transcript of each sample, of half as many tokens as the decoder has places, as OpenAI's own does.

        Raises what `prepare` raises, and UsageError for samples with a question.
        """
        features = self.asked(model, processor, samples)["input_features"].to(model.device)
        settings = greedy(model.generation_config, model.config.max_target_positions // 2)
        settings.return_timestamps, settings.max_new_tokens = False, model.config.max_target_positions // 2
        with quiet():
            ids = model.generate(features, generation_config=settings)
        return self.texts(model, processor, ids)

    def pieces(self, processor: Processor, sample: Sample) -> list[Sample]:
        """Return the recording in windows of what the model hears at once, cut where it is quiet; see `Sample.in_windows`."""
        extractor = _extractor(processor)
        return sample.in_windows(extractor.sampling_rate, extractor.n_samples)

    def start_tokens(self, model: Any) -> list[int]:
        """Return the tokens before the text: start and, as far as the model has them, language, task and "no timestamps".

        A multilingual model is told English where its generation config names no language.
        """
        settings, config = model.generation_config, model.config
        start = settings.decoder_start_token_id
        tokens = [config.decoder_start_token_id if start is None else start]
        if getattr(settings, "lang_to_id", None):
            language = (getattr(settings, "language", None) or "en").lower()
            code = f"<|{TO_LANGUAGE_CODE.get(language, language)}|>"
            tokens.append(settings.lang_to_id.get(language, settings.lang_to_id.get(code)))
            tokens.append(
                (getattr(settings, "task_to_id", None) or {}).get(getattr(settings, "task", None) or "transcribe")
            )
        tokens.append(getattr(settings, "no_timestamps_token_id", None))
        return [token for token in tokens if token is not None]

    def parts(self, model: Any) -> tuple[Part, ...]:
        """Return the graph that listens and the graph that writes."""
        merges = ledger_of(model.model.encoder.layers[0]) is not None
        listening, writing = whisper_parts(
            model, lambda batch: self._example_features(model, batch), self.start_tokens(model)
        )
        coarsens = any(coarsening_of(layer) for layer in model.model.encoder.layers)
        return replace(listening, choosing=merges or coarsens), writing

    def decoding(self, model: Any) -> Decoding:
        return whisper_decoding(model, self.start_tokens(model))

    def asked(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return what an answer depends on: the recording. Raises UsageError for samples with a question."""
        for sample in samples:
            if sample.question:
                raise UsageError(
                    f"sample '{sample.key}' asks a question, and {self.name} only transcribes",
                    hint="leave the question out",
                )
        return {"input_features": self._features(model, processor, samples)}

    def texts(self, model: Any, processor: Processor, ids: Sequence[Sequence[int]]) -> list[str]:
        return [text.strip() for text in _tokenizer(processor).batch_decode(ids, skip_special_tokens=True)]

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        """Return smooth features for the audio tower; for the decoder states as an encoder gives them, and 16 tokens."""
        c = model.config
        if tower == "audio":
            return {"input_features": self._example_features(model, batch)}
        start = self.start_tokens(model)
        ids = example_tokens(batch, min(16, c.max_target_positions), c.vocab_size, _end(c))
        ids[:, : len(start)] = torch.tensor(start)
        generator = torch.Generator().manual_seed(0)
        heard = tokens_left(model.model.encoder.layers[-1], c.max_source_positions)
        return {
            "encoder_hidden_states": torch.randn(batch, heard, c.d_model, generator=generator),
            "decoder_input_ids": ids,
            "decoder_mask": torch.ones_like(ids),
        }

    def exporting(self, model: nn.Module) -> AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()

    def write_config(self, model: Any) -> None:
        """Write depth and MLP width of both towers; heads cannot be written (the head size would change)."""
        for tower in self.towers(model):
            side = tower.depth_key.removesuffix("_layers")
            setattr(model.config, tower.depth_key, len(tower.blocks))
            found = widths(tower.blocks)
            if found:
                setattr(model.config, f"{side}_ffn_dim", found[1])

    def _forced_limit(self, model: Any) -> int:
        return min(FORCED_TOKENS, int(model.config.max_target_positions) - len(self.start_tokens(model)))

    def _features(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> Tensor:
        """Return the log-mel spectrograms (B, mel bins, frames) of recordings, padded with silence."""
        extractor = _extractor(processor)
        rate = extractor.sampling_rate
        waves: list[np.ndarray] = []
        for sample in samples:
            wave = sample.waveform(rate)
            if len(wave) > extractor.n_samples:
                raise UsageError(
                    f"the recording of sample '{sample.key}' lasts {len(wave) / rate:.1f} s; "
                    f"{self.name} hears {extractor.n_samples / rate:g} s at once",
                    hint="cut it into windows of that length, as Bundle.generate and mmc generate do",
                )
            waves.append(wave)
        features: Tensor = extractor(waves, sampling_rate=rate, return_tensors="pt")["input_features"]
        wanted = (model.config.num_mel_bins, self._frames(model))
        if features.shape[1:] != wanted:
            raise UsageError(
                f"the feature extractor makes {tuple(features.shape[1:])} (mel bins, frames), config.json says {wanted}",
                hint="use the preprocessor_config.json that belongs to this checkpoint",
            )
        return features.to(next(model.parameters()).dtype)

    def _example_features(self, model: Any, batch: int) -> Tensor:
        return example_pixels(batch, 1, model.config.num_mel_bins, self._frames(model)).squeeze(1)

    @staticmethod
    def _frames(model: Any) -> int:
        """Frames of a full recording; the second convolution halves them."""
        return 2 * int(model.config.max_source_positions)


def _end(config: Any) -> int:
    """Return the token that ends a text; some configs list several."""
    end = config.eos_token_id
    return int(end[0] if isinstance(end, list) else end)


def _extractor(processor: Processor) -> Any:
    if processor.audio is None:
        raise UsageError("this checkpoint has no feature extractor", hint="add its preprocessor_config.json")
    return processor.audio


def _tokenizer(processor: Processor) -> Any:
    if processor.tokenizer is None:
        raise UsageError("this checkpoint has no tokenizer", hint="add its tokenizer.json")
    return processor.tokenizer


FAMILY = Whisper()
