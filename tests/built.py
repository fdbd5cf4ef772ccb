"""Real assets in tests: built once and cached, skipped only where a pinned package has vanished from the registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.packages import AssetUnavailable


def built(build: Callable[[], Path]) -> Path:
    """Return what `build` makes. Skips, visibly, when the registry no longer has it; every other error fails the test."""
    try:
        return build()
    except AssetUnavailable as gone:
        pytest.skip(f"a pinned package can no longer be had: {gone}")
