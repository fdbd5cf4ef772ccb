"""`mmc narrow`: the pass "narrow" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "narrow",
    "narrow",
    """  mmc narrow MODEL -o OUT --ratio 0.2 --data questions/ --eval-data held-out/
  mmc narrow MODEL -o OUT --ratio 0.2 --data questions/ --eval-data held-out/ --recover 10m
  mmc narrow CLIP -o OUT --ratio 0.125 --towers vision --data pairs/ --eval-data held-out/ --recover 10m""",
    recovers=True,
)
