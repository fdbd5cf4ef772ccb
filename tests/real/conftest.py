"""The real dual encoder, built once and cached outside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import assets


@pytest.fixture(scope="session")
def dual_encoder() -> Path:
    """DINOv2-S + MiniLM. Skipped, visibly, only when a package has vanished from the registry."""
    try:
        return assets.dual_encoder()
    except assets.AssetUnavailable as gone:
        pytest.skip(f"a pinned package can no longer be had: {gone}")
