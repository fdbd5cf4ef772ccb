"""Image tokens that leave a language model on their way through it: in torch, in batches, with a cache, in exported graphs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import onnx
import pytest
import torch
from torch import Tensor

from mmcompress import checkpoint
from mmcompress.bundle import Bundle
from mmcompress.data import Sample, Video
from mmcompress.errors import UsageError
from mmcompress.export.onnx import export_onnx
from mmcompress.export.tensorrt_api import load_api
from mmcompress.manifest import Record
from mmcompress.measure.answerer import artifact_answerer
from mmcompress.measure.cost import cost_of
from mmcompress.passes import build
from mmcompress.passes.base import Context
from mmcompress.surgery.cache_lengths import CACHE
from mmcompress.surgery.counting import macs_within
from mmcompress.surgery.dropping import dropping_of
from mmcompress.surgery.ledger import watching
from mmcompress.surgery.prompt_flow import Method
from tests import tiny
from tests.export.test_tensorrt import rtx

METHODS: tuple[Method, ...] = get_args(Method)
CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "sparsevlm recycling": {"method": "sparsevlm", "recycle": True},
    "recoverable recycling": {"method": "recoverable", "recycle": True},
    "fastv in the cache": {"method": "fastv", "place": "cache"},
    "sparsevlm in the cache": {"method": "sparsevlm", "place": "cache", "after": (1,)},
    "grid in the cache": {"method": "grid", "place": "cache", "after": (1,)},
    "fastv skipping": {"method": "fastv", "place": "mlp", "after": (1,)},
    "lftr skipping": {"method": "lftr", "place": "mlp"},
}
FAMILIES = ("llava_clip", "llava_siglip", "llava_next", "smolvlm", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
every_case = pytest.mark.parametrize(
    ("family", "settings"),
    [pytest.param(family, settings, id=f"{family}-{name}") for family in FAMILIES for name, settings in CASES.items()],
)


def dropping(family: str, **settings: Any) -> Bundle:
    bundle = tiny.bundle(family)
    made = build("drop-visual-tokens", settings)
    made.check(bundle)
    plan = made.plan(bundle, Context())
    made.apply(bundle, plan)
    bundle.history.append(Record("drop-visual-tokens", settings, plan.decisions))
    return bundle


def asked(family: str, **more: Any) -> list[Sample]:
    """Five samples: one has no picture, one two, and one was asked something before."""
    samples = list(tiny.asked(4, turns=family != "paligemma"))
    return [*samples, replace(samples[0], key="two", further=(samples[1].picture,))]  # type: ignore[arg-type]


@every_case
def test_answers_depend_on_neither_batch_nor_cache(family: str, settings: dict[str, Any]) -> None:
    bundle = dropping(family, keep=0.3, **settings)
    facts = build("drop-visual-tokens", {"keep": 0.3, **settings}).fit(bundle, Context())
    assert min(facts["tokens_kept_after"].values()) < facts["tokens"]
    samples = asked(family)
    answers = bundle.generate(samples)
    assert answers == [bundle.generate([sample])[0] for sample in samples]
    bundle.model.generation_config.use_cache = False
    assert bundle.generate(samples) == answers


@every_case
def test_forced_answers_do_not_depend_on_the_batch(family: str, settings: dict[str, Any]) -> None:
    """Rows are padded on the right then, and the answer stands in them: the question still ends where it did."""
    bundle = dropping(family, keep=0.3, **settings)
    samples = [
        replace(sample, texts=("what is this" + " how many" * number,)) for number, sample in enumerate(asked(family))
    ]
    inputs = bundle.prepare("language", samples)
    with torch.no_grad():
        together = bundle.encode("language", inputs)
        for number, sample in enumerate(samples):
            alone = bundle.encode("language", bundle.prepare("language", [sample]))[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.parametrize("family", ["llava_clip", "llava_siglip", "smolvlm"])
def test_a_forced_answer_is_seen_as_token_after_token(family: str, settings: dict[str, Any]) -> None:
    """All at once, told where the question ends, or with a cache."""
    bundle = dropping(family, keep=0.3, **settings)
    sample = replace(next(iter(tiny.asked(1, turns=False))), texts=("what is this how many",))
    inputs = bundle.prepare("language", [sample])
    ids, asked_last = inputs["input_ids"], int(inputs["answer_positions"][0, 0])
    images = {key: inputs[key] for key in ("pixel_values", "pixel_attention_mask") if key in inputs}
    with torch.no_grad():
        wanted = bundle.encode("language", inputs).unflatten(1, (-1, bundle.model.config.text_config.vocab_size))[0]
        made = bundle.model(input_ids=ids[:, : asked_last + 1], **images, use_cache=True)
        for number, likely in enumerate(wanted):
            step = made.logits[0, -1].softmax(dim=-1).sqrt()
            torch.testing.assert_close(step, likely, atol=1e-5, rtol=1e-3)
            made = bundle.model(input_ids=ids[:, asked_last + 1 + number][:, None], **{CACHE: getattr(made, CACHE)})


def test_dropping_equals_masking() -> None:
    """Text goes on as if the blocks behind the place had hidden the image tokens that left, in the places all had."""
    bundle, plain = dropping("llava_clip", keep=0.3, after=(1,)), tiny.bundle("llava_clip")
    inputs = bundle.example_inputs("language", 2)
    how = dropping_of(bundle.model.model)
    assert how is not None
    with watching(how.ledger) as seen:
        made = states(bundle, inputs)
    assert len(seen) == 1
    stays = seen[0].sum(dim=1) > 0  # type: ignore[union-attr]
    count = stays.shape[1]
    assert stays.sum(dim=-1).tolist() == [16 + 5, 16 + 5]
    hidden = torch.zeros(2, 1, count, count).masked_fill(~stays[:, None, None, :], -1e9)
    hidden = hidden + torch.full((count, count), -1e9).triu(1)

    def hide(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": hidden}

    for block in plain.model.model.language_model.layers[1:]:
        block.register_forward_pre_hook(hide, with_kwargs=True)
    want = states(plain, inputs)
    text = inputs["input_ids"] != plain.model.config.image_token_id
    torch.testing.assert_close(made[text], want[text], atol=1e-5, rtol=1e-4)
    # And those that left stand where they were, as they were then.
    early = tiny.bundle("llava_clip")
    early.model.model.language_model.layers = early.model.model.language_model.layers[:1]
    early.model.config.text_config.num_hidden_layers = 1
    torch.testing.assert_close(made[~stays], states(early, inputs)[~stays], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def read(bundle: Bundle, inputs: dict[str, Tensor], **more: Any) -> Any:
    """What the model gives out that has read an example's prompt."""
    given = {"image": bundle.family.ready_made(bundle.model, inputs["image_tokens"])}  # type: ignore[attr-defined]
    return bundle.model.model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], mm_encoder_outputs=given, **more
    )


def states(bundle: Bundle, inputs: dict[str, Tensor]) -> Tensor:
    """What the last block's output is made of (B, N, C)."""
    made: Tensor = read(bundle, inputs).last_hidden_state
    return made


@pytest.mark.parametrize("after", [1, 2])
def test_fastv_keeps_what_the_last_token_looks_at(after: int) -> None:
    """Recomputed from the plain model's own attention weights, of grouped queries."""
    plain = tiny.bundle("llava_clip")
    inputs = plain.example_inputs("language", 2)
    plain.model.set_attn_implementation("eager")
    weights = read(plain, inputs, output_attentions=True).attentions[after - 1]
    image = inputs["input_ids"] == plain.model.config.image_token_id
    best = weights[:, :, -1].mean(dim=1).masked_fill(~image, -1).topk(5, dim=-1).indices
    bundle = dropping("llava_clip", keep=0.3, after=(after,))
    how = dropping_of(bundle.model.model)
    assert how is not None
    with watching(how.ledger) as seen:
        states(bundle, inputs)
    stays = (seen[0].sum(dim=1) > 0) & image  # type: ignore[union-attr]
    assert [row.nonzero()[:, 0].tolist() for row in stays] == [sorted(row) for row in best.tolist()]


def test_sparsevlm_asks_the_words_that_have_to_do_with_the_picture() -> None:
    """Recomputed in full from the plain model's weights: raters by the rows as they come in, then the mean of what they look at."""
    plain = tiny.bundle("llava_clip")
    inputs = plain.example_inputs("language", 2)
    image = inputs["input_ids"] == plain.model.config.image_token_id
    plain.model.set_attn_implementation("eager")
    with torch.no_grad():
        rows = plain.model.get_input_embeddings()(inputs["input_ids"])
        rows[image] = inputs["image_tokens"].flatten(0, 1)
        weights = plain.model.model(
            inputs_embeds=rows, attention_mask=inputs["attention_mask"], output_attentions=True
        ).attentions[0]
    expected = []
    for own, picture, seen in zip(rows, image, weights.mean(dim=1), strict=True):
        shares = (own[picture] @ own[~picture].T).softmax(dim=-1).mean(dim=0)
        raters = shares > shares.mean()
        assert 0 < raters.sum() < len(raters)
        score = seen[~picture][raters].mean(dim=0)[picture]
        first = int(picture.nonzero()[0, 0])
        expected.append(sorted((score.topk(5).indices + first).tolist()))
    bundle = dropping("llava_clip", keep=0.3, method="sparsevlm", after=(1,))
    how = dropping_of(bundle.model.model)
    assert how is not None
    with watching(how.ledger) as went:
        states(bundle, inputs)
    stays = (went[0].sum(dim=1) > 0) & image  # type: ignore[union-attr]
    assert [row.nonzero()[:, 0].tolist() for row in stays] == expected


