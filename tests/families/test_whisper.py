"""What only Whisper has: rows that are distributions, start tokens, 30 seconds, cache indices, a config that says one width."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import WhisperProcessor

from mmcompress import checkpoint, passes
from mmcompress.bundle import Bundle
from mmcompress.data import Sample, Waveform
from mmcompress.errors import UsageError
from mmcompress.families.whisper import FORCED_TOKENS
from mmcompress.jobs.inspect import inspect
from mmcompress.passes.base import Context, Plan
from tests import tiny

VOCABULARY = 25


@pytest.fixture
def bundle() -> Bundle:
    return tiny.bundle("whisper")


def decoder_rows(bundle: Bundle, samples: list[Sample]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the decoder's rows (B, T, V) and what they were made of."""
    inputs = bundle.prepare("decoder", samples)
    with torch.no_grad():
        return bundle.encode("decoder", inputs).unflatten(1, (-1, VOCABULARY)), inputs


def keep_blocks(bundle: Bundle, kept: dict[str, str]) -> None:
    passes.build("prune", {"units": ["blocks"]}).apply(
        bundle, Plan({"kept": {"heads": {}, "neurons": {}, "blocks": kept}})
    )


def test_decoder_rows_are_roots_of_distributions_and_zero_at_padding(bundle: Bundle) -> None:
    rows, inputs = decoder_rows(bundle, list(tiny.spoken(3)))
    mask = inputs["decoder_mask"]
    assert not mask.bool().all()  # texts differ in length, or nothing would be padded
    torch.testing.assert_close(rows.square().sum(-1), mask.float())
    logits = bundle.model(input_features=inputs["input_features"], decoder_input_ids=inputs["decoder_input_ids"]).logits
    torch.testing.assert_close(rows.square(), logits.softmax(-1) * mask[..., None])


def test_one_minus_cosine_of_decoder_rows_is_a_quarter_of_the_divergence(bundle: Bundle) -> None:
    """KL(p, q) = sum d^2 / 2p and sum (sqrt p - sqrt q)^2 = sum d^2 / 4p to leading order in d = q - p; 1 - cos is half of that."""
    samples = list(tiny.spoken(3))
    before, _ = decoder_rows(bundle, samples)
    with torch.no_grad():
        bundle.model.model.decoder.layers[0].fc2.weight.mul_(1.05)
    after, inputs = decoder_rows(bundle, samples)
    real = inputs["decoder_mask"].bool()
    p, q = (
        rows[real].double().square() / rows[real].double().square().sum(-1, keepdim=True) for rows in (before, after)
    )
    divergence = (p * (p / q).log()).sum(-1).mean()
    assert divergence > 1e-6
    cosine = nn.functional.cosine_similarity(before[real].double().flatten(), after[real].double().flatten(), dim=0)
    torch.testing.assert_close(1 - cosine, divergence / 4, rtol=0.05, atol=0)


