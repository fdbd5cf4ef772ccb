"""Greedy answers from the parts of a model, each in a runner: the loop around `mmcompress.parts`, in numpy.

Keys and values stay with the engine from one step to the next. What is written is what transformers' greedy search writes: the same
start, the same suppressed tokens, rows that have ended padded until all have.

Shape alphabet: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmcompress.errors import UsageError
from mmcompress.export.artifact import TensorSpec
from mmcompress.measure.runner import Array, Runner
from mmcompress.ops.positions import stand_apart
from mmcompress.parts import MASK, PAST, Decoding


@dataclass(frozen=True)
class Stage:
    """One part, loaded."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    runner: Runner
    most_tokens: int = 0

    @property
    def names(self) -> frozenset[str]:
        """The names of its inputs."""
        return frozenset(spec.name for spec in self.inputs)


@dataclass
class Written:
    """Answers to one batch, and what they cost."""

    rows: list[list[int]]
    """The tokens of each answer, without start and end."""
    seconds: dict[str, float]
    """What each of the earlier parts took, by name."""
    steps: list[float] = field(default_factory=list)
    """What the writer took in each call: first for the prompt, then for every further token of all rows."""
    cache_bytes: int = 0
    """Keys and values at the end, those of what was seen or heard included."""

    @property
    def first_token(self) -> float:
        """Seconds to the first token: every part once."""
        return sum(self.seconds.values()) + self.steps[0]


class Writer:
    """Answers with `stages` in the order they run, the writer last."""

    def __init__(self, stages: Sequence[Stage], decoding: Decoding) -> None:
        *self.earlier, self.last = stages
        self.decoding = decoding
        self._embed = next((stage for stage in self.earlier if "input_ids" in stage.names), None)
        self._presents = tuple(name for name in self.last.outputs if name.startswith("present_"))
        self._ends = np.array(decoding.end, dtype=np.int64)
        self._suppressed = np.array(decoding.suppressed, dtype=np.int64)
        self._suppressed_first = np.array(decoding.suppressed_first, dtype=np.int64)

    def write(self, asked: Mapping[str, Array], limit: int | None = None, *, to_the_end: bool = False) -> Written:
        """Answer what the family's `asked` made of B samples, with at most `limit` tokens each (default: `Decoding.limit`).

        `to_the_end` writes all of them whatever comes, which is what a timing needs. Raises UsageError where prompt and answer
        are longer than the model takes.
        """
        state = _State(self, asked)
        ids = self._start(state)
        taken = 0 if state.positions is None else int(state.positions.max()) + 1
        limit = self._room(max(ids.shape[1], taken, len(self.decoding.start)), limit)
        logits = state.step(ids)
        written: list[Array] = []
        running = np.ones(len(ids), dtype=bool)
        while True:
            self._suppress(logits, first=not written)
            chosen = np.where(running, logits.argmax(axis=-1), self.decoding.padding)
            written.append(chosen)
            running &= ~(chosen[:, None] == self._ends).any(axis=1)
            if len(written) == limit or not (running.any() or to_the_end):
                break
            logits = state.step(chosen[:, None])
        table = np.stack(written, axis=1)
        rows = table.tolist() if to_the_end else [self._until_end(row) for row in table.tolist()]
        return Written(rows, state.seconds, state.steps, state.cache_bytes())

    def _start(self, state: _State) -> Array:
        """Return the tokens (B, T) the answer follows that are not in the cache yet, choosing among alternatives."""
        if not self.decoding.start:
            return np.asarray(state.asked["input_ids"])
        batch = len(next(iter(state.asked.values())))
        ids = np.empty((batch, 0), dtype=np.int64)
        for choices in self.decoding.start:
            if len(choices) == 1:
                chosen = np.full((batch, 1), choices[0])
            else:
                table = np.array(choices)
                chosen = table[state.step(ids)[:, table].argmax(axis=-1)][:, None]
                ids = ids[:, :0]
            ids = np.concatenate([ids, chosen], axis=1)
        return ids

    def _room(self, prompt: int, limit: int | None) -> int:
        """Return how many tokens are written: those asked for, else the usual limit as far as there is room."""
        most = self.last.most_tokens
        if not self._presents:
            limit = 1  # it keeps nothing to go on from
        if limit is None:
            limit = min(self.decoding.limit, max(1, most - prompt)) if most else self.decoding.limit
        if limit < 1:
            raise UsageError(f"an answer of {limit} tokens was asked for", hint="ask for at least 1")
        if most and prompt + limit > most:
            raise UsageError(
                f"{prompt} tokens of prompt and {limit} of answer are {prompt + limit}; the model takes {most}",
                hint=f"ask for at most {most - prompt} new tokens" if most > prompt else "ask a shorter question",
            )
        return limit

    def _suppress(self, logits: Array, first: bool) -> None:
        logits[:, self._suppressed] = -np.inf
        if first:
            logits[:, self._suppressed_first] = -np.inf

    def _until_end(self, row: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(row) if token in self.decoding.end]
        return row[: ends[0]] if ends else row


