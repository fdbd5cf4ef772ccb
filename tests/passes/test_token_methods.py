"""Passes spell out the methods they take, which are read without importing anything: they are those that surgery knows."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from mmcompress.passes import schema
from mmcompress.surgery import prompt_flow, reducing, reduction


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("merge-tokens", (*get_args(reduction.Method), "random")),
        ("reduce-visual-tokens", get_args(reducing.Method)),
        ("drop-visual-tokens", get_args(prompt_flow.Method)),
    ],
)
def test_every_method_can_be_asked_for(name: str, methods: tuple[Any, ...]) -> None:
    (method,) = (parameter for parameter in schema(name).parameters if parameter.name == "method")
    assert method.choices == methods
