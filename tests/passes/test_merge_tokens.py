"""The laws of `merge-tokens` over every tiny family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.errors import UsageError
from mmcompress.manifest import Record
from mmcompress.passes import build, schema
from mmcompress.passes.base import Context, Plan
from mmcompress.passes.merge_tokens import MergeTokens
from mmcompress.surgery.reduction import Method
from tests import tiny

families = pytest.mark.parametrize("family", tiny.MERGING)
methods = pytest.mark.parametrize("method", [*get_args(Method), "random"])


def apply(bundle: Bundle, settings: MergeTokens, seed: int = 0) -> Plan:
    settings.check(bundle)
    plan = settings.plan(bundle, Context(seed=seed))
    settings.apply(bundle, plan)
    return plan


def outputs(bundle: Bundle, batch: int = 3) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: bundle.encode(name, bundle.example_inputs(name, batch)) for name in ("vision", "text")}


def block_tokens(bundle: Bundle, inputs: dict[str, Tensor]) -> list[int]:
    """Run the vision tower and return the tokens that leave each block."""
    seen: list[int] = []
    hooks = [
        bundle.module(block.path).register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
        for block in bundle.tower("vision").blocks
    ]
    with torch.no_grad():
        bundle.encode("vision", inputs)
    for hook in hooks:
        hook.remove()
    return seen


@families
def test_keep_1_leaves_the_model_alone(family: str) -> None:
    bundle = tiny.bundle(family)
    expected, modules = outputs(bundle), [vars(module).keys() for module in bundle.model.modules()]
    settings = MergeTokens(keep=1.0)
    apply(bundle, settings)
    assert [vars(module).keys() for module in bundle.model.modules()] == modules
    assert all(torch.equal(value, expected[name]) for name, value in outputs(bundle).items())
    assert settings.fit(bundle, Context())["keep"] == 1


@families
@methods
def test_blocks_pass_on_what_was_promised_and_the_rest_stays(family: str, method: Any) -> None:
    bundle = tiny.bundle(family)
    expected, state = outputs(bundle), copy.deepcopy(bundle.model.state_dict())
    config = bundle.model.config.to_json_string()
    settings = MergeTokens(keep=0.6, method=method)
    plan = apply(bundle, settings)
    stream = bundle.tower("vision").stream
    assert stream is not None
    facts = settings.fit(bundle, Context())
    assert block_tokens(bundle, bundle.example_inputs("vision", 2)) == facts["tokens_after_block"]
    assert facts["tokens_after_block"][-1] == stream.tokens - sum(plan.decisions["merged"])
    assert abs(facts["keep"] - 0.6) * stream.tokens * 3 <= 0.51
    made = outputs(bundle)
    assert torch.equal(made["text"], expected["text"])
    assert not torch.allclose(made["vision"], expected["vision"])
    assert torch.isfinite(made["vision"]).all()
    assert bundle.model.config.to_json_string() == config
    assert bundle.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in bundle.model.state_dict().items())


@families
@methods
def test_a_batch_equals_its_samples_a_copy_works_and_gradients_flow(family: str, method: Any) -> None:
    bundle = tiny.bundle(family)
    apply(bundle, MergeTokens(keep=0.6, method=method))
    inputs = bundle.example_inputs("vision", 3)
    together = bundle.encode("vision", inputs)
    for index in range(3):
        alone = bundle.encode("vision", {name: value[index : index + 1] for name, value in inputs.items()})
        assert torch.allclose(alone[0], together[index], atol=1e-5)
    twin = copy.deepcopy(bundle)
    bundle.model.vision_model = None
    assert torch.equal(twin.encode("vision", inputs), together)
    twin.encode("vision", inputs).square().sum().backward()
    for block in twin.tower("vision").blocks:
        for path in (*block.attention.writers, block.attention.reader, *block.mlp.writers, block.mlp.reader):
            gradient = twin.module(path).weight.grad
            assert gradient is not None
            assert gradient.abs().sum() > 0


@families
@methods
def test_reload_is_bit_equal(family: str, method: Any, tmp_path: Path) -> None:
    bundle = tiny.bundle(family)
    settings = {"keep": 0.6, "method": method, "schedule": "decreasing"}
    plan = apply(bundle, build("merge-tokens", settings), seed=5)  # type: ignore[arg-type]
    bundle.history.append(Record("merge-tokens", settings, plan.decisions))
    written = checkpoint.save(bundle, tmp_path / "out")
    assert not written.plain_transformers
    again = checkpoint.load(tmp_path / "out")
    expected = outputs(bundle)
    assert all(torch.equal(value, expected[name]) for name, value in outputs(again).items())
    assert "mmc_keys" not in (tmp_path / "out" / "config.json").read_text()


@families
def test_apply_needs_only_the_decisions_and_works_on_meta(family: str) -> None:
    bundle = tiny.bundle(family)
    settings = MergeTokens(keep=0.6)
    plan = settings.plan(bundle, Context())
    bundle.model.to("meta")
    settings.apply(bundle, Plan(plan.decisions))
    assert any("forward" in vars(module) for module in bundle.model.modules())


def test_random_is_reproducible_and_follows_the_seed() -> None:
    def kept(seed: int) -> Any:
        return MergeTokens(keep=0.6, method="random").plan(tiny.bundle("clip"), Context(seed=seed)).decisions["kept"]

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)
    assert all(positions[0] == 0 for positions in kept(1))


def test_random_equals_dropping_by_hand() -> None:
    bundle = tiny.bundle("dual_encoder_dinov2")
    plain = copy.deepcopy(bundle)
    plan = apply(bundle, MergeTokens(merged=(20, 10, 0), method="random"))
    inputs = bundle.example_inputs("vision", 2)
    model = plain.model.vision_model
    tokens = model.embeddings(inputs["pixel_values"])
    for block, kept in zip(model.encoder.layer, plan.decisions["kept"], strict=True):
        tokens = tokens + block.layer_scale1(block.attention(block.norm1(tokens))[0])
        tokens = tokens[:, kept]
        tokens = tokens + block.layer_scale2(block.mlp(block.norm2(tokens)))
    expected = plain.model.visual_projection(model.layernorm(tokens)[:, 0])
    assert torch.allclose(bundle.encode("vision", inputs), expected, atol=1e-6)


@families
def test_merging_beats_dropping_where_neighbours_are_alike(family: str) -> None:
    """On smooth images, at the same schedule, merging must stay closer to the original than dropping does.

    Of several models: one draw of random weights may prefer dropping.
    """
    error = {"tome": 0.0, "random": 0.0}
    for seed in range(6):
        expected = outputs(tiny.bundle(family, seed), 8)["vision"]
        for method in error:
            bundle = tiny.bundle(family, seed)
            apply(bundle, MergeTokens(keep=0.6, method=method))  # type: ignore[arg-type]
            error[method] += (outputs(bundle, 8)["vision"] - expected).norm().item() / expected.norm().item()
    assert error["tome"] < error["random"]


def naflex(bundle: Bundle, sides: list[tuple[int, int]], filling: float = 0.0) -> dict[str, Tensor]:
    """Return inputs of SigLIP 2 for images of these many patches, padded to 49."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.full((len(sides), 49, 192), filling)
    mask = torch.zeros(len(sides), 49, dtype=torch.int32)
    for index, (height, width) in enumerate(sides):
        pixels[index, : height * width] = torch.randn(height * width, 192, generator=generator)
        mask[index, : height * width] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(sides)}


