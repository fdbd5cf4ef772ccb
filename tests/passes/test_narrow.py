"""narrow on tiny models: rotations change nothing, a narrow model is what the formulas say, and what may follow follows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.manifest import Record
from mmcompress.measure.cost import cost_of
from mmcompress.ops import residual
from mmcompress.passes import narrow_fit
from mmcompress.passes.base import Context
from mmcompress.passes.narrow import Narrow
from mmcompress.passes.narrow_cut import cut
from mmcompress.passes.narrow_fit import look, narrow_values
from mmcompress.passes.narrow_units import Stream, stream_of
from mmcompress.passes.prune_cut import cut_blocks, set_parameters
from mmcompress.passes.prune_scores import tower_batches
from mmcompress.recipe import Step
from tests import tiny
from tests.passes.narrowing import project_rows

TIED, UNTIED = "llava_dinov2", "smolvlm"


def context(family: str) -> Context:
    return Context(data=tiny.data(family, 8), num_samples=8, batch_size=4, teacher=lambda: tiny.bundle(family, seed=0))


def run(bundle: Bundle, family: str, name: str = "narrow", **params: Any) -> Record:
    stage = pipeline.Stage(1, Step(name, params), passes.build(name, params))
    return pipeline.run_stage(bundle, stage, context(family))


def model(family: str) -> Bundle:
    """A model whose norms' gains differ much: with gains of one, a tied table would need no product before it."""
    bundle = tiny.bundle(family)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path in stream(bundle).norms:
            gain = bundle.module(path).get_parameter("weight")
            gain.copy_(0.2 + 2 * torch.rand(gain.shape, generator=generator))
    return bundle


def stream(bundle: Bundle) -> Stream:
    return stream_of(bundle.tower("language"))


@torch.no_grad()
def answers(bundle: Bundle, family: str) -> Tensor:
    """What the language tower makes of samples, pictures first going through the vision tower."""
    batches = tower_batches(bundle, "language", context(family), "test")
    return torch.cat([bundle.encode("language", inputs).flatten() for inputs in batches])


@contextmanager
def watched(bundle: Bundle, found: Stream) -> Iterator[dict[str, Tensor]]:
    """Yield what each norm is given (B, N, C) while active, by path."""
    states: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        return lambda _, args: states.update({path: args[0]})

    handles = [bundle.module(path).register_forward_pre_hook(hook(path)) for path in found.norms]
    yield states
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", [TIED, "llava_next", "qwen2_vl", "qwen3_vl"])
def test_at_full_width_any_rotation_changes_no_answer(family: str) -> None:
    """Through tied tables, the end of a picture's line, biases, and what the first blocks are given beside tokens."""
    bundle = model(family)
    before, found = answers(bundle, family), stream(bundle)
    basis = residual.random_directions(found.width, found.width, torch.Generator().manual_seed(1))
    tensors = narrow_values(bundle, found, look(bundle, found, context(family)), basis, context(family))
    weights = {name: bundle.model.get_parameter(name) for name in tensors if ".norm." not in name}
    assert all(not torch.allclose(weight, tensors[name], atol=0.01) for name, weight in weights.items())
    cut(bundle, found, found.width, [found.table, found.tied] if found.tied else ())
    set_parameters(bundle, tensors)
    torch.testing.assert_close(answers(bundle, family), before, rtol=1e-4, atol=1e-5)


def test_a_narrow_model_computes_what_the_formulas_say() -> None:
    """As a model of the full width whose writers are projected, and whose norms divide by the root of the mean of K channels."""
    family = UNTIED
    bundle, reference = model(family), model(family)
    found = stream(bundle)
    moments, width = look(bundle, found, context(family)), 24
    basis = residual.leading(moments.pooled(), width)
    run(bundle, family, ratio=0.25)
    into = (basis @ basis.T).float()
    with torch.no_grad():
        project_rows(reference, found, into)
        for path in found.writers:
            linear = reference.module(path)
            linear.weight.copy_(into @ linear.weight)
            if linear.bias is not None:
                linear.bias.copy_(into @ linear.bias)
        for norm, readers in found.norms.items():
            gain, moment = reference.module(norm).weight, moments.of[norm]
            for path in readers:
                weight = reference.module(path).weight
                seen = moment.double() @ basis
                fitted = (weight * gain).double() @ seen @ torch.linalg.inv(basis.T @ seen) @ basis.T
                weight.copy_(fitted)
            share = float((basis.T @ moment.double() @ basis).trace() / moment.double().trace())
            gain.fill_(
                (share * 32 / width) ** 0.5 * (width / 32) ** 0.5
            )  # its mean is over 32 channels, of which 8 are 0
    torch.testing.assert_close(answers(bundle, family), answers(reference, family), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [TIED, UNTIED])
def test_costs_are_foretold_exactly(family: str) -> None:
    bundle = model(family)
    before = {name: (cost.parameters, cost.macs) for name, cost in cost_of(bundle).towers.items()}
    record = run(bundle, family, ratio=0.3)
    cost = cost_of(bundle).towers["language"]
    assert record.plan["widths"] == {"language": {"before": 32, "after": 16}}
    # 22.4 of 32 may stay: in multiples of 8 that is 16.
    assert record.plan["after"]["language"] == {"parameters": cost.parameters, "macs": cost.macs}
    assert record.plan["before"]["language"] == dict(zip(("parameters", "macs"), before["language"], strict=True))
    assert record.plan["after"] == record.facts["recount"]
    # By hand: 3 blocks of q, o (32 each), k, v (16 each), 3 times 144 neurons, 2 gains; a gain, the table, and the output layer.
    tied, words = family == TIED, bundle.module(stream(bundle).rows[0][0]).num_embeddings
    gone = 16 * (3 * (2 * 32 + 2 * 16 + 3 * 144 + 2) + 1 + words * (1 if tied else 2)) - (16 * 16 if tied else 0)
    assert before["language"][0] - cost.parameters == gone


def test_the_share_of_energy_is_that_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured by hooks of its own: what is left of every norm's output, padding left out."""
    monkeypatch.setattr(narrow_fit, "shrinkage", lambda *_: 0.0)
    bundle = model(UNTIED)
    found = stream(bundle)
    basis = residual.leading(look(bundle, found, context(UNTIED)).pooled(), 24)
    kept, total = 0.0, 0.0
    for inputs in tower_batches(bundle, "language", context(UNTIED), "test"):
        with watched(bundle, found) as states, torch.no_grad():
            bundle.encode("language", inputs)
        for path, seen in states.items():
            real = seen[inputs["attention_mask"].bool()].double()
            real = real / (real.square().mean(-1, keepdim=True) + bundle.module(path).variance_epsilon).sqrt()
            kept += float((real @ basis).square().sum())
            total += float(real.square().sum())
    record = run(bundle, UNTIED, ratio=0.25)
    assert record.facts["kept_energy"]["language"] == pytest.approx(kept / total, abs=1e-5)


def test_the_control_is_as_wide_and_keeps_less() -> None:
    found = {}
    for method in ("pca", "readers", "channels", "random"):
        bundle = model(TIED)
        found[method] = run(bundle, TIED, ratio=0.25, method=method)
    assert all(record.plan == found["random"].plan for record in found.values())
    energy = {method: record.facts["kept_energy"]["language"] for method, record in found.items()}
    assert energy["pca"] > max(energy["readers"], energy["channels"], energy["random"])
    control = Narrow(ratio=0.25).control()
    assert control == Narrow(ratio=0.25, method="random")
    assert control.control() is None


def test_tied_tables_stay_tied(tmp_path: Path) -> None:
    bundle = model(TIED)
    run(bundle, TIED, ratio=0.25)
    checkpoint.save(bundle, tmp_path / "model")
    for each in (bundle, checkpoint.load(tmp_path / "model")):
        assert each.model.lm_head.weight is each.model.get_input_embeddings().weight
        assert each.model.lm_head.weight.shape[1] == each.model.lm_head.in_features == 24
        assert [type(part).__name__ for part in each.module("model.language_model.norm")] == ["LlamaRMSNorm", "Linear"]
        assert each.tower("language").residual.width == 24  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "multiple", "why"),
    [
        (UNTIED, 8, ""),
        (UNTIED, 2, "config.json cannot say the shapes"),  # 22 channels, which 4 heads do not divide
        ("qwen2_vl", 8, "config.json cannot say the shapes"),  # a head is as wide as the stream through their number
        (TIED, 8, "stored differently, such as model.language_model.norm.0.weight"),
    ],
)
def test_plain_transformers_loads_what_a_config_can_say(family: str, multiple: int, why: str, tmp_path: Path) -> None:
    bundle = model(family)
    run(bundle, family, ratio=0.3, multiple=multiple)
    written = checkpoint.save(bundle, tmp_path / "model")
    assert written.plain_transformers == (not why)
    assert why in written.why
    assert torch.equal(answers(checkpoint.load(tmp_path / "model"), family), answers(bundle, family))
    if not why:
        plain = type(bundle.model).from_pretrained(tmp_path / "model").eval()
        assert plain.config.text_config.hidden_size == 16
        other = Bundle(plain, bundle.processor, bundle.family, bundle.source)
        assert torch.equal(answers(other, family), answers(bundle, family))


