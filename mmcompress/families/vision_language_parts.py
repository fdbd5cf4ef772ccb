"""Vision-language models as three graphs: one looks, once; one turns tokens into rows; the third writes, token after token.

The writer serves the prompt (an empty past) and every later step alike, so its weights exist once. The word table stands beside it,
because the picture's tokens take the place of some of its rows in between.

Where the language model's first K blocks are given something of the picture too (deepstack), it stands behind each row; words have
zeros there.

Shape alphabet: B batch, R pictures or tiles, N tokens of a picture, T tokens, P past tokens, H heads, D head width, C channels,
K blocks, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.families.answers import require_known_settings
from mmcompress.families.caches import CODES, FLOATS, filled, held, nothing
from mmcompress.ops.masks import causal_mask, mask_both_ways
from mmcompress.parts import BATCH, MASK, PAST, TOKENS, Decoding, Part, Sizes
from mmcompress.surgery.cache_lengths import CACHE
from mmcompress.surgery.dropping import dropping_of, given_rooms, rooms_for
from mmcompress.surgery.reducing import choice_of
from mmcompress.surgery.rounded_cache import rounds_cache


def vision_part(look: Callable[..., Tensor], example: Callable[[int], dict[str, Tensor]], tables: int = 0) -> Part:
    """Return the part that makes image_embeds (R, N, C) by `look(model, *inputs)`; `example(R)` returns its inputs.

    `tables`: see `Part.tables`.
    """
    return Part(
        "vision",
        look,
        ("image_embeds",),
        dict.fromkeys(example(1), (BATCH,)),
        lambda sizes: example(sizes[BATCH]),
        tables=tables,
        tower="vision",
    )


def with_places(looking: Part, connector: str) -> Part:
    """Return a part that also gives out image_places (R, M, 1): where in its picture each of the M tokens was that are left.

    They are counted row by row; `connector`, the path of the module that chooses tokens, leaves them.
    """

    def look(model: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        made = looking.compute(model, *inputs)
        choice = choice_of(model.get_submodule(connector))
        assert choice is not None, "the pass bound it"
        places, choice.seen.places = choice.seen.places, None
        assert isinstance(made, Tensor), "it gives out image_embeds alone"
        assert places is not None, "the connector leaves them"
        return made, places[..., None].float()

    return replace(looking, compute=look, outputs=(*looking.outputs, "image_places"))


def embed_part(model: Any, deep: int) -> Part:
    """Return the word table as a part: rows (B, T, C + `deep` * C)."""

    def look_up(model: Any, ids: Tensor) -> Tensor:
        rows: Tensor = model.get_input_embeddings()(ids)
        return nn.functional.pad(rows, (0, deep * rows.shape[-1]))

    def example(sizes: Sizes) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.text_config.vocab_size - 1, (sizes[BATCH], sizes[TOKENS]), generator=generator)
        padding = getattr(model.get_input_embeddings(), "padding_idx", None)
        # The row of padding is all zeros, of which no cosine can be taken.
        return {"input_ids": ids if padding is None else ids + (ids >= padding)}

    return Part(
        "embed",
        look_up,
        ("inputs_embeds",),
        {"input_ids": (BATCH, TOKENS)},
        example,
        traced={TOKENS: 3},
        corners=({TOKENS: 1}, {TOKENS: 5}),
    )


def language_part(model: Any, language: str, both_ways: bool, axes: int, deep: int) -> Part:
    """Return the writer: logits (B, V) and present from inputs_embeds (B, T, C + K * C), attention_mask, position_ids and past.

    `both_ways`: the tokens given together look at one another in both directions. `axes`: how many positions a token has; with
    more than one position_ids is (B, axes, T). `deep`: K.

    Where the cache holds integers, past_key_I are codes, with past_key_scale_I (B, H, P, 1), and so are values.

    Where image tokens leave on their way through the blocks, it also takes image_mask (B, T) and, for each place, a mask of what
    blocks behind it hold and are given: attention_mask_1 (B, P_1 + T_1), as the text of `parts` says.
    """
    config = model.config.text_config
    dropping = dropping_of(model.model)
    places = _places(model, language)
    names = CODES if rounds_cache(model.get_submodule(language).layers[0].self_attn) else FLOATS
    past, present = (
        tuple(f"{kind}_{what}_{layer}" for layer in range(len(places)) for what in names)
        for kind in ("past", "present")
    )
    stages = range(1, 1 + len(dropping.drops) if dropping else 1)
    masks = ("image_mask", *(f"{MASK}_{stage}" for stage in stages)) if dropping else ()

    def write(model: Any, rows: Tensor, mask: Tensor, positions: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        told, caches = more[: len(masks)], more[len(masks) :]
        cache, before = filled(caches, names), caches[0].shape[2]
        rows, *further = rows.chunk(1 + deep, dim=-1)
        if both_ways:
            seen = mask_both_ways(rows.shape[1], rows.dtype, mask)
        else:
            seen = causal_mask(before, rows.shape[1], rows.dtype, mask)
        image, rooms = (told[0], told[1:]) if told else (None, ())
        with _added(model.get_submodule(language).layers, further), given_rooms(dropping, image, rooms):
            hidden = model.get_submodule(language)(
                inputs_embeds=rows,
                attention_mask=seen,
                position_ids=positions.transpose(0, 1) if axes > 1 else positions,
                **{CACHE: cache},
                use_cache=True,
            ).last_hidden_state
        return (model.lm_head(hidden[:, -1]), *held(cache))

    def example(sizes: Sizes) -> dict[str, Tensor]:
        batch, before, count = sizes[BATCH], sizes[PAST], sizes[TOKENS]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (batch, before + count), generator=generator)
        mask = torch.ones_like(ids)
        if before + count > 2:
            mask[1::2, :1] = 0  # every second row begins with padding
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        positions = places[:, None].repeat(1, axes, 1) if axes > 1 else places
        with torch.no_grad():
            rows = model.get_input_embeddings()(ids).to(model.dtype)
            further = torch.randn(*ids.shape, deep * rows.shape[-1], generator=generator)
            rows = torch.cat([rows, further.to(model.dtype) * rows.std()], dim=-1)
            earlier = empty(batch)
            if before:
                told = _told(mask[:, :before], [sizes[f"{PAST}_{stage}"] for stage in stages], {}) if masks else {}
                parts = (rows[:, :before], mask[:, :before], positions[..., :before], *told.values())
                earlier = write(model, *parts, *earlier)[1:]
        made = {
            "inputs_embeds": rows[:, before:].float(),
            "attention_mask": mask,
            "position_ids": positions[..., before:],
        }
        if masks:
            made |= _told(mask[:, before:], [sizes[f"{TOKENS}_{stage}"] for stage in stages], told if before else {})
        return made | {
            name: value.float() if value.is_floating_point() else value
            for name, value in zip(past, earlier, strict=True)
        }

    def empty(batch: int) -> tuple[Tensor, ...]:
        tensors: list[Tensor] = []
        for layer in model.get_submodule(language).layers:
            width = layer.self_attn.head_dim
            heads = layer.self_attn.k_proj.out_features // width
            tensors += nothing(torch.zeros(batch, heads, 0, width, dtype=model.dtype), names)
        return tuple(tensors)

    limit = int(getattr(config, "max_position_embeddings", 0))
    return Part(
        "language",
        write,
        ("logits", *present),
        {
            "inputs_embeds": (BATCH, TOKENS),
            "attention_mask": (BATCH, f"{PAST} + {TOKENS}"),
            "position_ids": (BATCH, "", TOKENS) if axes > 1 else (BATCH, TOKENS),
        }
        | dict.fromkeys(masks[:1], (BATCH, TOKENS))
        | {f"{MASK}_{stage}": (BATCH, f"{PAST}_{stage} + {TOKENS}_{stage}") for stage in stages}
        | {
            name: (BATCH, "", f"{PAST}_{place}" if place else PAST)
            for name, place in zip(past, (place for place in places for _ in names), strict=True)
        },
        example,
        traced=_sized({TOKENS: 9, PAST: 8}, stages) if masks else {TOKENS: 3, PAST: 4},
        corners=tuple(
            _sized(sizes, stages) for sizes in ({TOKENS: 6, PAST: 0}, {TOKENS: 1, PAST: 6}, {TOKENS: 3, PAST: 5})
        ),
        most_tokens=limit,
        tower="language",
    )


def left_masks(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the masks of what is left of a prompt behind each place where image tokens leave; none where they do not.

    `ids`, `mask`: (B, T), padded on the left.
    """
    dropping = dropping_of(model.model)
    if dropping is None:
        return {}
    video = getattr(model.config, "video_token_id", None)
    # Tokens of a video leave as those of pictures do.
    image = torch.isin(ids, torch.tensor([model.config.image_token_id, *([] if video is None else [video])]))
    rooms = rooms_for(dropping, mask, image.long())
    return {f"{MASK}_{stage}": room for stage, room in enumerate(rooms, 1)}


