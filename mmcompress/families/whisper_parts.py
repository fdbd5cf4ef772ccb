"""Whisper as two graphs: one listens, once; the other writes, token after token.

What the decoder looks at never changes while it writes, so the first graph already makes of the encoder's states what the decoder
needs: keys and values of each block's cross-attention. The second serves the start tokens (an empty past) and every later step
alike: its weights, the word table among them, exist once.

Shape alphabet: B batch, N states of the encoder, T tokens, P past tokens, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from mmcompress.families.anatomy import example_tokens
from mmcompress.families.answers import require_known_settings
from mmcompress.families.caches import filled, held
from mmcompress.ops.masks import causal_mask
from mmcompress.parts import BATCH, PAST, TOKENS, Decoding, Part, Sizes
from mmcompress.surgery.cache_lengths import CACHE


def listen(model: Any, features: Tensor) -> tuple[Tensor, ...]:
    """Return keys and values (B, H, N, D) of every decoder block's cross-attention, for features (B, mel bins, frames)."""
    states = model.model.encoder(features).last_hidden_state
    made = []
    for layer in model.model.decoder.layers:
        attention = layer.encoder_attn
        for project in (attention.k_proj, attention.v_proj):
            made.append(project(states).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2))
    return tuple(made)


def write(model: Any, ids: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
    """Return the last token's logits (B, V) and keys and values (B, H, P + T, D), for ids (B, T).

    `caches` are key and value of each block, first of the cross-attention (B, H, N, D), then of the past (B, H, P, D).
    """
    heard, past = caches[: len(caches) // 2], caches[len(caches) // 2 :]
    cache = EncoderDecoderCache(filled(past), filled(heard))
    before, count = past[0].shape[2], ids.shape[1]
    hidden = model.model.decoder(
        input_ids=ids,
        attention_mask=causal_mask(before, count, model.dtype),
        # The cache holds all that is looked at; this says only that there is something.
        encoder_hidden_states=heard[0],
        **{CACHE: cache},
        position_ids=(torch.arange(count) + before)[None],
        use_cache=True,
    ).last_hidden_state
    return (model.proj_out(hidden[:, -1]), *held(cache.self_attention_cache))


def whisper_parts(model: Any, features: Any, start: list[int]) -> tuple[Part, ...]:
    """Return the two graphs; `features(batch)` makes an example of what is heard, `start` opens every text."""
    layers = len(model.model.decoder.layers)
    heard, past, present = (tuple(_names(kind, layers)) for kind in ("cross", "past", "present"))
    places = model.config.max_target_positions

    def example(sizes: Sizes) -> dict[str, Tensor]:
        batch, before, count = sizes[BATCH], sizes[PAST], sizes[TOKENS]
        ids = example_tokens(batch, before + count + 1, model.config.vocab_size, 0)[:, :-1]
        begin = torch.tensor(start)[: before + count]
        ids[:, : len(begin)] = begin
        with torch.no_grad():
            states = listen(model, features(batch).to(model.dtype))
            empty = tuple(
                torch.zeros(batch, layer.self_attn.num_heads, 0, layer.self_attn.head_dim, dtype=model.dtype)
                for layer in model.model.decoder.layers
                for _ in ("key", "value")
            )
            earlier = write(model, ids[:, :before], *states, *empty)[1:] if before else empty
        made = dict(zip((*heard, *past), (*states, *earlier), strict=True))
        return {"input_ids": ids[:, before:]} | {name: value.float() for name, value in made.items()}

    return (
        Part(
            "audio",
            listen,
            heard,
            {"input_features": (BATCH,)},
            lambda sizes: {"input_features": features(sizes[BATCH])},
            tower="audio",
        ),
        Part(
            "decoder",
            write,
            ("logits", *present),
            {"input_ids": (BATCH, TOKENS)} | dict.fromkeys(heard, (BATCH,)) | dict.fromkeys(past, (BATCH, "", PAST)),
            example,
            traced={TOKENS: 3, PAST: 4},
            corners=(
                {TOKENS: len(start), PAST: 0},
                {TOKENS: 1, PAST: len(start)},
                {TOKENS: 3, PAST: 5},
            ),
            longest={TOKENS: 1, PAST: places - 1},
            most_tokens=places,
            tower="decoder",
        ),
    )


def whisper_decoding(model: Any, start: list[int]) -> Decoding:
    """Return how transformers' own greedy generation writes from `start`. Raises NotExportable for settings it does not cover."""
    settings, config = model.generation_config, model.config
    require_known_settings(settings)
    languages: dict[str, int] = getattr(settings, "lang_to_id", None) or {}
    end = settings.eos_token_id
    steps: list[tuple[int, ...]] = [(token,) for token in start]
    if languages and getattr(settings, "language", None) is None:
        steps[1:2] = [tuple(sorted(languages.values()))]  # it listens which language it is
        tasks: dict[str, int] = getattr(settings, "task_to_id", None) or {}
        if getattr(settings, "task", None) is None:
            # generate() names a task only where language or task are given.
            steps = [step for step in steps if step[0] not in tasks.values()]
    return Decoding(
        end=tuple(end if isinstance(end, list) else [end]),
        padding=settings.pad_token_id if settings.pad_token_id is not None else config.pad_token_id or 0,
        limit=config.max_target_positions // 2,
        start=tuple(steps),
        suppressed=tuple(settings.suppress_tokens or ()),
        suppressed_first=tuple(settings.begin_suppress_tokens or ()),
        questions=False,
    )


def _names(kind: str, layers: int) -> Iterator[str]:
    for layer in range(layers):
        yield f"{kind}_key_{layer}"
        yield f"{kind}_value_{layer}"
