"""`mmc sparsify`: the pass "sparsify" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "sparsify",
    "sparsify",
    """  mmc sparsify MODEL -o OUT --sparsity 0.5 --data pairs/ --eval-data held-out/
  mmc sparsify MODEL -o OUT --pattern 2:4 --method wanda --data pairs/
  mmc sparsify MODEL -o OUT --sparsity 0.6 --recover 10m --data pairs/ --eval-data held-out/""",
    recovers=True,
)
