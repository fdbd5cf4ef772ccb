"""Timing a model that answers in text, stage by stage: each earlier part, the prompt, one further token, and a whole answer.

All sides are asked the same: a question about one picture and one recording, of which every family takes what it can. An answer has
a fixed number of tokens whatever the model would say, so that sides differ in speed and not in what they say.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmcompress.bundle import Bundle
from mmcompress.data.sample import Sample
from mmcompress.data.sound import Waveform
from mmcompress.errors import UsageError
from mmcompress.export.artifact import TensorSpec
from mmcompress.jobs.arrays import arrays_for
from mmcompress.jobs.bench_targets import DTYPES, Source, Target, Variant, open_source, photo
from mmcompress.jobs.footprint import answer_footprint
from mmcompress.measure.answerer import Answerer, artifact_answerer, bundle_answerer, part_specs, torch_runner
from mmcompress.measure.memory import PeakMemory
from mmcompress.measure.runner import Arrays, Runner, Step
from mmcompress.measure.runners import open_runner
from mmcompress.measure.size import macs, onnx_macs
from mmcompress.parts import BATCH, PAST, TOKENS, Decoding, Exportable, Part
from mmcompress.progress import Progress

PROMPT, TOKEN, ANSWER = "prompt", "token", "answer"
QUESTION = "What is in the picture, and what colour is it?"
SECONDS = 1
"""Of the recording: speech models fill up what they are given to their own length."""


def open_targets(paths: Sequence[str], device: str, scratch: Path, new_tokens: int, progress: Progress) -> list[Target]:
    """Open every argument; two of the same name are told apart by a number. Raises UsageError, MissingError."""
    names = [Path(path).name or path for path in paths]
    labels = [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]
    targets: list[Target] = []
    for path, label in zip(paths, labels, strict=True):
        source = open_source(path, device)
        if source.answers:
            targets.append(AnswerTarget(source, label, device, scratch, progress, new_tokens))
        else:
            targets.append(Target(source, label, device, scratch, progress))
    first = targets[0]
    for other in targets[1:]:
        if not set(first.towers) & set(other.towers):
            raise UsageError(
                f"{first.name} has {', '.join(first.towers)} and {other.name} has {', '.join(other.towers)}",
                hint="only models that share a tower can be compared",
            )
    return targets


class AnswerTarget(Target):
    """An argument of `mmc bench` that answers in text; its stages take the place of towers."""

    def __init__(
        self, source: Source, name: str, device: str, scratch: Path, progress: Progress, new_tokens: int
    ) -> None:
        super().__init__(source, name, device, scratch, progress)
        self.new_tokens = new_tokens

    @property
    def towers(self) -> tuple[str, ...]:
        earlier = tuple(name for name in self._parts if name not in (self._writer, self._embed))
        goes_on = any(PAST in spec.dims for spec in self._parts[self._writer])
        return (*earlier, PROMPT, TOKEN, ANSWER) if goes_on else (*earlier, PROMPT, ANSWER)

    def specs(self, tower: str) -> tuple[TensorSpec, ...]:
        """Return the inputs of the part a stage runs; of a whole answer none, it is asked and not given arrays."""
        return () if tower == ANSWER else self._parts[self._part(tower)]

    def arrays(self, tower: str, batch: int, tokens: int) -> Arrays:
        """Return what a stage is timed with: what is asked, and noise for what other parts make of it."""
        asked = self.asked(batch)
        if tower == ANSWER:
            return asked
        noise = arrays_for(self.specs(tower), batch, sizes=self._sizes(tower))
        return noise if self._part(tower) == self._writer else {name: asked.get(name, noise[name]) for name in noise}

    def loader(self, variant: Variant, tower: str, threads: int) -> Callable[[], Runner]:
        if tower == ANSWER:
            return lambda: AnswerRunner(self._answerer(variant, threads), self.new_tokens)
        name, precision = self._part(tower), variant.precision
        if variant.runner == "torch":
            return lambda: self._torch(precision, name, threads)
        asked = "fp32" if self.artifact is None else precision
        kind = "cpu" if variant.runner == "openvino" else self._device.partition(":")[0]
        graph = self.graph(name, precision, self._experts(variant.runner))
        return partial(open_runner, variant.runner, graph, threads, kind, asked)

    def macs(self, tower: str, tokens: int) -> int:
        """Return a stage's multiply-accumulates for one item; a whole answer is all its stages, the last one once a token."""
        if tower == ANSWER:
            times = {stage: self.new_tokens - 1 if stage == TOKEN else 1 for stage in self.towers if stage != ANSWER}
            return sum(count * self.macs(stage, tokens) for stage, count in times.items())
        inputs, name = self.arrays(tower, 1, tokens), self._part(tower)
        if self.bundle is not None and not self._exports:
            part = next(part for part in self._torch_parts(self.bundle) if part.name == name)
            tensors = [torch.from_numpy(inputs[key]).to(self.bundle.device) for key in part.axes]
            return macs(partial(part.compute, self.bundle.model), tensors).total
        path = self.graph(name, *next(iter(self._exports), ("fp32", "auto")))
        return onnx_macs(path, {key: array.shape for key, array in inputs.items()}).total

    def memory(self, runner: str, tower: str, *, batch: int, tokens: int, threads: int) -> PeakMemory | None:
        """Return the peak of loading all parts and answering once; of single stages nothing."""
        name, _, precision = runner.partition(" ")
        if tower != ANSWER or (name == "torch" and precision):
            return None
        asked = (precision or "fp32", self._experts(name))
        home = self.path if name == "torch" else self.graph(self._writer, *asked).parent
        return answer_footprint(name, home, batch=batch, new_tokens=self.new_tokens, threads=threads)

    def stages(self, best: Mapping[str, float], batch: int) -> dict[str, Any]:
        """Return milliseconds of a batch by stage, from the stages' times in milliseconds; speed and cache of whole answers."""
        found: dict[str, Any] = {"prepare_ms": self._prepare_ms(batch)}
        timed = [stage for stage in self.towers if stage in best]
        found |= {f"{stage}_ms": best[stage] for stage in timed}
        if set(self.towers) - {TOKEN, ANSWER} <= best.keys():
            parts = [best[stage] for stage in self.towers if stage not in (TOKEN, ANSWER)]
            found["first_token_ms"] = found["prepare_ms"] + sum(parts)
        if TOKEN in best:
            found["tokens_per_second"] = batch * 1e3 / best[TOKEN]
        found["cache_mib"] = self._cache_bytes(batch) / 2**20
        return found

    def asked(self, batch: int) -> Arrays:
        """Return what the parts take of `batch` samples."""
        return self._preparing.asked([example_sample(self._preparing.decoding)] * batch)

    @cached_property
    def _preparing(self) -> Answerer:
        """Preprocessing; loads no part."""
        return bundle_answerer(self.bundle) if self.bundle is not None else artifact_answerer(self._own())

    @cached_property
    def _parts(self) -> dict[str, tuple[TensorSpec, ...]]:
        """The inputs of every part."""
        if self.bundle is None:
            return {component.name: component.inputs for component in self._own().components}
        return {part.name: part_specs(part) for part in self._torch_parts(self.bundle)}

    @property
    def _writer(self) -> str:
        return list(self._parts)[-1]

    @property
    def _embed(self) -> str:
        """The part that looks tokens up, which is no stage; "" without one."""
        earlier = [name for name in self._parts if name != self._writer]
        return next((name for name in earlier if "input_ids" in {spec.name for spec in self._parts[name]}), "")

    def _part(self, tower: str) -> str:
        return self._writer if tower in (PROMPT, TOKEN) else tower

    def _sizes(self, tower: str) -> dict[str, int]:
        """Return the sizes of named axes, as the example has them; a token is timed in the middle of an answer."""
        start, asked = self._preparing.decoding.start, self.asked(1)
        found = {
            dim: asked[spec.name].shape[axis]
            for specs in self._parts.values()
            for spec in specs
            if spec.name in asked
            for axis, dim in enumerate(spec.dims)
            if isinstance(dim, str) and dim != BATCH
        }
        prompt = len(start) if start else asked["input_ids"].shape[1]
        # "past_1 + tokens_1": what is left of the prompt where image tokens leave on the way.
        left = {dim.split(" + ")[1]: found.pop(dim) for dim in list(found) if dim.startswith(f"{PAST}_")}
        if tower != TOKEN:
            return {**found, **left, TOKENS: prompt, PAST: 0}
        written = self.new_tokens // 2
        held = {name.replace(TOKENS, PAST): size + written for name, size in left.items()}
        return {**found, **held, TOKENS: 1, PAST: prompt + written}

    def _cache_bytes(self, batch: int) -> int:
        """Keys and values of a whole answer, what was seen or heard included."""
        prompt = self._sizes(PROMPT)
        held = {
            name.replace(TOKENS, PAST): size + self.new_tokens
            for name, size in prompt.items()
            if name.startswith(TOKENS)
        }
        sizes = {**prompt, **held, TOKENS: 1}
        made = arrays_for([s for s in self._parts[self._writer] if len(s.dims) == 4], batch, sizes=sizes)
        return sum(array.nbytes for array in made.values())

    def _prepare_ms(self, batch: int) -> float:
        taken = []
        for _ in range(5):
            begun = time.perf_counter()
            self.asked(batch)
            taken.append(time.perf_counter() - begun)
        return float(np.median(taken) * 1e3)

    def _answerer(self, variant: Variant, threads: int) -> Answerer:
        if variant.runner == "torch":
            return bundle_answerer(self._bundle_in(variant.precision), threads=threads)
        key = (variant.precision, self._experts(variant.runner))
        self.graph(self._writer, *key)  # exports a checkpoint
        artifact = self._own() if self.artifact is not None else self._exports[key]
        asked = "fp32" if self.artifact is None else variant.precision
        return artifact_answerer(artifact, variant.runner, threads=threads, precision=asked)

    def _torch(self, precision: str, name: str, threads: int) -> Runner:
        bundle = self._bundle_in(precision)
        found: dict[str, Part] = {part.name: part for part in self._torch_parts(bundle)}
        runner: Runner = torch_runner(bundle, found[name], threads)
        return runner

    def _bundle_in(self, precision: str) -> Bundle:
        assert self.bundle is not None
        if precision == "fp32":
            return self.bundle
        return dataclasses.replace(self.bundle, model=copy.deepcopy(self.bundle.model).to(DTYPES[precision]))

    @staticmethod
    def _torch_parts(bundle: Bundle) -> tuple[Part, ...]:
        assert isinstance(bundle.family, Exportable)
        return bundle.family.parts(bundle.model)


