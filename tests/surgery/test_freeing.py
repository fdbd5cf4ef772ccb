"""Memory that was freed between blocks still in use goes back to the system."""

from __future__ import annotations

import platform

import pytest
import torch

from mmcompress.measure.memory import resident_bytes
from mmcompress.surgery import freeing


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to give memory back")
def test_freed_memory_between_kept_blocks_is_given_back() -> None:
    # Blocks below 128 KiB come from the heap; larger ones may be mapped one by one and freed at once.
    blocks: list[torch.Tensor | None] = [torch.ones(25_000) for _ in range(1000)]
    for index in range(0, len(blocks), 2):
        blocks[index] = None
    before = resident_bytes()
    freeing.give_back_freed()
    assert before - resident_bytes() > 25 * 2**20
    assert all(block is None or block.sum() == 25_000 for block in blocks)


def test_a_system_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeing, "_malloc_trim", lambda: None)
    freeing.give_back_freed()
