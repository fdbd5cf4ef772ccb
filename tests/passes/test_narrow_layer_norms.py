"""narrow where norms are LayerNorms: rotations change nothing, and what is left computes what the formulas say and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.manifest import Record
from mmcompress.passes import narrow_fit
from mmcompress.passes.base import Context
from mmcompress.passes.narrow import Narrow
from mmcompress.passes.narrow_cut import cut
from mmcompress.passes.narrow_fit import basis_for, look, narrow_values, readings
from mmcompress.passes.narrow_units import stream_of
from mmcompress.passes.prune_cut import cut_blocks, set_parameters
from mmcompress.passes.prune_scores import tower_batches
from mmcompress.recipe import Step
from tests import tiny
from tests.passes.narrowing import project_rows

STREAMS = [
    *((family, tower) for family in ("clip", "siglip", "siglip2") for tower in ("vision", "text")),
    *((family, "vision") for family in ("dual_encoder_vit", "dual_encoder_dinov2", "altclip", "chinese_clip")),
]
ENTERS, WIDENS, SCALES = "clip", "siglip", "dual_encoder_dinov2"
"""Vision towers whose stream begins behind a norm; whose last norm no Linear reads; and whose blocks scale what they add."""
every_stream = pytest.mark.parametrize(("family", "tower"), STREAMS)


def context(family: str, seed: int = 0) -> Context:
    return Context(
        data=tiny.data(family, 8), num_samples=8, batch_size=4, seed=seed, teacher=lambda: tiny.bundle(family, seed=0)
    )


def run(bundle: Bundle, family: str, name: str = "narrow", **params: Any) -> Record:
    stage = pipeline.Stage(1, Step(name, params), passes.build(name, params))
    return pipeline.run_stage(bundle, stage, context(family))


def model(family: str, tower: str = "vision") -> Bundle:
    """A model whose norms' gains and biases, and what scales additions, differ much."""
    bundle = tiny.bundle(family)
    found = stream_of(bundle.tower(tower))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path in (*found.norms, *filter(None, [found.entry])):
            norm = bundle.module(path)
            norm.weight.copy_(0.2 + 2 * torch.rand(norm.weight.shape, generator=generator))
            norm.bias.normal_(generator=generator)
        for name in found.scales.values():
            scale = bundle.model.get_parameter(name)
            scale.copy_(0.2 + torch.rand(scale.shape, generator=generator))
    return bundle


@torch.no_grad()
def answers(bundle: Bundle, family: str, tower: str = "vision") -> Tensor:
    return torch.cat([bundle.encode(tower, inputs) for inputs in tower_batches(bundle, tower, context(family), "test")])


@every_stream
def test_at_full_width_any_rotation_changes_no_answer(family: str, tower: str) -> None:
    bundle = model(family, tower)
    before, found = answers(bundle, family, tower), stream_of(bundle.tower(tower))
    moments = look(bundle, found, context(family))
    basis = basis_for("random", moments, found.width, seed=1, centred=True)
    tensors = narrow_values(bundle, found, moments, basis, context(family))
    same = [name for name, made in tensors.items() if name in dict(bundle.model.named_parameters())]
    assert all(not torch.allclose(bundle.model.get_parameter(name), tensors[name], atol=0.01) for name in same)
    cut(bundle, found, found.width, ())
    set_parameters(bundle, tensors)
    torch.testing.assert_close(answers(bundle, family, tower), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("family", [ENTERS, WIDENS, SCALES])
@pytest.mark.parametrize("method", ["readers", "channels"])
def test_a_narrow_model_computes_what_the_formulas_say(family: str, method: str) -> None:
    """As a model of the full width whose writers are projected, and whose readers are fitted around the mean."""
    bundle, reference = model(family), model(family)
    found = stream_of(bundle.tower("vision"))
    width = found.width - 8
    moments = look(bundle, found, context(family))
    basis = basis_for(
        method, moments, width, 0, True, readings(bundle, found, moments) if method == "readers" else None
    )
    run(bundle, family, ratio=8 / found.width, method=method, towers=["vision"])
    into = (basis @ basis.T).float()
    with torch.no_grad():
        project_rows(reference, found, into)
        for path in found.writers:
            layer, scale = reference.module(path), torch.ones(found.width)
            if path in found.scales:
                kept = reference.model.get_parameter(found.scales[path])
                scale = kept.clone()
                kept.fill_(1)
            layer.weight.copy_((into @ (scale[:, None] * layer.weight.flatten(1))).view_as(layer.weight))
            layer.bias.copy_(into @ (scale * layer.bias))
        if found.entry:
            norm = reference.module(found.entry)
            norm.register_forward_hook(lambda _, __, made: made @ into)
        for path, readers in found.norms.items():
            norm, mean = reference.module(path), moments.means[path].double()
            second, covariance = moments.of[path].double(), moments.around[path].double()
            seen = covariance @ basis
            fit = (
                seen @ torch.linalg.pinv(basis.T @ seen, rtol=1e-6) @ basis.T
            ).float()  # (C, C): n to what is known of it
            gain, bias = norm.weight.clone(), norm.bias.clone()
            share = float((basis.T @ second @ basis).trace() / second.trace())
            norm.weight.fill_(share**0.5)  # its mean is over all channels, of which some directions are empty
            norm.bias.zero_()
            rest = gain * (mean - fit.double() @ mean).float() + bias
            if not readers:
                norm.register_forward_hook(
                    lambda _, __, made, fit=fit, gain=gain, rest=rest: made @ fit.T * gain + rest
                )
            for reader in readers:
                linear = reference.module(reader)
                added = linear.weight @ rest + (0 if linear.bias is None else linear.bias)
                linear.bias = nn.Parameter(added)
                linear.weight.copy_(linear.weight * gain @ fit)
    torch.testing.assert_close(answers(bundle, family), answers(reference, family), rtol=2e-4, atol=2e-4)


def test_costs_are_foretold_and_what_they_should_be() -> None:
    """By hand; a block's channel: q, k, v, o, two LayerNorms and the up and down of 96 neurons with its bias."""
    block = 4 * 48 + 1 + 2 * 2 + 2 * 96 + 1
    gone = 12  # of 48: a quarter
    record = run(model(ENTERS), ENTERS, ratio=0.25, towers=["vision"])
    before, after = record.plan["before"]["vision"], record.plan["after"]["vision"]
    assert after == record.facts["recount"]["vision"]
    # 36 is no multiple of 8: 32 stay. The last norm's, the projection's 24 rows, whose bias is new; the product at the entry.
    gone = 16
    assert before["parameters"] - after["parameters"] == gone * (3 * block + 2 + 24) - 24 - 32 * 48
    # 50 tokens through every product, one through the projection.
    assert before["macs"] - after["macs"] == gone * (3 * (4 * 48 + 2 * 96) * 50 + 24) - 50 * 32 * 48
    block = 4 * 32 + 1 + 2 * 2 + 2 * 96 + 1
    record = run(model(WIDENS), WIDENS, ratio=0.25, towers=["vision"])
    before, after = record.plan["before"]["vision"], record.plan["after"]["vision"]
    assert after == record.facts["recount"]["vision"]
    # 24 stay of 32. Patches of 3 x 8 x 8 with a bias, 49 positions; behind the last norm a product with a bias.
    patch = 3 * 8 * 8
    assert before["parameters"] - after["parameters"] == 8 * (3 * block + patch + 1 + 49 + 2) - 24 * 32 - 32
    assert before["macs"] - after["macs"] == 8 * 49 * (3 * (4 * 32 + 2 * 96) + patch) - 49 * 24 * 32
    block = 4 * 48 + 1 + 2 * 2 + 2 * 96 + 1 + 2
    record = run(model(SCALES), SCALES, ratio=0.25)
    before, after = record.plan["before"]["vision"], record.plan["after"]["vision"]
    assert after == record.facts["recount"]["vision"]
    # Class and mask token, 50 positions.
    assert before["parameters"] - after["parameters"] == gone * (3 * block + patch + 1 + 52 + 2 + 24) - 24
    assert before["macs"] - after["macs"] == gone * (50 * 3 * (4 * 48 + 2 * 96) + 49 * patch + 24)


def test_what_is_left_are_plain_modules() -> None:
    bundle = model(SCALES)
    kinds = {name: type(module) for name, module in bundle.model.named_modules()}
    run(bundle, SCALES, ratio=0.25)
    assert {name: type(module) for name, module in bundle.model.named_modules()} == kinds
    found = stream_of(bundle.tower("vision"))
    assert found.width == 32
    assert all(torch.equal(bundle.model.get_parameter(name), torch.ones(32)) for name in found.scales.values())
    norm = bundle.module(found.last)
    assert norm.normalized_shape == (32,)
    assert not norm.bias.any()
    assert bundle.module("visual_projection").bias is not None
    # A LayerNorm finds no mean to take off: nothing with one is written.
    for path in found.writers:
        assert float(bundle.module(path).weight.detach().flatten(1).sum(0).abs().max()) < 1e-5
    # Once more: what was given a bias has one.
    record = run(bundle, SCALES, ratio=0.25)
    assert record.plan["widths"]["vision"] == {"before": 32, "after": 24}
    assert record.plan["after"] == record.facts["recount"]
    for family, path in ((ENTERS, "vision_model.pre_layrnorm"), (WIDENS, "vision_model.post_layernorm")):
        bundle = model(family)
        run(bundle, family, ratio=0.25, towers=["vision"])
        assert [type(part) for part in bundle.module(path)] == [nn.LayerNorm, nn.Linear]
        with pytest.raises(UsageError, match=f"narrowed or rotated already: there is a product behind {path}"):
            Narrow(towers=("vision",)).check(bundle)


@pytest.mark.parametrize("family", [ENTERS, SCALES])
def test_the_control_is_as_wide_and_keeps_less(family: str) -> None:
    found = {}
    for method in ("pca", "readers", "channels", "random"):
        found[method] = run(model(family), family, ratio=0.25, method=method, towers=["vision"])
    assert all(record.plan == found["random"].plan for record in found.values())
    energy = {method: record.facts["kept_energy"]["vision"] for method, record in found.items()}
    assert energy["pca"] > max(energy["readers"], energy["channels"], energy["random"])


@pytest.mark.parametrize(("family", "tower"), [("dual_encoder_vit", "vision"), ("clip", "text"), ("siglip", "text")])
def test_the_last_norm_is_judged_by_the_tokens_that_are_read(
    family: str, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class token; the end of a text; a text's last place: seen here in what the last norm's reader is given."""
    bundle = model(family, tower)
    found = stream_of(bundle.tower(tower))
    norm, reader = bundle.module(found.last), bundle.module(found.norms[found.last][0])
    given: list[Tensor] = []
    handle = reader.register_forward_pre_hook(lambda _, args: given.append((args[0] - norm.bias) / norm.weight))
    answers(bundle, family, tower)
    handle.remove()
    read = torch.cat(given).detach()
    assert read.shape == (8, found.width)
    monkeypatch.setattr(narrow_fit, "shrinkage", lambda *_: 0.0)
    moments = look(bundle, found, context(family))
    torch.testing.assert_close(moments.means[found.last], read.mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moments.of[found.last], read.T @ read / 8, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moments.around[found.last], read.T.cov(correction=0), rtol=1e-3, atol=1e-4)


def test_directions_that_are_read_serve_readers_best() -> None:
    """Readers of the first block, which is given what the full width gives it, less what is cut."""
    errors = {}
    for method in ("readers", "pca", "random"):
        bundle, reference = model(SCALES), model(SCALES)
        run(bundle, SCALES, ratio=0.75, method=method)
        reader = "vision_model.encoder.layer.0.attention.q_proj"
        seen: dict[str, Tensor] = {}
        for name, each in (("narrow", bundle), ("wide", reference)):
            each.module(reader).register_forward_hook(
                lambda _, __, made, name=name, seen=seen: seen.update({name: made})
            )
            answers(each, SCALES)
        errors[method] = float((seen["narrow"] - seen["wide"]).square().mean())
    assert errors["readers"] < errors["pca"] < errors["random"]


def test_one_sample_is_enough_to_see_nothing_of_how_it_varies() -> None:
    """CLIP's last norm is given a class token alone: of one picture it has no covariance."""
    bundle = model(ENTERS)
    made = Narrow(ratio=0.25, towers=("vision",)).plan(bundle, Context(data=tiny.data(ENTERS, 1), num_samples=1))
    assert all(tensor.isfinite().all() for tensor in made.tensors.values())
    assert made.tensors["visual_projection.weight"].any()


@pytest.mark.parametrize("family", [ENTERS, WIDENS, SCALES])
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("merge-tokens", {"keep": 0.6}),
        ("merge-tokens", {"keep": 0.6, "method": "crossget", "guide": "learned", "guide_epochs": 1}),
        ("quantize", {"scheme": "W8A8", "text_scheme": "W16A16", "min_cosine": -1.0}),
        ("prune", {"ratio": 0.1, "towers": ["vision"]}),
        ("distill", {"steps": 2, "batch_size": 4, "towers": ["vision"]}),
        ("factorize", {"ratio": 0.1, "towers": ["vision"]}),
    ],
)
def test_what_follows_works_and_reloads(family: str, name: str, params: dict[str, Any], tmp_path: Path) -> None:
    bundle = model(family)
    run(bundle, family, ratio=0.25, towers=["vision"])
    narrow = answers(bundle, family)
    run(bundle, family, name, **params)
    made = answers(bundle, family)
    assert not torch.equal(made, narrow)
    written = checkpoint.save(bundle, tmp_path / "model")
    assert not written.plain_transformers
    assert torch.equal(answers(checkpoint.load(tmp_path / "model"), family), made)
    if name == "quantize":
        assert float(nn.functional.cosine_similarity(made, narrow).min()) > 0.99


