"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (with experts, too): pictures of any size, positions in three dimensions, grouped queries.

The vision tower sees the patches of all pictures in one row, by the grid of each. Qwen2.5 looks through windows in all blocks but a
few; Qwen3 gives the language model's first blocks what its own earlier blocks made (deepstack), beside the image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from mmcompress.bundle import Processor
from mmcompress.errors import NotExportable
from mmcompress.families.anatomy import example_pixels
from mmcompress.families.picture_rows import gathered, padded
from mmcompress.families.qwen_vl_film import film, frame_tables, with_fewer_frames
from mmcompress.families.qwen_vl_parts import layout, look
from mmcompress.families.qwen_vl_video import by_kind, image_patches, in_words, packed, video_patches
from mmcompress.families.qwen_vl_vision import EXAMPLE_GRID, kind_of, vision_tower, write_vision_config
from mmcompress.families.talk import Shown, Talk
from mmcompress.families.vision_language import VisionLanguage
from mmcompress.families.vision_language_parts import vision_part
from mmcompress.parts import Decoding, Part
from mmcompress.surgery.frames import hand_on, merging_of
from mmcompress.views import Film, Tower

if TYPE_CHECKING:
    from mmcompress.data import Sample, Video

CLASSES: dict[str, type[nn.Module]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
}


