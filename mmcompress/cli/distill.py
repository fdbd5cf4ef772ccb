"""`mmc distill`: the pass "distill" as a command; the teacher is the original unless another is named."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "distill",
    "distill",
    """  mmc distill STUDENT -o OUT --teacher ORIGINAL --data pairs/ --epochs 2
  torchrun --nproc-per-node 2 -m mmcompress.cli distill STUDENT -o OUT --teacher ORIGINAL --data pairs/""",
)
