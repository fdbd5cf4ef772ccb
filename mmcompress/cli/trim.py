"""`mmc trim`: the pass "trim-vocabulary" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "trim",
    "trim-vocabulary",
    """  mmc trim MODEL -o OUT --data pairs/ --eval-data held-out/
  mmc trim MODEL -o OUT --tokens 4000 --data pairs/""",
)
