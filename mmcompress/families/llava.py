"""LLaVA and LLaVA-NeXT: a CLIP, SigLIP or DINOv2 encoder, a two-layer connector, a language model of Llama's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError, closest
from mmcompress.families.anatomy import example_pixels, read_blocks
from mmcompress.families.vision_encoders import VISION, write_vision_config
from mmcompress.families.vision_language import VisionLanguage
from mmcompress.families.vision_language_parts import vision_part
from mmcompress.parts import BATCH, Part, Sizes
from mmcompress.surgery.reducing import handed_on
from mmcompress.views import Block, Connector, TokenStream, Tower

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
            connector=self.connector(model, blocks),
            stream=self._stream(model, blocks),
            why_no_stream="the connector reads several blocks, and each needs all tokens in their places",
        )

    def _stream(self, model: Any, blocks: tuple[Block, ...]) -> TokenStream | None:
        """Return the view of the patches up to where the connector reads them, all in their places again."""
        config = model.config.vision_config
        protected = VISION[config.model_type].class_tokens
        patches = (config.image_size // config.patch_size) ** 2
        read = _read(model, blocks)
        if len(read) > 1 or read[0] < 0:
            return None
        return TokenStream(tokens=patches + protected, protected=protected, readout="all", blocks=read[0] + 1)

    def connector(self, model: Any, blocks: tuple[Block, ...]) -> Connector | None:
        """Return the view of the two layers between encoder and language model."""
        config = model.config
        last = max(_read(model, blocks))
        side = config.vision_config.image_size // config.vision_config.patch_size
        count, leading = self._encoded(model), VISION[config.vision_config.model_type].class_tokens
        return Connector(
            path="model.multi_modal_projector",
            tokens=count,
            grid=(side, side) if count == side**2 else (1, count),
            scorer=blocks[last].attention.path if last >= 0 and count == side**2 else "",
            leading=leading,
        )

    def makers(self, model: Any) -> tuple[str, ...]:
        return ("model.multi_modal_projector.linear_2",)

    def rows(self, model: Any) -> tuple[str, ...]:
        return ("model.image_newline",) if hasattr(model.model, "image_newline") else ()

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
        return handed_on(model.model.multi_modal_projector, self._encoded(model))

    @staticmethod
    def _encoded(model: Any) -> int:
        """Return how many of the encoder's tokens of a picture go into the connector."""
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


def _read(model: Any, blocks: tuple[Block, ...]) -> list[int]:
    """Return the indices of the blocks whose tokens the connector reads, -1 for what the first is given."""
    layers = model.config.vision_feature_layer
    # hidden_states counts what the blocks were given, then what the last gave out.
    return [
        (layer if layer >= 0 else len(blocks) + 1 + layer) - 1
        for layer in ([layers] if isinstance(layers, int) else layers)
    ]


class LlavaNext(Llava):
    """LLaVA-NeXT: a picture as a whole and in tiles, each encoded by itself."""

    name = "llava_next"
    model_types: tuple[str, ...] = ("llava_next",)
    architectures: tuple[str, ...] = ("LlavaNextForConditionalGeneration",)
    image_keys: tuple[str, ...] = ("pixel_values", "image_sizes")

    def model_class(self, config: Any) -> type[nn.Module]:
        super().model_class(config)
        return LlavaNextForConditionalGeneration

    def vision_tower(self, model: Any) -> Tower:
        return replace(
            super().vision_tower(model),
            why_no_connector="the tiles of a picture are put together by the places of their tokens",
        )

    def connector(self, model: Any, blocks: tuple[Block, ...]) -> Connector | None:
        return None

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
        """Return the graph: tiles (R, 3, H, W) of any pictures, and `image_places` (M,) of `looked_at`, to image_embeds (M, C)."""

        def look(model: Any, pixels: Tensor, places: Tensor) -> Tensor:
            tokens = self._look(model, pixels)
            made: Tensor = torch.cat([model.model.image_newline[None], tokens.flatten(0, 1)])[places]
            return made

        def example(sizes: Sizes) -> dict[str, Tensor]:
            c = model.config.vision_config
            pixels = example_pixels(sizes[BATCH], c.num_channels, c.image_size, c.image_size)
            count = 1 + sizes[BATCH] * self._tile_tokens(model)
            generator = torch.Generator().manual_seed(0)
            return {
                "pixel_values": pixels,
                "image_places": torch.randint(count, (sizes["image_tokens"],), generator=generator),
            }

        return Part(
            "vision",
            look,
            ("image_embeds",),
            {"pixel_values": (BATCH,), "image_places": ("image_tokens",)},
            example,
            traced={"image_tokens": 5},
            corners=({"image_tokens": 1}, {"image_tokens": 2 * self._tile_tokens(model)}),
            tower="vision",
        )

    def looked_at(self, model: Any, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tiles of all pictures and where each image token comes from: 0 the end of a line, 1 + i token i of the tiles.

        Cutting padding off and ending lines is left to the model's own code, which is given numbers in place of tokens.
        """
        each, before, tiles, places = self._tile_tokens(model), 1, [], []
        for pixels, size in zip(images["pixel_values"], images["image_sizes"], strict=True):
            count = self._tiles(model, size)
            numbers = torch.arange(before, before + count * each).reshape(count, each, 1)
            places.append(self._packed(model, numbers, size, torch.zeros(1, dtype=torch.long))[:, 0])
            tiles.append(pixels[:count])
            before += count * each
        return {"pixel_values": torch.cat(tiles), "image_places": torch.cat(places)}

    def placeholders(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> str:
        return self._token(model, processor) * self._count(model, inputs["image_sizes"][row])

    def example_image_tokens(self, model: Any) -> int:
        return self._count(model, self.example_images(model, 1)["image_sizes"][0])

    def _count(self, model: Any, size: Tensor) -> int:
        """Return how many tokens a picture of `size` has."""
        tokens = torch.empty(self._tiles(model, size), self._tile_tokens(model), 1, device="meta")
        return len(self._packed(model, tokens, size, torch.empty(1, device="meta")))

    def _tile_tokens(self, model: Any) -> int:
        return self._encoded(model)

    @staticmethod
    def _tiles(model: Any, size: Tensor) -> int:
        """Return how many tiles a picture of `size` (2,) is cut into, the whole one included."""
        c = model.config
        return int(image_size_to_num_patches(size, c.image_grid_pinpoints, c.vision_config.image_size))

    @staticmethod
    def _packed(model: Any, tokens: Tensor, size: Tensor, newline: Tensor) -> Tensor:
        """Return the tokens (M, C) of a picture of `size` (2,), packed by the model's own code from its tiles' (tiles, N, C)."""
        made, _ = model.model.pack_image_features(
            [tokens], size[None], model.config.vision_feature_select_strategy, newline
        )
        found: Tensor = made[0]
        return found


LLAVA = Llava()
LLAVA_NEXT = LlavaNext()
