"""What a stream is said to consist of is what torch-pruning finds, in every family it can follow."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import pytest

from mmcompress.bundle import Bundle
from mmcompress.errors import MissingError, UsageError
from mmcompress.passes import narrow_crosscheck
from mmcompress.passes.base import Context
from mmcompress.passes.narrow import Narrow
from mmcompress.passes.narrow_crosscheck import crosscheck
from mmcompress.passes.narrow_units import Stream, known, stream_of
from mmcompress.progress import Silent
from tests import tiny

# Blocks have q, k, v, o, up, down and two norms, with gated feed-forwards one Linear more, with scales two parameters. Then there
# are the last norm and its reader, and what goes in: tables, tokens, patches, the product behind a first norm.
SEEN = {("vision", family): 3 * 8 + 2 + 1 for family in ("clip", "altclip", "chinese_clip")} | {
    ("text", "clip"): 2 * 8 + 2 + 2,
    ("vision", "siglip"): 3 * 8 + 2 + 2,
    ("vision", "siglip2"): 3 * 8 + 2 + 1,
    ("text", "siglip"): 2 * 8 + 2 + 2,
    ("text", "siglip2"): 2 * 8 + 2 + 2,
    ("vision", "dual_encoder_vit"): 3 * 8 + 2 + 3,
    ("vision", "dual_encoder_dinov2"): 3 * 10 + 2 + 3,
}
WORDS = dict.fromkeys(
    ("llava_dinov2", "llava_next", "smolvlm", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"), 3 * 9 + 2 + 1
)
"""Language models: of what goes in, torch-pruning follows the word table alone."""
UNFOLLOWED = {
    "siglip2": ["vision_model.embeddings.position_embedding"],
    "dual_encoder_dinov2": ["vision_model.embeddings.mask_token"],
    "llava_next": ["model.multi_modal_projector.linear_2", "model.image_newline"],
}


class Saying(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def streams(bundle: Bundle) -> list[Stream]:
    return [stream_of(tower) for tower in known(bundle)]


@pytest.mark.parametrize("family", [*tiny.MERGING, *WORDS])
def test_streams_are_what_torch_pruning_finds(family: str) -> None:
    pytest.importorskip("torch_pruning")
    bundle, progress = tiny.bundle(family), Saying()
    shapes = {name: (parameter.shape, parameter.requires_grad) for name, parameter in bundle.model.named_parameters()}
    facts = crosscheck(bundle, streams(bundle), progress)
    wanted = {tower: count for (tower, name), count in SEEN.items() if name == family} or {
        "language": WORDS.get(family)
    }
    assert {tower: found["agreed"] for tower, found in facts.items()} == wanted
    first = next(iter(facts.values()))
    if family in UNFOLLOWED:
        assert first["not_followed"] == UNFOLLOWED[family]
        assert all(path in progress.said[0] for path in UNFOLLOWED[family])
    elif family in tiny.MERGING:
        assert not first["not_followed"]
    else:
        # What makes image tokens, which are put where words stand.
        assert all("visual" in path or "modal" in path for path in first["not_followed"])
    after = {name: (parameter.shape, parameter.requires_grad) for name, parameter in bundle.model.named_parameters()}
    assert after == shapes


def changed(stream: Stream, **fields: Any) -> Stream:
    return dataclasses.replace(stream, **fields)


def test_what_is_missing_or_too_much_is_found() -> None:
    pytest.importorskip("torch_pruning")
    bundle = tiny.bundle("dual_encoder_dinov2")
    (stream,) = streams(bundle)
    at = "vision_model.encoder.layer.1"
    forgotten = changed(stream, rows=tuple(row for row in stream.rows if row[1] != "cls_token"))
    with pytest.raises(
        UsageError, match=r"torch-pruning cuts 1 rows of vision_model.embeddings.cls_token that we would not"
    ):
        crosscheck(bundle, [forgotten], Silent())
    unscaled = changed(stream, scales={path: name for path, name in stream.scales.items() if not path.startswith(at)})
    with pytest.raises(UsageError, match=f"cuts 1 rows of {at}.layer_scale1.lambda1, 1 rows of {at}.layer_scale2"):
        crosscheck(bundle, [unscaled], Silent())
    norm = f"{at}.norm1"
    deaf = changed(stream, norms=stream.norms | {norm: stream.norms[norm][1:]})
    with pytest.raises(UsageError, match=f"cuts 1 columns of {at}.attention.q_proj that we would not, and not less"):
        crosscheck(bundle, [deaf], Silent())
    beside = changed(stream, norms=stream.norms | {norm: (*stream.norms[norm], f"{at}.attention.o_proj")})
    with pytest.raises(UsageError, match=f"cuts nothing that we would not, and not 1 columns of {at}.attention.o_proj"):
        crosscheck(bundle, [beside], Silent())


def test_what_torch_pruning_cannot_follow_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")
    bundle = tiny.bundle("dual_encoder_vit")

    def untraceable(*_: Any) -> None:
        raise RuntimeError("no gradient here")

    with monkeypatch.context() as patched:
        patched.setattr(narrow_crosscheck, "dependencies", untraceable)
        with pytest.raises(
            UsageError, match="cannot follow the vision tower of dual_encoder models: RuntimeError: no grad"
        ):
            crosscheck(bundle, streams(bundle), Silent())
    monkeypatch.setattr(narrow_crosscheck, "dependencies", lambda *_: time.sleep(5))
    with pytest.raises(UsageError, match=r"in the vision tower did not end in 0\.05 s"):
        crosscheck(bundle, streams(bundle), Silent(), seconds=0.05)


def test_it_is_asked_first_and_noted() -> None:
    pytest.importorskip("torch_pruning")
    bundle = tiny.bundle("dual_encoder_vit")
    context = Context(data=tiny.data("dual_encoder_vit", 4), num_samples=4)
    plain = Narrow(ratio=0.25).plan(bundle, context)
    asked = Narrow(ratio=0.25, crosscheck=True).plan(bundle, context)
    assert asked.facts["crosscheck"] == {"vision": {"agreed": 29, "not_followed": []}}
    assert (asked.decisions, asked.facts["kept_energy"]) == (plain.decisions, plain.facts["kept_energy"])


def test_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    bundle = tiny.bundle("clip")
    with pytest.raises(MissingError, match="torch-pruning") as caught:
        Narrow(crosscheck=True).plan(bundle, Context())
    assert "pip install" in caught.value.hint
