"""`mmc prune`: the pass "prune" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "prune",
    "prune",
    """  mmc prune MODEL -o OUT --ratio 0.3
  mmc prune MODEL -o OUT --ratio 0.3 --score taylor --data pairs/ --eval-data held-out/""",
)
