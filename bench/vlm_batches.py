"""What one training step of the mini-VLM sees: pictures, turns about them in random order, and the loss of the answers."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from bench.mini_vlm import ASSISTANT, END, IMAGE, PATCHES, START, USER
from bench.pretrained import PATCH
from bench.scenes import Group, ask_scene, draw_scene, make_scene
from bench.vqa_data import WORDINGS, Drawn, ask_drawing, main_colour

MOST_TURNS = 8


@dataclass(frozen=True)
class Pictures:
    """What is trained on: drawings with their right answers, and the scenes 0..scenes-1."""

    drawings: list[Drawn]
    answers: list[dict[Group, str]]
    scenes: int

    def scene(self, number: int) -> Image.Image:
        """The picture of a scene."""
        return draw_scene(make_scene(number))

    def drawing(self, number: int) -> Image.Image:
        """The picture of a drawing."""
        with Image.open(self.drawings[number].file) as image:
            return image.convert("RGB")

    def inked(self) -> Tensor:
        """Which patches of each scene hold anything but paper: (scenes, PATCHES)."""
        return torch.stack([inked_patches(self.scene(number)) for number in range(self.scenes)])

    def drawing_turns(self, number: int, choose: random.Random) -> list[tuple[str, str]]:
        """(question, answer) about a drawing; its name is asked first as often as not, when nothing has given it away."""
        answers = list(self.answers[number].items())
        choose.shuffle(answers)
        if choose.random() < 0.5:
            answers.sort(key=lambda item: item[0] != "naming")
        return [(choose.choice(WORDINGS[group]), answer) for group, answer in answers]

    def scene_turns(self, number: int, choose: random.Random) -> list[tuple[str, str]]:
        """(question, answer) about a scene, at most MOST_TURNS of them; words are read in most of the sequences."""
        turns = ask_scene(make_scene(number))
        choose.shuffle(turns)
        turns.sort(key=lambda turn: turn.group != "reading")
        turns = turns[:MOST_TURNS]
        choose.shuffle(turns)
        return [(turn.question, turn.answers[0]) for turn in turns]


def inked_patches(image: Image.Image) -> Tensor:
    """Which patches of a scene hold anything but the paper of its first pixel: (PATCHES,)."""
    pixels = torch.from_numpy(np.array(image)).int()
    marked = (pixels != pixels[0, 0]).any(-1)
    side = marked.shape[0] // PATCH
    return marked.reshape(side, PATCH, side, PATCH).any(3).any(1).flatten()


def load_pictures(scenes: int, drawings: list[Drawn]) -> Pictures:
    """Training material of `drawings` and so many scenes."""
    answers = []
    for drawing in drawings:
        with Image.open(drawing.file) as image:
            answers.append(ask_drawing(drawing.row, main_colour(image)))
    return Pictures(drawings, answers, scenes)


class Talk:
    """Turns as token numbers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.start, self.end, self.user, self.assistant, self.image = tokenizer.convert_tokens_to_ids(
            [START, END, USER, ASSISTANT, IMAGE]
        )
        self.known: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """The tokens of a question or an answer."""
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.known[text]

    def after_image(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """What follows the image tokens of the first turn, and which of these tokens the model is to say."""
        tokens: list[int] = []
        said: list[bool] = []
        for i, (question, answer) in enumerate(turns):
            asked = [*([self.user] if i else []), *self.text(question), self.assistant]
            answered = [*self.text(answer), self.end]
            tokens += asked + answered
            said += [False] * len(asked) + [True] * len(answered)
        return tokens, said


def answer_loss(
    model: LlavaForConditionalGeneration,
    talk: Talk,
    features: Tensor,
    shown: Tensor,
    turns: list[list[tuple[str, str]]],
) -> Tensor:
    """Mean cross-entropy of the answer tokens.

    features: (B, N', C) patches; shown: (B, N') which of the PATCHES they are, rising.
    """
    language = model.model.language_model
    followed = [talk.after_image(each) for each in turns]
    longest = max(len(tokens) for tokens, _ in followed)
    ids = torch.full((len(turns), longest), talk.tokenizer.pad_token_id)
    said = torch.zeros(len(turns), longest, dtype=torch.bool)
    for i, (tokens, flags) in enumerate(followed):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        said[i, : len(flags)] = torch.tensor(flags)
    before = language.embed_tokens(torch.tensor([[talk.start, talk.user]])).expand(len(turns), -1, -1)
    image = model.model.multi_modal_projector(features)
    inputs = torch.cat((before, image.to(before.dtype), language.embed_tokens(ids)), dim=1)
    # A patch keeps the position that it has among all patches, so fewer patches look like the same picture.
    lead = torch.arange(2).expand(len(turns), -1)
    rest = (2 + PATCHES + torch.arange(longest)).expand(len(turns), -1)
    positions = torch.cat((lead, shown + 2, rest), dim=1)
    # Padding comes last, where a causal model cannot see it; the mask of ones says that gaps in the positions mean nothing.
    hidden = language(
        inputs_embeds=inputs, position_ids=positions, attention_mask=torch.ones_like(positions), use_cache=False
    ).last_hidden_state
    # The state before a token predicts it: one to the left.
    states = hidden[:, -longest - 1 : -1][said]
    return nn.functional.cross_entropy(model.lm_head(states).float(), ids[said])


def choose_patches(preference: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """For each picture `count` different patches, rising: (B, count); preferred ones first, else at random.

    preference: (B, PATCHES), larger is sooner; equal ones take turns.
    """
    order = (preference + torch.rand(preference.shape, generator=generator)).argsort(1, descending=True)
    return order[:, :count].sort(1).values
