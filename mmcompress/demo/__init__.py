"""The embedded default of `mmc demo`: a small real CLIP and drawings to try it on. Only paths here; see NOTICE for licences."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent

CLIP = FOLDER / "clip"
"""A CLIPModel checkpoint (fp16) with its image processor and tokenizer."""
TEST = FOLDER / "test.tar.gz"
"""Held-out vendor's drawings as a packed webdataset shard: `<hexcode>.png`, `<hexcode>.json` (text, tags, label, group)."""
TRAIN = FOLDER / "train.tar.gz"
"""Drawings of training vendors for calibration and distillation, in the same form."""
CLASSES = FOLDER / "classes.json"
"""Zero-shot classes and prompt templates: {"classes": [...], "templates": [...]}; a sample's `label` is one of the classes."""
RECIPE = FOLDER / "recipe.yaml"
"""All four passes, in the order that works."""
NOTICE = FOLDER / "NOTICE"
"""Who made what, under which licence."""
