"""`mmc factorize`: the pass "factorize" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "factorize",
    "factorize",
    """  mmc factorize MODEL -o OUT --ratio 0.2 --data pairs/ --eval-data held-out/
  mmc factorize MODEL -o OUT --ratio 0.1 --method svd""",
    recovers=True,
)
