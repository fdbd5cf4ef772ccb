"""`mmc reduce`: the pass "reduce-visual-tokens" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "reduce",
    "reduce-visual-tokens",
    """  mmc reduce VLM -o OUT --keep 0.25
  mmc reduce VLM -o OUT --keep-tokens 64 --method divprune --eval-data held-out/
  mmc reduce VLM -o OUT --keep 0.25 --method selector --data pictures/
  mmc reduce VLM -o OUT --method prumerge --adaptive --data pictures/
  mmc reduce VLM -o OUT --keep 0.25 --explain photo.jpg""",
    explains=True,
)
