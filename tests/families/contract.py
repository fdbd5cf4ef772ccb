"""What every family must give, as inherited test classes: subclass the one of its kind and name the tiny model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mmcompress.bundle import Bundle, DualEncoder, Generator
from mmcompress.data import Sample
from mmcompress.errors import UsageError
from mmcompress.evaluate.likelihoods import read_answers
from mmcompress.export.onnx import experts_for, export_onnx
from mmcompress.export.trace import traced_parts
from mmcompress.measure.answerer import artifact_answerer, bundle_answerer
from mmcompress.parts import BATCH
from mmcompress.views import Experts, Tower
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
            for attention in filter(None, (block.attention, block.cross)):
                width = attention.heads * attention.head_dim
                keys = attention.kv_heads * attention.head_dim
                made = [bundle.module(path).out_features for path in attention.writers]
                assert made in ([width, keys, keys], [3 * width])
                assert bundle.module(attention.reader).in_features == width
                assert attention.path.startswith(block.path)
                bundle.module(attention.path)
            assert block.cross is None or block.cross.path != block.attention.path
            bundle.module(block.feeding.path)
            assert (block.mlp is None) != (block.experts is None)
            if block.mlp:
                assert all(bundle.module(path).out_features == block.mlp.neurons for path in block.mlp.writers)
                assert bundle.module(block.mlp.reader).in_features == block.mlp.neurons
            else:
                check_experts(bundle, block.experts)
            assert block.path.startswith(tower.blocks_path)
        for tower in bundle.towers():
            for path in (*tower.heads, *tower.embeddings):
                bundle.module(path)
            if not tower.why_fixed_depth:
                assert len(bundle.module(tower.blocks_path)) == len(tower.blocks)

    def test_modules_that_share_a_weight_are_named_as_tied(self, bundle: Bundle) -> None:
        owners: dict[int, list[str]] = {}
        for name, parameter in bundle.model.named_parameters(remove_duplicate=False):
            if name.endswith(".weight"):  # a bias may have a second name where its owner keeps it too
                owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
        shared = {tuple(names) for names in owners.values() if len(names) > 1}
        assert {pair for tower in bundle.towers() for pair in tower.tied} == shared
        assert all(tower.owns(path) for tower in bundle.towers() for pair in tower.tied for path in pair)

    def test_bookkeeping_counts_what_it_says(self, bundle: Bundle) -> None:
        for _, block in blocks_of(bundle):
            for attention in filter(None, (block.attention, block.cross)):
                counts = {
                    "heads": attention.heads,
                    "kv_heads": attention.kv_heads,
                    "width": attention.heads * attention.head_dim,
                    "head_dim": attention.head_dim,
                    "scale": attention.head_dim**-0.5,
                }
                for path, attribute, what in attention.bookkeeping:
                    assert getattr(bundle.module(path), attribute) == counts[what]

    def test_a_block_is_what_attend_and_feed_say(self, bundle: Bundle) -> None:
        """Calling the named children in order and adding the residuals gives the block's own output."""
        for tower, block in blocks_of(bundle):
            if not block.attend:
                continue
            module = bundle.module(block.path)
            width = bundle.module(block.attention.reader).out_features
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
            assert len(owners) == (0 if left else 1) or (parameter.numel() == 1 and not owners), name

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

    def test_it_can_be_exported(self, bundle: Bundle) -> None:
        """Every part computes with what it says it takes, and gives out what it says."""
        for module in traced_parts(bundle, "float32"):
            part = module.part
            for sizes in ({BATCH: 3, **part.traced}, *({BATCH: 2, **corner} for corner in part.corners)):
                example = module.example(sizes)
                named = {
                    name: example[key].shape[axis]
                    for key, names in part.axes.items()
                    for axis, name in enumerate(names)
                    if name in sizes
                }
                assert named == {name: size for name, size in sizes.items() if name in named}
                with torch.no_grad():
                    made = module(*example.values())
                assert len(made) == len(part.outputs)
                assert all(output.isfinite().all() for output in made)

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