@pytest.mark.parametrize("family", [ENTERS, SCALES])
def test_what_came_before_stays(family: str, tmp_path: Path) -> None:
    bundle = model(family)
    run(bundle, family, "merge-tokens", keep=0.6)
    run(bundle, family, "prune", ratio=0.1, towers=["vision"])
    heads = [block.attention.heads for block in bundle.tower("vision").blocks]
    run(bundle, family, ratio=0.25, towers=["vision"])
    assert heads == [block.attention.heads for block in bundle.tower("vision").blocks]
    checkpoint.save(bundle, tmp_path / "model")
    assert torch.equal(answers(checkpoint.load(tmp_path / "model"), family), answers(bundle, family))


@pytest.mark.parametrize("family", [ENTERS, WIDENS])
def test_graphs_are_narrow_and_answer_alike(family: str, tmp_path: Path) -> None:
    bundle = model(family)
    cut_blocks(bundle, bundle.tower("vision"), [0])
    run(bundle, family, ratio=0.25, towers=["vision"])
    report = export_onnx(
        bundle, tmp_path / "out", towers=["vision"], batches=(2,)
    )  # which compares both at each corner
    assert all(row.relative <= 1e-4 for component in report.components for row in component.parity)
    graph = onnx.load(tmp_path / "out" / "vision.onnx").graph
    shapes = [tuple(tensor.dims) for tensor in graph.initializer]
    width = stream_of(bundle.tower("vision")).width
    assert (96, width) in shapes or (width, 96) in shapes
    assert {"LayerNormalization"} <= {node.op_type for node in graph.node}