@pytest.mark.parametrize("after", [(1,), (1, 2)])
@pytest.mark.parametrize("method", ["fastv", "sparsevlm", "recoverable"])
def test_what_stays_does_not_depend_on_the_answer_behind_it(method: str, after: tuple[int, ...]) -> None:
    bundle = dropping("llava_clip", keep=0.3, method=method, after=after)
    for sample in asked("llava_clip"):
        short, long = (stays_before(bundle, replace(sample, texts=(text,))) for text in ("two", "nobody knows " * 40))
        assert short == long


def stays_before(bundle: Bundle, sample: Sample) -> list[int]:
    """The places of what is left of a question, whatever answer stands behind it."""
    how = dropping_of(bundle.model.model)
    assert how is not None
    inputs = bundle.prepare("language", [sample])
    with watching(how.ledger) as went, torch.no_grad():
        bundle.encode("language", inputs)
    places = torch.arange(inputs["input_ids"].shape[1])
    for step in went:
        places = (step[0] @ places.float()).long()  # type: ignore[index]
    return [place for place in places.tolist() if place < int(inputs["answer_positions"][0, 0])]


def test_what_sparsevlm_recycles_is_the_mean_of_what_leaves() -> None:
    """With 16 tokens of which 5 stay, 3 of the 11 that leave come back as one: which are the best four is as without."""
    inputs = tiny.bundle("llava_clip").example_inputs("language")
    entered: dict[bool, torch.Tensor] = {}
    shares: dict[bool, torch.Tensor] = {}
    for recycle in (True, False):
        bundle = dropping("llava_clip", keep=0.3, method="sparsevlm", after=(1,), recycle=recycle)
        how = dropping_of(bundle.model.model)
        assert how is not None
        block = bundle.module(bundle.tower("language").blocks[1].path)
        block.input_layernorm.register_forward_pre_hook(  # type: ignore[operator, union-attr]
            lambda _, given, own=recycle: entered.update({own: given[0][0]})
        )
        with watching(how.ledger) as went:
            states(bundle, inputs)
        shares[recycle] = went[0][0]  # type: ignore[index]
    before = before_dropping(inputs)
    for recycle in (True, False):
        torch.testing.assert_close(entered[recycle], shares[recycle] @ before)
    means = shares[True].max(dim=1).values < 1
    assert shares[True][means].sort(descending=True).values[0, :4].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])
    kept = {row.argmax().item() for row in shares[True][~means]}
    assert kept < {row.argmax().item() for row in shares[False]}
    assert len(kept) == len(shares[False]) - 1


