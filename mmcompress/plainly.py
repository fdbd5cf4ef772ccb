"""Whether plain transformers makes the same model of a checkpoint: found out by building it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from mmcompress.bundle import Bundle
from mmcompress.preprocessing import quiet
from mmcompress.surgery.float_codes import is_float_coded
from mmcompress.surgery.rounded_cache import rounds_cache


def plain_model(bundle: Bundle) -> Any:
    """Return what plain transformers makes of the bundle's config, on meta tensors."""
    with torch.device("meta"), quiet():
        return bundle.family.model_class(bundle.model.config)(bundle.model.config)


def loads_plainly(bundle: Bundle, have: Mapping[str, tuple[int, ...]] | None = None) -> tuple[bool, str]:
    """Return whether plain transformers rebuilds this very model from its config.json, and if not, why not.

    Found out by building it (on meta tensors) and comparing every name and shape, not by trusting what passes did. `have` are
    those of the stored tensors, where they are not the model's own.
    """
    rounded = [name for name, module in bundle.model.named_modules() if rounds_cache(module)]
    bound = [name for name, module in bundle.model.named_modules() if _is_bound(module)]
    want = {name: tuple(tensor.shape) for name, tensor in plain_model(bundle).state_dict().items()}
    if have is None:
        have = {name: tuple(tensor.shape) for name, tensor in bundle.model.state_dict().items()}
        for path, module in bundle.model.named_modules():
            if is_float_coded(module):
                # transformers reads these of the names that bitsandbytes gives their parts.
                have = {name: shape for name, shape in have.items() if not name.startswith(f"{path}.weight")}
                have[f"{path}.weight"] = (module.out_features, module.in_features)
    changed = sorted(set(want) ^ set(have))
    uneven = sorted(name for name in set(want) & set(have) if want[name] != have[name])
    if changed:
        return False, f"{len(changed)} tensors are stored differently, such as {changed[0]}; load with mmcompress.load"
    if uneven:
        name = uneven[0]
        return False, (
            f"config.json cannot say the shapes of {len(uneven)} tensors, such as {name} {list(have[name])}; "
            "load with mmcompress.load"
        )
    if bound:
        return (
            False,
            f"{len(bound)} modules such as {bound[0]} reduce tokens; plain transformers would run without that",
        )
    if rounded:
        return False, (
            f"{len(rounded)} attentions such as {rounded[0]} keep keys and values as integers; plain transformers would keep floats"
        )
    coded = any(is_float_coded(module) for module in bundle.model.modules())
    return True, "with bitsandbytes and accelerate, in bfloat16 on CPUs that have it" if coded else ""


def _is_bound(module: nn.Module) -> bool:
    """Whether a module has methods of its own in place of its class's."""
    return any(isinstance(value, MethodType) and value.__self__ is module for value in vars(module).values())
