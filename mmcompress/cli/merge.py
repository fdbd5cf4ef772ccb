"""`mmc merge`: the pass "merge-tokens" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "merge",
    "merge-tokens",
    """  mmc merge MODEL -o OUT --keep 0.5
  mmc merge MODEL -o OUT --keep 0.5 --eval-data held-out/
  mmc merge MODEL -o OUT --similarity 0.99 --data pictures/
  mmc merge MODEL -o OUT --keep 0.5 --explain photo.jpg""",
    explains=True,
    recovers=True,
)
