"""Tiny models run in several processes: one thread each is fastest, and keeps forked children safe. Real models get two."""

from __future__ import annotations

import gc

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    """The setting is the process's; a test may have left a runner open that changed it."""
    torch.set_num_threads(2 if request.node.get_closest_marker("real") else 1)
