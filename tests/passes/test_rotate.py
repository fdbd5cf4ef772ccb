"""rotate on tiny models: what is computed stays, what stood out does not; refusals, and what may follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress import checkpoint, passes, pipeline
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.manifest import Record
from mmcompress.ops.hadamard import hadamard_rotation
from mmcompress.passes.base import Context
from mmcompress.passes.narrow_units import stream_of
from mmcompress.passes.prune_scores import tower_batches
from mmcompress.passes.quantize_channels import channels_of
from mmcompress.passes.rotate import turn_values
from mmcompress.recipe import Step
from tests import tiny


def context(family: str) -> Context:
    return Context(data=tiny.data(family, 8), num_samples=8, batch_size=4, teacher=lambda: tiny.bundle(family))


def run(bundle: Bundle, family: str, name: str = "rotate", **params: Any) -> Record:
    stage = pipeline.Stage(1, Step(name, params), passes.build(name, params))
    return pipeline.run_stage(bundle, stage, context(family))


def uneven(family: str) -> Bundle:
    """A model whose norms' gains and biases differ."""
    bundle = tiny.bundle(family)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tower in bundle.towers():
            for path in stream_of(tower).norms if tower.residual else ():
                for name, parameter in bundle.module(path).named_parameters():
                    drawn = torch.rand(parameter.shape, generator=generator)
                    parameter.copy_(drawn + 0.2 if name == "weight" else drawn - 0.5)
    return bundle


@torch.no_grad()
def standing_out(family: str, tower: str) -> Bundle:
    """A model in whose stream one channel is 30 times as large, and is read by weights a 30th as large."""
    bundle = uneven(family)
    found = stream_of(bundle.tower(tower))
    for path in found.writers:
        for parameter in bundle.module(path).parameters(recurse=False):
            parameter[3] *= 30
    for path, name in found.rows:
        bundle.module(path).get_parameter(name)[..., 3] *= 30
    for readers in found.norms.values():
        for path in readers:
            bundle.module(path).weight[:, 3] /= 30
    return bundle


@torch.no_grad()
def answers(bundle: Bundle, family: str, tower: str) -> Tensor:
    """What a tower makes of samples; a language model, of pictures that went through the vision tower before."""
    return torch.cat(
        [bundle.encode(tower, inputs).flatten() for inputs in tower_batches(bundle, tower, context(family), "test")]
    )


# With a table shared and not, LayerNorms, a product behind the first or the last norm, gains of blocks, fused projections, shared
# keys and values, cross-attention, and streams that are not known.
FAMILIES = (
    "llava_dinov2", "llava_next", "qwen2_vl", "qwen3_vl", "smolvlm", "clip", "siglip", "dual_encoder_dinov2", "altclip", "whisper",
    "blip", "vilt", "clap", "paligemma",
)  # fmt: skip