def check_experts(bundle: Bundle, mixed: Experts) -> None:
    """What is stacked has a part for each, and the router gives tokens to as many of them as it is said to."""
    router = bundle.module(mixed.router)
    assert {len(bundle.model.get_parameter(name)) for name in mixed.stacked} == {mixed.experts} == {len(router.weight)}
    assert {name.rpartition(".")[0] for name in mixed.stacked} == {mixed.holder}
    assert bundle.model.get_parameter(mixed.stacked[-1]).shape[-1] == mixed.neurons
    assert all(getattr(bundle.module(path), attribute) == mixed.experts for path, attribute in mixed.bookkeeping)
    states = torch.randn(9, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    logits, weights, indices = router(states)
    assert logits.shape == (9, mixed.experts)
    assert weights.shape == indices.shape == (9, mixed.top)
    torch.testing.assert_close(logits, states @ router.weight.t())
    torch.testing.assert_close(weights, logits.gather(1, indices).softmax(-1))


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


class AnsweringContract(FamilyContract):
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

    def test_answers_of_a_batch_are_those_of_single_samples(self, bundle: Bundle) -> None:
        samples = self.samples()
        assert bundle.generate(samples) == [bundle.generate([sample])[0] for sample in samples]

    def test_its_parts_in_one_loop_answer_the_same(self, bundle: Bundle) -> None:
        """The loop that serves every engine, around the parts in torch."""
        samples = [self.resized(sample) for sample in self.samples()]
        assert bundle_answerer(bundle, threads=1).generate(samples) == bundle.generate(samples)

    def test_exported_it_answers_the_same(self, bundle: Bundle, tmp_path: Path) -> None:
        """In every engine, in a batch and alone; experts in the form that an engine is given."""
        samples = [self.resized(sample) for sample in self.samples()]
        want = bundle.generate(samples)
        assert len(set(want)) > 1
        mixed = any(block.experts for tower in bundle.towers() for block in tower.blocks)
        artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
        for runner in ("onnxruntime", "openvino"):
            if mixed and experts_for([runner]) == "every":
                artifact = export_onnx(bundle, tmp_path / runner, batches=(2,), experts="every").artifact
            answerer = artifact_answerer(artifact, runner, threads=1)
            assert answerer.generate(samples) == want
            assert [answerer.generate([sample])[0] for sample in samples] == want
            answerer.close()

    def resized(self, sample: Sample) -> Sample:
        """Return a sample as exported models see it."""
        return sample


class GeneratorContract(AnsweringContract):
    def test_with_a_cache_the_answer_is_the_same_as_without(self, bundle: Bundle) -> None:
        answers = bundle.generate(self.samples())
        bundle.model.generation_config.use_cache = False
        assert bundle.generate(self.samples()) == answers

    def test_asking_changes_no_setting(self, bundle: Bundle) -> None:
        before = bundle.model.generation_config.to_dict()
        bundle.generate(self.samples())
        assert bundle.model.generation_config.to_dict() == before


class TeacherForcedContract:
    """Beside `GeneratorContract`, for families that can be led through a given answer."""

    def samples(self) -> list[Sample]:
        """Return three samples with texts of different lengths, in words the tokenizer knows."""
        raise NotImplementedError

    def test_the_next_tokens_are_the_answers_then_its_end(self, bundle: Bundle) -> None:
        samples = self.samples()
        tokens, roots = self.led(bundle, samples)
        decode = bundle.processor.tokenizer.decode
        for row, sample in zip(tokens, samples, strict=True):
            said = row[row >= 0]
            assert decode(said, skip_special_tokens=True).strip() == sample.texts[0]
            assert not decode(said[-1:], skip_special_tokens=True).strip()
        assert len({int((row >= 0).sum()) for row in tokens}) > 1
        assert tokens.shape == roots.shape[:2]

    def test_at_each_token_of_an_answer_stands_a_distribution(self, bundle: Bundle) -> None:
        tokens, roots = self.led(bundle, self.samples())
        assert tokens.max() < roots.shape[2]
        torch.testing.assert_close(
            roots[tokens >= 0].square().sum(-1), torch.ones(int((tokens >= 0).sum())), atol=1e-5, rtol=0
        )

    def test_of_likelihoods_those_of_a_batch_are_those_of_single_samples(self, bundle: Bundle) -> None:
        samples = self.samples()
        together = read_answers(bundle, samples)
        for place, sample in enumerate(samples):
            alone = read_answers(bundle, [sample])
            assert alone.tokens[0] == together.tokens[place]
            assert alone.log[0] == pytest.approx(together.log[place], abs=1e-4)

    def led(self, bundle: Bundle, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next tokens (B, T) and the roots (B, T, V)."""
        tower = bundle.forced.answering
        inputs = bundle.prepare(tower, [bundle.items(tower, sample)[0] for sample in samples])
        tokens = bundle.forced.next_tokens(bundle.model, inputs)
        with torch.no_grad():
            return tokens, bundle.encode(tower, inputs).unflatten(1, (tokens.shape[1], -1))


class VisionLanguageContract(TeacherForcedContract, GeneratorContract):
    towers = ("vision", "language")

    def items(self, tower: str) -> list[Any]:
        return [sample for sample in tiny.data(self.model, 4) if tower == "language" or sample.picture is not None]

    def samples(self) -> list[Sample]:
        return list(tiny.data(self.model, 4))

    def forced(self, bundle: Bundle, sample: Sample) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the inputs of `encode` for one sample, and the same as the model's own forward takes them."""
        inputs = bundle.prepare("language", [sample])
        asked = {key: inputs[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in inputs}
        images = {key: inputs[key] for key in bundle.family.image_keys if key in inputs}
        given = bundle.family.generation_inputs(bundle.model, {**asked, **images, "position_ids": torch.tensor([])})
        return inputs, {key: value for key, value in given.items() if key != "position_ids"}

    def test_language_rows_are_the_models_own_distributions_of_the_answer(self, bundle: Bundle) -> None:
        for sample in self.samples():
            inputs, given = self.forced(bundle, sample)
            with torch.no_grad():
                rows = bundle.encode("language", inputs).unflatten(1, (-1, bundle.model.lm_head.out_features))
                logits = bundle.model(**given).logits
            places = inputs["answer_positions"][0]
            torch.testing.assert_close(rows[0].square(), logits[0, places].softmax(-1), rtol=1e-4, atol=1e-6)
            said = bundle.processor.tokenizer(sample.texts[0], add_special_tokens=False)["input_ids"]
            follows = inputs["input_ids"][0, places[:-1] + 1].tolist()
            assert follows == said[: len(follows)]
            assert len(follows) == len(said)  # the last place predicts the end

    def test_the_answer_depends_on_the_picture(self, bundle: Bundle) -> None:
        shown = [sample for sample in self.samples() if sample.picture is not None]
        other = [replace(sample, picture=tiny.images(1, seed=9)[0]) for sample in shown]
        first, second = (torch.from_numpy(bundle.embed("language", samples)) for samples in (shown, other))
        assert (first - second).abs().amax(1).min() > 1e-4

    def test_vision_rows_are_what_the_language_model_is_given(self, bundle: Bundle) -> None:
        """Ready-made image tokens in place of the picture give the same distributions."""
        sample = self.samples()[0]
        inputs = bundle.prepare("language", [sample])
        with torch.no_grad():
            want = bundle.encode("language", inputs)
            tokens = bundle.encode("vision", bundle.prepare("vision", [sample]))
            width = bundle.family.image_width(bundle.model)
            ready = {key: value for key, value in inputs.items() if key not in bundle.family.image_keys}
            got = bundle.encode("language", {**ready, "image_tokens": tokens.unflatten(1, (-1, width))})
        torch.testing.assert_close(got, want)

    def test_a_question_that_holds_the_image_token_is_refused(self, bundle: Bundle) -> None:
        sample = replace(self.samples()[0], question="what is <image> ?")
        with pytest.raises(UsageError, match="stands for a picture"):
            bundle.generate([sample])

    def test_a_talk_longer_than_the_model_takes_is_refused(self, bundle: Bundle) -> None:
        sample = replace(self.samples()[0], question="what " * 300)
        with pytest.raises(UsageError, match="takes 256"):
            bundle.generate([sample])


def blocks_of(bundle: Bundle) -> list[tuple[Tower, object]]:
    return list(itertools.chain.from_iterable(((t, block) for block in t.blocks) for t in bundle.towers()))


def chain(module: nn.Module, names: tuple[str, ...], hidden: torch.Tensor) -> torch.Tensor:
    for name in names:
        hidden = module.get_submodule(name)(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden
