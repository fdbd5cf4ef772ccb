"""What CLIP-like families share: two encoders called through get_image_features and get_text_features, one similarity."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmcompress.bundle import Processor
from mmcompress.errors import UsageError
from mmcompress.families.anatomy import example_pixels, example_tokens

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmcompress.data import Sample


class TwoTowers:
    """Base of the dual-encoder families; a family adds names, classes and towers."""

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    media: Literal["vision", "audio"] = "vision"
    outside: tuple[str, ...] = ()
    """Paths of modules that neither embedding needs: they belong to no tower, and passes leave them as they are."""
    text_inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    text_limit_key = "max_position_embeddings"
    vision_key = "vision_config"
    pad_to_limit = False
    """SigLIP was trained on texts padded to the limit."""

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return the embeddings (B, C) of one tower; see `Family.encode`."""
        features = model.get_image_features if tower == "vision" else model.get_text_features
        pooled: Tensor = features(**inputs).pooler_output
        return pooled

    def similarity(self, model: Any) -> tuple[Tensor, Tensor]:
        """Return (scale, bias) of the logits; the bias is 0 where the model has none."""
        bias = getattr(model, "logit_bias", None)
        scale = model.logit_scale.exp()
        return scale, torch.zeros_like(scale) if bias is None else bias

    def exporting(self, model: nn.Module) -> AbstractContextManager[None]:
        """Change nothing: most models can be traced as they are."""
        return contextlib.nullcontext()

    def text_config(self, model: Any) -> Any:
        """Return the config that holds the text tower's limits."""
        return model.config.text_config

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        """Return smooth pictures, or tokens of a short text; see `Family.example_inputs`."""
        if tower == "vision":
            c = getattr(model.config, self.vision_key)
            return {"pixel_values": example_pixels(batch, c.num_channels, c.image_size, c.image_size)}
        c = self.text_config(model)
        length = min(16, self.text_limit(model))
        ids = example_tokens(batch, length, c.vocab_size, self.end_of_text(c), c.pad_token_id or 0)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def end_of_text(self, config: Any) -> int:
        """Return the id a text ends in; of a BERT, whose config does not say, any that is no padding."""
        return 2

    def items(self, tower: str, sample: Sample) -> list[Any]:
        """Return the sample's image, or its texts; see `Family.items`."""
        if tower == "text":
            return list(sample.texts)
        return [sample.image] if sample.shown else []

    def prepare(self, model: nn.Module, processor: Processor, tower: str, items: Sequence[Any]) -> dict[str, Tensor]:
        """Return pixels for images, tokens for texts; longer texts are cut at the model's limit."""
        make = self.prepare_texts if tower == "text" else self.prepare_images
        return make(model, processor, items)

    def prepare_images(self, model: nn.Module, processor: Processor, images: Sequence[Image]) -> dict[str, Tensor]:
        """Return pixel inputs for images."""
        if processor.image is None:
            raise UsageError("this checkpoint has no image processor", hint="add its preprocessor_config.json")
        prepared = processor.image(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return in_dtype_of(model, prepared)

    def prepare_texts(self, model: nn.Module, processor: Processor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return token inputs for texts, padded and cut at the model's limit."""
        limit = self.text_limit(model)
        prepared = tokenizer_of(processor)(
            list(texts),
            padding="max_length" if self.pad_to_limit else True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        return {name: prepared[name] for name in self.text_inputs if name in prepared}

    def text_limit(self, model: Any) -> int:
        """Return the most tokens a text may have."""
        return int(getattr(self.text_config(model), self.text_limit_key))

    def cut_texts(self, model: nn.Module, processor: Processor, texts: Sequence[str]) -> tuple[int, int]:
        """Return how many texts lose their end in `prepare_texts`, and the limit in tokens."""
        limit = self.text_limit(model)
        tokens = tokenizer_of(processor)(list(texts), verbose=False)["input_ids"] if texts else []
        return sum(len(found) > limit for found in tokens), limit


def in_dtype_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `inputs` with pixels and sound in the dtype of the weights, for models that do not see to that themselves."""
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def tokenizer_of(processor: Processor) -> Any:
    """Return the tokenizer. Raises UsageError where there is none."""
    if processor.tokenizer is None:
        raise UsageError("this checkpoint has no tokenizer", hint="add its tokenizer.json")
    return processor.tokenizer
