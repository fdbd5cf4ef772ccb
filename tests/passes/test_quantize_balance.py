"""quantize in a language model that is shown pictures: how much image and text tokens count; ops/test_awq has the maths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context
from mmcompress.passes.quantize import Quantize
from mmcompress.passes.quantize_balance import Balance, balance_for, gradients, image_places
from mmcompress.passes.quantize_moments import Inputs, inputs_of, linears_of
from tests import tiny
from tests.passes.fitting import FAMILY, VLM, context, run, spread


def without_pictures(count: int = 6) -> Context:
    samples = [Sample(str(i), ("a red cat",), question="what is this ?") for i in range(count)]
    return Context(data=Dataset(Memory(samples), "texts"), num_samples=count, batch_size=4)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_without_pictures_all_tokens_count_the_same(rounding: Any) -> None:
    settings: dict[str, Any] = {"towers": ("language",), "scaling": "awq", "rounding": rounding}
    _, plain = run(spread(VLM), without_pictures(), **settings)
    _, balanced = run(spread(VLM), without_pictures(), balance="modality", **settings)
    assert plain.decisions["scaled"] == balanced.decisions["scaled"]
    assert all(torch.equal(value, balanced.tensors[name]) for name, value in plain.tensors.items())
    assert "image_tokens_count" not in balanced.decisions["towers"]["language"]


def given_out(bundle: Bundle, names: dict[str, str]) -> dict[str, Tensor]:
    """Name -> what the module at its path gives out, once the bundle has run."""
    made: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args, output: made.update({name: output})

    for name, path in names.items():
        bundle.module(path).register_forward_hook(hook(name))
    return made


def test_gradients_are_those_of_the_answers_loss() -> None:
    """Sample by sample, by what autograd says of the outputs themselves."""
    bundle, data = tiny.bundle(VLM), context(VLM, 4)
    tower = bundle.tower("language")
    assert tower.prompt is not None
    found = gradients(bundle, tower, tower.prompt.image_tokens, data)
    names = {f"{block.path}.mlp": block.mlp.reader for block in tower.blocks}
    wanted = {name: [0.0, 0.0] for name in names}
    counts = [0, 0]
    assert data.data is not None
    for index in range(4):
        inputs = bundle.prepare("language", bundle.items("language", data.data[index]))
        made = given_out(bundle, names)
        roots = bundle.encode("language", inputs)
        answer = bundle.forced.next_tokens(bundle.model, inputs)[0]
        probabilities = roots.reshape(len(answer), -1).square()
        loss = -torch.stack([probabilities[i, t].log() for i, t in enumerate(answer.tolist()) if t >= 0]).mean()
        slopes = torch.autograd.grad(loss, [made[name] for name in names])
        image = torch.tensor([token in tower.prompt.image_tokens for token in inputs["input_ids"][0].tolist()])
        counts[0] += int(image.sum())
        counts[1] += int((~image).sum())
        for name, slope in zip(names, slopes, strict=True):
            wanted[name][0] += slope[0][image].abs().mean(-1).sum().item()
            wanted[name][1] += slope[0][~image].abs().mean(-1).sum().item()
    assert [found.image, found.text] == counts
    assert min(counts) > 0
    for name in names:
        assert found.sizes[name] == pytest.approx(wanted[name], rel=1e-3)
    assert not any(parameter.grad is not None for parameter in bundle.model.parameters())


def test_moments_count_tokens_as_they_are_told() -> None:
    """One batch whose moments are put together by hand from its image tokens and its text tokens."""
    bundle, data = tiny.bundle(VLM), context(VLM, 4)
    tower = bundle.tower("language")
    assert tower.prompt is not None
    path = tower.blocks[1].attention.writers[0]
    balance = balance_for("modality", bundle, tower, data)
    ratio = balance.ratios["attention"][1]
    linears = linears_of(bundle, [path])
    found: list[Inputs] = []
    for each in (balance, balance_for("text", bundle, tower, data)):
        inputs_of(bundle, tower, linears, data, each, True, "a test", lambda group, known: found.append(known))
    seen, texts = found
    assert data.data is not None
    items = [item for index in range(4) for item in bundle.items("language", data.data[index])]
    inputs = bundle.prepare("language", items)
    states: list[Tensor] = []
    handle = bundle.module(path).register_forward_pre_hook(lambda module, args: states.append(args[0].detach()))
    bundle.encode("language", inputs)
    handle.remove()
    kept = inputs["attention_mask"].bool()
    image = torch.isin(inputs["input_ids"], torch.tensor(tower.prompt.image_tokens))[kept]
    assert torch.equal(image_places(inputs, tower.prompt.image_tokens), image)
    shown, said = states[0][kept][image], states[0][kept][~image]
    second = (ratio * shown.T @ shown / len(shown) + said.T @ said / len(said)) / (ratio + 1)
    torch.testing.assert_close(seen.moment, second, rtol=1e-3, atol=1e-5)
    assert texts.mean_sizes is not None
    torch.testing.assert_close(texts.moment, said.T @ said / len(said), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(texts.mean_sizes, said.abs().mean(0), rtol=1e-4, atol=1e-5)


def test_ratios_are_reported_and_move_the_weights() -> None:
    settings: dict[str, Any] = {"towers": ("language",), "rounding": "gptq"}
    _, plain = run(spread(VLM), context(VLM), **settings)
    _, made = run(spread(VLM), context(VLM), balance="modality", **settings)
    reported = made.decisions["towers"]["language"]["image_tokens_count"]
    assert {part: len(ratios) for part, ratios in reported.items()} == {"attention": 3, "mlp": 3}
    name = next(name for name in plain.tensors if name.endswith("weight_int4"))
    assert not torch.equal(plain.tensors[name], made.tensors[name])


def test_tokens_that_cannot_be_told_apart_are_refused() -> None:
    balance = Balance((7,), {"layer": (1.0, 2.0)})
    balance.begin({"input_ids": torch.tensor([[7, 1, 2]]), "attention_mask": torch.tensor([[1, 1, 0]])})
    assert balance.counts("layer", torch.zeros(2, 4)).tolist() == [1, 2]  # type: ignore[union-attr]
    assert balance.counts("another", torch.zeros(2, 4)) is None
    with pytest.raises(UsageError, match="layer is given 3 tokens, the prompts have 2") as caught:
        balance.counts("layer", torch.zeros(3, 4))
    assert caught.value.hint


def test_balance_is_refused_where_no_tower_is_shown_pictures() -> None:
    made = Quantize(scheme="W4A16", scaling="awq", balance="modality")
    made.check(tiny.bundle(VLM))
    with pytest.raises(UsageError, match="no tower to be quantized is given both image and text tokens"):
        made.check(tiny.bundle(FAMILY))
    with pytest.raises(UsageError, match="no tower to be quantized is given both image and text tokens"):
        Quantize(scheme="W4A16", scaling="awq", balance="modality", towers=("vision",)).check(tiny.bundle(VLM))
