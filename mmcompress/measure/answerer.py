"""A model that answers in text, cut into parts: an exported artifact in an engine, or a bundle in torch, with its preprocessing.

Accuracy measured through an artifact is the accuracy of what will be deployed. Where stages are timed, a bundle answers through the
same loop, so that engines are compared and not loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig

from mmcompress import passes
from mmcompress.bundle import Bundle, Cut, Processor
from mmcompress.errors import UsageError
from mmcompress.export.artifact import Artifact, TensorSpec
from mmcompress.families import family_for
from mmcompress.manifest import Source
from mmcompress.measure.runner import Arrays
from mmcompress.measure.runners import open_runner
from mmcompress.measure.writing import Stage, Writer, Written
from mmcompress.parts import BATCH, Exportable, Part
from mmcompress.passes.base import Plan
from mmcompress.preprocessing import read_processor

if TYPE_CHECKING:
    from mmcompress.data import Sample


class Answerer:
    """Answers samples; parts are loaded when the first answer is asked for."""

    def __init__(
        self, family: Exportable, model: Any, processor: Processor, stages: Callable[[], Sequence[Stage]]
    ) -> None:
        self.family, self.processor = family, processor
        self.model, self._open = model, stages
        self._writer: Writer | None = None
        self.decoding = family.decoding(model)

    @property
    def writer(self) -> Writer:
        """The loop with its parts, loaded the first time."""
        if self._writer is None:
            self._writer = Writer(self._open(), self.decoding)
        return self._writer

    def asked(self, samples: Sequence[Sample]) -> Arrays:
        """Return what the parts take of samples."""
        made = self.family.asked(self.model, self.processor, samples)
        return {
            name: (value.float() if value.is_floating_point() else value).cpu().numpy() for name, value in made.items()
        }

    def write(self, samples: Sequence[Sample], limit: int | None = None) -> Written:
        """Return the tokens of the answers and what they cost. Raises what `Writer.write` and preprocessing raise."""
        return self.writer.write(self.asked(samples), limit)

    def generate(self, samples: Sequence[Sample]) -> list[str]:
        """Return one greedy answer a sample."""
        cut = Cut.of(self.family, self.processor, samples)
        return cut.joined([text for part in cut.portions for text in self.texts(self.write(part).rows)])

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return answers in words."""
        return self.family.texts(self.model, self.processor, rows)

    def close(self) -> None:
        """Give the engines' memory back."""
        if self._writer is not None:
            for stage in (*self._writer.earlier, self._writer.last):
                stage.runner.close()
            self._writer = None


def artifact_answerer(
    artifact: Artifact,
    runner: str = "onnxruntime",
    *,
    threads: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
) -> Answerer:
    """Return what answers with an exported artifact; the further arguments are those of `open_runner`.

    Raises UsageError for an artifact of a model that embeds.
    """
    if artifact.generation is None:
        raise UsageError(
            f"{artifact.directory} holds a model that does not answer in text", hint="mmc generate needs one"
        )
    family, config = family_for(artifact.config), AutoConfig.for_model(**artifact.config)
    assert isinstance(family, Exportable), "only such families leave a generation config"
    # Preprocessing asks a model for its dtype and limits; one without weights can answer that.
    with torch.device("meta"):
        model: Any = family.model_class(config)(config)
    model.generation_config = GenerationConfig.from_dict(artifact.generation)
    processor = read_processor(artifact.directory)
    bundle = Bundle(model, processor, family, Source(**{**artifact.source, "config": artifact.config}))
    for record in artifact.records:
        if record["name"] in passes.PREPARING:
            passes.build(record["name"], record["params"]).apply(bundle, Plan(record["plan"]))

    def stages() -> list[Stage]:
        return [
            Stage(
                component.name,
                component.inputs,
                tuple(spec.name for spec in component.outputs),
                open_runner(runner, artifact.path(component.name), threads, device, precision),
                component.tokens,
            )
            for component in artifact.components
        ]

    return Answerer(family, model, processor, stages)


def bundle_answerer(bundle: Bundle, *, threads: int | None = None) -> Answerer:
    """Return what answers with a bundle's parts in torch, on its device. Raises UsageError where it has none."""
    family = bundle.family
    if not isinstance(family, Exportable):
        raise UsageError(f"{bundle.family.name} names no parts", hint="use Bundle.generate")
    bundle.model.eval()

    def stages() -> list[Stage]:
        return [
            Stage(part.name, part_specs(part), part.outputs, torch_runner(bundle, part, threads), part.most_tokens)
            for part in family.parts(bundle.model)
        ]

    return Answerer(family, bundle.model, bundle.processor, stages)


def torch_runner(bundle: Bundle, part: Part, threads: int | None) -> Any:
    """Return a part of a bundle in torch, floats in and out as float32 as its graph has them."""
    from mmcompress.measure.machine import default_threads
    from mmcompress.measure.run_torch import TorchRunner

    dtype = next(bundle.model.parameters()).dtype

    def compute(**inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cast = [_cast(inputs[name], dtype) for name in part.axes]
        made = part.compute(bundle.model, *cast)
        return tuple(_cast(value, torch.float32) for value in ((made,) if isinstance(made, torch.Tensor) else made))

    return TorchRunner(compute, threads or default_threads(), str(bundle.device), output_names=part.outputs)


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def part_specs(part: Part) -> tuple[TensorSpec, ...]:
    """Return the inputs of a part as its graph would declare them."""
    example = part.example({BATCH: 2, **part.traced})
    return tuple(
        TensorSpec(name, str(value.dtype).removeprefix("torch."), _dims(part.axes[name], value))
        for name, value in ((name, example[name]) for name in part.axes)
    )


def _dims(axes: Sequence[str], value: torch.Tensor) -> tuple[int | str, ...]:
    named = [*axes, *[""] * (value.dim() - len(axes))]
    return tuple(name or int(size) for name, size in zip(named, value.shape, strict=True))
