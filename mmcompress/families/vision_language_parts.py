"""A vision-language model as three graphs: what sees, what looks tokens up, and what writes.

For families whose pictures all have one size and one number of tokens. What is seen takes the places of image tokens between the
second graph and the third, so the language model is traced without pictures and serves the prompt and every later step alike.

Shape alphabet: B batch, N tokens of a picture, T tokens, P past tokens, H heads, D head width, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmcompress.bundle import Processor
from mmcompress.families.answers import decoding
from mmcompress.families.causal import cache_names, causal_mask, filled
from mmcompress.families.vision_language import ANSWER_TOKENS, VisionLanguage
from mmcompress.parts import BATCH, PAST, TOKENS, Decoding, Part, Sizes

if TYPE_CHECKING:
    from mmcompress.data import Sample


class InParts(VisionLanguage):
    """What such a family is by inheriting from this: exportable."""

    reads_both_ways = False
    """Whether the prompt's tokens look at those behind them too."""

    def parts(self, model: Any) -> tuple[Part, ...]:
        blocks = self.towers(model)[1].blocks
        past, present = (cache_names(kind, len(blocks)) for kind in ("past", "present"))
        images = self.example_images(model, 1)
        config = model.config.text_config

        def write(model: Any, embeds: Tensor, mask: Tensor, positions: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
            cache = filled(caches)
            before, count = caches[0].shape[2], embeds.shape[1]
            hidden = model.get_submodule(self.language)(
                inputs_embeds=embeds,
                attention_mask=causal_mask(before, count, embeds.dtype, mask, self.reads_both_ways),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            layers: Any = cache.layers
            return (
                model.lm_head(hidden[:, -1]),
                *(tensor for layer in layers for tensor in (layer.keys, layer.values)),
            )

        def example(sizes: Sizes) -> dict[str, Tensor]:
            batch, before, count = sizes[BATCH], sizes[PAST], sizes[TOKENS]
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(config.vocab_size, (batch, before + count), generator=generator)
            ids = torch.where(ids == model.config.image_token_id, ids - 1, ids)
            mask = torch.ones_like(ids)
            mask[1::2, : (before + count) // 4] = 0  # every second prompt is shorter, and padded on its left
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            with torch.no_grad():
                embeds = self.look_up(model, ids)
                caches = tuple(
                    torch.zeros(batch, block.attention.kv_heads, 0, block.attention.head_dim, dtype=embeds.dtype)
                    for block in blocks
                    for _ in ("key", "value")
                )
                if before:
                    caches = write(model, embeds[:, :before], mask[:, :before], positions[:, :before], *caches)[1:]
            given = {"inputs_embeds": embeds[:, before:], **dict(zip(past, caches, strict=True))}
            return {name: value.float() for name, value in given.items()} | {
                "attention_mask": mask,
                "position_ids": positions[:, before:],
            }

        return (
            Part(
                "vision",
                self.see,
                ("image_embeds",),
                dict.fromkeys(images, (BATCH,)),
                lambda sizes: self.example_images(model, sizes[BATCH]),
                tower="vision",
            ),
            Part(
                "embed",
                self.look_up,
                ("inputs_embeds",),
                {"input_ids": (BATCH, TOKENS)},
                lambda sizes: {"input_ids": torch.arange(sizes[BATCH] * sizes[TOKENS]).view(-1, sizes[TOKENS]) % 7 + 1},
                traced={TOKENS: 3},
                corners=({TOKENS: 1}, {TOKENS: 5}),
            ),
            Part(
                "language",
                write,
                ("logits", *present),
                {
                    "inputs_embeds": (BATCH, TOKENS),
                    "attention_mask": (BATCH, f"{PAST} + {TOKENS}"),
                    "position_ids": (BATCH, TOKENS),
                    **dict.fromkeys(past, (BATCH, "", PAST)),
                },
                example,
                traced={TOKENS: 5, PAST: 4},
                corners=({TOKENS: 9, PAST: 0}, {TOKENS: 1, PAST: 9}),
                most_tokens=int(getattr(config, "max_position_embeddings", 0)),
                tower="language",
            ),
        )

    def decoding(self, model: Any) -> Decoding:
        settings = model.generation_config
        return decoding(
            settings,
            settings.max_new_tokens or ANSWER_TOKENS,
            settings.pad_token_id or 0,
            image_token=model.config.image_token_id,
        )

    def asked(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the pictures there are, and prompts padded on the left: input_ids, attention_mask, position_ids (B, T)."""
        images, prompts = self._asked(model, processor, samples)
        ids, mask = self._row_up(model, prompts, samples, left=True)
        marks = self.marks(model, ids, mask, mask, images)
        present = images.pop("has_image", None)
        if present is not None:
            images = {name: value[present.bool()] for name, value in images.items()}
        positions = marks.get("position_ids", (mask.cumsum(-1) - 1).clamp_min(0))
        return {**images, "input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def texts(self, processor: Processor, ids: Sequence[Sequence[int]]) -> list[str]:
        found = self.talk.tokenizer(processor).batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]

    def look_up(self, model: Any, ids: Tensor) -> Tensor:
        """Return the language model's rows (B, T, C) of tokens."""
        rows: Tensor = model.get_submodule(self.language).embed_tokens(ids)
        return rows

    def see(self, model: Any, pixels: Tensor) -> Tensor:
        """Return the image tokens (B, N, C) of pictures, for any batch without a loop over it."""
        raise NotImplementedError