class QwenVL(VisionLanguage):
    """All of them; what differs is told by the config's model_type."""

    name = "qwen_vl"
    model_types: tuple[str, ...] = tuple(CLASSES)
    architectures: tuple[str, ...] = tuple(made.__name__ for made in CLASSES.values())
    image_keys = ("pixel_values", "image_grid_thw", "grid_seconds")
    talk = Talk(without_template=None)
    position_axes = 3

    def model_class(self, config: Any) -> type[nn.Module]:
        self.check_config(config)
        return CLASSES[config.model_type]

    def vision_tower(self, model: Any) -> Tower:
        return vision_tower(model)

    def makers(self, model: Any) -> tuple[str, ...]:
        merger = "model.visual.merger"
        if kind_of(model) != "qwen3_vl":
            return (f"{merger}.mlp.2",)
        # Those of the deepstack are added to what the first blocks give out.
        deeper = range(len(model.model.visual.deepstack_merger_list))
        return (f"{merger}.linear_fc2", *(f"model.visual.deepstack_merger_list.{i}.linear_fc2" for i in deeper))

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return each of a sample's images, and its video, as a sample or, for the language model, the sample with an answer."""
        if tower != "vision" or not sample.video:
            return super().items(tower, sample)
        return [*super().items(tower, sample.showing(sample.pictures)), sample.showing((), sample.video)]

    def visuals(self, sample: Sample) -> list[Any]:
        """Return all images of a sample, then its video."""
        sample = sample.decoded()
        return [*sample.pictures, *((sample.video,) if sample.video else ())]

    def image_inputs(self, model: Any, processor: Processor, images: Sequence[Image | Video]) -> dict[str, Tensor]:
        """Return pixel_values (B, patches, pixels of a patch), zeros behind, and image_grid_thw (B, 3).

        Where there are videos also grid_seconds (B,), how long a layer of their grids lasts; 0 for images.
        """
        kind, layer = kind_of(model), processor.image.temporal_patch_size
        made = [
            image_patches(processor, one) if isinstance(one, Image) else video_patches(processor, one, kind)
            for one in images
        ]
        inputs = {
            "pixel_values": padded([patches for patches, _ in made]),
            "image_grid_thw": torch.stack([grid for _, grid in made]),
        }
        seconds = [0.0 if isinstance(one, Image) else layer / one.rate for one in images]
        if any(seconds):
            inputs["grid_seconds"] = torch.tensor(seconds)
        return inputs

    def example_images(self, model: Any, batch: int) -> dict[str, Tensor]:
        c = model.config.vision_config
        grid = torch.tensor(EXAMPLE_GRID)
        width = c.in_channels * c.temporal_patch_size * c.patch_size**2
        return {
            "pixel_values": example_pixels(batch, 1, int(grid.prod()), width).squeeze(1),
            "image_grid_thw": grid.expand(batch, -1).contiguous(),
        }

    def placeholders(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> str:
        return self.image_tokens_of(model, processor)[0] * self._count(model, inputs["image_grid_thw"][row])

    def image_tokens_of(self, model: Any, processor: Processor) -> tuple[str, ...]:
        tokenizer, config = self.talk.tokenizer(processor), model.config
        found: list[str] = tokenizer.convert_ids_to_tokens([config.image_token_id, config.video_token_id])
        return tuple(found)

    def shown(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> Shown:
        seconds = float(inputs["grid_seconds"][row]) if "grid_seconds" in inputs else 0.0
        if not seconds:
            return super().shown(model, processor, inputs, row)
        token, grid = self.image_tokens_of(model, processor)[1], inputs["image_grid_thw"][row]
        layers, layer = int(grid[0]), processor.image.temporal_patch_size
        how, count = merging_of(model.model), self._count(model, grid) // layers
        if kind_of(model) != "qwen3_vl":
            return Shown(token, token * count * (how.left(layers) if how else layers), "video")
        # Qwen3 is told the time of each layer of frames in words: that of its middle.
        ids = [model.config.vision_start_token_id, model.config.vision_end_token_id]
        around = tuple(self.talk.tokenizer(processor).convert_ids_to_tokens(ids))
        times = (layer - 1) / 2 / layer * seconds + torch.arange(layers).double() * seconds
        told = in_words((how.times(times) if how else times).tolist(), token, count, around)
        return Shown(token, told, "video", around)

    def example_image_tokens(self, model: Any) -> int:
        return self._count(model, torch.tensor(EXAMPLE_GRID))

    def _count(self, model: Any, grid: Tensor) -> int:
        return int(grid.prod()) // model.config.vision_config.spatial_merge_size**2

    def seen(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        """Return what the model makes of images and videos alike: its own way differs in their names only."""
        given, joint = packed(inputs), model.model
        # Of its class: fewer layers of a video are the language model's matter, see `handed_on`.
        return type(joint).get_image_features(joint, given["pixel_values"], given["image_grid_thw"], return_dict=True)

    def made_of(self, model: Any, images: dict[str, Tensor]) -> dict[str, Any]:
        return {kind: self.seen(model, own) for kind, own in by_kind(images).items()}

    def image_tokens(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Return the image tokens (N, C) of each picture, with deepstack (N, C + K * C): all that the language model is given."""
        made = self.seen(model, inputs)
        deep = getattr(made, "deepstack_features", None) or []
        return [torch.cat(parts, dim=-1) for parts in zip(made.pooler_output, *deep, strict=True)]

    def image_width(self, model: Any) -> int:
        return super().image_width(model) * (1 + self.deep(model))

    def deep(self, model: Any) -> int:
        return len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))

    def film(self, model: Any) -> Film:
        how, kind = merging_of(model.model), kind_of(model)
        return film(kind, super().image_width(model), 1 + self.deep(model), how.stride if how else 1)

    def handed_on(self, model: Any, made: dict[str, Any], images: dict[str, Tensor]) -> dict[str, Any]:
        kinds = by_kind(images)
        return {
            kind: hand_on(model.model, one, kinds.get(kind, {}).get("image_grid_thw")) for kind, one in made.items()
        }

    def ready_made(self, model: Any, tokens: Tensor) -> Any:
        parts: Any = [list(rows) for rows in tokens.split(super().image_width(model), dim=-1)]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=parts[0], deepstack_features=parts[1:])

    def vision_graph(self, model: Any) -> Part:
        """Return the graph; it takes pictures of `EXAMPLE_GRID` patches alone."""
        at = layout(model.config.vision_config, EXAMPLE_GRID)
        return vision_part(
            lambda model, pixels: look(model.model.visual, at, pixels),
            lambda count: {"pixel_values": self._layers(self.example_images(model, count))},
            at.table_bytes,
        )

    def parts(self, model: Any) -> tuple[Part, ...]:
        looking, *others = super().parts(model)
        return (*with_fewer_frames(model, looking, self.example_image_tokens(model), self.image_width(model)), *others)

    def decoding(self, model: Any) -> Decoding:
        return replace(super().decoding(model), resizes=True)

    def asked(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return what the parts take; images and frames are first drawn at the one size the vision part knows."""
        patch = model.config.vision_config.patch_size
        _, rows, columns = EXAMPLE_GRID
        size = (columns * patch, rows * patch)
        resized = [sample.redrawn(lambda image: image.resize(size)) for sample in samples]
        # Without its files no video processor's settings say that frames be larger.
        made = super().asked(model, replace(processor, files={}), resized)
        # The loop around the parts knows one token for all that is seen; positions are settled by now.
        ids, config = made["input_ids"], model.config
        return made | {"input_ids": ids.masked_fill(ids == config.video_token_id, config.image_token_id)}

    def looked_at(self, model: Any, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return pixel_values (R, P, …); layers of a video, which do not look at one another, are pictures of their own.

        Where layers become fewer, also the tables that say how. Raises UsageError for another grid than `EXAMPLE_GRID`.
        """
        return {"pixel_values": self._layers(images)} | frame_tables(model, images["image_grid_thw"][:, 0].tolist())

    def _layers(self, images: dict[str, Tensor]) -> Tensor:
        other = [grid for grid in images["image_grid_thw"].tolist() if tuple(grid[1:]) != EXAMPLE_GRID[1:]]
        if other:
            raise NotExportable(
                f"the image processor cuts a picture into {other[0]} patches; the exported vision part takes {list(EXAMPLE_GRID)}",
                hint="let min_pixels and max_pixels in preprocessor_config.json allow that size",
            )
        return packed(images)["pixel_values"].unflatten(0, (-1, EXAMPLE_GRID[1] * EXAMPLE_GRID[2]))

    def marks(
        self, model: Any, ids: Tensor, mask: Tensor, prompt: Tensor, images: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return position_ids (B, 3, N): time, row and column of image tokens, one count for text."""
        if "image_counts" in images:
            counts = images["image_counts"]
            images = {key: gathered(images[key], counts) for key in self.image_keys if key in images}
        kinds = by_kind(images)
        video = kinds.get("video", {})
        positions, _ = model.model.get_rope_index(
            ids,
            self._token_types(model, ids),
            image_grid_thw=kinds.get("image", {}).get("image_grid_thw"),
            video_grid_thw=video.get("image_grid_thw"),
            second_per_grid_ts=video.get("grid_seconds"),
            attention_mask=mask,
        )
        return {"position_ids": positions.transpose(0, 1).contiguous()}

    @staticmethod
    def _token_types(model: Any, ids: Tensor) -> Tensor:
        """Return (B, N): 1 at tokens of an image, 2 at those of a video."""
        return (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()

    def positions(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
        return {"position_ids": inputs["position_ids"].transpose(0, 1)}

    def generation_inputs(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = super().generation_inputs(model, inputs)
        del inputs["position_ids"]  # the model counts on from its own
        inputs["mm_token_type_ids"] = self._token_types(model, inputs["input_ids"])
        images = {key: inputs.pop(key) for key in self.image_keys if key in inputs}
        kinds = by_kind(images)
        if "video" in kinds:
            given = packed(kinds["video"])
            inputs |= {"pixel_values_videos": given["pixel_values"], "video_grid_thw": given["image_grid_thw"]}
            if kind_of(model) == "qwen2_5_vl":
                inputs["second_per_grid_ts"] = given["grid_seconds"]
        if "image" in kinds:
            given = packed(kinds["image"])
            inputs |= {key: given[key] for key in ("pixel_values", "image_grid_thw")}
        return inputs

    def write_vision_config(self, model: Any, tower: Tower) -> None:
        write_vision_config(model, tower, super().image_width(model))


FAMILY = QwenVL()