@pytest.mark.parametrize("method", ["hadamard", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_stays(family: str, method: str) -> None:
    bundle = uneven(family)
    names = [tower.name for tower in bundle.towers()]
    if "language" in names and bundle.tower("language").residual:
        names.remove("vision")  # whose last layer writes into the language model's stream, in turned channels
    before = {name: answers(bundle, family, name) for name in names}
    weights = {name: parameter.clone() for name, parameter in bundle.model.named_parameters()}
    record = run(bundle, family, method=method)
    assert record.plan["values"] == [tower.name for tower in bundle.towers()]
    now = dict(bundle.model.named_parameters())
    for tower in bundle.towers():
        for block in tower.blocks:
            for attention in filter(None, (block.attention, block.cross)):
                for path in (attention.writers[-1], attention.reader):
                    assert not torch.allclose(weights[f"{path}.weight"], now[f"{path}.weight"], atol=0.01)
    for name in names:
        torch.testing.assert_close(answers(bundle, family, name), before[name], rtol=1e-4, atol=2e-5)


def test_weights_are_those_of_the_formulas() -> None:
    """A Llama's: queries are W diag(g) Q, the second half of a feed-forward Q'W, gains 1, the table E Q; Q the drawn one."""
    family = "smolvlm"
    bundle, turned = uneven(family), uneven(family)
    run(turned, family, values=False, towers=["language"])
    found = stream_of(bundle.tower("language"))
    turn = hadamard_rotation(found.width, torch.Generator().manual_seed(0)).float()
    norm, readers = next(iter(found.norms.items()))
    gain = bundle.module(norm).weight
    for path in readers:
        torch.testing.assert_close(turned.module(path).weight, bundle.module(path).weight * gain @ turn)
    down = bundle.tower("language").blocks[0].mlp.reader  # type: ignore[union-attr]
    torch.testing.assert_close(turned.module(down).weight, turn.T @ bundle.module(down).weight)
    assert torch.equal(turned.module(norm).weight, torch.ones_like(gain))
    table, name = found.rows[0]
    torch.testing.assert_close(
        turned.module(table).get_parameter(name), bundle.module(table).get_parameter(name) @ turn
    )


def test_values_by_hand() -> None:
    """Two query heads of two channels that share one head of values, turned by a quarter."""
    bundle = tiny.bundle("llava_dinov2")
    block = bundle.tower("language").blocks[0].attention
    made = channels_of(bundle.tower("language"))[block.reader]
    assert made.heads > made.kv_heads
    width = made.width
    quarter = torch.eye(width, dtype=torch.float64)
    quarter[:2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    values, reader = (bundle.module(path).weight.detach().clone() for path in (made.maker, block.reader))
    turn_values(bundle, made, block.reader, quarter)
    rows, columns = bundle.module(made.maker).weight, bundle.module(block.reader).weight
    for head in range(made.kv_heads):
        first = head * width
        torch.testing.assert_close(rows[first], values[first + 1])
        torch.testing.assert_close(rows[first + 1], -values[first])
        torch.testing.assert_close(rows[first + 2 : first + width], values[first + 2 : first + width])
    for head in range(made.heads):
        first = head * width
        torch.testing.assert_close(columns[:, first], reader[:, first + 1])
        torch.testing.assert_close(columns[:, first + 1], -reader[:, first])


@pytest.mark.parametrize(("family", "tower"), [("llava_clip", "language"), ("dual_encoder_vit", "vision")])
def test_a_channel_that_stands_out_does_less_harm_to_the_others(family: str, tower: str) -> None:
    errors = {}
    for turn in (False, True):
        bundle = standing_out(family, tower)
        wanted = answers(bundle, family, tower)
        if turn:
            record = run(bundle, family, values=False, towers=[tower])
        run(bundle, family, "quantize", scheme="W8A8", towers=[tower], smooth=0.0, min_cosine=-1.0)
        errors[turn] = float((answers(bundle, family, tower) - wanted).square().mean() / wanted.square().mean())
    assert errors[True] < 0.5 * errors[False]
    assert record.facts["largest_now"].keys() == record.facts["largest"].keys() == {tower}


def test_only_what_is_asked_for_is_turned() -> None:
    bundle = tiny.bundle("clip")
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    record = run(bundle, "clip", stream=False, towers=["text"])
    changed = {name for name, tensor in bundle.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert record.plan == {"streams": {}, "values": ["text"], "seed": 0}
    assert changed == {
        f"text_model.encoder.layers.{block}.self_attn.{name}"
        for block in range(len(bundle.tower("text").blocks))
        for name in ("v_proj.weight", "v_proj.bias", "out_proj.weight")
    }


def test_seeds_draw_others() -> None:
    first, second, again = (tiny.bundle("llava_clip") for _ in range(3))
    for bundle, seed in ((first, 0), (second, 1), (again, 0)):
        turn = passes.build("rotate", {})
        turn.apply(bundle, turn.plan(bundle, Context(seed=seed)))
    name = stream_of(first.tower("language")).writers[-1] + ".weight"
    one, other, same = (bundle.model.get_parameter(name) for bundle in (first, second, again))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.01)


def test_plain_transformers_loads_what_has_no_product_of_its_own(tmp_path: Path) -> None:
    for family, plainly in (("llava_clip", True), ("llava_dinov2", False)):
        bundle = tiny.bundle(family)
        run(bundle, family, towers=["language"])
        written = checkpoint.save(bundle, tmp_path / family)
        assert written.plain_transformers == plainly
        again = checkpoint.load(tmp_path / family)
        assert torch.equal(answers(again, family, "language"), answers(bundle, family, "language"))
    plain = type(bundle.model)
    bundle = tiny.bundle("llava_clip")
    model = plain.from_pretrained(tmp_path / "llava_clip").eval()
    loaded = Bundle(model, bundle.processor, bundle.family, bundle.source)
    torch.testing.assert_close(
        answers(loaded, "llava_clip", "language"), answers(bundle, "llava_clip", "language"), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize(
    ("earlier", "params", "words", "hint"),
    [
        (("quantize", {"scheme": "W8A16"}), {}, "rotate is for", "put rotate before"),
        (("quantize", {"scheme": "W8A16"}), {"stream": False}, "rotate is for", "put rotate before"),
        (("factorize", {"ratio": 0.3}), {}, "rotate is for", "put rotate before"),
        (("narrow", {"ratio": 0.25}), {}, "narrowed or rotated already", "checkpoint before"),
        (("rotate", {}), {}, "narrowed or rotated already", "checkpoint before"),
    ],
    ids=["quantize", "quantize-values", "factorize", "narrow", "rotate"],
)
def test_what_cannot_be_turned_is_refused(
    earlier: tuple[str, dict[str, Any]], params: dict[str, Any], words: str, hint: str
) -> None:
    bundle = tiny.bundle("clip")
    run(bundle, "clip", earlier[0], **earlier[1])
    with pytest.raises(UsageError, match=words) as caught:
        passes.build("rotate", params).check(bundle)
    assert hint in caught.value.hint


def test_a_stream_alone_that_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match="residual stream cannot become narrower"):
        passes.build("rotate", {"values": False, "towers": ["audio"]}).check(tiny.bundle("whisper"))
    with pytest.raises(UsageError, match="no residual stream of whisper models"):
        passes.build("rotate", {"values": False}).check(tiny.bundle("whisper"))
    bundle = tiny.bundle("altclip")
    assert list(run(bundle, "altclip", values=False).plan["streams"]) == ["vision"]  # and not of its text tower


def test_rows_that_are_integers_are_refused_by_the_pass_s_name() -> None:
    bundle = tiny.bundle("clip")
    run(bundle, "clip", "quantize", scheme="W8A16", keep_float=["*layers*", "*projection*"])
    for name in ("rotate", "narrow"):
        with pytest.raises(UsageError, match=f"{name} is for rows of floats") as caught:
            passes.build(name, {"towers": ["text"]}).check(bundle)
        assert f"put {name} before quantize" in caught.value.hint


def test_layers_it_does_not_turn_may_be_anything() -> None:
    bundle = tiny.bundle("clip")
    run(bundle, "clip", "quantize", scheme="W8A16", keep_float=["*self_attn*"])
    assert run(bundle, "clip", stream=False).facts["largest"].keys() == {"vision", "text"}


def test_sparse_weights_are_not_filled() -> None:
    bundle = tiny.bundle("clip")
    run(bundle, "clip", "sparsify", sparsity=0.5)
    with pytest.raises(UsageError, match="50% of the weights to be turned are 0") as caught:
        run(bundle, "clip")
    assert "before sparsify" in caught.value.hint


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_the_product_before_all_words_takes_8_bits(scheme: str) -> None:
    bundle = tiny.bundle("llava_dinov2")
    table = bundle.tower("language").tied[0][0]
    norm = bundle.tower("language").residual.norm  # type: ignore[union-attr]
    run(bundle, "llava_dinov2", towers=["language"])
    target = "openvino" if scheme == "NVFP4" else "cpu"
    record = run(
        bundle,
        "llava_dinov2",
        "quantize",
        scheme=scheme,
        target=target,
        towers=["language"],
        sensitivity_samples=0,
        group_size=16,
    )
    layers = record.plan["layers"]
    assert {layers[f"{norm}.1"], layers[table]} == {"W8A16"}
    assert list(layers.values()).count(scheme) == 3 * 7


def test_eyes_whose_tokens_are_turned_learn_nothing_from_the_original() -> None:
    family = "llava_clip"
    bundle = tiny.bundle(family)
    run(bundle, family, towers=["language"])
    with pytest.raises(UsageError, match="turned the channels of what the vision tower gives out") as caught:
        run(bundle, family, "distill", steps=1, batch_size=4)
    assert "rotate after distill" in caught.value.hint
    run(bundle, family, "distill", steps=1, batch_size=4, towers=["language"])
    alone = tiny.bundle(family)
    run(alone, family, towers=["vision"])  # whose own stream is not known: values, which stay within
    run(alone, family, "distill", steps=1, batch_size=4)


def test_other_passes_follow_and_the_result_exports(tmp_path: Path) -> None:
    bundle = tiny.bundle("clip")
    run(bundle, "clip")
    for name, params in (
        ("prune", {"ratio": 0.1}),
        ("merge-tokens", {"keep": 0.7}),
        ("distill", {"steps": 2, "batch_size": 4}),
        ("quantize", {"scheme": "W8A8", "min_cosine": -1.0}),
    ):
        run(bundle, "clip", name, **params)
    checkpoint.save(bundle, tmp_path / "model")
    again = checkpoint.load(tmp_path / "model")
    assert torch.equal(answers(again, "clip", "vision"), answers(bundle, "clip", "vision"))
    export_onnx(bundle, tmp_path / "artifact", batches=(1, 2))  # which compares both
