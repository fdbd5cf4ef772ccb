"""`mmc frames`: the pass "merge-frames" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "frames",
    "merge-frames",
    """  mmc frames VLM -o OUT --stride 2 --eval-data videos/
  mmc frames VLM -o OUT --stride 4 --convolution""",
)
