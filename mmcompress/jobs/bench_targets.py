"""What `mmc bench` is given (a checkpoint, an exported directory, one with engines), brought into a form that can be timed."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig

from mmcompress import checkpoint, weights
from mmcompress.bundle import Bundle, DualEncoder
from mmcompress.errors import NotExportable, UsageError
from mmcompress.export import tensorrt as engines
from mmcompress.export.artifact import Artifact, TensorSpec, is_artifact, open_artifact
from mmcompress.export.onnx import Experts, experts_for, export_onnx
from mmcompress.families import family_for
from mmcompress.jobs.arrays import arrays_for
from mmcompress.jobs.footprint import footprint
from mmcompress.measure.answerer import part_specs
from mmcompress.measure.latency import interleaved
from mmcompress.measure.machine import cpu_flags
from mmcompress.measure.memory import PeakMemory
from mmcompress.measure.runner import Arrays, Runner
from mmcompress.measure.runners import RUNNERS, open_runner
from mmcompress.measure.size import artifact_size, macs, onnx_macs
from mmcompress.parts import Divided, Exportable, Part
from mmcompress.preprocessing import read_processor
from mmcompress.progress import Progress

TEXT = "a small red house beside two trees"
ENGINES = ("tensorrt", "tensorrt_rtx")
EXPORTED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """A runner with a precision."""

    runner: str
    precision: str = "fp32"

    @property
    def label(self) -> str:
        """What tables call it; "fp32" means as stored and is left out."""
        return self.runner if self.precision == "fp32" else f"{self.runner} {self.precision}"


@dataclass(frozen=True)
class Source:
    """What an argument names: a checkpoint or an exported directory."""

    path: Path
    bundle: Bundle | None = None
    artifact: Artifact | None = None

    @property
    def answers(self) -> bool:
        """Whether it answers in text from parts."""
        if self.bundle is not None:
            return not isinstance(self.bundle.family, DualEncoder) and has_parts(self.bundle)
        return self.artifact is not None and self.artifact.generation is not None


def has_parts(bundle: Bundle) -> bool:
    """Whether the family cuts this model into parts; some refuse some of their models."""
    if not isinstance(bundle.family, Exportable):
        return False
    try:
        bundle.family.decoding(bundle.model)
        return bool(bundle.family.parts(bundle.model))
    except NotExportable:
        return False


def open_source(path: str, device: str) -> Source:
    """Open a checkpoint or an exported directory. Raises UsageError, MissingError."""
    if is_artifact(path):
        return Source(Path(path), artifact=open_artifact(path))
    return Source(weights.locate(path), bundle=checkpoint.load(path, device=device))


class Target:
    """One argument of `mmc bench`, whose towers embed."""

    def __init__(self, source: Source, name: str, device: str, scratch: Path, progress: Progress) -> None:
        self.name, self._device, self._scratch, self._progress = name, device, scratch, progress
        self.notes: list[str] = []
        self.path, self.bundle, self.artifact = source.path, source.bundle, source.artifact
        self._exports: dict[tuple[str, Experts], Artifact] = {}
        """By precision, and the form of experts."""
        self.engine = _engine_api(self.path) if self.artifact is not None else ""
        self.kind = "checkpoint" if self.artifact is None else "engines" if self.engine else "exported"

    @property
    def towers(self) -> tuple[str, ...]:
        if self.bundle is not None:
            return tuple(tower.name for tower in self.bundle.towers())
        return tuple(component.name for component in self._own().components)

    def variants(self, runners: Sequence[str], precisions: Sequence[str]) -> list[Variant]:
        """Return what of the runners and precisions can run this target.

        Without `precisions`: as stored, and for torch also plain bf16 where the hardware computes in it. Engines that take their
        precision from the file are left out where another one can lower an artifact's.
        """
        fit = [name for name in runners if name in self._runners()]
        if precisions:
            asked = [Variant(name, precision) for name in fit for precision in precisions]
            able = [each for each in asked if each.precision == "fp32" or RUNNERS[each.runner].lowers]
            return able if self.artifact is not None and able else asked
        made = [Variant(name) for name in fit]
        if "torch" in fit and self._fast_bf16():
            made.append(Variant("torch", "bf16"))
        return made

    def specs(self, tower: str) -> tuple[TensorSpec, ...]:
        """Return the inputs of a tower's encoder."""
        if self.bundle is None:
            return self._own().component(tower).inputs
        part = _own_part(self.bundle, tower)
        if part is not None:
            return part_specs(part)
        example = self.bundle.example_inputs(tower, 1)
        text = "input_ids" in example
        return tuple(
            TensorSpec(
                name,
                str(value.dtype).removeprefix("torch."),
                ("batch", "tokens") if text and value.dim() == 2 else ("batch", *map(int, value.shape[1:])),
            )
            for name, value in example.items()
        )

    def loader(self, variant: Variant, tower: str, threads: int) -> Callable[[], Runner]:
        """Return what loads a tower in a runner. A checkpoint is exported first where the runner needs a graph."""
        name, precision = variant.runner, variant.precision
        if name == "torch":
            kind = self._device.partition(":")[0]
            return partial(open_runner, "torch", self._module(precision, tower), threads, kind, "fp32")
        if name in ENGINES:
            path = self._own().path(tower).with_suffix(".engine")
            return partial(open_runner, name, path, threads, "cuda", precision)
        # Exported in the precision asked for; an artifact has its own, and a runner that cannot lower it says so.
        asked = "fp32" if self.artifact is None else precision
        kind = "cpu" if name == "openvino" else self._device.partition(":")[0]
        return partial(open_runner, name, self.graph(tower, precision, self._experts(name)), threads, kind, asked)

    def _experts(self, runner: str) -> Experts:
        """Return the form in which a runner takes experts; "auto" where there are none."""
        towers = self.bundle.towers() if self.bundle is not None else ()
        mixed = any(block.experts for tower in towers for block in tower.blocks)
        return experts_for([runner]) if mixed else "auto"

    def graph(self, tower: str, precision: str = "fp32", experts: Experts = "auto") -> Path:
        """Return a tower's ONNX file, exporting a checkpoint into the scratch directory when that is not done yet."""
        if self.artifact is not None:
            return self.artifact.path(tower)
        assert self.bundle is not None
        if (precision, experts) not in self._exports:
            self._progress.say(
                f"{self.name} is a checkpoint: exporting it to ONNX for the timing, {EXPORTED[precision]}"
            )
            report = export_onnx(
                self.bundle,
                self._scratch / f"{len(list(self._scratch.iterdir()))}-{precision}",
                precision=EXPORTED[precision],
                experts=experts,
                progress=self._progress,
            )
            self._exports[precision, experts] = report.artifact
            self.notes.append(f"exported to ONNX ({EXPORTED[precision]}) for this run; the files are not kept")
        return self._exports[precision, experts].path(tower)

    def macs(self, tower: str, tokens: int) -> int:
        """Return a tower's multiply-accumulates for one item, recounted on the graph, or on the model without one."""
        inputs = arrays_for(self.specs(tower), 1, tokens)
        if self.bundle is not None and not self._exports:
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
            return macs(encoder(self.bundle, tower), tensors).total
        path = self.graph(tower, *next(iter(self._exports), ("fp32", "auto")))
        return onnx_macs(path, {name: array.shape for name, array in inputs.items()}).total

    def bytes(self) -> int:
        """Return the weights' bytes on disk: of a checkpoint its weight files, of an export its graphs or engines."""
        if self.bundle is not None:
            return sum(file.stat().st_size for file in weights.weight_files(self.path, allow_pickle=True))
        if self.engine:
            return sum(file.stat().st_size for file in self.path.glob("*.engine"))
        own = self._own()
        return sum(artifact_size(own.path(component.name)).total for component in own.components)

    def arrays(self, tower: str, batch: int, tokens: int) -> Arrays:
        """Return the inputs a tower is timed with."""
        return arrays_for(self.specs(tower), batch, tokens)

    def memory(self, runner: str, tower: str, *, batch: int, tokens: int, threads: int) -> PeakMemory | None:
        """Return the peak of loading a tower and encoding once, None where it cannot be told."""
        name, _, precision = runner.partition(" ")
        if name == "torch" and precision:  # it is loaded in full precision first, so the peak would be that one's
            return None
        path = self.path if name == "torch" else self.graph(tower, precision or "fp32", self._experts(name))
        return footprint(name, path, tower, self.specs(tower), batch=batch, tokens=tokens, threads=threads)

    def stages(self, best: Mapping[str, float], batch: int) -> dict[str, Any]:
        """Return milliseconds per item from a picture and a text to their embeddings, given the towers' times of a batch."""
        prepare = self.preparers()
        items = {"vision": photo(), "text": TEXT}
        steps = {tower: partial(prepare[tower], [items[tower]]) for tower in self.towers if tower in items}
        taken = interleaved(steps, rounds=10) if steps else {}
        found: dict[str, Any] = {}
        for tower in self.towers:
            if tower in taken:
                found[f"prepare_{tower}_ms"] = float(np.median(taken[tower].seconds) * 1e3)
            if tower in best:
                found[f"encode_{tower}_ms"] = best[tower] / batch
        return found

    def preparers(self) -> dict[str, Callable[[Any], Any]]:
        """Return what turns one image and one text into inputs: {"vision": …, "text": …}."""
        if self.bundle is not None:
            return {tower: partial(self.bundle.prepare, tower) for tower in self.towers}
        own = self._own()
        family, config = family_for(own.config), AutoConfig.for_model(**own.config)
        with torch.device("meta"):
            model = family.model_class(config)(config)
        processor = read_processor(own.directory)
        return {tower: partial(family.prepare, model, processor, tower) for tower in self.towers}

    def _own(self) -> Artifact:
        assert self.artifact is not None, "only checkpoints have none"
        return self.artifact

    def _runners(self) -> tuple[str, ...]:
        if self.engine:
            return (self.engine,)
        graphs = tuple(name for name, spec in RUNNERS.items() if ".onnx" in spec.suffixes)
        if self.bundle is not None:
            return ("torch", *graphs)
        if any({"MoE", "QMoE"} & component.nodes.keys() for component in self._own().components):
            # No other runtime has these operators.
            return ("onnxruntime",)
        return graphs

    def _fast_bf16(self) -> bool:
        # A quantized layer's scales would be rounded too, which is not what anybody deploys.
        plain = self.bundle is not None and not any(record.name == "quantize" for record in self.bundle.history)
        return plain and (self._device != "cpu" or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_flags())))

    def _module(self, precision: str, tower: str) -> Callable[..., torch.Tensor]:
        """The tower with weights in `precision`: plain conversion, which beats autocast's casting on every call."""
        assert self.bundle is not None
        bundle, dtype = self.bundle, DTYPES[precision]
        if precision != "fp32":
            bundle = dataclasses.replace(bundle, model=copy.deepcopy(bundle.model).to(dtype))

        run = encoder(bundle, tower)

        def encode(**inputs: torch.Tensor) -> torch.Tensor:
            cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
            return run(**cast)

        return encode