class _State:
    """What one batch has come to: outputs of the earlier parts, cache, mask and positions."""

    def __init__(self, writer: Writer, asked: Mapping[str, Array]) -> None:
        self.writer, self.asked = writer, asked
        self.seconds: dict[str, float] = {}
        self.steps: list[float] = []
        self.context: dict[str, Any] = {}
        self.cache: dict[str, Any] = {}
        self.masks = {name: mask for name, mask in asked.items() if name.startswith(MASK)}
        self.positions = asked.get("position_ids")
        wanted = frozenset[str]().union(*(stage.names for stage in (*writer.earlier, writer.last)))
        for stage in writer.earlier:
            known = {**asked, **self.context}
            if stage is writer._embed or not stage.names <= known.keys():
                continue  # a question without a picture needs no vision part
            begun = time.perf_counter()
            given = {name: known[name] for name in stage.names}
            self.context |= stage.runner.chain(given, keep=wanted & set(stage.outputs))
            self.seconds[stage.name] = time.perf_counter() - begun
        if "image_places" in self.context:
            self._stand_apart(self.context["image_places"])

    def _stand_apart(self, places: Array) -> None:
        """Let a picture's tokens stand where they were: at the `places` (R, M, 1) of as many positions as it had tokens."""
        decoding = self.writer.decoding
        assert self.positions is not None, "a prompt with pictures has them"
        positions, image = self.positions, self.asked["input_ids"] == decoding.image_token
        given = [torch.from_numpy(value) for value in (positions, image, places[..., 0].astype(np.int64))]
        stand = stand_apart(given[0], given[1], given[2], decoding.room)
        self.positions = stand[0].numpy()

    def step(self, ids: Array) -> Array:
        """Return logits (B, V) that follow `ids` (B, T), and remember what was seen."""
        begun, last = time.perf_counter(), self.writer.last
        if not self.cache:
            self.cache = {spec.name: _empty(spec, len(ids)) for spec in last.inputs if spec.name.startswith("past_")}
        else:
            new = np.ones_like(ids)
            self.masks = {name: np.concatenate([mask, new], axis=1) for name, mask in self.masks.items()}
        given: dict[str, Any] = {**self.asked, **self.context, **self.cache, **self.masks, "input_ids": ids}
        if "image_mask" in last.names:
            given["image_mask"] = (ids == self.writer.decoding.image_token).astype(np.int64)
        if self.writer._embed is not None and "inputs_embeds" in last.names:
            given["inputs_embeds"] = self._embedded(self.writer._embed, ids)
        if self.positions is not None:
            if self.steps:
                highest = self.positions.max(axis=tuple(range(1, self.positions.ndim)), keepdims=True)
                self.positions = np.broadcast_to(highest + 1, (*self.positions.shape[:-1], 1))
            given["position_ids"] = self.positions
        found = last.runner.chain({name: given[name] for name in last.names}, keep=self.writer._presents)
        self.cache = {name.replace("present_", "past_", 1): found[name] for name in self.writer._presents}
        logits = np.array(found["logits"])
        self.steps.append(time.perf_counter() - begun)
        return logits

    def _embedded(self, stage: Stage, ids: Array) -> Array:
        """Return the rows (B, T, C) of tokens, with those of the picture in its places."""
        (rows,) = stage.runner.chain({"input_ids": ids}, keep=()).values()
        places = ids == self.writer.decoding.image_token
        if not self.steps and "image_embeds" in self.context:
            seen = self.context["image_embeds"]
            rows = np.array(rows)
            rows[places] = seen.reshape(-1, seen.shape[-1])
        return np.asarray(rows)

    def cache_bytes(self) -> int:
        """Bytes of keys and values, and of what the earlier parts left for the writer."""
        kept = [value for name, value in self.context.items() if name in self.writer.last.names]
        return sum(_bytes(value) for value in (*self.cache.values(), *kept))


def _empty(spec: TensorSpec, batch: int) -> Array:
    """A past of no tokens."""
    shape = [dim if isinstance(dim, int) else 0 if dim.startswith(PAST) else batch for dim in spec.dims]
    return np.zeros(shape, dtype=np.dtype(spec.dtype))


def _bytes(value: Any) -> int:
    size = getattr(value, "nbytes", None)
    return int(value.tensor_size_in_bytes() if size is None else size)  # an OrtValue says it by another name