def test_gradients_stay_finite_where_a_probability_is_zero(bundle: Bundle) -> None:
    with torch.no_grad():
        bundle.model.proj_out.weight.mul_(300)
    inputs = bundle.example_inputs("decoder", 2)
    rows = bundle.encode("decoder", inputs)
    assert (rows == 0).any()  # float32 holds no such root
    rows.sum().backward()
    gradients = [p.grad for p in bundle.model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_text_led_through_is_start_tokens_then_words(bundle: Bundle) -> None:
    sample = Sample("a", ("red cat",), audio=tiny.recordings(1)[0])
    inputs = bundle.prepare("decoder", [sample])
    words = bundle.processor.tokenizer.convert_tokens_to_ids(["red", "cat"])
    assert inputs["decoder_input_ids"].tolist() == [[1, 24, *words]]
    assert inputs["decoder_mask"].tolist() == [[1, 1, 1, 1]]


def test_a_greedy_answer_is_what_the_rows_put_first(bundle: Bundle) -> None:
    """Led through its own answer, the decoder puts each next token of it first (of those it may write)."""
    bundle.model.generation_config.suppress_tokens = [0, 1, 2, 3, 24]  # words only, so that the text says every token
    samples = list(tiny.spoken(3))
    answers = bundle.generate(samples)
    rows, inputs = decoder_rows(bundle, [replace(s, texts=(a,)) for s, a in zip(samples, answers, strict=True)])
    assert inputs["decoder_input_ids"].shape[1] == 2 + 12  # half of the decoder's 24 places
    rows[..., [0, 1, 2, 3, 24]] = 0
    assert torch.equal(rows[:, 1:-1].argmax(-1), inputs["decoder_input_ids"][:, 2:])


def test_a_transcript_starts_with_a_space(bundle: Bundle) -> None:
    seen: list[str] = []

    def tokenizer(texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        seen.extend(texts)
        return {"input_ids": [[4] for _ in texts]}

    bundle.processor.tokenizer = tokenizer
    bundle.prepare("decoder", [Sample("a", ("red cat ", "other"), audio=tiny.recordings(1)[0])])
    assert seen == [" red cat"]


def test_example_inputs_start_as_a_text_does(bundle: Bundle) -> None:
    ids = bundle.example_inputs("decoder", 2)["decoder_input_ids"]
    assert ids[:, :2].tolist() == [[1, 24]] * 2


def test_padding_and_marks_are_no_part_of_an_answer(bundle: Bundle) -> None:
    """Texts of one batch that end at different places."""
    with torch.no_grad():
        bundle.model.proj_out.weight[3] *= 3  # the end comes sooner
    answers = bundle.generate(list(tiny.spoken(6)))
    assert len({len(answer.split()) for answer in answers}) > 1
    assert not any("[" in answer for answer in answers)


def test_long_transcripts_are_cut(bundle: Bundle) -> None:
    sample = Sample("a", ("cat " * 500,), audio=tiny.recordings(1)[0])
    assert bundle.prepare("decoder", [sample])["decoder_input_ids"].shape[1] == min(24, FORCED_TOKENS + 2)


def test_a_transcript_that_was_cut_has_no_end_and_start_tokens_are_no_part_of_it(bundle: Bundle) -> None:
    recording = tiny.recordings(1)[0]
    samples = [Sample("a", ("red cat",), audio=recording), Sample("b", ("cat " * 500,), audio=recording)]
    tokens = bundle.forced.next_tokens(bundle.model, bundle.prepare("decoder", samples))
    cat = bundle.processor.tokenizer.convert_tokens_to_ids("cat")
    # At the start token nothing is asked, at "no timestamps" the first word; the end (3) follows the last one.
    assert tokens[0, :5].tolist() == [-1, bundle.processor.tokenizer.convert_tokens_to_ids("red"), cat, 3, -1]
    assert tokens[1].tolist() == [-1] + [cat] * 22 + [-1]


def test_what_a_sample_offers_each_tower(bundle: Bundle) -> None:
    audio = tiny.recordings(1)[0]
    heard, read = Sample("a", audio=audio), Sample("b", ("a cat",))
    both = Sample("c", ("a cat", "another text"), audio=audio)
    assert [bundle.items("audio", sample) for sample in (heard, read, both)] == [[heard], [], [both]]
    assert [bundle.items("decoder", sample) for sample in (heard, read, both)] == [[], [], [both]]


def test_a_longer_recording_is_answered_in_windows_of_what_the_model_hears(bundle: Bundle) -> None:
    first, second, short = (wave.samples for wave in tiny.recordings(3, seed=1))
    quiet = np.zeros(tiny.RATE // 5, np.float32)
    joined = np.concatenate([first, quiet, second])
    assert len(joined) > tiny.RATE >= len(first) + len(quiet)
    long = Sample("long", ("a red cat",), audio=Waveform(joined, tiny.RATE))
    pieces = [piece.waveform(tiny.RATE) for piece in bundle.family.pieces(bundle.processor, long)]
    np.testing.assert_array_equal(np.concatenate(pieces), joined)
    assert len(pieces) == 2
    assert len(first) <= len(pieces[0]) <= len(first) + len(quiet)
    alone = Sample("short", audio=Waveform(short, tiny.RATE))
    windows = [Sample(str(number), audio=Waveform(wave, tiny.RATE)) for number, wave in enumerate(pieces)]
    said = bundle.generate([*windows, alone])
    assert said[0] != said[1]
    assert bundle.generate([long, alone]) == [f"{said[0]} {said[1]}", said[2]]


def test_of_a_longer_recording_passes_see_the_first_window(bundle: Bundle) -> None:
    """With the beginning of its transcript, which is what the decoder is led through."""
    wave = np.concatenate([one.samples for one in tiny.recordings(4)])
    sample = Sample("long", ("a",), audio=Waveform(wave, tiny.RATE))
    first = bundle.family.pieces(bundle.processor, sample)[0]
    for tower in ("audio", "decoder"):
        want, got = (bundle.prepare(tower, [one]) for one in (first, sample))
        assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_model_is_not_given_more_than_it_hears(bundle: Bundle) -> None:
    sample = Sample("long", ("a",), audio=Waveform(np.zeros(tiny.RATE + 1, np.float32), tiny.RATE))
    with pytest.raises(UsageError, match=r"'long' lasts 1\.0 s; whisper hears 1 s at once"):
        bundle.family.asked(bundle.model, bundle.processor, [sample])


@pytest.mark.parametrize(("part", "tower"), [("audio", "audio"), ("tokenizer", "decoder")])
def test_missing_preprocessing_is_named(part: str, tower: str, bundle: Bundle) -> None:
    setattr(bundle.processor, part, None)
    with pytest.raises(UsageError, match=r"no (feature extractor|tokenizer)"):
        bundle.prepare(tower, list(tiny.spoken(1)))


def test_a_feature_extractor_of_another_size_is_refused(bundle: Bundle) -> None:
    bundle.model.config.num_mel_bins = 80
    with pytest.raises(UsageError, match=r"makes \(20, 100\) .* says \(80, 100\)"):
        bundle.prepare("audio", list(tiny.spoken(1)))


MANY = {"lang_to_id": {"<|en|>": 5, "<|de|>": 6}, "task_to_id": {"transcribe": 7, "translate": 8}}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [1, 24]),
        ({"no_timestamps_token_id": None}, [1]),
        (MANY, [1, 5, 7, 24]),
        ({**MANY, "language": "<|de|>", "task": "translate"}, [1, 6, 8, 24]),
        ({**MANY, "language": "german"}, [1, 6, 7, 24]),
        ({**MANY, "language": "de"}, [1, 6, 7, 24]),
    ],
)
def test_start_tokens_are_those_generation_starts_with(
    settings: dict[str, Any], wanted: list[int], bundle: Bundle
) -> None:
    generation = bundle.model.generation_config
    for name, value in settings.items():
        setattr(generation, name, value)
    assert bundle.family.start_tokens(bundle.model) == wanted  # type: ignore[attr-defined]
    if "lang_to_id" not in settings or "language" in settings:  # else it would detect the language
        generation.return_timestamps = False
        theirs = bundle.model._retrieve_init_tokens(None, 1, generation, bundle.model.config, 100, {})
        if "no_timestamps_token_id" not in settings:
            assert theirs.tolist() == [wanted]


