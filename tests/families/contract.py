"""What every family must give, as one inherited test class: subclass it and name the tiny model."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image
from torch import nn

from mmcompress.bundle import Bundle, Tower
from tests import tiny


class FamilyContract:
    model: str
    """Name in `tiny.FAMILIES`."""

    @pytest.fixture
    def bundle(self) -> Bundle:
        return tiny.bundle(self.model)

    def test_there_is_a_vision_and_a_text_tower(self, bundle: Bundle) -> None:
        assert [tower.name for tower in bundle.towers()] == ["vision", "text"]

    def test_every_path_leads_to_a_module_of_the_right_shape(self, bundle: Bundle) -> None:
        for tower, block in blocks_of(bundle):
            attention, mlp = block.attention, block.mlp
            width = attention.heads * attention.head_dim
            assert [bundle.module(path).out_features for path in attention.writers] == [
                width,
                attention.kv_heads * attention.head_dim,
                attention.kv_heads * attention.head_dim,
            ]
            assert bundle.module(attention.reader).in_features == width
            assert all(bundle.module(path).out_features == mlp.neurons for path in mlp.writers)
            assert bundle.module(mlp.reader).in_features == mlp.neurons
            assert block.path.startswith(tower.blocks_path)
        for tower in bundle.towers():
            for path in (*tower.heads, *tower.embeddings):
                bundle.module(path)
            assert len(bundle.module(tower.blocks_path)) == len(tower.blocks)

    def test_bookkeeping_counts_what_it_says(self, bundle: Bundle) -> None:
        for _, block in blocks_of(bundle):
            attention = block.attention
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
            assert len(owners) == (0 if parameter.numel() == 1 else 1), name

    def test_a_towers_output_depends_on_its_own_parameters_only(self, bundle: Bundle) -> None:
        for tower in bundle.towers():
            bundle.model.zero_grad(set_to_none=True)
            bundle.encode(tower.name, bundle.example_inputs(tower.name, 2)).sum().backward()
            for name, parameter in bundle.model.named_parameters():
                assert parameter.grad is None or tower.owns(name), name

    def test_encode_is_what_the_model_gives(self, bundle: Bundle) -> None:
        inputs = bundle.example_inputs("vision", 2) | bundle.example_inputs("text", 3)
        output = bundle.model(**{k: v for k, v in inputs.items() if k in self.forward_inputs})
        scale, bias = bundle.family.similarity(bundle.model)
        image, text = (
            nn.functional.normalize(bundle.encode(name, bundle.example_inputs(name, n)), dim=-1)
            for name, n in (("vision", 2), ("text", 3))
        )
        torch.testing.assert_close(output.logits_per_image, scale * image @ text.T + bias, rtol=1e-5, atol=1e-4)

    forward_inputs: tuple[str, ...] = (
        "pixel_values", "input_ids", "attention_mask", "pixel_attention_mask", "spatial_shapes",
    )  # fmt: skip

    def test_a_batch_equals_its_single_samples(self, bundle: Bundle) -> None:
        for name, items in (("vision", tiny.images(3)), ("text", tiny.texts(3))):
            together = bundle.embed(name, items)
            for row, item in zip(together, items, strict=True):
                torch.testing.assert_close(
                    torch.from_numpy(bundle.embed(name, [item])[0]), torch.from_numpy(row), rtol=0, atol=2e-5
                )

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

    def test_text_longer_than_the_limit_is_cut_not_refused(self, bundle: Bundle) -> None:
        embeddings = bundle.embed_texts(["cat " * 200])
        assert embeddings.shape[0] == 1

    def test_grey_and_transparent_images_are_accepted(self, bundle: Bundle) -> None:
        assert bundle.embed_images([Image.new("L", (30, 70)), Image.new("RGBA", (70, 30))]).shape[0] == 2

    def test_write_config_of_the_untouched_model_rebuilds_it(self, bundle: Bundle) -> None:
        bundle.family.write_config(bundle.model)
        with torch.device("meta"):
            again = type(bundle.model)(bundle.model.config)
        shapes = {name: tensor.shape for name, tensor in bundle.model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes


def blocks_of(bundle: Bundle) -> list[tuple[Tower, object]]:
    return list(itertools.chain.from_iterable(((t, block) for block in t.blocks) for t in bundle.towers()))


def chain(module: nn.Module, names: tuple[str, ...], hidden: torch.Tensor) -> torch.Tensor:
    for name in names:
        hidden = module.get_submodule(name)(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden
