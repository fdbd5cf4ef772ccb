"""Scores on tiny families: against finite differences, against padding, against batching."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample
from mmcompress.errors import UsageError
from mmcompress.passes import prune_effects, prune_scores
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_units import Group, count_tokens, list_groups
from mmcompress.surgery.watch import evaluating, watch_gradients, watch_inputs
from tests import tiny

families = pytest.mark.parametrize("family", tiny.FAMILIES)


def context(count: int = 6, batch_size: int = 6) -> Context:
    pairs = zip(tiny.images(count), tiny.texts(count), strict=True)
    samples = [Sample(key=str(i), texts=(text,), picture=image) for i, (image, text) in enumerate(pairs)]
    return Context(Dataset(Memory(samples)), num_samples=count, batch_size=batch_size)


def groups_of(bundle: Bundle, kinds: tuple[str, ...] = ("heads", "neurons"), towers: int = 2) -> list[Group]:
    chosen = bundle.towers()[:towers]
    tokens = {path: n for tower in chosen for path, n in count_tokens(bundle, tower).items()}
    return list_groups(bundle, chosen, kinds, (), tokens)


@families
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_gate_gradients_predict_what_silencing_a_little_does(family: str, tower: str) -> None:
    """Turning a unit down by 1e-6 changes any function of the embeddings by 1e-6 of its gate gradient, to first order."""
    bundle = tiny.bundle(family)
    bundle.model.double()
    inputs = bundle.example_inputs(tower, 3)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    groups = [group for group in groups_of_double(bundle) if group.tower == tower]
    torch.manual_seed(0)
    direction = torch.randn_like(bundle.encode(tower, inputs))
    effects: dict[str, Tensor] = {}

    def record(path: str, states: Tensor, gradient: Tensor) -> None:
        units = next(group.units for group in groups if group.reader == path)
        effects[path] = (states * gradient).unflatten(-1, (units, -1)).flatten(0, -3).sum((0, 2))

    def value() -> Tensor:
        return (nn.functional.normalize(bundle.encode(tower, inputs), dim=-1) * direction).sum()

    with evaluating(bundle.model), watch_gradients({g.reader: bundle.module(g.reader) for g in groups}, record):
        value().backward()
    step = 1e-6
    with torch.no_grad():
        before = value()
        for group in groups:
            weight = bundle.module(group.reader).weight
            columns = slice(0, group.width)
            kept = weight[:, columns].clone()
            weight[:, columns] *= 1 - step
            change = (before - value()) / step
            weight[:, columns] = kept
            torch.testing.assert_close(change, effects[group.reader][0], rtol=1e-3, atol=1e-6)


def groups_of_double(bundle: Bundle) -> list[Group]:
    tokens = dict.fromkeys(
        (p for t in bundle.towers() for b in t.blocks for p in (b.attention.reader, b.mlp.reader)), 1
    )
    return list_groups(bundle, bundle.towers(), ("heads", "neurons"), (), tokens)


def close(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@families
def test_batches_and_so_padding_do_not_matter(family: str) -> None:
    """Texts of a batch are padded to the longest: one at a time there is no padding."""
    bundle = tiny.bundle(family)
    groups, blocks = groups_of(bundle), groups_of(bundle, ("blocks",))
    singles, batch = context(batch_size=1), context(batch_size=6)
    close(
        prune_scores.activation(bundle, groups, singles, centred=True),
        prune_scores.activation(bundle, groups, batch, centred=True),
    )
    close(prune_scores.block_influence(bundle, blocks, singles), prune_scores.block_influence(bundle, blocks, batch))


def test_taylor_does_not_depend_on_how_a_batch_is_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny.bundle("dual_encoder_dinov2")
    groups, blocks = groups_of(bundle), groups_of(bundle, ("blocks",))
    found = []
    for size in (1, 4, 64):
        monkeypatch.setattr(prune_effects, "slice_size", lambda *_, size=size: size)
        found.append(
            [
                *prune_effects.taylor(bundle, groups, context(), "embedding"),
                *prune_effects.taylor(bundle, groups, context(), "contrastive"),
                *prune_effects.taylor(bundle, blocks, context(), "embedding"),
            ]
        )
    close(found[0], found[1])
    close(found[0], found[2])


@pytest.mark.parametrize("objective", ["embedding", "contrastive"])
def test_a_unit_without_effect_has_no_importance(objective: str) -> None:
    bundle = tiny.bundle("clip")
    groups = groups_of(bundle)
    reader = bundle.module(groups[0].reader)
    with torch.no_grad():
        reader.weight[:, 12:24] = 0  # the second head
    for scores in (
        prune_effects.taylor(bundle, groups, context(), objective)[0],
        prune_scores.activation(bundle, groups, context(), centred=False)[0],
    ):
        assert scores[1] == 0
        assert (scores[[0, 2, 3]] > 0).all()


def test_magnitude_by_hand() -> None:
    bundle = tiny.bundle("clip")
    groups = groups_of(bundle)
    at = bundle.module(bundle.tower("vision").blocks[0].mlp.path)
    want = at.fc1.weight[7].square().sum() + at.fc1.bias[7].square() + at.fc2.weight[:, 7].square().sum()
    torch.testing.assert_close(prune_scores.magnitude(bundle, groups)[1][7], want.sqrt().detach())


def test_embedding_taylor_is_the_squared_displacement_of_a_weak_unit() -> None:
    """Mean square over random directions = squared distance the normalised embedding moves, for a unit weak enough."""
    bundle = tiny.bundle("clip")
    group = groups_of(bundle, ("heads",), towers=1)[0]
    reader = bundle.module(group.reader)
    with torch.no_grad():
        reader.weight[:, :12] *= 0.01
    data = context(1).data
    assert data is not None
    many = Context(Dataset(Memory([data[0]] * 200)), num_samples=200, batch_size=50)
    found = prune_effects.taylor(bundle, [group], many, "embedding")[0][0]
    inputs = bundle.prepare("vision", [data[0].image])
    with torch.no_grad():
        before = nn.functional.normalize(bundle.encode("vision", inputs), dim=-1)
        reader.weight[:, :12] = 0
        after = nn.functional.normalize(bundle.encode("vision", inputs), dim=-1)
    torch.testing.assert_close(found, (before - after).square().sum(), rtol=0.25, atol=0)


def test_contrastive_taylor_ranks_blocks_and_tells_samples_apart() -> None:
    bundle = tiny.bundle("clip")
    groups = groups_of(bundle, ("blocks",))
    scores = prune_effects.taylor(bundle, groups, context(), "contrastive")
    assert all(float(score) > 0 for score in scores)
    with pytest.raises(UsageError, match="batch_size is 1"):
        prune_effects.taylor(bundle, groups, context(batch_size=1), "contrastive")


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_contrastive_taylor_is_the_gradient_of_the_symmetric_loss(tower: str) -> None:
    """A gate on one neuron for each sample, differentiated through the whole model and the loss of the whole batch."""
    bundle = tiny.bundle("clip")
    group = next(group for group in groups_of(bundle, ("neurons",)) if group.tower == tower)
    neuron, count = 5, 6
    data = context(count).data
    assert data is not None
    samples = [data.subset(count, 0)[index] for index in range(count)]
    items = {"vision": [sample.image for sample in samples], "text": [sample.texts[0] for sample in samples]}
    gate = torch.ones(count, requires_grad=True)

    def close_gate(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        chosen = torch.arange(args[0].shape[-1]) == neuron
        return (torch.where(chosen, args[0] * gate[:, None, None], args[0]),)

    handle = bundle.module(group.reader).register_forward_pre_hook(close_gate)  # type: ignore[arg-type]
    found = {
        name: nn.functional.normalize(bundle.encode(name, bundle.prepare(name, items[name])), dim=-1) for name in items
    }
    handle.remove()
    logits = bundle.model.logit_scale.exp() * found["vision"] @ found["text"].T
    target = torch.arange(count)
    loss = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
    (gradient,) = torch.autograd.grad(loss, gate)
    score = prune_effects.taylor(bundle, [group], context(count), "contrastive")[0][neuron]
    torch.testing.assert_close(score, gradient.square().mean(), rtol=1e-3, atol=0)


def test_every_text_of_a_sample_counts() -> None:
    bundle = tiny.bundle("clip")
    samples = [Sample(key="a", texts=("a cat", "a dog", "a tree")), Sample(key="b", texts=("a car",))]
    given = Context(Dataset(Memory(samples)), batch_size=2)
    sizes = [len(inputs["input_ids"]) for inputs in prune_scores.tower_batches(bundle, "text", given, "test")]
    assert sizes == [2, 2]


def test_data_without_what_a_tower_needs() -> None:
    bundle = tiny.bundle("clip")
    groups = groups_of(bundle)
    texts = Context(Dataset(Memory([Sample(key="a", texts=("a cat",)), Sample(key="b", texts=("a dog",))])))
    with pytest.raises(UsageError, match="nothing for the vision tower"):
        prune_effects.taylor(bundle, groups, texts, "embedding")
    with pytest.raises(UsageError, match="at least 2 samples with an image and a text"):
        prune_effects.taylor(bundle, groups, texts, "contrastive")
    with pytest.raises(UsageError, match="needs data"):
        prune_scores.activation(bundle, groups, dataclasses.replace(texts, data=None), centred=False)


def test_balanced_activations_count_images_and_texts_alike() -> None:
    """Mean squares over image tokens and over text tokens, half and half, by hand; towers without prompts as before."""
    bundle, data = tiny.bundle("llava_clip"), tiny.data("llava_clip", 4)
    given = Context(data, num_samples=4, batch_size=4)
    tower = bundle.tower("language")
    assert tower.prompt is not None
    groups = groups_of(bundle, ("neurons",))
    plain = prune_scores.activation(bundle, groups, given, centred=False)
    found = prune_scores.activation(bundle, groups, given, centred=False, balance=True)
    seen: dict[str, Tensor] = {}
    items = [item for index in range(4) for item in bundle.items("language", data.subset(4, 0)[index])]
    inputs = bundle.prepare("language", items)
    with evaluating(bundle.model), watch_inputs({g.reader: bundle.module(g.reader) for g in groups}, seen.__setitem__):
        bundle.encode("language", inputs)
    real = inputs["attention_mask"].bool().flatten()
    image = torch.isin(inputs["input_ids"].flatten(), torch.tensor(tower.prompt.image_tokens))
    for group, before, after in zip(groups, plain, found, strict=True):
        if group.tower == "vision":
            assert torch.equal(before, after)
            continue
        halves = [seen[group.reader][real & kind].square().mean(0) for kind in (image, ~image)]
        norms = ((halves[0] + halves[1]) / 2).sqrt()
        weight = bundle.module(group.reader).weight
        assert isinstance(weight, Tensor)
        torch.testing.assert_close(after, weight.detach().square().sum(0).sqrt() * norms, rtol=1e-4, atol=1e-7)
        assert not torch.allclose(before, after, rtol=1e-3)
    with pytest.raises(UsageError, match="no tower to be pruned is given both") as caught:
        Prune(score="activation", balance=True).check(tiny.bundle("clip"))
    assert caught.value.hint
    Prune(score="activation", balance=True).check(bundle)
