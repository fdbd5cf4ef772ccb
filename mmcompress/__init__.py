"""mmcompress: make multimodal transformers smaller and faster, and prove what it cost.

    import mmcompress as mmc
    bundle = mmc.load("model")
    mmc.compress(bundle, "recipe.yaml", output="smaller")

Names are imported on first use, so that `import mmcompress` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Bundle": "mmcompress.bundle",
    "load": "mmcompress.checkpoint",
    "save": "mmcompress.checkpoint",
    "compress": "mmcompress.pipeline",
    "Recipe": "mmcompress.recipe",
    "open_data": "mmcompress.data",
    "MmcError": "mmcompress.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmcompress' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