class AnswerRunner:
    """All parts with the loop around them, as something that can be timed like one of them."""

    def __init__(self, answerer: Answerer, new_tokens: int) -> None:
        self._answerer, self._new_tokens = answerer, new_tokens
        self.name, self.device = answerer.writer.last.runner.name, answerer.writer.last.runner.device

    def facts(self) -> dict[str, Any]:
        return {**self._answerer.writer.last.runner.facts(), "new_tokens": self._new_tokens}

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        return {"tokens": np.array(self._answerer.writer.write(inputs, self._new_tokens, to_the_end=True).rows)}

    def chain(self, inputs: Mapping[str, Any], keep: Any) -> dict[str, Any]:
        return dict(self.run(inputs))

    def bind(self, inputs: Mapping[str, Any]) -> Step:
        return lambda: (self.run(inputs), None)[1]

    def close(self) -> None:
        self._answerer.close()


def example_sample(decoding: Decoding) -> Sample:
    """A photo-sized picture and a recording of tones, with a question where one can be asked."""
    time_ = np.arange(16_000 * SECONDS) / 16_000
    sound = (0.2 * np.sin(2 * np.pi * 220 * time_) * np.sin(2 * np.pi * 0.7 * time_)).astype(np.float32)
    return Sample(
        "benchmark", picture=photo(), audio=Waveform(sound, 16_000), question=QUESTION if decoding.questions else ""
    )
