"""PaliGemma: a SigLIP encoder, one linear connector, a Gemma that reads picture and question in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.anatomy import example_pixels, read_blocks
from mmcompress.families.talk import Shown, Talk, require_no_tokens
from mmcompress.families.vision_encoders import VISION, write_vision_config
from mmcompress.families.vision_language import VisionLanguage
from mmcompress.families.vision_language_parts import vision_part
from mmcompress.parts import Part
from mmcompress.surgery.reducing import handed_on
from mmcompress.views import Connector, TokenStream, Tower

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmcompress.data import Sample


class OneQuestion(Talk):
    """Picture, question, line break: the model was trained on nothing else."""

    def prompt(self, processor: Processor, sample: Sample, shown: Sequence[Shown], tokens: Sequence[str]) -> list[int]:
        if sample.turns:
            raise UsageError(
                f"sample '{sample.key}' has earlier turns, and paligemma answers single questions",
                hint="leave out its turns",
            )
        question = sample.question or self.without_question
        require_no_tokens(sample, [question], tokens)
        tokenizer = self.tokenizer(processor)
        text = f"{''.join(one.stands for one in shown)}{tokenizer.bos_token or ''}{question}\n"
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


class PaliGemma(VisionLanguage):
    """PaliGemma and PaliGemma 2."""

    name = "paligemma"
    model_types: tuple[str, ...] = ("paligemma",)
    architectures: tuple[str, ...] = ("PaliGemmaForConditionalGeneration",)
    talk = OneQuestion(without_question="caption en")
    both_ways = True

    def model_class(self, config: Any) -> type[nn.Module]:
        self.check_config(config)
        return PaliGemmaForConditionalGeneration

    def vision_tower(self, model: Any) -> Tower:
        config, root = model.config.vision_config, "model.vision_tower"
        encoder = VISION["siglip_vision_model"]
        side = config.image_size // config.patch_size
        blocks = read_blocks(model, f"{root}.{encoder.blocks}", encoder.names, config.hidden_act)
        return Tower(
            name="vision",
            path=root,
            blocks_path=f"{root}.{encoder.blocks}",
            blocks=blocks,
            config="vision_config",
            depth_key="num_hidden_layers",
            heads=("model.multi_modal_projector",),
            connector=Connector("model.multi_modal_projector", side**2, (side, side), blocks[-1].attention.path),
            embeddings=tuple(f"{root}.{path}" for path in encoder.embeddings),
            stream=TokenStream(tokens=side**2, protected=0, readout="all"),
        )

    def makers(self, model: Any) -> tuple[str, ...]:
        return ("model.multi_modal_projector.linear",)

    def image_inputs(self, model: Any, processor: Processor, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return pixel_values (B, 3, H, W)."""
        return {"pixel_values": processor.image(images=list(images), return_tensors="pt")["pixel_values"]}

    def example_images(self, model: Any, batch: int) -> dict[str, Tensor]:
        c = model.config.vision_config
        return {"pixel_values": example_pixels(batch, c.num_channels, c.image_size, c.image_size)}

    def placeholders(self, model: Any, processor: Processor, inputs: dict[str, Tensor], row: int) -> str:
        token: str = self.talk.tokenizer(processor).convert_ids_to_tokens(model.config.image_token_id)
        return token * self.example_image_tokens(model)

    def example_image_tokens(self, model: Any) -> int:
        c = model.config.vision_config
        return handed_on(model.model.multi_modal_projector, int((c.image_size // c.patch_size) ** 2))

    def vision_graph(self, model: Any) -> Part:
        return vision_part(
            lambda model, pixels: model.get_image_features(pixels, return_dict=True).pooler_output,
            lambda count: self.example_images(model, count),
        )

    def ready_made(self, model: Any, tokens: Tensor) -> Any:
        return BaseModelOutputWithPooling(pooler_output=tokens)

    def marks(
        self, model: Any, ids: Tensor, mask: Tensor, prompt: Tensor, images: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return token_type_ids (B, N), 0 where tokens are read in both directions, and position_ids (B, N) from 1 on."""
        return {"token_type_ids": 1 - prompt, "position_ids": mask.cumsum(-1).clamp_min(1)}

    def positions(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
        return {key: inputs[key] for key in ("token_type_ids", "position_ids")}

    def generation_inputs(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = super().generation_inputs(model, inputs)
        del inputs["position_ids"]  # the model counts on from its own
        return inputs

    def write_vision_config(self, model: Any, tower: Tower) -> None:
        write_vision_config(model.config.vision_config, tower.blocks)


FAMILY = PaliGemma()