def before_dropping(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens (T, C) of the first row as they come out of the first block."""
    plain = tiny.bundle("llava_clip")
    made: list[torch.Tensor] = []
    plain.module(plain.tower("language").blocks[0].path).register_forward_hook(lambda _, __, out: made.append(out[0]))
    states(plain, inputs)
    return made[0]


def test_tokens_leave_again_and_again() -> None:
    bundle = dropping("llava_clip", keep=0.25, method="pyramiddrop", after=(1, 2))
    how = dropping_of(bundle.model.model)
    assert how is not None
    with watching(how.ledger) as seen:
        states(bundle, bundle.example_inputs("language", 1))
    assert [rows.shape[1:] for rows in seen if rows is not None] == [(16 + 8, 16 + 16), (16 + 4, 16 + 8)]


@pytest.mark.parametrize("place", ["blocks", "mlp", "cache"])
def test_the_cache_holds_what_is_left(place: str) -> None:
    bundle = dropping("llava_clip", keep=0.25, after=(2,), place=place)
    cache = getattr(read(bundle, bundle.example_inputs("language", 2), use_cache=True), CACHE)
    assert [layer.keys.shape[2] for layer in cache.layers] == [32, 32, 20]


@every_case
def test_reload_is_bit_equal(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    bundle = dropping(family, keep=0.3, **settings)
    assert not checkpoint.save(bundle, tmp_path / "out").plain_transformers
    again = checkpoint.load(tmp_path / "out")
    inputs = bundle.example_inputs("language", 2)
    with torch.no_grad():
        assert torch.equal(again.encode("language", inputs), bundle.encode("language", inputs))
    samples = asked(family)
    assert again.generate(samples) == bundle.generate(samples)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(pytest.param("llava_clip", settings, id=name) for name, settings in CASES.items()),
        *(
            pytest.param(family, CASES[name], id=f"{family}-{name}")
            for family, name in (
                ("paligemma", "fastv"),
                ("paligemma", "fastv in the cache"),
                ("paligemma", "fastv skipping"),
                ("qwen2_vl", "lftr skipping"),
                ("smolvlm", "sparsevlm"),
                ("llava_next", "pyramiddrop"),
                ("qwen3_vl", "fastv"),
            )
        ),
    ],
)
def test_exported_it_answers_the_same(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    bundle = dropping(family, keep=0.3, **settings)
    samples = [replace(sample, picture=square(sample.picture)) for sample in tiny.asked(3, turns=False)]
    want = bundle.generate(samples)
    artifact = export_onnx(bundle, tmp_path / "out", batches=(2,)).artifact
    operators = {node.op_type for node in onnx.load(artifact.path("language"), load_external_data=False).graph.node}
    assert not operators & {"Loop", "NonZero", "If", "TopK"}
    # Positions on three axes are put together by scattering, with all tokens too.
    assert family == "qwen3_vl" or not operators & {"ScatterElements", "ScatterND"}
    for runner in ("onnxruntime", "openvino"):
        answerer = artifact_answerer(artifact, runner, threads=1)
        assert answerer.generate(samples) == want
        assert [answerer.generate([sample])[0] for sample in samples] == want
        answerer.close()


def square(picture: Any) -> Any:
    return picture.resize((224, 224)) if picture else None


@rtx
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "pyramiddrop"},
        {"method": "sparsevlm", "recycle": True},
        {"method": "sparsevlm", "place": "cache", "after": (1,)},
        {"method": "fastv", "place": "mlp", "after": (1,)},
    ],
)
def test_tensorrt_rtx_parses_and_builds_the_language_part(settings: dict[str, Any], tmp_path: Path) -> None:
    """For the prompt, whose past is empty, and for a further token."""
    bundle = dropping("llava_clip", keep=0.5, **settings)
    artifact = export_onnx(bundle, tmp_path / "out", batches=(1,)).artifact
    trt = load_api("tensorrt_rtx").trt
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(artifact.path("language"))), parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for tokens, past in (((1, 16, 64), (0, 0, 0)), ((1, 1, 1), (1, 16, 128))):
        profile = builder.create_optimization_profile()
        for spec in artifact.component("language").inputs:
            sizes = [[size_of(dim, number, tokens, past) for dim in spec.dims] for number in range(3)]
            profile.set_shape(spec.name, *sizes)
        assert config.add_optimization_profile(profile) >= 0
    assert builder.build_serialized_network(network, config) is not None


def size_of(dim: int | str, number: int, tokens: tuple[int, ...], past: tuple[int, ...]) -> int:
    if isinstance(dim, int):
        return dim
    kinds = {"batch": (1, 1, 2), "tokens": tokens, "past": past}
    return sum(kinds[name.partition("_")[0]][number] for name in dim.split(" + "))


def test_an_exported_cache_is_smaller(tmp_path: Path) -> None:
    sample = next(iter(tiny.asked(1, turns=False)))
    sizes = []
    for bundle in (tiny.bundle("llava_clip"), dropping("llava_clip", keep=0.25, after=(1,))):
        artifact = export_onnx(bundle, tmp_path / f"out{len(sizes)}", batches=(1,)).artifact
        answerer = artifact_answerer(artifact, threads=1)
        sizes.append(answerer.write([sample], 1).cache_bytes)
        answerer.close()
    # In two of three blocks twelve tokens fewer, keys and values of two heads of eight floats.
    assert sizes[0] - sizes[1] == 2 * 12 * 2 * 2 * 8 * 4


def test_beams_find_what_they_find_alone() -> None:
    bundle = dropping("llava_clip", keep=0.3, after=(1,))
    samples = asked("llava_clip")
    bundle.model.generation_config.num_beams = 2
    assert bundle.generate(samples) == [bundle.generate([sample])[0] for sample in samples]


def test_a_cache_may_be_cut_but_its_rows_not_chosen() -> None:
    bundle = dropping("llava_clip", keep=0.3, after=(1,))
    inputs = bundle.example_inputs("language", 2)
    cache = getattr(read(bundle, inputs, use_cache=True), CACHE)
    with torch.no_grad():
        once = bundle.model.model(input_ids=inputs["input_ids"][:, :2], **{CACHE: cache}).last_hidden_state
        cache.crop(-2)
        assert torch.equal(
            bundle.model.model(input_ids=inputs["input_ids"][:, :2], **{CACHE: cache}).last_hidden_state, once
        )
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(UsageError, match="for 1 rows, and 23 for 2 were put in"):
            bundle.model.model(input_ids=inputs["input_ids"][:1, :1], **{CACHE: cache})


def test_attention_that_takes_no_masks_is_refused() -> None:
    bundle = dropping("llava_clip", keep=0.3)
    attention = bundle.model.model.language_model.layers[-1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="computes attention by flash_attention_2"):
        bundle.generate(asked("llava_clip"))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_frames_of_a_video_leave_too(family: str) -> None:
    bundle = dropping(family, keep=0.3)
    sample = next(iter(tiny.asked(1, turns=False)))
    frames = tuple(picture.resize((56, 56)) for picture in tiny.images(4))
    shown = [sample, replace(sample, key="video").showing((), Video(frames, 2.0))]
    answers = bundle.generate(shown)
    assert answers == [bundle.generate([one])[0] for one in shown]
    how = dropping_of(bundle.model.model)
    assert how is not None
    inputs = bundle.prepare("language", [replace(shown[1], texts=("what",))])
    image = torch.isin(inputs["input_ids"], torch.tensor(bundle.tower("language").prompt.image_tokens))  # type: ignore[union-attr]
    with watching(how.ledger) as seen, torch.no_grad():
        bundle.encode("language", inputs)
    assert image.sum() == 8  # two layers of frames of four tokens
    assert ((seen[0].sum(dim=1) > 0) & image).sum() == 2  # type: ignore[union-attr]


def test_a_cache_of_fixed_size_is_refused() -> None:
    bundle = dropping("llava_clip", keep=0.3, after=(1,))
    bundle.model.generation_config.cache_implementation = "static"
    with pytest.raises(UsageError, match="a cache of Static"):
        bundle.generate(asked("llava_clip"))


def test_from_a_cache_alone_they_leave_once_the_prompt_is_read() -> None:
    """Then the prompt is read as by the plain model, and what follows sees the rest: as if those keys were hidden."""
    plain, bundle = tiny.bundle("llava_clip"), dropping("llava_clip", keep=0.3, after=(1,), place="cache")
    inputs = bundle.example_inputs("language", 2)
    how = dropping_of(bundle.model.model)
    assert how is not None
    made = []
    with torch.no_grad():
        for one in (plain, bundle):
            with watching(how.ledger) as seen:
                made.append(read(one, inputs, use_cache=True))
        torch.testing.assert_close(made[0].last_hidden_state, made[1].last_hidden_state, atol=1e-5, rtol=1e-4)
        stays = seen[0].sum(dim=1) > 0  # type: ignore[union-attr]
        hidden = torch.cat([torch.where(stays, 0.0, -1e9), torch.zeros(2, 1)], dim=1)[:, None, None]

        def hide(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": hidden}

        for block in plain.model.model.language_model.layers[1:]:
            block.register_forward_pre_hook(hide, with_kwargs=True)
        further = [
            one.model.model(input_ids=inputs["input_ids"][:, :1], **{CACHE: getattr(before, CACHE)}).last_hidden_state
            for one, before in zip((plain, bundle), made, strict=True)
        ]
    torch.testing.assert_close(*further, atol=1e-5, rtol=1e-4)


def test_who_skips_a_feed_forward_has_its_attention_alone() -> None:
    """As if it said 0 of them; what it computes, and what it learns from, are the others."""
    plain, bundle = tiny.bundle("llava_clip"), dropping("llava_clip", keep=0.3, after=(1,), place="mlp")
    inputs = bundle.example_inputs("language", 2)
    how = dropping_of(bundle.model.model)
    assert how is not None
    given: list[torch.Size] = []
    for block in bundle.model.model.language_model.layers:
        block.mlp.gate_proj.register_forward_hook(lambda _module, args, _made: given.append(args[0].shape))
    with watching(how.ledger) as seen:
        made = states(bundle, inputs)
    assert [shape[1] for shape in given] == [32, 21, 21]
    stays = seen[0].sum(dim=1)[..., None]  # type: ignore[union-attr]
    for block in plain.model.model.language_model.layers[1:]:
        block.mlp.register_forward_hook(lambda _module, _args, said: said * stays)
    torch.testing.assert_close(made, states(plain, inputs), atol=1e-5, rtol=1e-4)


def test_without_feed_forwards_nothing_is_skipped() -> None:
    plain, bundle = tiny.bundle("llava_clip"), dropping("llava_clip", keep=0.3, after=(1,), place="mlp")
    inputs = bundle.example_inputs("language", 2)
    for one in (plain, bundle):
        for block in one.model.model.language_model.layers:
            block.mlp.down_proj.weight.data.zero_()
    torch.testing.assert_close(states(bundle, inputs), states(plain, inputs), atol=1e-5, rtol=1e-4)


def test_skipped_multiply_adds_are_not_counted() -> None:
    """Attention still sees all; a share of the blocks' multiply-adds is met by the tokens that feed-forwards are given."""
    bundles = {
        "all": tiny.bundle("llava_clip"),
        "mlp": dropping("llava_clip", macs=0.9, after=(1,), place="mlp"),
        "blocks": dropping("llava_clip", macs=0.9, after=(1,)),
    }
    images = {
        name: build("drop-visual-tokens", {"keep": 0.5}).fit(bundle, Context())["tokens_kept_after"]
        for name, bundle in bundles.items()
        if name != "all"
    }
    assert images["mlp"]["1"] < images["blocks"]["1"]
    counted = {name: cost_of(bundle).towers["language"].macs for name, bundle in bundles.items()}
    assert counted["mlp"] < counted["all"]


def test_an_error_half_way_leaves_nothing_behind() -> None:
    bundle = dropping("llava_clip", keep=0.3, after=(1,))
    inputs = bundle.example_inputs("language", 2)
    want = states(bundle, inputs)
    last = bundle.model.model.language_model.layers[-1]
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        states(bundle, inputs)
    handle.remove()
    assert torch.equal(states(bundle, inputs), want)


def test_it_trains_and_refuses_gradient_checkpointing() -> None:
    bundle = dropping("llava_clip", keep=0.3)
    inputs = bundle.example_inputs("language", 2)
    bundle.model.train()
    bundle.encode("language", inputs).square().mean().backward()
    gradients = [block.mlp.down_proj.weight.grad for block in bundle.model.model.language_model.layers]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    bundle.model.activation_checkpointing_enable()
    with pytest.raises(UsageError, match="gradient checkpointing"):
        bundle.encode("language", inputs)


def test_blocks_that_others_rely_on_stay_when_blocks_are_pruned() -> None:
    bundle = dropping("llava_clip", keep=0.3, after=(2,))
    assert bundle.tower("language").needed == (1, 2)
    prune = {
        "ratio": 0.3,
        "units": ["blocks"],
        "score": "block-influence",
        "towers": ["language"],
        "compensate": "none",
    }
    made = build("prune", prune)
    plan = made.plan(bundle, Context(data=tiny.data("llava_clip", 8), num_samples=8, batch_size=4))
    made.apply(bundle, plan)
    assert len(bundle.tower("language").blocks) == 2
    samples = asked("llava_clip")
    answers = bundle.generate(samples)
    assert answers == [bundle.generate([sample])[0] for sample in samples]


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("clip", {}, "is given them among its words"),
        ("whisper", {}, "is given them among its words"),
        ("llava_clip", {"after": (3,)}, "can leave after 1 to 2 of the 3 blocks"),
        ("llava_clip", {"after": (0,)}, "can leave after 1 to 2 of the 3 blocks"),
        ("llava_clip", {"after": (0,), "method": "random"}, "can leave after 1 to 2 of the 3 blocks"),
        ("qwen3_vl", {"after": (0,), "method": "random"}, "can leave after 1 to 2 of the 3 blocks"),
        ("llava_clip", {"keep_tokens": 4, "after": (1, 2)}, "tokens leave 2 times"),
        ("llava_clip", {"method": "pyramiddrop", "place": "cache"}, "leave the cache once"),
        ("llava_clip", {"method": "pyramiddrop", "place": "mlp"}, "leave the mlp once"),
    ],
)
def test_what_cannot_be_done_is_said(family: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        build("drop-visual-tokens", settings).check(tiny.bundle(family))
    assert raised.value.hint


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": 0.0}, "0 < keep <= 1"),
        ({"keep_tokens": 0}, "a number >= 1"),
        ({"keep": 0.5, "keep_tokens": 4}, "both keep and keep_tokens"),
        ({"after": (2, 2)}, "numbers that grow"),
        ({"latency_ms": 0.0}, "a number > 0"),
        ({"latency_ms": 9.0, "place": "cache"}, "place cache does not change"),
        ({"macs": 0.5, "place": "cache"}, "place cache does not change"),
        ({"macs": 0.5, "keep": 0.5}, "both keep and macs"),
        ({"macs": 1.5}, "0 < macs <= 1"),
        ({"recycle": True}, "recycle is for methods sparsevlm and"),
        ({"recycle": True, "method": "sparsevlm", "place": "cache"}, "where tokens leave the blocks"),
    ],
)
def test_bad_parameters_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build("drop-visual-tokens", settings)


