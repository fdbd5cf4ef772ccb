"""Blocks that compute with runs of tokens as one, and give all of them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.manifest import Record
from mmcompress.measure.cost import cost_of
from mmcompress.ops.coarsening import coarse
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.surgery.coarsening import coarsening_of
from tests import tiny

SETTINGS: dict[str, Any] = {"keep": 0.4, "run": 4, "first": 1}
texts = pytest.mark.parametrize("family", ["dual_encoder", "clap", "altclip"])
methods = pytest.mark.parametrize("method", ["vcc", "random"])


def coarsened(family: str, **settings: Any) -> Bundle:
    bundle = tiny.bundle(family)
    given = {**SETTINGS, **settings}
    made = build("coarsen-tokens", given)
    made.check(bundle)
    plan = made.plan(bundle, Context())
    made.apply(bundle, plan)
    bundle.history.append(Record("coarsen-tokens", given, plan.decisions))
    return bundle


def text(bundle: Bundle, batch: int = 3) -> dict[str, Tensor]:
    """Texts of 16, 12 and 7 tokens, padded on the right."""
    inputs = dict(bundle.example_inputs("text", batch))
    if "attention_mask" in inputs:
        kept = torch.tensor([16, 12, 7])[:batch, None]
        inputs["attention_mask"] = (torch.arange(16)[None] < kept).long()
    return inputs


def encoded(bundle: Bundle, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return bundle.encode("text", inputs)


@texts
@methods
def test_a_batch_equals_its_texts_alone(family: str, method: str) -> None:
    bundle = coarsened(family, method=method)
    inputs = text(bundle)
    together = encoded(bundle, inputs)
    assert not torch.allclose(together, encoded(tiny.bundle(family), inputs), atol=1e-4)
    for row, count in enumerate((16, 12, 7)):
        alone = {key: value[row : row + 1, :count] for key, value in inputs.items()}
        torch.testing.assert_close(together[row], encoded(bundle, alone)[0], atol=1e-5, rtol=1e-4)


def test_two_blocks_are_what_the_method_says() -> None:
    """From the blocks' own parts: fine in the first, then with what its class token looked at least as means."""
    plain, bundle = tiny.bundle("dual_encoder"), coarsened("dual_encoder")
    seen: list[tuple[Tensor, Tensor]] = []
    for block in bundle.tower("text").blocks:
        bundle.module(block.path).register_forward_hook(lambda _, args, made: seen.append((args[0], made)))
    inputs = bundle.example_inputs("text", 2)
    encoded(bundle, inputs)
    first, second = (plain.module(block.path) for block in plain.tower("text").blocks[:2])
    plain.model.set_attn_implementation("eager")
    tokens = seen[0][0]
    with torch.no_grad():
        torch.testing.assert_close(first(tokens), seen[0][1])
        _, weights = first.attention(tokens, None)  # type: ignore[operator]
        tokens = first(tokens)
        rows = coarse(weights[:, :, 0].mean(dim=1), torch.ones(2, 16, dtype=torch.bool), 400, 4, 1)
        assert rows.shape[1] == 7
        sizes = rows.sum(dim=-1)
        means = rows / sizes[..., None] @ tokens
        made = second(means, sizes.log()[:, None, None, :])
        torch.testing.assert_close(tokens + rows.mT @ (made - means), seen[1][1], atol=1e-5, rtol=1e-4)


def test_runs_of_equal_tokens_are_coarse_without_a_trace() -> None:
    """A mean that counts as often as it has members is looked at as much as they together: nothing changes."""
    plain, bundle = tiny.bundle("dual_encoder"), coarsened("dual_encoder", keep=0.1)
    for one in (plain, bundle):
        one.module("text_model.embeddings.position_embeddings").weight.data.zero_()  # type: ignore[union-attr, operator]
    ids = torch.tensor([[7, *[3] * 4, *[5] * 4, *[9] * 4]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(encoded(bundle, inputs), encoded(plain, inputs), atol=1e-5, rtol=1e-4)


@texts
@methods
def test_reload_is_bit_equal(family: str, method: str, tmp_path: Path) -> None:
    bundle = coarsened(family, method=method)
    assert not checkpoint.save(bundle, tmp_path / "out").plain_transformers
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(encoded(again, text(again)), encoded(bundle, text(bundle)))


@methods
def test_exported_it_takes_texts_of_any_length(method: str, tmp_path: Path) -> None:
    bundle = coarsened("dual_encoder", method=method)
    artifact = export_onnx(bundle, tmp_path / "out", batches=(1, 3)).artifact
    session = onnxruntime.InferenceSession(artifact.path("text"), providers=["CPUExecutionProvider"])
    names = {each.name for each in session.get_inputs()}
    for batch, count in ((3, 16), (2, 5), (1, 11)):
        inputs = {key: value[:, :count] for key, value in text(bundle, batch).items()}
        want = encoded(bundle, inputs)
        (made,) = session.run(None, {key: value.numpy() for key, value in inputs.items() if key in names})
        torch.testing.assert_close(torch.from_numpy(made), want, atol=1e-4, rtol=1e-3)


def test_it_computes_less() -> None:
    plain, less = tiny.bundle("dual_encoder"), coarsened("dual_encoder")
    assert cost_of(less).towers["text"].macs < cost_of(plain).towers["text"].macs
    assert cost_of(less).towers["vision"].macs == cost_of(plain).towers["vision"].macs


def test_sound_is_coarsened_too_and_comes_out_whole() -> None:
    bundle = coarsened("whisper")
    inputs = bundle.example_inputs("audio", 2)
    with torch.no_grad():
        made = bundle.module("model.encoder")(inputs["input_features"]).last_hidden_state
        want = tiny.bundle("whisper").module("model.encoder")(inputs["input_features"]).last_hidden_state
    assert made.shape == want.shape
    assert not torch.allclose(made, want, atol=1e-4)


def test_it_trains_and_refuses_gradient_checkpointing() -> None:
    bundle = coarsened("dual_encoder")
    inputs = text(bundle)
    bundle.model.train()
    bundle.encode("text", inputs).square().mean().backward()
    for block in bundle.tower("text").blocks:
        gradient = bundle.module(block.mlp.reader).weight.grad
        assert isinstance(gradient, Tensor)
        assert gradient.abs().sum() > 0
    bundle = coarsened("whisper")
    bundle.model.train()
    bundle.model.activation_checkpointing_enable()
    with pytest.raises(UsageError, match="gradient checkpointing"):
        bundle.encode("audio", bundle.example_inputs("audio", 2))


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("clip", {}, "cannot be coarsened"),
        ("dual_encoder", {"tower": "vision"}, "the vision tower's tokens cannot be coarsened"),
        ("dual_encoder", {"first": 0}, "at least one sees all tokens"),
        ("dual_encoder", {"first": 9}, "at least one sees all tokens"),
    ],
)
def test_what_cannot_be_done_is_said(family: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        build("coarsen-tokens", settings).check(tiny.bundle(family))
    assert raised.value.hint


def test_blocks_that_others_rely_on_stay_when_blocks_are_pruned() -> None:
    bundle = coarsened("dual_encoder")
    assert bundle.tower("text").needed == (0,)
    assert tiny.bundle("dual_encoder").tower("text").needed == ()


def test_a_second_time_and_merging_are_refused() -> None:
    with pytest.raises(UsageError, match="already"):
        build("coarsen-tokens", SETTINGS).check(coarsened("dual_encoder"))
    with pytest.raises(UsageError, match="coarsens tokens already"):
        build("merge-tokens", {"keep": 0.6}).check(coarsened("whisper"))
    merged = tiny.bundle("whisper")
    merging = build("merge-tokens", {"keep": 0.6})
    merging.apply(merged, merging.plan(merged, Context()))
    with pytest.raises(UsageError, match="merges tokens"):
        build("coarsen-tokens", SETTINGS).check(merged)


@pytest.mark.parametrize(("settings", "said"), [({"keep": 0.0}, "0 < keep <= 1"), ({"run": 1}, "a number >= 2")])
def test_bad_parameters_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build("coarsen-tokens", settings)


def test_with_all_kept_nothing_is_bound() -> None:
    bundle = coarsened("dual_encoder", keep=1.0)
    assert not any(coarsening_of(bundle.module(block.path)) for block in bundle.tower("text").blocks)
