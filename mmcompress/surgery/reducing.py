"""A connector that hands a language model fewer image tokens.

`bind_connector` gives the connector instance a `forward` of its own: what its class computes, then an assignment (see
`ops.token_choice`) and its means. `bind_scorer` does the same to one attention of the encoder, which leaves scores of its tokens
for the connector in a `Seen` that both share. Classes stay as they were, and no name in the state dict changes. A learned selector
is the one module that is added, to the connector, and reads what that gives out: the tokens the language model would be given.

Shapes: R pictures or tiles, N tokens before, M after, C channels, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcompress.errors import UsageError
from mmcompress.ops import token_choice
from mmcompress.ops.token_autoencoder import normalised
from mmcompress.surgery.attention import give_scores
from mmcompress.surgery.ledger import Ledger

Method = Literal[
    "divprune",
    "clusters",
    "visionzip",
    "prumerge",
    "attention",
    "lftr",
    "tome",
    "selector",
    "relevance",
    "pool",
    "grid",
    "random",
]
SCORED: tuple[Method, ...] = ("visionzip", "prumerge", "attention")
"""Methods that ask what the encoder looked at."""
LEARNED: Method = "selector"
"""The method that asks a module of its own."""
ATTRIBUTE = "choice"


class Seen(Ledger):
    """Where the encoder leaves scores (R, N) for the connector, and that where in their pictures tokens were (R, M)."""

    scores: Tensor | None = None
    places: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """Which tokens a connector hands on."""

    method: Method
    tokens: int
    """N."""
    kept: int
    """M."""
    grid: tuple[int, int]
    small: tuple[int, int] = (0, 0)
    """Rows and columns that "pool" leaves."""
    drawn: tuple[int, ...] = ()
    """The places that "random" and "relevance" keep."""
    leading: int = 0
    apart: bool = False
    """Whether tokens go on in the order of their places, which the language model is told."""
    seen: Seen = field(default_factory=Seen)

    @property
    def compares(self) -> bool:
        """Whether the tokens say which of them go on, and not their places alone."""
        return self.method not in ("relevance", "pool", "grid", "random")


def bind_connector(connector: nn.Module, choice: Choice, selector: nn.Module | None = None) -> None:
    """Make `connector` hand on `choice.kept` tokens of each picture; `selector`, for the method that is learned, joins it."""
    setattr(connector, ATTRIBUTE, choice)
    if selector is not None:
        connector.add_module(LEARNED, selector)
    connector.forward = MethodType(_forward, connector)


def bind_scorer(attention: nn.Module, choice: Choice) -> None:
    """Make an attention of the encoder leave its scores for the connector bound with the same `choice`."""
    give_scores(attention, class_token=choice.leading > 0)
    setattr(attention, ATTRIBUTE, choice)
    attention.forward = MethodType(_attend, attention)


def choice_of(module: nn.Module) -> Choice | None:
    """Return what a connector, or the attention it asks, was bound with; None where it was not."""
    return getattr(module, ATTRIBUTE, None)


def selector_of(connector: nn.Module) -> nn.Module:
    """Return the module that scores the tokens (R, N, C), normalised: (R, N, 1)."""
    return connector.get_submodule(LEARNED)


def handed_on(connector: nn.Module, otherwise: int) -> int:
    """Return how many tokens a picture a connector hands on, `otherwise` where it is not bound."""
    choice = choice_of(connector)
    return otherwise if choice is None else choice.kept


def _forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    tokens: Tensor = type(self).forward(self, *args, **kwargs)
    choice: Choice = getattr(self, ATTRIBUTE)
    if tokens.shape[1] != choice.tokens:
        raise UsageError(
            f"the image tokens were chosen of {choice.tokens} a picture, but here are {tokens.shape[1]}",
            hint="give pictures of the model's own size",
        )
    rows = assignment(choice, tokens, _scores(self, choice, tokens))
    places = None
    if choice.apart:
        rows, places = token_choice.by_place(rows, choice.grid)
    if choice.seen.watched is not None:
        choice.seen.watched.append(rows)
    made = rows.to(tokens.dtype) @ tokens
    if choice.seen.put_back:
        return token_choice.places(rows, tokens.detach()).to(tokens.dtype) @ made
    if places is not None:
        choice.seen.places = places[..., 0].expand(tokens.shape[0], -1)
    return made


def _scores(connector: nn.Module, choice: Choice, tokens: Tensor) -> Tensor | None:
    """Return what a learned selector, or the encoder, says of the tokens (R, N); None where nobody is asked."""
    if choice.method == LEARNED:
        scored: Tensor = selector_of(connector)(normalised(tokens.detach()))[..., 0]
        return scored
    scores, choice.seen.scores = choice.seen.scores, None
    return None if scores is None else scores[:, choice.leading :]


def assignment(choice: Choice, tokens: Tensor, scores: Tensor | None = None) -> Tensor:
    """Return what goes into each token handed on, (R, M, N) or (M, N). `tokens`: (R, N, C); `scores`: (R, N)."""
    features = tokens.detach()
    match choice.method:
        case "divprune":
            return token_choice.spread_farthest(features, choice.kept)
        case "clusters":
            return token_choice.clustered(features, choice.kept)
        case "lftr":
            return token_choice.least_redundant(features, choice.kept)
        case "tome":
            return token_choice.halved(features, choice.kept)
        case "pool":
            return token_choice.pooled(choice.grid, choice.small).to(tokens.device)
        case "grid":
            return token_choice.evenly(choice.tokens, choice.kept).to(tokens.device)
        case "random" | "relevance":
            return token_choice.standing_at(torch.tensor(choice.drawn), choice.tokens).to(tokens.device)
    assert scores is not None, "the scorer runs before the tokens are chosen"
    scores = scores.detach()
    if choice.method in ("attention", LEARNED):
        return token_choice.best_scored(scores, choice.kept)
    if choice.method == "visionzip":
        return token_choice.dominant_and_contextual(scores, features, choice.kept)
    return token_choice.kept_with_neighbours(scores, features, choice.kept)


def _attend(self: Any, *args: Any, **kwargs: Any) -> Any:
    made = type(self).forward(self, *args, **kwargs)
    choice: Choice = getattr(self, ATTRIBUTE)
    choice.seen.scores = made[1]
    return made
