"""mmcompress: make multimodal transformers smaller and faster, and prove what it cost.

    import mmcompress as mmc
    from mmcompress import recipe
    mmc.compress("model", recipe.read("recipe.yaml"), "smaller")
    bundle = mmc.load("smaller")

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
    "compress": "mmcompress.jobs.compress",
    "Recipe": "mmcompress.recipe",
    "open_data": "mmcompress.data",
    "MmcError": "mmcompress.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmcompress' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
