"""`mmc rotate`: the pass "rotate" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "rotate",
    "rotate",
    """  mmc rotate VLM -o TURNED --towers language --eval-data held-out/
  mmc quantize TURNED -o OUT --scheme W4A16 --data questions/ --eval-data held-out/""",
)
