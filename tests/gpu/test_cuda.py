"""What must hold on a CUDA device; skipped, and counted as skipped, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context
from mmcompress.recipe import Step
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STEPS = (
    Step("prune", {"ratio": 0.3}),
    Step("merge-tokens", {"keep": 0.6}),
    Step("quantize", {"scheme": "W8A8", "target": "tensorrt"}),
)


def compressed(family: str, device: str) -> Bundle:
    bundle = tiny.bundle(family)
    bundle.model.to(device)
    context = Context(data=tiny.dataset(12), num_samples=8, batch_size=4)
    for number, step in enumerate(STEPS, 1):
        pipeline.run_stage(bundle, pipeline.Stage(number, step, passes.build(step.name, step.params)), context)
    return bundle


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_pass_runs_on_cuda_and_reloads_there(family: str, tmp_path: Path) -> None:
    bundle = compressed(family, "cuda")
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model", device="cuda")
    for tower in bundle.towers():
        inputs = bundle.example_inputs(tower.name, 3)
        assert torch.equal(bundle.encode(tower.name, inputs), again.encode(tower.name, inputs))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cuda_and_cpu_agree_on_the_same_checkpoint(family: str, tmp_path: Path) -> None:
    checkpoint.save(tiny.bundle(family), tmp_path / "model")
    here, there = (checkpoint.load(tmp_path / "model", device=device) for device in ("cpu", "cuda"))
    for name, items in (("vision", tiny.images(3)), ("text", tiny.texts(3))):
        torch.testing.assert_close(
            torch.from_numpy(there.embed(name, items)), torch.from_numpy(here.embed(name, items)), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(
    "settings", [{"method": "fastv"}, {"method": "sparsevlm"}, {"method": "grid", "place": "cache"}]
)
def test_prompts_lose_tokens_on_cuda_as_on_the_cpu(settings: dict[str, object]) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        bundle = tiny.bundle("llava_clip")
        bundle.model.to(device)
        step = Step("drop-visual-tokens", {"keep": 0.3, **settings, "after": [1]})
        pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, step.params)), Context())
        answers.append(bundle.generate(list(tiny.asked(4))))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_keeps_half_precision(dtype: torch.dtype) -> None:
    bundle = tiny.bundle("clip")
    step = STEPS[1]
    pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, step.params)), Context())
    bundle.model.to("cuda", dtype)
    inputs = {k: v.to(dtype) for k, v in bundle.example_inputs("vision", 2).items()}
    embeddings = bundle.encode("vision", inputs)
    assert embeddings.dtype == dtype
    assert torch.isfinite(embeddings).all()


@pytest.mark.parametrize("family", ["llava_dinov2", "clip"])
def test_rotating_on_cuda_changes_nothing_there(family: str) -> None:
    bundle = tiny.bundle(family)
    bundle.model.to("cuda")
    tower = {"llava_dinov2": "language", "clip": "vision"}[family]
    inputs = bundle.prepare(tower, [bundle.items(tower, sample)[0] for sample in tiny.data(family, 4)])
    before = bundle.encode(tower, inputs)
    step = Step("rotate", {})
    pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, step.params)), Context())
    torch.testing.assert_close(bundle.encode(tower, inputs), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        {"scheme": "W8A8"},
        {"scheme": "W4A16", "rounding": "gptq", "scaling": "awq"},
        {"scheme": "W4A16", "rounding": "adaround", "scaling": "equalize", "clip": True},
    ],
    ids=["smoothed", "gptq-awq", "adaround-equalize"],
)
def test_samples_fit_weights_on_cuda(params: dict[str, object], tmp_path: Path) -> None:
    """With a place for a run that goes on, whose tensors lie on the CPU."""
    bundle = tiny.bundle("llava_clip")
    bundle.model.to("cuda")
    data = tiny.data("llava_clip", 8)
    inputs = bundle.prepare("language", [bundle.items("language", sample)[0] for sample in data])
    before = bundle.encode("language", inputs).flatten()
    step = Step("quantize", {"group_size": 16, "min_cosine": -1.0, **params})
    context = Context(data=data, num_samples=8, batch_size=4, workdir=tmp_path)
    pipeline.run_stage(bundle, pipeline.Stage(1, step, passes.build(step.name, step.params)), context)
    assert torch.nn.functional.cosine_similarity(bundle.encode("language", inputs).flatten(), before, dim=0) > 0.9
