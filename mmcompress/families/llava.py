"""LLaVA and LLaVA-NeXT: a CLIP, SigLIP or DINOv2 encoder, a two-layer connector, a language model of Llama's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from mmcompress.bundle import Processor
from mmcompress.errors import NotExportable, UsageError, closest
from mmcompress.families.anatomy import example_pixels, read_blocks
from mmcompress.families.vision_encoders import VISION, write_vision_config
from mmcompress.families.vision_language import VisionLanguage
from mmcompress.families.vision_language_parts import vision_part
from mmcompress.parts import Part
from mmcompress.views import Tower

if TYPE_CHECKING:
    from PIL.Image import Image


class Llava(VisionLanguage):
    """LLaVA 1.5 and what is saved in its class: one square picture, its patches in the prompt."""

    name = "llava"
    model_types: tuple[str, ...] = ("llava",)
    architectures: tuple[str, ...] = ("LlavaForConditionalGeneration",)

    def model_class(self, config: Any) -> type[nn.Module]:
        self.check_config(config)
        kind = config.vision_config.model_type
        if kind not in VISION:
            raise UsageError(
                f"{self.name} with a '{kind}' vision encoder is not supported",
                hint=f"{closest(kind, VISION)}; add a line in mmcompress/families/vision_encoders.py",
            )
        return LlavaForConditionalGeneration

    def vision_tower(self, model: Any) -> Tower:
        config, root = model.config.vision_config, "model.vision_tower"
        encoder = VISION[config.model_type]
        blocks = read_blocks(model, f"{root}.{encoder.blocks}", encoder.names, config.hidden_act)
        return Tower(
            name="vision",
            path=root,
            blocks_path=f"{root}.{encoder.blocks}",
            blocks=blocks,
            config="vision_config",
            depth_key="num_hidden_layers",
            heads=("model.multi_modal_projector",),
            parameters=("model.image_newline",) if hasattr(model.model, "image_newline") else (),
            embeddings=tuple(f"{root}.{path}" for path in encoder.embeddings),
            numbered=(("config", "vision_feature_layer", "after"),),
            # Behind the last block transformers gives out normalised states: without it, an earlier block would come last.
            needed=(len(blocks) - 1,) if config.model_type in ("dinov2", "vit") else (),
            why_no_stream="the prompt keeps a place for each of the picture's tokens; fewer of them would not fill it",
        )

    def image_inputs(self, model: Any, processor: Processor, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return pixel_values (B, 3, H, W). Raises UsageError where the processor makes another size than the model takes."""
        pixels = processor.image(images=list(images), return_tensors="pt")["pixel_values"]
        side = model.config.vision_config.image_size
        if pixels.shape[-2:] != (side, side):
            raise UsageError(
                f"the image processor makes {pixels.shape[-2]} x {pixels.shape[-1]} pixels, config.json says {side}",
                hint="use the preprocessor_config.json that belongs to this checkpoint",
            )
        return {"pixel_values": pixels}

    def example_images(self, model: Any, batch: int) -> dict[str, Tensor]:
        c = model.config.vision_config
        return {"pixel_values": example_pixels(batch, c.num_channels, c.image_size, c.image_size)}

    def vision_graph(self, model: Any) -> Part:
        return vision_part(self._look, lambda count: self.example_images(model, count))

    @staticmethod
    def _look(model: Any, pixels: Tensor) -> Tensor:
        """Return image_embeds (B, N, C); the model's own way lists them, picture by picture."""
        config = model.config
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        first = int(config.vision_feature_select_strategy == "default")
        tokens: Tensor = model.model.multi_modal_projector(torch.cat([states[i][:, first:] for i in layers], dim=-1))
        return tokens

    def placeholders(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> str:
        return self._token(model, processor) * self.example_image_tokens(model)

    def example_image_tokens(self, model: Any) -> int:
        c = model.config
        patches = (c.vision_config.image_size // c.vision_config.patch_size) ** 2
        # "default" leaves out the first token, whether the encoder has a class token or not.
        return (
            patches + VISION[c.vision_config.model_type].class_tokens - (c.vision_feature_select_strategy == "default")
        )

    def write_vision_config(self, model: Any, tower: Tower) -> None:
        write_vision_config(model.config.vision_config, tower.blocks)

    def _token(self, model: Any, processor: Processor) -> str:
        token: str = self.talk.tokenizer(processor).convert_ids_to_tokens(model.config.image_token_id)
        return token


class LlavaNext(Llava):
    """LLaVA-NeXT: a picture as a whole and in tiles, each encoded by itself."""

    name = "llava_next"
    model_types: tuple[str, ...] = ("llava_next",)
    architectures: tuple[str, ...] = ("LlavaNextForConditionalGeneration",)
    image_keys: tuple[str, ...] = ("pixel_values", "image_sizes")

    def model_class(self, config: Any) -> type[nn.Module]:
        super().model_class(config)
        return LlavaNextForConditionalGeneration

    def image_inputs(self, model: Any, processor: Processor, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return pixel_values (B, tiles, 3, H, W), the whole picture first and zeros behind, and image_sizes (B, 2)."""
        made = processor.image(images=list(images), return_tensors="pt")
        return {key: made[key] for key in self.image_keys}

    def example_images(self, model: Any, batch: int) -> dict[str, Tensor]:
        c = model.config.vision_config
        height, width = model.config.image_grid_pinpoints[0]
        tiles = 1 + height * width // c.image_size**2
        pixels = example_pixels(batch * tiles, c.num_channels, c.image_size, c.image_size)
        return {
            "pixel_values": pixels.unflatten(0, (batch, tiles)),
            "image_sizes": torch.tensor([[height, width]]).expand(batch, -1).contiguous(),
        }

    def vision_graph(self, model: Any) -> Part:
        raise NotExportable(
            "llava_next cuts every picture into as many tiles as suit it, and pads their tokens by its size; no graph does that",
            hint="run the checkpoint with torch (mmcompress.load); a W8A16 one is already smaller on disk",
        )

    def placeholders(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> str:
        return self._token(model, processor) * self._count(model, inputs["pixel_values"], inputs["image_sizes"][row])

    def example_image_tokens(self, model: Any) -> int:
        made = self.example_images(model, 1)
        return self._count(model, made["pixel_values"], made["image_sizes"][0])

    def _count(self, model: Any, pixels: Tensor, size: Tensor) -> int:
        """Return how many tokens a picture of `size` has: packed by the model's own code, without values."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        c = model.config
        tiles = image_size_to_num_patches(size, c.image_grid_pinpoints, c.vision_config.image_size)
        each = super().example_image_tokens(model)
        packed, _ = model.model.pack_image_features(
            [torch.empty(tiles, each, 1, device="meta")],
            size[None],
            c.vision_feature_select_strategy,
            torch.empty(1, device="meta"),
        )
        return len(packed[0])


LLAVA = Llava()
LLAVA_NEXT = LlavaNext()
