"""`mmc drop`: the pass "drop-visual-tokens" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "drop",
    "drop-visual-tokens",
    '''  mmc drop VLM -o OUT --keep 0.25
  mmc drop VLM -o OUT --method pyramiddrop --after 8,16,24 --keep 0.125 --eval-data held-out/
  mmc drop VLM -o OUT --method recoverable --adaptive --data questions/
  mmc drop VLM -o OUT --keep 0.25 --explain photo.jpg --prompt "What is on the table?"''',
    explains=True,
)
