"""`mmc quantize`: the pass "quantize" as a command."""

from __future__ import annotations

from mmcompress.cli.single import single_pass

command = single_pass(
    "quantize",
    "quantize",
    """  mmc quantize MODEL -o OUT --scheme W8A8 --data pairs/
  mmc quantize MODEL -o OUT --scheme W8A8 --text-scheme W8A16 --target tensorrt --data pairs/
  mmc quantize MODEL -o OUT --scheme auto --bits 6 --data pairs/ --sensitivity
  mmc quantize VLM -o OUT --scheme W8A16 --language-scheme W4A16 --rounding gptq --data questions/""",
)
