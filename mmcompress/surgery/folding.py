"""Fold what a Linear's input is multiplied by into what makes it: the norm, or another Linear's rows.

    Linear(norm(x) * gain)  =  Linear(norm'(x))        weight' = weight * gain,  bias' = bias * gain

That holds where the norm ends in  … * weight + bias,  and where nothing but these Linears reads what it gives out. Neither is known
of a class by its name (some norms multiply by 1 + weight; some blocks add a norm's output to their own), so both are looked at.
A quantized weight's rows are multiplied by way of their scales: its integers stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mmcompress.surgery.deferred import is_read, multiply
from mmcompress.surgery.quantized_base import Quantized


@torch.no_grad()
def fold(maker: nn.Module, gain: Tensor) -> None:
    """Multiply what a norm or a Linear, quantized or not, gives out by `gain` (C,), in place."""
    assert getattr(maker, "output_scale", None) is None, (
        "its outputs share one grid, which a gain by channel would leave"
    )
    for name, parameter in list(maker.named_parameters(recurse=False)):
        factor = _along_rows(gain, parameter)
        if is_read(parameter):
            setattr(maker, name, multiply(parameter, factor))
        else:
            parameter.mul_(factor)
    if isinstance(maker, Quantized):
        maker.weight_scale.mul_(_along_rows(gain, maker.weight_scale))


def _along_rows(gain: Tensor, tensor: Tensor) -> Tensor:
    return gain.to(tensor).view(-1, *[1] * (tensor.dim() - 1))


def may_fold(module: nn.Module) -> bool:
    """Whether a module has the parameters of a norm: `weight` (C,), perhaps `bias`, and no others."""
    parameters = dict(module.named_parameters())
    return {"weight"} <= parameters.keys() <= {"weight", "bias"} and parameters["weight"].dim() == 1


@torch.no_grad()
def can_fold(norm: nn.Module) -> bool:
    """Whether `fold` does to this norm what it says, found out by trying it on a copy."""
    channels = len(norm.get_parameter("weight"))
    probe = torch.randn(4, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gain = torch.linspace(0.5, 2, channels, dtype=torch.float64)
    plain = copy.deepcopy(norm).to(device="cpu", dtype=torch.float64)
    folded = copy.deepcopy(plain)
    fold(folded, gain)
    wanted: Tensor = plain(probe) * gain
    # Some norms compute in float32 whatever they are given.
    return torch.allclose(folded(probe), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@dataclass
class Readers:
    """Which Linears read what each norm gives out."""

    found: dict[str, set[str]] = field(default_factory=dict)
    """Norm -> the Linears that are given its output as it is."""
    others: set[str] = field(default_factory=set)
    """Norms whose output something else reads, too."""

    def alone(self) -> dict[str, set[str]]:
        """Return the norms that nothing but Linears read, with these."""
        return {norm: linears for norm, linears in self.found.items() if norm not in self.others}


@contextmanager
def watch_readers(norms: Mapping[str, nn.Module], linears: Mapping[str, nn.Module]) -> Iterator[Readers]:
    """Note, of every forward inside, who reads what the `norms` give out: of `linears`, or anything else."""
    readers = Readers()
    owners = {id(linear.weight): path for path, linear in linears.items()}
    # What norms gave out stays alive, or another tensor would be taken for it.
    made: dict[int, tuple[str, Tensor]] = {}

    def hook(path: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                made[id(output)] = (path, output)

        return after

    class Looking(TorchFunctionMode):
        def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = call(*args, **kwargs)
            given = [made[id(leaf)][0] for leaf in tree_leaves((args, kwargs)) if id(leaf) in made]
            if not given:
                return result
            reader = owners.get(id(args[1])) if call is functional.linear and len(args) > 1 else None
            if reader is not None:
                readers.found.setdefault(given[0], set()).add(reader)
            elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not its shape or its dtype
                readers.others.update(given)
            return result

    handles = [norm.register_forward_hook(hook(path)) for path, norm in norms.items()]
    try:
        with Looking():
            yield readers
    finally:
        for handle in handles:
            handle.remove()
