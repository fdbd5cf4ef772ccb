"""What tests of `narrow` compare with: a model whose stream is projected, and as wide as before."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.bundle import Bundle
from mmcompress.passes.narrow_units import Stream


@torch.no_grad()
def project_rows(bundle: Bundle, stream: Stream, into: Tensor) -> None:
    """Project all rows of tables that go into a stream, by `into` (C, C)."""
    for path, name in stream.rows:
        rows = bundle.module(path).get_parameter(name)
        rows.copy_(rows @ into)
