"""`mmc search`: the pass "search-prune" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "search",
    "search-prune",
    """  mmc search MODEL -o OUT --ratio 0.4 --data pairs/ --eval-data held-out/
  mmc search MODEL -o OUT --ratio 0.4 --method uvc --units heads,neurons,blocks --data pairs/
  mmc search MODEL -o OUT --ratio 0.4 --max-minutes 15 --recover 15m --data pairs/""",
    recovers=True,
)