@methods
def test_padding_of_siglip2_has_no_influence(method: Any) -> None:
    bundle = tiny.bundle("siglip2")
    plain = copy.deepcopy(bundle)
    # 25 of 49 patches are real; 12, 6 and 3 padded ones are on side A block by block, so merging costs nothing.
    apply(bundle, MergeTokens(merged=(12, 6, 3), method=method))
    mixed = naflex(bundle, [(5, 5), (7, 7), (3, 8)])
    together = bundle.encode("vision", mixed)
    assert torch.equal(bundle.encode("vision", naflex(bundle, [(5, 5), (7, 7), (3, 8)], filling=50.0)), together)
    for index in range(3):
        alone = {name: value[index : index + 1] for name, value in mixed.items()}
        assert torch.allclose(bundle.encode("vision", alone)[0], together[index], atol=1e-5)
    if method == "tome":
        expected = plain.encode("vision", mixed)
        assert torch.allclose(together[0], expected[0], atol=1e-5)
        assert not torch.allclose(together[1], expected[1], atol=1e-3)


def test_proportional_attention_can_be_switched_off() -> None:
    made = []
    for proportional in (True, False):
        bundle = tiny.bundle("siglip")
        apply(bundle, MergeTokens(keep=0.6, proportional=proportional))
        made.append(outputs(bundle)["vision"])
    assert not torch.allclose(*made, atol=1e-4)


