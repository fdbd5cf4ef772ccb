"""The real dual encoder, built once and cached outside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import assets
from tests.built import built


@pytest.fixture(scope="session")
def dual_encoder() -> Path:
    """DINOv2-S + MiniLM."""
    return built(assets.dual_encoder)