def test_dropped_blocks_are_renumbered_for_the_cache(bundle: Bundle) -> None:
    keep_blocks(bundle, {"audio": "0,2", "decoder": "1"})
    layer = bundle.model.model.decoder.layers[0]
    assert (layer.self_attn.layer_idx, layer.encoder_attn.layer_idx) == (0, 0)
    bundle.family.write_config(bundle.model)
    samples = list(tiny.spoken(3))
    answers = bundle.generate(samples)
    bundle.model.generation_config.use_cache = False
    assert bundle.generate(samples) == answers


def test_the_config_says_depth_and_width_of_both_sides(bundle: Bundle, tmp_path: Path) -> None:
    """OpenAI's configs also hold num_hidden_layers, which transformers reads as another name of encoder_layers."""
    bundle.source = replace(bundle.source, config={**bundle.source.config, "num_hidden_layers": 3})
    keep_blocks(bundle, {"audio": "0,2", "decoder": "1"})
    kept = {f"{tower}.{index}": "0-31" for tower, index in (("audio", 0), ("audio", 1), ("decoder", 0))}
    passes.build("prune", {}).apply(bundle, Plan({"kept": {"heads": {}, "neurons": kept, "blocks": {}}}))
    written = checkpoint.save(bundle, tmp_path / "model")
    assert written.plain_transformers, written.why
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    found = {key: config.get(key) for key in ("encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim")}
    assert found == {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    assert config.get("num_hidden_layers") in (None, 2)


@pytest.mark.parametrize("together", [False, True], ids=["preprocessor_config", "processor_config"])
def test_feature_extractor_tokenizer_and_generation_config_come_back(
    together: bool, bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    bundle.model.save_pretrained(folder)
    parts = bundle.processor
    if together:
        WhisperProcessor(parts.audio, _whisper_tokenizer()).save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    if not together:
        parts.audio.save_pretrained(folder)
    loaded = checkpoint.load(folder)
    assert loaded.processor.image is None
    samples = list(tiny.spoken(3))
    assert loaded.generate(samples) == bundle.generate(samples)
    checkpoint.save(loaded, tmp_path / "again")
    assert checkpoint.load(tmp_path / "again").generate(samples) == bundle.generate(samples)
    name = "processor_config.json" if together else "preprocessor_config.json"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_tokens_of_the_decoder_cannot_be_merged(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="decoder tower's tokens cannot be merged: the decoder writes one token"):
        passes.build("merge-tokens", {"tower": "decoder"}).check(bundle)


@pytest.mark.parametrize("method", ["tome", "random"])
def test_the_decoder_hears_the_merged_states_and_encode_puts_them_back(bundle: Bundle, method: str) -> None:
    made = passes.build("merge-tokens", {"merged": (20, 0, 9), "method": method})
    made.apply(bundle, made.plan(bundle, Context()))
    assert bundle.example_inputs("decoder", 2)["encoder_hidden_states"].shape == (2, 21, 48)
    features = bundle.example_inputs("audio", 2)
    with torch.no_grad():
        heard = bundle.model.model.encoder(**features).last_hidden_state
        placed = bundle.encode("audio", features).unflatten(1, (50, 48))
    assert heard.shape == (2, 21, 48)
    for states, places in zip(heard, placed, strict=True):
        apart = (places[:, None] - states).abs().amax(dim=2)  # (50, 21)
        assert apart.amin(dim=0).max() < 1e-5
        # Where a state was dropped stands the mean of the others.
        assert method == "random" or apart.amin(dim=1).max() < 1e-5
    samples = list(tiny.spoken(3))
    assert bundle.generate(samples) == [bundle.generate([sample])[0] for sample in samples]


def test_inspect_counts_each_tower_and_says_why_not(bundle: Bundle, tmp_path: Path) -> None:
    checkpoint.save(bundle, tmp_path / "model")
    found = inspect(tmp_path / "model")
    audio, decoder = found["towers"]
    assert (audio["name"], audio["blocks"], audio["neurons"], audio["tokens"]) == ("audio", 3, "128", 50)
    assert (decoder["name"], decoder["blocks"], decoder["neurons"]) == ("decoder", 2, "96")
    assert audio["parameters"] + decoder["parameters"] == sum(p.numel() for p in bundle.model.parameters())
    applies = {(row["pass"], row["tower"]): row["applies"] for row in found["passes"]}
    assert applies == {
        (name, tower): name in ("prune", "search-prune", "factorize", "rotate", "sparsify", "quantize", "distill")
        or (name in ("merge-tokens", "coarsen-tokens") and tower == "audio")
        or (name == "trim-vocabulary" and tower == "decoder")
        for name in passes.PASSES
        for tower in ("audio", "decoder")
    }
    assert all(row["applies"] or row["reason"] for row in found["passes"])


def _whisper_tokenizer() -> Any:
    from transformers import WhisperTokenizer

    words = {word: index for index, word in enumerate(["<|endoftext|>", "a", "b"])}
    return WhisperTokenizer(vocab=words, merges=[])


def test_the_decoder_learns_nothing_about_the_encoder_from_its_rows(bundle: Bundle) -> None:
    """The encoder runs without a graph: a decoder is scored and repaired by itself, at a decoder's cost."""
    bundle.encode("decoder", bundle.prepare("decoder", list(tiny.spoken(2)))).sum().backward()
    assert all(p.grad is None for p in bundle.model.model.encoder.parameters())
    assert isinstance(bundle.model.proj_out, nn.Linear)
    assert bundle.model.proj_out.weight.grad.abs().sum() > 0
