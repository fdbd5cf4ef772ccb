"""BLIP in graphs: one looks; where a question is asked, one reads it; the last writes, token after token.

As with Whisper, what the decoder looks at never changes while it writes, so the graph before it already makes keys and values of
each block's cross-attention: of the picture for captions, of the question's states for answers.

Shape alphabet: B batch, N image tokens, Q tokens of the question, T tokens, P past tokens, S states that are looked at (N or Q),
H heads, D head width, C channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from mmcompress.families.anatomy import example_tokens
from mmcompress.families.answers import require_known_settings
from mmcompress.families.blip_views import example_pictures
from mmcompress.families.caches import filled, held
from mmcompress.ops.masks import HIDDEN, causal_mask
from mmcompress.parts import BATCH, PAST, TOKENS, Decoding, Part, Sizes
from mmcompress.surgery.cache_lengths import CACHE

QUESTION = "question"
"""The axis of a question's tokens."""


def see(model: Any, pixels: Tensor) -> Tensor:
    """Return the states of the image tokens (B, N, C) of pixels (B, 3, H, W)."""
    states: Tensor = model.vision_model(pixels).last_hidden_state
    return states


def read(model: Any, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
    """Return the states (B, Q, C) of a question's ids and mask (B, Q), which looks at `seen` (B, N, C)."""
    states: Tensor = model.text_encoder(
        ids,
        attention_mask=_shown(mask, seen.dtype),
        position_ids=torch.arange(ids.shape[1])[None],
        encoder_hidden_states=seen,
    ).last_hidden_state
    return states


def crossed(model: Any, states: Tensor) -> tuple[Tensor, ...]:
    """Return keys and values (B, H, S, D) of every decoder block's cross-attention, for states (B, S, C)."""
    made = []
    for block in model.text_decoder.bert.encoder.layer:
        attention = block.crossattention.self
        for project in (attention.key, attention.value):
            heads = (attention.num_attention_heads, attention.attention_head_size)
            made.append(project(states).unflatten(-1, heads).transpose(1, 2))
    return tuple(made)


def write(model: Any, ids: Tensor, mask: Tensor | None, *caches: Tensor) -> tuple[Tensor, ...]:
    """Return the last token's logits (B, V) and keys and values (B, H, P + T, D), for ids (B, T).

    `mask` (B, S) is 1 at states that are looked at, None where all are. `caches` are key and value of each block, first of the
    cross-attention (B, H, S, D), then of the past (B, H, P, D).
    """
    looked, past = caches[: len(caches) // 2], caches[len(caches) // 2 :]
    cache = EncoderDecoderCache(filled(past), filled(looked))
    before, count, dtype = past[0].shape[2], ids.shape[1], looked[0].dtype
    with masked_cross_attention(model):
        hidden = model.text_decoder.bert(
            input_ids=ids,
            attention_mask=causal_mask(before, count, dtype),
            position_ids=(torch.arange(count) + before)[None],
            # The cache holds all that is looked at; this says only that there is something.
            encoder_hidden_states=looked[0],
            encoder_attention_mask=None if mask is None else _shown(mask, dtype),
            **{CACHE: cache},
            use_cache=True,
            is_decoder=True,
        ).last_hidden_state
    return (model.text_decoder.cls(hidden[:, -1]), *held(cache.self_attention_cache))


def captioner_parts(model: Any) -> tuple[Part, ...]:
    """Return the graphs that look and write."""
    looked = _names(model, "cross")

    def look(model: Any, pixels: Tensor) -> tuple[Tensor, ...]:
        return crossed(model, see(model, pixels))

    def shown(sizes: Sizes) -> dict[str, Tensor]:
        states = look(model, example_pictures(model, sizes[BATCH])["pixel_values"].to(model.dtype))
        return dict(zip(looked, states, strict=True))

    return (
        _vision_part(look, looked, model),
        _decoder_part(model, shown, dict.fromkeys(looked, (BATCH,))),
    )


def answerer_parts(model: Any) -> tuple[Part, ...]:
    """Return the graphs that look, read and write."""
    looked = _names(model, "cross")

    def asked(model: Any, ids: Tensor, mask: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        return crossed(model, read(model, ids, mask, seen))

    def example(sizes: Sizes) -> dict[str, Tensor]:
        c = model.config.text_config
        ids = example_tokens(sizes[BATCH], sizes[QUESTION], c.vocab_size, c.sep_token_id, c.pad_token_id)
        mask = torch.ones_like(ids)
        if sizes[QUESTION] > 1:
            mask[1::2, -1] = 0  # every second question is shorter
        with torch.no_grad():
            seen = see(model, example_pictures(model, sizes[BATCH])["pixel_values"].to(model.dtype))
        return {"question_ids": ids, "question_mask": mask, "image_states": seen.float()}

    def shown(sizes: Sizes) -> dict[str, Tensor]:
        given = example(sizes)
        states = asked(model, given["question_ids"], given["question_mask"], given["image_states"].to(model.dtype))
        return {"question_mask": given["question_mask"], **dict(zip(looked, states, strict=True))}

    question = {"question_ids": (BATCH, QUESTION), "question_mask": (BATCH, QUESTION)}
    return (
        _vision_part(see, ("image_states",), model),
        Part(
            "text",
            asked,
            looked,
            {**question, "image_states": (BATCH,)},
            example,
            traced={QUESTION: 5},
            corners=({QUESTION: 1}, {QUESTION: 7}),
            tower="text",
        ),
        _decoder_part(
            model, shown, {"question_mask": (BATCH, QUESTION), **dict.fromkeys(looked, (BATCH, "", QUESTION))}
        ),
    )


def decoding(model: Any, limit: int) -> Decoding:
    """Return how greedy generation writes. Raises NotExportable for settings it does not cover."""
    settings, text = model.generation_config, model.config.text_config
    require_known_settings(settings)
    return Decoding(
        end=(text.sep_token_id,),
        padding=text.pad_token_id,
        limit=settings.max_new_tokens or limit,
        start=((text.bos_token_id,),),
        suppressed=tuple(settings.suppress_tokens or ()),
        suppressed_first=tuple(settings.begin_suppress_tokens or ()),
    )


@contextlib.contextmanager
def masked_cross_attention(model: Any) -> Iterator[None]:
    """While active, the decoder's cross-attention heeds the mask it is given.

    BlipTextAttention hands its mask on by a name that its inner module does not read there (transformers 5.23): a question shorter
    than others of its batch would be looked at with its padding.
    """

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "encoder_attention_mask": kwargs.get("attention_mask")}

    blocks = model.text_decoder.bert.encoder.layer
    handles = [block.crossattention.self.register_forward_pre_hook(give, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _vision_part(look: Callable[..., Any], outputs: tuple[str, ...], model: Any) -> Part:
    return Part(
        "vision",
        look,
        outputs,
        {"pixel_values": (BATCH,)},
        lambda sizes: example_pictures(model, sizes[BATCH]),
        tower="vision",
    )


def _decoder_part(
    model: Any, shown: Callable[[Sizes], dict[str, Tensor]], looked: Mapping[str, tuple[str, ...]]
) -> Part:
    """Return the writer; `shown` makes an example of what it looks at, whose names and axes are `looked`: mask, keys and values."""
    past, present = _names(model, "past"), _names(model, "present")
    text, masked = model.config.text_config, "question_mask" in looked

    def compute(model: Any, ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return write(model, ids, *given) if masked else write(model, ids, None, *given)

    def example(sizes: Sizes) -> dict[str, Tensor]:
        batch, before, count = sizes[BATCH], sizes[PAST], sizes[TOKENS]
        ids = example_tokens(batch, before + count + 1, text.vocab_size, text.sep_token_id, text.pad_token_id)[:, :-1]
        ids[:, 0] = text.bos_token_id
        with torch.no_grad():
            states = shown(sizes)
            earlier: tuple[Tensor, ...] = tuple(
                torch.zeros(batch, attention.num_attention_heads, 0, attention.attention_head_size, dtype=model.dtype)
                for attention in (block.attention.self for block in model.text_decoder.bert.encoder.layer)
                for _ in ("key", "value")
            )
            if before:
                earlier = compute(model, ids[:, :before], *states.values(), *earlier)[1:]
        made = states | dict(zip(past, earlier, strict=True))
        floats = {name: value.float() if value.is_floating_point() else value for name, value in made.items()}
        return {"input_ids": ids[:, before:]} | floats

    asked = {QUESTION: 5} if masked else {}
    places = text.max_position_embeddings
    return Part(
        "decoder",
        compute,
        ("logits", *present),
        {"input_ids": (BATCH, TOKENS)} | dict(looked) | dict.fromkeys(past, (BATCH, "", PAST)),
        example,
        traced={TOKENS: 3, PAST: 4, **asked},
        corners=({TOKENS: 1, PAST: 0, **asked}, {TOKENS: 1, PAST: 1, **asked}, {TOKENS: 3, PAST: 5, **asked}),
        longest={TOKENS: 1, PAST: places - 1, **asked},
        most_tokens=places,
        tower="decoder",
    )


def _names(model: Any, kind: str) -> tuple[str, ...]:
    blocks = range(len(model.text_decoder.bert.encoder.layer))
    return tuple(f"{kind}_{what}_{block}" for block in blocks for what in ("key", "value"))


def _shown(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores (B, 1, 1, S) where `mask` (B, S) is 0."""
    return torch.where(mask[:, None, None, :].bool(), torch.zeros((), dtype=dtype), torch.full((), HIDDEN, dtype=dtype))
