"""`mmc prune`: the pass "prune" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "prune",
    "prune",
    """  mmc prune MODEL -o OUT --ratio 0.3
  mmc prune MODEL -o OUT --ratio 0.3 --score taylor --data pairs/ --eval-data held-out/
  mmc prune MODEL -o OUT --ratio 0.4 --recover 10m --data pairs/ --eval-data held-out/
  mmc prune MODEL -o OUT --ratio 0.5 --recover 30m --rounds 3 --data pairs/ --eval-data held-out/""",
    recovers=True,
    repeats=True,
)