def test_merged_takes_one_number_or_one_per_block() -> None:
    bundle = tiny.bundle("clip")

    def schedule(**settings: Any) -> Any:
        return MergeTokens(**settings).plan(bundle, Context()).decisions["merged"]

    assert schedule(merged=(8,)) == [8, 8, 8]
    assert schedule(merged=(8,), schedule="decreasing") == [16, 8, 0]
    # 50 tokens: 24 of 49 in the first block, 12 of 25 in the second, 6 of 13 in the third.
    assert schedule(merged=(40,)) == [24, 12, 6]
    assert schedule(merged=(8,), every=2) == [8, 0, 8]
    assert schedule(merged=(8,), every=2, first=1) == [0, 8, 0]
    assert schedule(keep=0.9, first=1) == [0, 5, 5]
    assert schedule(merged=(0, 5, 9)) == [0, 5, 9]
    assert schedule() == schedule(keep=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.5}, r"merge-tokens.keep is 1.5; expected 0 < keep <= 1"),
        ({"keep": 0.0}, r"merge-tokens.keep is 0"),
        ({"keep": 0.5, "merged": (3,)}, "both keep and merged"),
        ({"merged": (-1,)}, "has -1; expected numbers >= 0"),
        ({"merged": (3, 2, 1), "every": 2}, "schedule, every and first would change nothing"),
        ({"first": -1}, "first is -1; expected a number >= 0"),
        ({"first": 3}, "first is 3, but in the vision tower 3 blocks can merge"),
        ({"merged": (3, 2, 1), "first": 1}, "schedule, every and first would change nothing"),
        ({"keep": 0.6, "first": 2}, "keep 0.6 is too small: merging in 1 of 3 blocks"),
        ({"every": 0}, "every is 0; expected a number >= 1"),
        ({"tower": "audio"}, "no tower 'audio'"),
        ({"tower": "text"}, "the text tower's tokens cannot be merged: CLIP reads"),
        ({"merged": (1, 2)}, "has 2 numbers, but in the vision tower 3 blocks can merge"),
        ({"merged": (30, 0, 0)}, r"block 0 has 50 tokens \(1 protected\) and cannot merge 30; the limit is 24"),
        ({"keep": 0.05}, "keep 0.05 is too small"),
    ],
)
def test_refusals_say_what_and_why(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        apply(tiny.bundle("clip"), MergeTokens(**settings))
    assert raised.value.hint


@families
def test_text_towers_and_a_second_merging_are_refused(family: str) -> None:
    bundle = tiny.bundle(family)
    with pytest.raises(UsageError, match="cannot be merged") as raised:
        MergeTokens(tower="text").check(bundle)
    assert raised.value.hint == "towers that can be merged: vision"
    apply(bundle, MergeTokens(keep=0.8))
    with pytest.raises(UsageError, match="merges tokens already"):
        MergeTokens(keep=0.8).check(bundle)


@families
def test_sizes_can_be_left_out_of_attention(family: str) -> None:
    made = []
    for proportional in (True, False):
        bundle = tiny.bundle(family)
        apply(bundle, MergeTokens(keep=0.6, proportional=proportional))
        blocks = [bundle.module(block.path) for block in bundle.tower("vision").blocks]
        assert {block.reduction.proportional for block in blocks} == {proportional}
        made.append(outputs(bundle)["vision"])
    assert not torch.allclose(*made)


@methods
def test_a_fused_token_counts_once_unless_told_otherwise(method: Any) -> None:
    bundle = tiny.bundle("clip")
    apply(bundle, MergeTokens(keep=0.6, method=method))
    assert bundle.module(bundle.tower("vision").blocks[0].path).reduction.proportional == (method != "evit")
    bundle = tiny.bundle("clip")
    apply(bundle, MergeTokens(keep=0.6, method=method, proportional=True))
    assert bundle.module(bundle.tower("vision").blocks[0].path).reduction.proportional


def test_images_of_another_size_than_the_config_says_are_refused_early() -> None:
    bundle = tiny.bundle("dual_encoder_dinov2")
    bundle.processor.image = type(bundle.processor.image)(size={"height": 24, "width": 24})
    assert bundle.embed_images(tiny.images(1)).shape[0] == 1
    with pytest.raises(UsageError, match="the image processor makes 3x24x24, config.json says 3x56x56"):
        MergeTokens(keep=0.5).check(bundle)


def test_parameters_have_help() -> None:
    parameters = schema("merge-tokens").parameters
    assert [parameter.name for parameter in parameters] == [
        "keep",
        "keep_tokens",
        "macs",
        "latency_ms",
        "merged",
        "similarity",
        "floor",
        "schedule",
        "every",
        "first",
        "method",
        "guide",
        "guide_epochs",
        "tower",
        "proportional",
    ]
    assert all(parameter.help for parameter in parameters)
