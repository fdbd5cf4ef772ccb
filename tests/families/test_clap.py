"""What only CLAP has: sound beside texts, windows in stages, a bias table cut with its heads, recordings of any length."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmcompress import passes
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, Memory, Sample, Waveform
from mmcompress.errors import UsageError
from mmcompress.evaluate.evaluation import evaluate
from mmcompress.evaluate.store import read_evaluation, write_evaluation
from mmcompress.export.artifact import open_artifact
from mmcompress.export.onnx import export_onnx
from mmcompress.measure.embedder import ArtifactEmbedder
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_units import count_costs, count_tokens, list_groups, read_ranges
from tests import tiny


@pytest.fixture
def bundle() -> Bundle:
    return tiny.bundle("clap")


def test_stages_are_one_stack_of_different_widths(bundle: Bundle) -> None:
    blocks = bundle.tower("audio").blocks
    assert [block.index for block in blocks] == [0, 1, 2, 3]
    assert [block.attention.heads for block in blocks] == [4, 4, 8, 8]
    assert [block.mlp.neurons for block in blocks] == [64, 64, 128, 128]


def test_costs_of_windows_and_tables_by_hand(bundle: Bundle) -> None:
    # C 32, 4 heads of 8, 64 tokens in windows of 16, a table of 7 x 7 offsets.
    tower = bundle.tower("audio")
    heads = list_groups(bundle, [tower], ("heads",), (), count_tokens(bundle, tower))[0]
    assert heads.cost.parameters == 3 * 8 * (32 + 1) + 8 * 32 + 49
    assert heads.cost.macs == 64 * 4 * 8 * 32 + 2 * 64 * 16 * 8


def test_a_head_goes_with_its_column_of_the_bias_table(bundle: Bundle) -> None:
    """Slicing equals masking, and the recount is what was promised."""
    bundle.model.double()
    settings = Prune(ratio=0.1, score="random", compensate="none", units=("heads",), towers=("audio",))
    plan = settings.plan(bundle, Context())
    masked = Bundle(copy.deepcopy(bundle.model), bundle.processor, bundle.family, bundle.source)
    for block in masked.tower("audio").blocks:
        kept = read_ranges(plan.decisions["kept"]["heads"].get(f"audio.{block.index}", "0-7"))
        gone = [head for head in range(block.attention.heads) if head not in kept]
        masked.module(block.attention.reader).weight.data.unflatten(1, (block.attention.heads, -1))[:, gone] = 0  # type: ignore[operator]
    settings.apply(bundle, plan)
    assert [block.attention.heads for block in bundle.tower("audio").blocks] != [4, 4, 8, 8]
    inputs = bundle.example_inputs("audio", 2)
    torch.testing.assert_close(bundle.encode("audio", inputs), masked.encode("audio", inputs), rtol=0, atol=1e-10)
    after = count_costs(bundle, bundle.tower("audio"))
    assert plan.decisions["after"]["audio"] == {"parameters": after.parameters, "macs": after.macs}


def test_a_recording_is_one_sample_however_many_windows_it_has(bundle: Bundle) -> None:
    """The gate gradient of a sample sums over its windows before it is squared: by finite differences."""
    context = Context(data=tiny.spoken(1), num_samples=1, batch_size=1)
    tower = bundle.tower("audio")
    (group,) = [
        g for g in list_groups(bundle, [tower], ("heads",), (1, 2, 3), count_tokens(bundle, tower)) if g.block == 0
    ]
    from mmcompress.passes.prune_effects import _directions, taylor

    (found,) = taylor(bundle, [group], context, "embedding")
    ((inputs, differentiate),) = _directions(bundle, "audio", context, "")
    bundle.model.double()
    reader, step = bundle.module(group.reader), 1e-4
    weight = reader.weight.data.unflatten(1, (group.units, -1))  # type: ignore[operator]
    effects = []
    with torch.no_grad():
        for head in range(group.units):
            values = []
            for scale in (1 + step, (1 - step) / (1 + step)):
                weight[:, head] *= scale
                embedding = bundle.encode("audio", {name: value.double() for name, value in inputs.items()})
                normalised = nn.functional.normalize(embedding, dim=-1)
                # The direction is drawn from the batch's seed; it weighs a double embedding the same way.
                values.append(float(differentiate(normalised, 0)))
            weight[:, head] /= 1 - step
            effects.append((values[0] - values[1]) / (2 * step))
    torch.testing.assert_close(found.double(), torch.tensor(effects).double().square(), rtol=1e-2, atol=1e-9)


def test_stretching_is_what_the_model_does_itself(bundle: Bundle) -> None:
    samples = list(tiny.spoken(2))
    extractor = bundle.processor.audio
    waves = [sample.waveform(tiny.RATE) for sample in samples]
    raw = extractor(waves, sampling_rate=tiny.RATE, return_tensors="pt")["input_features"]
    assert raw.shape == (2, 1, 63, 16)
    prepared = bundle.prepare("audio", samples)["input_features"]
    assert prepared.shape == (2, 1, 64, 16)
    ours, theirs = (bundle.encode("audio", {"input_features": features}) for features in (prepared, raw))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    normalised = bundle.model.get_audio_features(raw).pooler_output
    torch.testing.assert_close(nn.functional.normalize(ours, dim=-1), normalised, rtol=0, atol=1e-4)


def test_the_middle_of_a_long_recording_is_heard(bundle: Bundle) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 2 * tiny.RATE).astype(np.float32)
    long = Sample("long", audio=Waveform(wave, tiny.RATE))
    middle = Sample("middle", audio=Waveform(wave[tiny.RATE // 2 : -tiny.RATE // 2], tiny.RATE))
    features = bundle.prepare("audio", [long, middle])["input_features"]
    assert torch.equal(features[0], features[1])


def test_what_cannot_be_heard_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="'silent' has nothing for the audio tower"):
        bundle.embed_samples([*tiny.spoken(1), Sample("silent", ("a cat",))])
    bundle.model.config.audio_config.num_mel_bins = 32
    with pytest.raises(UsageError, match=r"makes \(63, 16\) .* allows \(32, 32\)"):
        bundle.prepare("audio", list(tiny.spoken(1)))
    bundle.processor.audio = None
    with pytest.raises(UsageError, match="no feature extractor"):
        bundle.prepare("audio", list(tiny.spoken(1)))
    bundle.model.config.audio_config.enable_fusion = True
    with pytest.raises(UsageError, match="feature fusion"):
        bundle.family.model_class(bundle.model.config)


def test_refusals_say_why(bundle: Bundle) -> None:
    for name, params, words in (
        ("prune", {"units": ["blocks"], "score": "random"}, "pairs, of plain and of shifted windows"),
        ("merge-tokens", {"tower": "audio"}, "cut into windows"),
        ("distill", {}, "texts of clap describe sound"),
    ):
        with pytest.raises(UsageError, match=words):
            passes.build(name, params).check(bundle)


def test_one_ratio_of_all_mlps_is_said_in_the_config(bundle: Bundle) -> None:
    halves = {f"audio.{block.index}": f"0-{block.mlp.neurons // 2 - 1}" for block in bundle.tower("audio").blocks}
    made = passes.build("prune", {})
    made.apply(bundle, passes.base.Plan({"kept": {"heads": {}, "neurons": halves, "blocks": {}}}))
    bundle.family.write_config(bundle.model)
    assert bundle.model.config.audio_config.mlp_ratio == 1.0
    with torch.device("meta"):
        again = type(bundle.model)(bundle.model.config)
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in bundle.model.state_dict().items()
    }


class Hearing:
    """Recognises how loud a recording is, and what its text says of that."""

    describes = "audio"

    def embed_samples(self, samples: list[Sample]) -> np.ndarray:
        return np.array(
            [_direction(round(float(np.abs(sample.waveform(tiny.RATE)).max()) * 100)) for sample in samples]
        )

    def embed_images(self, images: list[object]) -> np.ndarray:
        raise AssertionError("there is nothing to see")

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        return np.array([_direction(int(text)) for text in texts])


def _direction(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=16)


def test_retrieval_of_recordings(tmp_path: Path) -> None:
    """Metrics say what is retrieved; silence finds nothing; an evaluation keeps that it was of sound."""
    waves = [np.full(1600, level / 100, np.float32) for level in range(1, 41)]
    data = Dataset(Memory([Sample(f"{i}", (str(i + 1),), audio=Waveform(w, tiny.RATE)) for i, w in enumerate(waves)]))
    found = evaluate(Hearing(), data, ["retrieval"])
    estimates = found.estimates["retrieval"]
    assert {name for name in estimates if name.endswith("r1")} == {"audio_to_text_r1", "text_to_audio_r1"}
    assert estimates["audio_to_text_r1"].value == estimates["text_to_audio_r1"].value == 1.0
    silence = next(control for control in found.controls if control.name == "silence")
    assert (silence.metric, silence.leaks) == ("audio_to_text_r1", False)
    write_evaluation(found, tmp_path / "kept.npz")
    again = read_evaluation(tmp_path / "kept.npz")
    assert again.scene.embeddings.media == "audio"
    assert "audio_cosine" in evaluate(Hearing(), data, ["agreement"], reference=again).estimates["agreement"]


def test_the_exported_towers_hear_what_the_model_hears(bundle: Bundle, tmp_path: Path) -> None:
    export_onnx(bundle, tmp_path / "out")
    embedder = ArtifactEmbedder(open_artifact(tmp_path / "out"))
    assert embedder.describes == "audio"
    samples = list(tiny.spoken(2))
    np.testing.assert_allclose(embedder.embed_samples(samples), bundle.embed_samples(samples), atol=2e-4)
    texts = tiny.texts(2)
    np.testing.assert_allclose(embedder.embed_texts(texts), bundle.embed_texts(texts), atol=2e-4)
