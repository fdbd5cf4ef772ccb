"""What `prune` refuses, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest

from mmcompress.errors import UsageError
from mmcompress.passes import build, schema
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from tests import tiny


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ratio": 1.5}, "prune.ratio is 1.5; expected 0 <= ratio < 1"),
        ({"ratio": -0.1}, "prune.ratio is -0.1"),
        ({"ratios": {"vision": 1.0}}, "prune.ratios.vision is 1.0"),
        ({"units": ["blocks", "heads"]}, "mixes blocks"),
        ({"units": ["head"]}, r"prune.units is \['head'\]"),
        ({"units": ["blocks"], "score": "magnitude"}, "magnitude does not rank blocks"),
        ({"score": "block-influence"}, "block-influence does not rank heads and neurons"),
        ({"multiple": 0}, "prune.multiple is 0"),
        ({"min_keep": 2}, "prune.min_keep is 2"),
        ({"target": 0}, "prune.target is 0"),
        ({"uniform": True, "protect": [0]}, "contradict"),
        ({"score": "best"}, "prune.score is 'best'"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("prune", params)


def test_unknown_towers_and_missing_data() -> None:
    bundle = tiny.bundle("clip")
    with pytest.raises(UsageError, match="clip has no tower 'visoin'") as caught:
        Prune(towers=("visoin",)).check(bundle)
    assert caught.value.hint == "did you mean 'vision'?"
    with pytest.raises(UsageError, match=r"prune\.ratios names 'text'"):
        Prune(towers=("vision",), ratios={"text": 0.1}).check(bundle)
    with pytest.raises(UsageError, match="needs data"):
        Prune().plan(bundle, Context())


def test_every_parameter_has_help() -> None:
    assert all(len(parameter.help) > 20 for parameter in schema("prune").parameters)