def encoder(bundle: Bundle, tower: str) -> Callable[..., torch.Tensor]:
    """Return what computes a tower in torch from what its graph takes, by name."""
    part = _own_part(bundle, tower)

    def encode(**inputs: torch.Tensor) -> torch.Tensor:
        if part is None:
            return bundle.encode(tower, inputs)
        made = part.compute(bundle.model, *(inputs[name] for name in part.axes))
        return made if isinstance(made, torch.Tensor) else made[0]

    return encode


def _own_part(bundle: Bundle, tower: str) -> Part | None:
    """Return the part called as `tower` of models that neither embed nor answer, and have one; None of others."""
    if not isinstance(bundle.family, Divided) or isinstance(bundle.family, Exportable):
        return None
    return next(part for part in bundle.family.parts(bundle.model) if part.name == tower)


def photo() -> Image.Image:
    """A photo-sized picture, so that resizing costs what it costs in use."""
    across, down = np.meshgrid(np.arange(640), np.arange(480))
    pixels = np.stack([across % 256, down % 256, (across + down) % 256], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels)


def _engine_api(directory: Path) -> str:
    """Which of the two libraries built the engines in `directory`; empty where there are none."""
    path = directory / engines.FILE_NAME
    if not path.is_file():
        return ""
    try:
        api = json.loads(path.read_text())["api"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error}", hint="export the engines again") from error
    if api not in ENGINES:
        raise UsageError(f"{path} names an unknown builder '{api}'", hint="export the engines again")
    return str(api)
