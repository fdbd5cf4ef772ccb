"""`mmc coarsen`: the pass "coarsen-tokens" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "coarsen",
    "coarsen-tokens",
    """  mmc coarsen DUAL-ENCODER -o OUT --keep 0.5 --eval-data long-texts/
  mmc coarsen WHISPER -o OUT --keep 0.6 --run 4 --first 1""",
)
