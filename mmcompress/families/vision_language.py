"""What models share that look at a picture and answer in text: a vision encoder, a connector, a language model.

Its towers are "vision", whose output are the image tokens the language model is given (its `heads` are the connector), and
"language", which predicts the answer's tokens. The language tower is judged by itself: the image tokens go in without gradient, or
ready-made where inputs hold them.

All inputs are batch first, one row a sample; what a model wants packed is packed by `seen`.

Shape alphabet: B batch, N tokens, T answer tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcompress.bundle import Processor
from mmcompress.families.answers import greedy, next_token_roots, quiet
from mmcompress.families.language_models import language_tower, require_language, write_language_config
from mmcompress.families.picture_questions import PictureQuestions
from mmcompress.families.picture_rows import gathered, padded
from mmcompress.families.vision_language_parts import (
    embed_part,
    language_decoding,
    language_part,
    left_masks,
    with_places,
)
from mmcompress.parts import Decoding, Part
from mmcompress.surgery.dropping import asked_at, has_to_stay
from mmcompress.surgery.frames import STAGES, stages_of
from mmcompress.surgery.ledger import putting_back
from mmcompress.surgery.reducing import Choice, choice_of
from mmcompress.surgery.reduction import ledger_of
from mmcompress.surgery.routing import as_exported
from mmcompress.views import Film, Prompt, Tower

if TYPE_CHECKING:
    from mmcompress.data import Sample

ANSWER_TOKENS = 128
"""The longest answer, where the generation config names no other."""


class VisionLanguage(PictureQuestions):
    """Base of these families; a family adds names, classes, the vision tower, and how pictures become inputs and placeholders."""

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    language = "model.language_model"
    """Path of the language model."""
    answering = "language"
    both_ways = False
    """Whether the prompt's tokens look at one another in both directions."""
    position_axes = 1
    """How many positions a token has."""

    @abstractmethod
    def vision_tower(self, model: Any) -> Tower:
        """Return the view of the vision encoder with its connector."""

    @abstractmethod
    def example_images(self, model: Any, batch: int) -> dict[str, Tensor]:
        """Return what `image_inputs` could, the same every time."""

    @abstractmethod
    def example_image_tokens(self, model: Any) -> int:
        """Return how many tokens an example picture has."""

    def seen(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        """Return what the model makes of the pictures: an output whose `pooler_output` lists (N, C) of each."""
        return model.get_image_features(**inputs, return_dict=True)

    def positions(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Return what the language model is told of the tokens' places and kinds beside their mask."""
        return {}

    def towers(self, model: Any) -> tuple[Tower, ...]:
        vision = self.vision_tower(model)
        asked = {block.index for block in vision.blocks if choice_of(model.get_submodule(block.attention.path))}
        language, film = language_tower(model, self.language, self.makers(model), self.rows(model)), self.film(model)
        stages = self._stages(model)
        return (
            # The connector chooses tokens by what these blocks look at.
            replace(vision, needed=tuple(sorted(asked.union(vision.needed)))),
            replace(
                language,
                heads=(*language.heads, *stages),
                residual=None if stages else language.residual,
                why_no_residual="convolutions add to the tokens of a video's frames"
                if stages
                else language.why_no_residual,
                film=film,
                why_no_film="" if film else "it is shown the frames of a video as pictures, one after the other",
                prompt=self._prompt(model),
                needed=tuple(block.index for block in language.blocks if has_to_stay(model.get_submodule(block.path))),
            ),
        )

    @abstractmethod
    def makers(self, model: Any) -> tuple[str, ...]:
        """Return the paths of the Linears whose outputs the language model is given, as they are or added up."""

    def rows(self, model: Any) -> tuple[str, ...]:
        """Return the names of parameters (…, C) that it is given beside these and words."""
        return ()

    def film(self, model: Any) -> Film | None:
        """Return the view of what is given of a video; None where its frames are pictures like others."""
        return None

    def _stages(self, model: Any) -> tuple[str, ...]:
        """Return the path of what adds to the means of a video's layers, if something does."""
        film = self.film(model)
        return (f"{film.path}.{STAGES}",) if film and stages_of(model.get_submodule(film.path)) else ()

    def _prompt(self, model: Any) -> Prompt:
        """Return the view of what the language model is asked."""
        ids = (model.config.image_token_id, getattr(model.config, "video_token_id", None))
        return Prompt(
            path="model",
            image_tokens=tuple(token for token in ids if token is not None),
            first=self.deep(model),
            both_ways=self.both_ways,
        )

    def check_config(self, config: Any) -> None:
        """Raise UsageError where the language model is none of those known."""
        require_language(self.name, config.text_config.model_type)

    def encode(self, model: Any, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return one row per sample whose cosine between two models is how alike they are; see `Family.encode`.

        - "vision": the image tokens (N, C) that the language model is given, as N * C, zeros behind where others have more; where
          it is given fewer than the encoder makes, they stand in all their places.
        - "language", led through the reference answer: its next-token distributions, see `next_token_roots`.
        """
        if tower == "vision":
            choice = self._choice(model)
            with putting_back(choice.seen if choice else None):
                return padded([tokens.flatten() for tokens in self.image_tokens(model, inputs)])
        with asked_at(model.model, inputs["answer_positions"][:, 0]):
            hidden = model.model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                mm_encoder_outputs=self._given(model, inputs),
                use_cache=False,
                **self.positions(model, inputs),
            ).last_hidden_state
        places = inputs["answer_positions"][:, :, None].expand(-1, -1, hidden.shape[-1])
        return next_token_roots(model.lm_head(hidden.gather(1, places)), inputs["answer_mask"])

    def image_tokens(self, model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Return all that the language model is given of each picture, (N, C) each."""
        return list(self.seen(model, inputs).pooler_output)

    def ready_made(self, model: Any, tokens: Tensor) -> Any:
        """Return image tokens (B, N, C) as the output `seen` gives."""
        return BaseModelOutputWithPooling(pooler_output=list(tokens))  # type: ignore[arg-type]

    def _given(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Any] | None:
        if "image_tokens" in inputs:
            choice = self._choice(model)
            if choice:
                choice.seen.places = None  # where other pictures' tokens were says nothing of these
            return self.handed_on(model, {"image": self.ready_made(model, inputs["image_tokens"])}, {})
        images = {key: inputs[key] for key in self.image_keys if key in inputs}
        if not images:
            return None
        if "image_counts" in inputs:
            images = {key: gathered(value, inputs["image_counts"]) for key, value in images.items()}
        if not len(next(iter(images.values()))):
            return None
        with torch.no_grad():
            made = self.made_of(model, images)
        return self.handed_on(model, made, images)

    def handed_on(self, model: Any, made: dict[str, Any], images: dict[str, Tensor]) -> dict[str, Any]:
        """Return what the language model is given of what was made of pictures, with gradient."""
        return made

    def made_of(self, model: Any, images: dict[str, Tensor]) -> dict[str, Any]:
        """Return what the model makes of pictures, one row each, by its kind, as the model's forward takes it."""
        return {"image": self.seen(model, images)}

    def generate(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> list[str]:
        """Return the greedy answer to each sample's question; to none, a description. Raises what `prepare` raises."""
        images, prompts = self._asked(model, processor, samples)
        ids, mask = self._row_up(model, prompts, samples, left=True)
        marks = self.marks(model, ids, mask, mask, images)
        given = {"input_ids": ids, "attention_mask": mask, **images, **marks}
        given = {name: value.to(model.device) for name, value in given.items()}
        ends = torch.full((len(ids),), ids.shape[1] - 1, device=model.device)
        with quiet(), asked_at(model.model, ends):
            made = model.generate(
                **self.generation_inputs(model, given), generation_config=greedy(model.generation_config, ANSWER_TOKENS)
            )
        return self.texts(model, processor, made[:, ids.shape[1] :].tolist())

    def generation_inputs(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return batch-first inputs as the model's own `generate` takes them."""
        counts = inputs.pop("image_counts", None)
        if counts is not None:
            inputs |= {key: gathered(inputs[key], counts) for key in self.image_keys if key in inputs}
        return inputs

    @abstractmethod
    def vision_graph(self, model: Any) -> Part:
        """Return the part that makes image_embeds (R, N, C) of what `looked_at` gives, for any R.

        Raises UsageError for models whose pictures no graph can take.
        """

    def parts(self, model: Any) -> tuple[Part, ...]:
        """Return the graphs that look, look words up, and write. Raises what `vision_graph` raises."""
        choice, tower = self._choice(model), self.vision_tower(model)
        merges = ledger_of(model.get_submodule(tower.blocks[0].path)) is not None
        looking = replace(self.vision_graph(model), choosing=merges or bool(choice and choice.compares))
        if choice and choice.apart and tower.connector:
            looking = with_places(looking, tower.connector.path)
        return (
            looking,
            embed_part(model, self.deep(model)),
            language_part(model, self.language, self.both_ways, self.position_axes, self.deep(model)),
        )

    def _choice(self, model: Any) -> Choice | None:
        """Return which image tokens the language model is given, None where it is given all."""
        connector = self.vision_tower(model).connector
        return choice_of(model.get_submodule(connector.path)) if connector else None

    def decoding(self, model: Any) -> Decoding:
        choice = self._choice(model)
        room = choice.tokens if choice and choice.apart else 0
        return replace(language_decoding(model, ANSWER_TOKENS), room=room)

    def asked(self, model: Any, processor: Processor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the vision part's inputs, of pictures only, and the prompt: input_ids, attention_mask, position_ids."""
        images, prompts = self._asked(model, processor, samples)
        ids, mask = self._row_up(model, prompts, samples, left=True)
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        marks = self.marks(model, ids, mask, mask, images)
        counts = images.pop("image_counts", None)
        if counts is not None:
            images = {key: gathered(value, counts) for key, value in images.items()}
        seen = self.looked_at(model, images) if images else {}
        prompt = {"input_ids": ids, "attention_mask": mask, "position_ids": marks.get("position_ids", places)}
        return seen | prompt | left_masks(model, ids, mask)

    def looked_at(self, model: Any, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the vision graph's inputs, one row each picture or tile. Raises UsageError for pictures it cannot take."""
        return images

    def example_inputs(self, model: Any, tower: str, batch: int) -> dict[str, Tensor]:
        """Return smooth pictures for the vision tower; for the language model image tokens, and 16 tokens of text around them."""
        if tower == "vision":
            return self.example_images(model, batch)
        c = model.config
        count, width = self.example_image_tokens(model), self.image_width(model)
        generator = torch.Generator().manual_seed(0)
        reserved = sorted({c.image_token_id, getattr(c, "video_token_id", None) or c.image_token_id})
        ids = torch.randint(c.text_config.vocab_size - len(reserved), (batch, 16), generator=generator)
        for token in reserved:
            ids += ids >= token
        ids = torch.cat([ids[:, :4], torch.full((batch, count), c.image_token_id), ids[:, 4:]], dim=1)
        positions = torch.arange(ids.shape[1] - 8, ids.shape[1]).expand(batch, -1).contiguous()
        mask = torch.ones_like(ids)
        dtype = next(model.parameters()).dtype
        return {
            "image_tokens": torch.randn(batch, count, width, generator=generator).to(dtype),
            "input_ids": ids,
            "attention_mask": mask,
            "answer_positions": positions,
            "answer_mask": torch.ones_like(positions),
            **self.marks(model, ids, mask, mask, self.example_images(model, batch)),
        }

    def image_width(self, model: Any) -> int:
        """Return C of the image tokens."""
        return int(model.get_input_embeddings().embedding_dim)

    def deep(self, model: Any) -> int:
        """Return how many of the language model's first blocks are given something of the picture beside the image tokens."""
        return 0

    def exporting(self, model: Any) -> AbstractContextManager[None]:
        """Run experts, where there are any, in a form that graphs have."""
        mixed = [block.experts for tower in self.towers(model) for block in tower.blocks if block.experts]
        mixtures = {model.get_submodule(each.router): model.get_submodule(each.holder) for each in mixed}
        return as_exported(model.config.text_config, mixtures) if mixtures else contextlib.nullcontext()

    def write_config(self, model: Any) -> None:
        """Write depths and uniform widths of both towers."""
        vision, language = self.towers(model)
        self.write_vision_config(model, vision)
        write_language_config(model.config.text_config, language)

    @abstractmethod
    def write_vision_config(self, model: Any, tower: Tower) -> None:
        """Write depth and uniform widths of the vision tower."""