def test_a_second_time_is_refused() -> None:
    with pytest.raises(UsageError, match="already"):
        build("drop-visual-tokens", {"keep": 0.5}).check(dropping("llava_clip", keep=0.5))


@pytest.mark.parametrize(("family", "after"), [("llava_clip", (1,)), ("llava_clip", (1, 2)), ("qwen2_vl", (2,))])
def test_multiply_adds_are_kept_to_when_counted_anew(family: str, after: tuple[int, ...]) -> None:
    whole = counted(tiny.bundle(family))
    for share in (0.95, 0.8):
        kept = counted(dropping(family, macs=share, after=after, method="random")) / whole
        # One token more in every block, and it would be too much.
        assert kept <= share < kept + 0.1


def counted(bundle: Bundle) -> int:
    """What attentions and MLPs of the language model multiply in their example's prompt."""
    tower = bundle.tower("language")
    paths = [path for block in tower.blocks for path in (block.attention.path, block.mlp.path)]
    inputs = bundle.example_inputs("language")
    return macs_within([bundle.module(path) for path in paths], lambda: bundle.encode("language", inputs))


def test_too_few_multiply_adds_are_refused() -> None:
    with pytest.raises(UsageError, match="macs 0.2 is too small: with one image token left"):
        dropping("llava_clip", macs=0.2, after=(2,))


def test_a_number_of_tokens_holds_for_every_prompt() -> None:
    bundle = dropping("llava_clip", keep_tokens=6, after=(1,))
    how = dropping_of(bundle.model.model)
    assert how is not None
    samples = asked("llava_clip")
    bundle.model.generation_config.max_new_tokens = 1
    family: Any = bundle.family
    for sample in samples:
        ids = family.asked(bundle.model, bundle.processor, [sample])["input_ids"]
        images = int((ids == bundle.model.config.image_token_id).sum())
        with watching(how.ledger) as seen:
            bundle.generate([sample])
        assert seen[0].shape[1] == ids.shape[1] - images + min(images, 6)  # type: ignore[union-attr]