def test_what_is_refused_says_why() -> None:
    bundle = model(SCALES)
    with pytest.raises(UsageError, match="its blocks put a norm over what they have added to"):
        Narrow(towers=("text",)).check(bundle)
    run(bundle, SCALES, "merge-tokens", keep=0.6, method="crossget", guide="learned", guide_epochs=1)
    with pytest.raises(UsageError, match="cross token, which goes into the stream") as caught:
        Narrow().check(bundle)
    assert "put narrow before merge-tokens" in (caught.value.hint or "")
    bundle = model(SCALES)
    bundle.replace("vision_model.encoder.layer.1.norm1", nn.RMSNorm(48))
    with pytest.raises(UsageError, match=r"layer.1.norm1 is a RMSNorm, and vision_model.layernorm a LayerNorm"):
        Narrow().check(bundle)
    with pytest.raises(UsageError, match="would keep 1 in multiples of 1") as caught:
        Narrow(ratio=0.97, multiple=1).check(model(SCALES))
    assert "ratio <= 0.95" in (caught.value.hint or "")
    bundle = model(SCALES)
    run(bundle, SCALES, "quantize", scheme="W8A16", text_scheme="W16A16")
    with pytest.raises(UsageError, match="narrow is for") as caught:
        Narrow().check(bundle)
    assert "put narrow before" in (caught.value.hint or "")
