"""An exported artifact as something that embeds images and texts: the files on disk, in an engine, with the saved preprocessing.

Accuracy measured through this is the accuracy of what will be deployed, and not of the model it was exported from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import AutoConfig

from mmcompress.bundle import DualEncoder
from mmcompress.errors import UsageError
from mmcompress.export.artifact import Artifact
from mmcompress.families import family_for
from mmcompress.measure.runners import Runner, open_runner
from mmcompress.preprocessing import read_processor

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmcompress.data import Sample

_ENGINES = ("tensorrt", "tensorrt_rtx")


class ArtifactEmbedder:
    """Embeds with the components of one artifact; a component is loaded when it is first needed.

    `runner`, `threads`, `device` and `precision` are those of `measure.runners.open_runner`.
    """

    def __init__(
        self,
        artifact: Artifact,
        runner: str = "onnxruntime",
        *,
        threads: int | None = None,
        device: str | None = None,
        precision: str = "fp32",
    ) -> None:
        self.artifact = artifact
        self._open = (runner, threads, device, precision)
        self._runners: dict[str, Runner] = {}
        self._family = family_for(artifact.config)
        config = AutoConfig.for_model(**artifact.config)
        # Preprocessing asks a model for its dtype and limits; one without weights can answer that.
        with torch.device("meta"):
            self._model: Any = self._family.model_class(config)(config)
        self._processor = read_processor(artifact.directory)
        if not isinstance(self._family, DualEncoder):
            raise UsageError(
                f"{artifact.directory} holds a model that neither embeds nor answers",
                hint="run its graph in onnxruntime or OpenVINO; mmc bench times it",
            )
        self._media = self._family.media

    @property
    def similarity(self) -> tuple[float, float]:
        """(scale, bias): logits are scale * cosine + bias."""
        return self.artifact.similarity

    def embed_images(self, images: Sequence[Image]) -> np.ndarray:
        """Return float32 embeddings (B, C), not normalised. Raises what `open_runner` and preprocessing raise."""
        return self._run("vision", self.prepare_images(images))

    @property
    def describes(self) -> Literal["image", "audio"]:
        """What the texts describe."""
        return "audio" if self._media == "audio" else "image"

    def embed_samples(self, samples: Sequence[Sample]) -> np.ndarray:
        """Return float32 embeddings (B, C) of the samples' pictures or recordings. Raises what decoding and `embed_images` do."""
        items = [item for sample in samples for item in self._family.items(self._media, sample)]
        return self._run(self._media, self._arrays(self._media, self._prepare(self._media, items)))

    def prepare_images(self, images: Sequence[Image]) -> dict[str, np.ndarray]:
        """Return what the vision graph takes for `images`."""
        return self._arrays("vision", self._prepare("vision", images))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 embeddings (B, C), not normalised. Raises what `open_runner` and preprocessing raise."""
        return self._run("text", self._arrays("text", self._prepare("text", texts)))

    def cut_texts(self, texts: Sequence[str]) -> tuple[int, int]:
        """Return how many texts are longer than the model takes, and that limit in tokens."""
        assert isinstance(self._family, DualEncoder), "only dual encoders are exported as embedders"
        return self._family.cut_texts(self._model, self._processor, texts)

    def _prepare(self, component: str, items: Sequence[Any]) -> dict[str, torch.Tensor]:
        return self._family.prepare(self._model, self._processor, component, items)

    def runner(self, component: str) -> Runner:
        """Return the engine that holds `component`, loading it the first time."""
        if component not in self._runners:
            name, threads, device, precision = self._open
            self._runners[component] = open_runner(name, self.path(component), threads, device, precision)
        return self._runners[component]

    def path(self, component: str) -> Path:
        """Return the file the engine loads: the graph, or the engine built from it. Raises UsageError where there is none."""
        graph = self.artifact.path(component)
        if self._open[0] not in _ENGINES:
            return graph
        engine = graph.with_suffix(".engine")
        if not engine.is_file():
            raise UsageError(
                f"{self.artifact.directory} holds no engine for '{component}'", hint="mmc export --to tensorrt"
            )
        return engine

    def close(self) -> None:
        """Give the engines' memory back."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()

    def _arrays(self, component: str, prepared: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        wanted = {spec.name for spec in self.artifact.component(component).inputs}
        return {name: value.numpy() for name, value in prepared.items() if name in wanted}

    def _run(self, component: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        output = self.artifact.component(component).outputs[0].name
        return np.asarray(self.runner(component).run(inputs)[output], dtype=np.float32)
