"""quantize with scheme auto and a budget of milliseconds, by a stopwatch whose times are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmcompress import checkpoint, passes
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_times import TRIALS
from mmcompress.pipeline import Stage, run_stage
from mmcompress.recipe import Step
from mmcompress.surgery.packed import PackedLinear
from mmcompress.surgery.quantized import QuantizedLinear
from tests import tiny

FAMILY = "dual_encoder_dinov2"
ELSE = 3.0
"""Milliseconds of what is no product."""


class Known:
    """A product takes a microsecond for each thousand multiplications, times a factor of its scheme; the rest `ELSE` ms."""

    def __init__(self, over: Sequence[float] = (), **factors: float) -> None:
        self.factors = {"float": 1.0, "W8A16": 1.2, "W4A16": 2.0, "W8A8": 0.5, **factors}
        self.over = list(over)
        """Milliseconds that models take longer than their products say, one for each time one is asked for."""
        self.asked: list[tuple[str, ...]] = []

    def layer(self, layer: nn.Module, rows: int) -> float:
        scheme = "float"
        if isinstance(layer, PackedLinear):
            scheme = "W4A16"
        elif isinstance(layer, QuantizedLinear):
            scheme = "W8A16" if layer.input_zero_point is None else "W8A8"
        assert hasattr(layer, "in_features"), "only products are timed"
        return self.factors[scheme] * rows * layer.in_features * layer.out_features / 1e6  # type: ignore[operator]

    def model(self, bundle: Bundle, stages: tuple[str, ...]) -> float:
        self.asked.append(stages)
        return ELSE + self.products(bundle, stages) + (self.over.pop(0) if self.over else 0.0)

    def products(self, bundle: Bundle, stages: tuple[str, ...]) -> float:
        counts: dict[str, int] = {}

        def count(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                counts[path] = args[0].numel() // args[0].shape[-1]

            return hook

        kinds = (nn.Linear, QuantizedLinear, PackedLinear)
        layers = {path: m for path, m in bundle.model.named_modules() if isinstance(m, kinds)}
        handles = [layer.register_forward_pre_hook(count(path)) for path, layer in layers.items()]
        for name in stages:
            with torch.inference_mode():
                bundle.encode(name, bundle.example_inputs(name))
        for handle in handles:
            handle.remove()
        return sum(self.layer(layers[path], rows) for path, rows in counts.items())


def run(watch: Known, bundle: Bundle | None = None, **params: Any) -> Plan:
    context = Context(
        data=tiny.dataset(8),
        num_samples=8,
        batch_size=4,
        stopwatch=lambda target: watch if target == "cpu" else Known(),
    )
    made = Quantize(**{"scheme": "auto", "group_size": 16, "min_cosine": -1.0, "towers": ("vision",), **params})
    return made.plan(bundle or tiny.bundle(FAMILY), context)


def whole() -> float:
    watch = Known()
    return watch.products(tiny.bundle(FAMILY), ("vision",))


def test_the_least_of_the_layers_is_rounded_that_has_to_be() -> None:
    products = whole()
    losses, rounded = [], []
    for share in (0.95, 0.8, 0.6):
        plan = run(Known(), latency_ms=ELSE + share * products)
        mixed = plan.decisions["mixed"]
        assert mixed["tried_ms"][-1] <= ELSE + share * products
        assert mixed["spent"] == pytest.approx(mixed["tried_ms"][-1], abs=1e-3)
        assert set(plan.decisions["towers"]["vision"]["schemes"]) <= {
            "W8A8",
            "W16A16",
        }  # what else is slower than floats
        losses.append(mixed["predicted_loss"])
        rounded.append(len(plan.decisions["layers"]))
    assert losses == sorted(losses)
    assert rounded == sorted(rounded)
    assert rounded[0] < rounded[-1]


def test_what_w8a8_is_smoothed_by_is_searched_and_told() -> None:
    told = run(Known(), latency_ms=ELSE + 0.8 * whole()).decisions["towers"]["vision"]
    assert told["smooth_tried"][f"{told['smooth']:g}"] == max(told["smooth_tried"].values())
    given = run(Known(), latency_ms=ELSE + 0.8 * whole(), smooth=0.5).decisions["towers"]["vision"]
    assert (given["smooth"], "smooth_tried" in given) == (0.5, False)


def test_where_4_bits_are_fast_they_are_taken() -> None:
    plan = run(Known(W4A16=0.1, W8A8=5.0, W8A16=5.0), latency_ms=ELSE + 0.3 * whole())
    assert set(plan.decisions["towers"]["vision"]["schemes"]) <= {"W4A16", "W16A16"}
    assert "W4A16" in plan.decisions["layers"].values()


def test_a_model_that_takes_longer_than_its_products_say_is_chosen_anew() -> None:
    products = whole()
    tenth = 0.1 * products
    watch = Known(over=[0.0, tenth])  # the float model first, then the first choice
    plan = run(watch, latency_ms=ELSE + 0.8 * products)
    first, second = plan.decisions["mixed"]["tried_ms"][:2]
    assert first > ELSE + 0.8 * products >= second
    straight = run(Known(), latency_ms=ELSE + 0.8 * products)
    assert len(plan.decisions["layers"]) > len(straight.decisions["layers"])
    assert {*watch.asked} == {("vision",)}


def test_a_model_that_never_keeps_it_is_refused_with_what_it_took() -> None:
    watch = Known(over=[0.0, *[50.0] * TRIALS])
    with pytest.raises(UsageError, match="vision took 5[0-9.]+ ms with the schemes that were to keep it") as caught:
        run(watch, latency_ms=ELSE + 0.8 * whole())
    assert caught.value.hint.startswith("allow 5")


def test_what_cannot_or_need_not_be_kept_is_refused() -> None:
    least = ELSE + 0.5 * whole()  # W8A8 for all
    with pytest.raises(UsageError, match=f"latency_ms is 0.1; the least that vision can have is {least:.3f}"):
        run(Known(), latency_ms=0.1)
    with pytest.raises(UsageError, match="every layer of vision may stay float"):
        run(Known(), latency_ms=100)
    with pytest.raises(UsageError, match="for targets cpu and openvino; tensorrt cannot be timed"):
        Quantize(scheme="auto", latency_ms=5, target="tensorrt")
    with pytest.raises(UsageError, match="needs a run that may export and time"):
        Quantize(scheme="auto", latency_ms=5).plan(tiny.bundle(FAMILY), Context(data=tiny.dataset(8)))


def test_a_uniform_scheme_that_times_too_long_is_no_rival() -> None:
    products = whole()
    limit = ELSE + 0.7 * products
    assert "W8A8" in run(Known(), latency_ms=limit).decisions["mixed"]["uniform_loss"]
    # Timed: the float model, the choice, then W8A8 for all.
    slow = run(Known(over=[0.0, 0.0, products]), latency_ms=limit).decisions["mixed"]
    assert slow["uniform_loss"] == {}
    assert slow["kept"] == "auto"


def test_it_is_loaded_again_as_it_was(tmp_path: Path) -> None:
    params = {"scheme": "auto", "latency_ms": ELSE + 0.8 * whole(), "group_size": 16, "towers": ["vision"]}
    bundle = tiny.bundle(FAMILY)
    context = Context(data=tiny.dataset(8), num_samples=8, batch_size=4, stopwatch=lambda target: Known())
    run_stage(bundle, Stage(1, Step("quantize", params), passes.build("quantize", params)), context)
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    inputs = bundle.example_inputs("vision", 2)
    with torch.inference_mode():
        assert torch.equal(bundle.encode("vision", inputs), again.encode("vision", inputs))
    rounded = [module for module in again.model.modules() if isinstance(module, QuantizedLinear)]
    assert rounded
    assert all(module.input_zero_point is not None for module in rounded)
