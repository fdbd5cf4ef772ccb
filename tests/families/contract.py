"""What every family must give, as inherited test classes: subclass the one of its kind and name the tiny model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mmcompress.bundle import Bundle, DualEncoder, Generator, Tower
from mmcompress.data import Sample
from tests import tiny


class FamilyContract:
    model: str
    """A name `tiny.bundle` knows."""
    towers: tuple[str, ...]

    def items(self, tower: str) -> list[Any]:
        """Return three items of a tower, as `prepare` takes them."""
        raise NotImplementedError

    @pytest.fixture
    def bundle(self) -> Bundle:
        return tiny.bundle(self.model)

    def test_the_towers_are_there(self, bundle: Bundle) -> None:
        assert tuple(tower.name for tower in bundle.towers()) == self.towers

    def test_every_path_leads_to_a_module_of_the_right_shape(self, bundle: Bundle) -> None:
        for tower, block in blocks_of(bundle):
            mlp = block.mlp
            for attention in filter(None, (block.attention, block.cross)):
                width = attention.heads * attention.head_dim
                assert [bundle.module(path).out_features for path in attention.writers] == [
                    width,
                    attention.kv_heads * attention.head_dim,
                    attention.kv_heads * attention.head_dim,
                ]
                assert bundle.module(attention.reader).in_features == width
                assert attention.path.startswith(block.path)
                bundle.module(attention.path)
            assert block.cross is None or block.cross.path != block.attention.path
            bundle.module(mlp.path)
            assert all(bundle.module(path).out_features == mlp.neurons for path in mlp.writers)
            assert bundle.module(mlp.reader).in_features == mlp.neurons
            assert block.path.startswith(tower.blocks_path)
        for tower in bundle.towers():
            for path in (*tower.heads, *tower.embeddings):
                bundle.module(path)
            if not tower.why_fixed_depth:
                assert len(bundle.module(tower.blocks_path)) == len(tower.blocks)

    def test_modules_that_share_a_weight_are_named_as_tied(self, bundle: Bundle) -> None:
        owners: dict[int, list[str]] = {}
        for name, parameter in bundle.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
        shared = {tuple(names) for names in owners.values() if len(names) > 1}
        assert {pair for tower in bundle.towers() for pair in tower.tied} == shared
        assert all(tower.owns(path) for tower in bundle.towers() for pair in tower.tied for path in pair)

    def test_bookkeeping_counts_what_it_says(self, bundle: Bundle) -> None:
        for _, block in blocks_of(bundle):
            for attention in filter(None, (block.attention, block.cross)):
                counts = {"heads": attention.heads, "width": attention.heads * attention.head_dim}
                for path, attribute, what in attention.bookkeeping:
                    assert getattr(bundle.module(path), attribute) == counts[what]

    def test_a_block_is_what_attend_and_feed_say(self, bundle: Bundle) -> None:
        """Calling the named children in order and adding the residuals gives the block's own output."""
        for tower, block in blocks_of(bundle):
            if not block.attend:
                continue
            module = bundle.module(block.path)
            width = bundle.module(block.mlp.writers[0]).in_features
            hidden = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
            out = hidden + chain(module, block.attend, hidden)
            out = out + chain(module, block.feed, out)
            torch.testing.assert_close(module(hidden, None), out, rtol=0, atol=1e-6)
            assert tower.name

    def test_towers_own_every_parameter_but_the_similarity_once(self, bundle: Bundle) -> None:
        towers = bundle.towers()
        for name, parameter in bundle.model.named_parameters():
            owners = [tower.name for tower in towers if tower.owns(name)]
            left = any(name.startswith(path + ".") for path in getattr(bundle.family, "outside", ()))
            assert len(owners) == (0 if left or parameter.numel() == 1 else 1), name

    def test_a_towers_output_depends_on_its_own_parameters_only(self, bundle: Bundle) -> None:
        for tower in bundle.towers():
            bundle.model.zero_grad(set_to_none=True)
            bundle.encode(tower.name, bundle.example_inputs(tower.name, 2)).sum().backward()
            for name, parameter in bundle.model.named_parameters():
                assert parameter.grad is None or tower.owns(name), name

    def test_a_batch_equals_its_single_samples(self, bundle: Bundle) -> None:
        """Where rows are as wide as the longest item of a batch (a decoder's), nothing but zeros is added."""
        for name in self.towers:
            items = self.items(name)
            for row, item in zip(torch.from_numpy(bundle.embed(name, items)), items, strict=True):
                alone = torch.from_numpy(bundle.embed(name, [item])[0])
                torch.testing.assert_close(alone, row[: len(alone)], rtol=0, atol=2e-5)
                assert not row[len(alone) :].any()

    def test_example_inputs_are_valid_and_the_same_every_time(self, bundle: Bundle) -> None:
        for tower in bundle.towers():
            first, again = (bundle.example_inputs(tower.name, 2) for _ in range(2))
            assert all(torch.equal(first[key], again[key]) for key in first)
            embeddings = bundle.encode(tower.name, first)
            assert embeddings.shape[0] == 2
            assert not torch.equal(embeddings[0], embeddings[1])

    def test_stream_counts_the_tokens_the_blocks_see(self, bundle: Bundle) -> None:
        for tower in bundle.towers():
            if tower.stream is None:
                assert tower.why_no_stream
                continue
            seen: list[int] = []
            handle = bundle.module(tower.blocks[0].path).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].shape[1])
            )
            bundle.encode(tower.name, bundle.example_inputs(tower.name, 1))
            handle.remove()
            assert seen == [tower.stream.tokens]

    def test_write_config_of_the_untouched_model_rebuilds_it(self, bundle: Bundle) -> None:
        bundle.family.write_config(bundle.model)
        with torch.device("meta"):
            again = type(bundle.model)(bundle.model.config)
        shapes = {name: tensor.shape for name, tensor in bundle.model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes


class DualEncoderContract(FamilyContract):
    towers = ("vision", "text")

    def items(self, tower: str) -> list[Any]:
        if tower == "audio":
            return list(tiny.spoken(3))
        return tiny.images(3) if tower == "vision" else tiny.texts(3)

    def test_it_embeds_and_does_not_answer(self, bundle: Bundle) -> None:
        assert isinstance(bundle.family, DualEncoder)
        assert not isinstance(bundle.family, Generator)

    def test_encode_is_what_the_model_gives(self, bundle: Bundle) -> None:
        media = bundle.dual.media
        inputs = bundle.example_inputs(media, 2) | bundle.example_inputs("text", 3)
        output = bundle.model(**{k: v for k, v in inputs.items() if k in self.forward_inputs})
        scale, bias = bundle.family.similarity(bundle.model)
        image, text = (
            nn.functional.normalize(bundle.encode(name, bundle.example_inputs(name, n)), dim=-1)
            for name, n in ((media, 2), ("text", 3))
        )
        logits = output.logits_per_audio if media == "audio" else output.logits_per_image
        torch.testing.assert_close(logits, scale * image @ text.T + bias, rtol=1e-5, atol=1e-4)

    forward_inputs: tuple[str, ...] = (
        "pixel_values", "input_features", "input_ids", "attention_mask", "pixel_attention_mask", "spatial_shapes",
    )  # fmt: skip

    def test_text_longer_than_the_limit_is_cut_not_refused(self, bundle: Bundle) -> None:
        embeddings = bundle.embed_texts(["cat " * 200])
        assert embeddings.shape[0] == 1

    def test_grey_and_transparent_images_are_accepted(self, bundle: Bundle) -> None:
        if bundle.describes == "image":
            assert bundle.embed_images([Image.new("L", (30, 70)), Image.new("RGBA", (70, 30))]).shape[0] == 2


class GeneratorContract(FamilyContract):
    def samples(self) -> list[Sample]:
        """Return three samples to answer."""
        raise NotImplementedError

    def test_it_answers_and_does_not_embed(self, bundle: Bundle) -> None:
        assert isinstance(bundle.family, Generator)
        assert not isinstance(bundle.family, DualEncoder)

    def test_the_answer_is_the_same_every_time(self, bundle: Bundle) -> None:
        answers = bundle.generate(self.samples())
        assert len(set(answers)) > 1  # it depends on what is asked about
        assert bundle.generate(self.samples()) == answers

    def test_with_a_cache_the_answer_is_the_same_as_without(self, bundle: Bundle) -> None:
        answers = bundle.generate(self.samples())
        bundle.model.generation_config.use_cache = False
        assert bundle.generate(self.samples()) == answers

    def test_answers_of_a_batch_are_those_of_single_samples(self, bundle: Bundle) -> None:
        samples = self.samples()
        assert bundle.generate(samples) == [bundle.generate([sample])[0] for sample in samples]

    def test_asking_changes_no_setting(self, bundle: Bundle) -> None:
        before = bundle.model.generation_config.to_dict()
        bundle.generate(self.samples())
        assert bundle.model.generation_config.to_dict() == before


def blocks_of(bundle: Bundle) -> list[tuple[Tower, object]]:
    return list(itertools.chain.from_iterable(((t, block) for block in t.blocks) for t in bundle.towers()))


def chain(module: nn.Module, names: tuple[str, ...], hidden: torch.Tensor) -> torch.Tensor:
    for name in names:
        hidden = module.get_submodule(name)(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden
