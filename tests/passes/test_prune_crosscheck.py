import sys
import time

import pytest

from mmcompress.errors import MissingError, UsageError
from mmcompress.passes import prune_crosscheck
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_crosscheck import crosscheck, unit_channels
from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_our_groups_are_torch_prunings(family: str) -> None:
    pytest.importorskip("torch_pruning")
    bundle = tiny.bundle(family)
    flags = [parameter.requires_grad for parameter in bundle.model.parameters()]
    # 3 vision and 2 text blocks, one head and one neuron each.
    assert crosscheck(bundle, bundle.towers()) == 10
    assert [parameter.requires_grad for parameter in bundle.model.parameters()] == flags


def test_groups_are_what_a_head_and_a_neuron_are_made_of() -> None:
    bundle = tiny.bundle("clip")
    head, neuron, *_ = unit_channels(bundle, bundle.tower("vision"))
    at = "vision_model.encoder.layers.0"
    last = list(range(36, 48))
    writers = {(f"{at}.self_attn.{name}_proj", "rows"): last for name in "qkv"}
    assert head == {**writers, (f"{at}.self_attn.out_proj", "columns"): last}
    assert neuron == {(f"{at}.mlp.fc1", "rows"): [95], (f"{at}.mlp.fc2", "columns"): [95]}


def test_an_incomplete_group_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")
    real = prune_crosscheck.unit_channels

    def forgetful(*args):  # type: ignore[no-untyped-def]
        for channels in real(*args):
            yield {key: value for key, value in channels.items() if not key[0].endswith("v_proj")}

    monkeypatch.setattr(prune_crosscheck, "unit_channels", forgetful)
    with pytest.raises(UsageError, match=r"torch-pruning cuts .*12 rows of .*v_proj.*, we would cut"):
        Prune(crosscheck=True).check(tiny.bundle("clip"))


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(prune_crosscheck, "dependencies", lambda *_: time.sleep(5))
    bundle = tiny.bundle("clip")
    with pytest.raises(UsageError, match=r"in the vision tower did not end in 0\.05 s"):
        crosscheck(bundle, bundle.towers(), seconds=0.05)


def test_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    bundle = tiny.bundle("clip")
    with pytest.raises(MissingError, match="torch-pruning") as caught:
        crosscheck(bundle, bundle.towers())
    assert "pip install" in caught.value.hint
