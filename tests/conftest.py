"""Tests run on tiny models: one thread each is fastest, and keeps forked children safe."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
