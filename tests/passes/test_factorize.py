"""factorize on tiny models: the budget is met, layers lose what was foretold, and what comes before or after finds its way."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcompress import pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.cost import cost_of
from mmcompress.measure.onnx_recount import onnx_macs
from mmcompress.passes import build, factorize_fit
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.factorize import Factorize
from mmcompress.passes.factorize_fit import fitted
from mmcompress.passes.factorize_ranks import Layer, choose_ranks
from mmcompress.passes.prune_budget import Pool
from mmcompress.passes.prune_cut import set_parameters
from mmcompress.passes.prune_scores import tower_batches
from mmcompress.passes.quantize_judge import groups_of
from mmcompress.recipe import Step
from mmcompress.surgery.low_rank import LowRankLinear
from mmcompress.surgery.watch import evaluating, watch_inputs
from tests import tiny

FAMILY = "dual_encoder_dinov2"
DATA = Context(data=tiny.data(FAMILY, 8), num_samples=8, batch_size=4)


def run(bundle: Bundle, data: Context = DATA, name: str = "factorize", **params: Any) -> Any:
    stage = pipeline.Stage(1, Step(name, params), build(name, params))
    return pipeline.run_stage(bundle, stage, data).plan


def factorized(bundle: Bundle) -> dict[str, LowRankLinear]:
    return {path: module for path, module in bundle.model.named_modules() if isinstance(module, LowRankLinear)}


def parameters(bundle: Bundle) -> dict[str, int]:
    return {name: cost.parameters for name, cost in cost_of(bundle).towers.items()}


@pytest.mark.parametrize(
    ("params", "towers"),
    [
        ({"ratio": 0.2}, ("vision", "text")),
        ({"ratio": 0.1, "method": "svd"}, ("vision", "text")),
        ({"ratio": 0.25, "towers": ["vision"], "layers": ["mlp"], "multiple": 1}, ("vision",)),
        ({"target": 60_000, "weigh": "energy", "method": "asvd"}, ("vision", "text")),
    ],
)
def test_the_budget_is_met_within_a_step(params: dict[str, Any], towers: tuple[str, ...]) -> None:
    bundle = tiny.bundle(FAMILY)
    before, macs = parameters(bundle), {name: cost.macs for name, cost in cost_of(bundle).towers.items()}
    ranks = run(bundle, **params)["ranks"]
    total = sum(before[name] for name in towers)
    wanted = total - params["target"] if "target" in params else params["ratio"] * total
    layers = factorized(bundle)
    assert {path: layer.rank for path, layer in layers.items()} == ranks
    assert all(rank % params.get("multiple", 8) == 0 for rank in ranks.values())
    largest = max((layer.in_features + layer.out_features) * params.get("multiple", 8) for layer in layers.values())
    gone = {name: before[name] - after for name, after in parameters(bundle).items()}
    assert wanted <= sum(gone[name] for name in towers) < wanted + largest
    # Counted on the model, and by hand: every layer in two is smaller than it was, by what its rank says.
    saved = [n.in_features * n.out_features - n.rank * (n.in_features + n.out_features) for n in layers.values()]
    assert min(saved) > 0
    assert sum(saved) == sum(gone.values())
    for name, cost in cost_of(bundle).towers.items():
        assert (cost.macs < macs[name]) == any(path.startswith(bundle.tower(name).path) for path in layers)


def test_layers_lose_what_was_foretold_and_biases_make_up_for_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plain energy, on the calibration tokens themselves and without shrinking for tokens that were not seen."""
    monkeypatch.setattr(factorize_fit, "shrinkage", lambda *_: 0.0)
    bundle, made = tiny.bundle(FAMILY), Factorize(weigh="energy", towers=("vision",))
    _, layers, _ = made.survey(bundle)
    found = fitted(made, bundle, layers, DATA)
    linears = {layer.path: bundle.module(layer.path) for layer in layers}
    tokens: dict[str, list[Tensor]] = {path: [] for path in linears}
    with evaluating(bundle.model), watch_inputs(linears, lambda path, seen: tokens[path].append(seen)):
        for inputs in tower_batches(bundle, "vision", DATA, "test"):
            bundle.encode("vision", inputs)
    for layer in layers:
        seen, linear = torch.cat(tokens[layer.path]).double(), linears[layer.path]
        assert isinstance(linear, nn.Linear)
        wanted = nn.functional.linear(seen, linear.weight.double(), linear.bias.double()).detach()
        energy = float((wanted - wanted.mean(0)).square().sum())
        for rank in layer.ranks:
            parts = {
                name.removeprefix(layer.path): value.double()
                for name, value in found[layer.path].tensors(layer.path, linear, rank).items()
            }
            have = nn.functional.linear(seen @ parts[".down.weight"].T, parts[".up.weight"], parts[".up.bias"])
            torch.testing.assert_close(have.mean(0), wanted.mean(0), rtol=1e-4, atol=1e-5)
            foretold = float(found[layer.path].directions.losses[rank:].sum())
            assert float((have - wanted).square().sum()) / energy == pytest.approx(foretold, rel=0.01)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_losses_are_squared_displacements_of_the_embedding(tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a thousandth of a layer's output, its mean made up for, moves normalised embeddings as far as foretold.

    Roughly, and rather less: a picture's tokens are taken for independent, and here all of them err alike.
    """
    monkeypatch.setattr(factorize_fit, "shrinkage", lambda *_: 0.0)
    bundle, made = tiny.bundle(FAMILY), Factorize(towers=(tower,))
    _, layers, _ = made.survey(bundle)
    found = fitted(made, bundle, layers, DATA)
    twice = dataclasses.replace(
        DATA, data=Dataset(Memory([*tiny.data(FAMILY, 8), *tiny.data(FAMILY, 8)])), num_samples=16
    )
    again = fitted(made, bundle, layers[:1], twice)
    inputs = list(tower_batches(bundle, tower, DATA, "test"))

    @torch.no_grad()
    def embedded() -> Tensor:
        return torch.cat([nn.functional.normalize(bundle.encode(tower, part).double(), dim=-1) for part in inputs])

    before, ratios = embedded(), []
    for layer in layers:
        linear, fit = bundle.module(layer.path), found[layer.path]
        assert isinstance(linear, nn.Linear)
        assert fit.mean is not None
        kept = linear.weight.detach().clone(), linear.bias.detach().clone()
        with torch.no_grad():
            linear.bias += 0.001 * linear.weight @ fit.mean
            linear.weight *= 0.999
        moved = float((embedded() - before).square().sum(-1).mean()) / 0.001**2
        with torch.no_grad():
            linear.weight.copy_(kept[0])
            linear.bias.copy_(kept[1])
        ratios.append(float(fit.directions.losses.sum()) / moved)
    assert 1 / 16 < statistics.median(ratios) < 1, ratios
    # An average over samples, not a sum.
    torch.testing.assert_close(
        again[layers[0].path].directions.losses.sum(), found[layers[0].path].directions.losses.sum(), rtol=0.5, atol=0
    )


def test_ranks_by_hand() -> None:
    """Two layers (6, 6) that cost 36, or 24 at rank 2 and 12 at rank 1."""
    layers = [Layer("vision", path, (6, 6), (1, 2)) for path in "ab"]
    losses = {"a": torch.tensor([5, 1, 1, 0.1, 0.1, 0.1]), "b": torch.tensor([5.0, 4, 0, 0, 0, 0])}
    # Rank 2 loses 1.3 and 0, rank 1 loses 2.3 and 4.
    for remove, ranks in (
        (0, {}),
        (12, {"b": 2}),
        (24, {"a": 2, "b": 2}),
        (25, {"a": 1, "b": 2}),
        (48, {"a": 1, "b": 1}),
    ):
        assert choose_ranks(Pool(("vision",), 72, remove, ""), layers, losses) == ranks


def test_the_control_keeps_as_many_directions_of_each_layer() -> None:
    ranks = run(tiny.bundle(FAMILY), ratio=0.2)["ranks"]
    control = Factorize(ratio=0.2).control({"ranks": ranks})
    assert control is not None
    plan = control.plan(tiny.bundle(FAMILY), DATA)
    assert plan.decisions["ranks"] == ranks
    assert control.control() is None


def test_a_graph_multiplies_less_and_computes_the_same(tmp_path: Any) -> None:
    bundle = tiny.bundle("clip")
    run(bundle, ratio=0.15, towers=["vision"], method="svd")
    layers = factorized(bundle)
    report = export_onnx(bundle, tmp_path / "out", towers=["vision"])
    assert all(row.relative <= 1e-4 for row in report.components[0].parity)
    # 3 blocks of 8 products, and one more for each layer in two.
    assert report.artifact.component("vision").nodes["MatMul"] == 24 + len(layers)
    counted = onnx_macs(report.artifact.path("vision"), {"pixel_values": (1, 3, 56, 56)}).total
    assert counted == cost_of(bundle).towers["vision"].macs < cost_of(tiny.bundle("clip")).towers["vision"].macs


def test_quantize_rounds_the_factors_and_folds_their_gains() -> None:
    bundle = tiny.bundle(FAMILY)
    run(bundle, ratio=0.25, towers=["vision"], layers=["attention"])
    outputs = bundle.encode("vision", bundle.example_inputs("vision", 2))
    plan = run(bundle, name="quantize", scheme="W8A8", min_cosine=-1.0, towers=["vision"])
    layers = factorized(bundle)
    assert layers
    assert all({f"{path}.down", f"{path}.up"} <= plan["layers"].keys() for path in layers)
    rounded = bundle.encode("vision", bundle.example_inputs("vision", 2))
    assert nn.functional.cosine_similarity(rounded, outputs).min() > 0.99
    first = bundle.tower("vision").blocks[0]
    assert {*first.attention.writers, first.attention.reader} <= layers.keys()
    assert sorted(f"{path}.down" for path in first.attention.writers) in plan["folds"].values()
    assert plan["folds"][f"{first.attention.writers[-1]}.up"] == [f"{first.attention.reader}.down"]
    # They are judged with their layer, not by themselves.
    groups = groups_of(bundle.tower("vision"), list(plan["layers"]))
    assert f"{first.path}.attention" in groups
    assert not any(name.endswith((".down", ".up")) for name in groups)


def test_distill_trains_the_factors_towards_the_original() -> None:
    bundle = tiny.bundle(FAMILY)
    run(bundle, ratio=0.2, directions="random")
    layer = next(iter(factorized(bundle).values()))
    before = layer.down.weight.detach().clone()
    data = Context(data=tiny.data(FAMILY, 16), batch_size=8, teacher=lambda: tiny.bundle(FAMILY))
    facts = build("distill", {"steps": 12, "batch_size": 8, "learning_rate": 3e-4, "amp": False}).fit(bundle, data)
    assert facts["loss"]["after"] < facts["loss"]["before"]
    assert not torch.equal(layer.down.weight, before)


def test_prune_goes_before_and_is_refused_behind() -> None:
    bundle = tiny.bundle(FAMILY)
    run(bundle, name="prune", ratio=0.1, score="magnitude", compensate="none")
    run(bundle, ratio=0.1, method="svd")
    assert factorized(bundle)
    with pytest.raises(UsageError, match="has two factors; prune cuts nn.Linear") as caught:
        build("prune", {"ratio": 0.1}).check(bundle)
    assert caught.value.hint == "put prune before factorize"
    with pytest.raises(UsageError, match="has two factors already"):
        Factorize(ratio=0.01).check(bundle)


def test_what_is_refused_says_why() -> None:
    bundle = tiny.bundle(FAMILY)
    with pytest.raises(UsageError, match="would remove .* and at most") as caught:
        Factorize(ratio=0.9).check(bundle)
    largest = float(caught.value.hint.split("ratio <= ")[1].split(",")[0])
    Factorize(ratio=largest).check(bundle)
    with pytest.raises(UsageError, match="at most"):
        Factorize(ratio=largest + 0.002).check(bundle)
    with pytest.raises(UsageError, match="factorize matched nothing: no Linear"):
        Factorize(ratio=0.1, multiple=64).check(bundle)
    with pytest.raises(UsageError, match="has no tower 'audio'"):
        Factorize(towers=("audio",)).check(bundle)
    with pytest.raises(UsageError, match="factorize with method=svd-llm needs data"):
        Factorize(ratio=0.1).plan(bundle, Context())
    run(bundle, name="quantize", scheme="W8A16", towers=["text"])
    with pytest.raises(UsageError, match="is a QuantizedLinear; factorize replaces nn.Linear") as caught:
        Factorize(ratio=0.1).check(bundle)
    assert caught.value.hint == "put factorize before quantize"
    Factorize(ratio=0.1, towers=("vision",)).check(bundle)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ratio": 1.0}, "factorize.ratio is 1.0; expected 0 <= ratio < 1"),
        ({"ratios": {"vision": -0.1}}, "factorize.ratios.vision is -0.1"),
        ({"target": 0}, "factorize.target is 0"),
        ({"target": 9, "ratios": {"vision": 0.1}}, "both target and ratios"),
        ({"min_keep": 2}, "factorize.min_keep is 2"),
        ({"multiple": 0}, "factorize.multiple is 0"),
        ({"alpha": 3}, "factorize.alpha is 3"),
        ({"layers": ["heads"]}, r"factorize.layers is \['heads'\]"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("factorize", params)


def test_a_plan_without_tensors_makes_the_same_structure_around_the_bias() -> None:
    bundle, original = tiny.bundle(FAMILY), tiny.bundle(FAMILY)
    made = Factorize(ratio=0.1, method="svd")
    plan = made.plan(bundle, Context())
    made.apply(bundle, Plan(plan.decisions))
    state = bundle.model.state_dict()
    assert plan.tensors
    assert all(state[name].shape == tensor.shape for name, tensor in plan.tensors.items())
    set_parameters(bundle, plan.tensors)
    for path, layer in factorized(bundle).items():
        x, bias = torch.randn(2, layer.in_features), original.module(path).bias
        assert layer.weight.shape == original.module(path).weight.shape
        assert isinstance(bias, Tensor)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.up.weight @ layer.down.weight, bias))
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_what_shares_its_weight_stays_whole() -> None:
    bundle = tiny.bundle(FAMILY)
    first, second, *_ = (bundle.module(path) for path in bundle.tower("vision").blocks[0].attention.writers)
    second.weight = first.weight
    _, layers, _ = Factorize(ratio=0.05).survey(bundle)
    paths = {layer.path for layer in layers}
    assert len(paths) == 6 * 3 + 6 * 2 - 2
    assert not {*bundle.tower("vision").blocks[0].attention.writers[:2]} & paths