def test_graphs_are_narrow_and_answer_alike(tmp_path: Path) -> None:
    bundle = model(TIED)
    cut_blocks(bundle, bundle.tower("language"), [0])
    cut_blocks(bundle, bundle.tower("vision"), [2])
    run(bundle, TIED, ratio=0.25)
    report = export_onnx(bundle, tmp_path / "out", batches=(2,))  # which compares both at each corner
    assert [report.component.name for report in report.components] == ["vision", "embed", "language"]
    assert all(row.relative <= 1e-4 for component in report.components for row in component.parity)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("quantize", {"scheme": "W8A8", "min_cosine": -1.0}),
        ("prune", {"ratio": 0.1, "towers": ["language"]}),
        ("distill", {"steps": 2, "batch_size": 4, "towers": ["language"]}),
    ],
)
def test_what_follows_works_and_reloads(name: str, params: dict[str, Any], tmp_path: Path) -> None:
    bundle = model(TIED)
    run(bundle, TIED, ratio=0.25)
    narrow = answers(bundle, TIED)
    run(bundle, TIED, name, **params)
    made = answers(bundle, TIED)
    assert not torch.equal(made, narrow)
    checkpoint.save(bundle, tmp_path / "model")
    assert torch.equal(answers(checkpoint.load(tmp_path / "model"), TIED), made)
    if name == "quantize":
        assert nn.functional.cosine_similarity(made, narrow, dim=0) > 0.99
        assert "model.language_model.norm.1" in bundle.history[-1].plan["layers"]


def test_what_came_before_stays() -> None:
    bundle = model(UNTIED)
    run(bundle, UNTIED, "prune", ratio=0.1, towers=["language"])
    heads = [block.attention.heads for block in bundle.tower("language").blocks]
    neurons = [block.mlp.neurons for block in bundle.tower("language").blocks]
    run(bundle, UNTIED, ratio=0.25)
    assert heads == [block.attention.heads for block in bundle.tower("language").blocks]
    assert neurons == [block.mlp.neurons for block in bundle.tower("language").blocks]
    # Once more, where no product stands behind the last norm.
    record = run(bundle, UNTIED, ratio=0.3)
    assert record.plan["widths"]["language"] == {"before": 24, "after": 16}


def test_other_towers_lose_nothing_but_the_turn_of_their_tokens() -> None:
    bundle, before = model(TIED), model(TIED)
    run(bundle, TIED, ratio=0.25)
    states, changed = before.model.state_dict(), bundle.model.state_dict()
    projector = "model.multi_modal_projector.linear_2"
    vision = [name for name in states if not before.tower("language").owns(name) and not name.startswith(projector)]
    assert vision
    assert all(torch.equal(states[name], changed[name]) for name in vision)
    assert changed[f"{projector}.weight"].shape == (24, states[f"{projector}.weight"].shape[1])


def test_what_is_refused_says_why() -> None:
    bundle = model(TIED)
    with pytest.raises(UsageError, match="would keep 0 in multiples of 8") as caught:
        Narrow(ratio=0.8).check(bundle)
    assert "ratio <= 0.75" in (caught.value.hint or "")
    Narrow(ratio=0.75).check(bundle)
    with pytest.raises(UsageError, match="stream cannot become narrower: its family does not name all") as caught:
        Narrow(towers=("vision",)).check(bundle)
    assert "other than vision" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="has no tower 'audio'"):
        Narrow(towers=("audio",)).check(bundle)
    with pytest.raises(UsageError, match="narrowing the stream of the language tower needs data"):
        Narrow().plan(bundle, Context())
    with pytest.raises(UsageError, match="gemma multiplies words by the root"):
        Narrow().check(tiny.bundle("paligemma"))
    with pytest.raises(
        UsageError, match=r"no residual stream of whisper models .*audio: .*activation.*decoder: its family"
    ):
        Narrow().check(tiny.bundle("whisper"))
    odd = copy.deepcopy(bundle)
    odd.replace("model.language_model.layers.1.input_layernorm", nn.LayerNorm(32))
    with pytest.raises(
        UsageError, match=r"layers.1.input_layernorm is a LayerNorm, and model.language_model.norm a Llama"
    ):
        Narrow().check(odd)
    run(bundle, TIED, ratio=0.25)
    with pytest.raises(UsageError, match="narrowed or rotated already"):
        Narrow().check(bundle)
    with pytest.raises(UsageError, match="the student's vision has 384 values in its hidden states, the teacher's 512"):
        run(bundle, TIED, "distill", steps=1, batch_size=4)
    for family, scheme in ((TIED, {"vision_scheme": "W16A16"}), (UNTIED, {"language_scheme": "W16A16"})):
        rounded = model(family)
        run(rounded, family, "quantize", scheme="W8A16", **scheme)
        with pytest.raises(UsageError, match="narrow is for") as caught:
            Narrow().check(rounded)
        assert "put narrow before" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ratio": 1.0}, r"narrow.ratio is 1; expected 0 <= ratio < 1"),
        ({"multiple": 0}, "narrow.multiple is 0"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        passes.build("narrow", params)