def _places(model: Any, language: str) -> tuple[int, ...]:
    """Return for each block of the language model how many places where tokens leave lie before it."""
    dropping, count = dropping_of(model.model), len(model.get_submodule(language).layers)
    return tuple(sum(drop.after <= layer for drop in dropping.drops) if dropping else 0 for layer in range(count))


def _sized(sizes: Sizes, stages: range) -> Sizes:
    """Return sizes with those behind each place: of several tokens one more leaves each time."""
    made = dict(sizes)
    for stage in stages:
        for axis in (TOKENS, PAST):
            made[f"{axis}_{stage}"] = max(min(sizes[axis], 2), sizes[axis] - stage)
    return made


def _told(mask: Tensor, left: list[int], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return image_mask (B, T) and the masks behind each place for an example: all but the ends of `mask` (B, T) is a picture's.

    `left`: how many slots each place has. `before`: the same of tokens that came earlier.
    """
    image = mask.clone()
    image[:, 0] = image[:, -1] = 0
    made = {"image_mask": image}
    for stage, slots in enumerate(left, 1):
        room = mask[:, mask.shape[1] - slots :].clone()
        room[:, :1] = mask[:, :1] if slots > 1 else 1  # what was padding takes no slot
        made[f"{MASK}_{stage}"] = torch.cat([before[f"{MASK}_{stage}"], room], dim=1) if before else room
    return made


@contextlib.contextmanager
def _added(blocks: nn.ModuleList, further: list[Tensor]) -> Iterator[None]:
    """While active, the first blocks' outputs have `further`, one (B, T, C) a block, added.

    The model's own way takes the rows of image tokens alone, and how many those are no graph can say.
    """

    def hook(rows: Tensor) -> Callable[..., Tensor]:
        return lambda _module, _given, made: made + rows

    handles = [block.register_forward_hook(hook(rows)) for block, rows in zip(blocks, further, strict=False)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def language_decoding(model: Any, limit: int) -> Decoding:
    """Return how greedy generation writes. Raises NotExportable for settings it does not cover."""
    settings, config = model.generation_config, model.config
    require_known_settings(settings)
    end = settings.eos_token_id
    ends = tuple(end if isinstance(end, list) else [end]) if end is not None else ()
    return Decoding(
        end=ends,
        padding=settings.pad_token_id if settings.pad_token_id is not None else (ends[0] if ends else 0),
        limit=settings.max_new_tokens or limit,
        suppressed=tuple(settings.suppress_tokens or ()),
        suppressed_first=tuple(settings.begin_suppress_tokens or ()),
        image_token=config.image_token_id,
    )
