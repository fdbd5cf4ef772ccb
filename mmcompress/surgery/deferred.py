"""Tensors whose values are read when they are needed, so that a model larger than memory can be cut.

A deferred tensor has a shape and a dtype, zeros that share one place in memory (a model of them runs, for shapes), and a function
that makes its values. Cutting one gives another, whose values are made and then cut.

Only `values`, `select`, `multiply` and `surgery.lending` know: what else is computed from a deferred tensor is computed from zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

_READ, _LENT = "_mmc_read", "_mmc_lent_for"


def hollow(like: Tensor) -> Tensor:
    """Return zeros of the shape and dtype of `like` that share one place in memory; a parameter where it is one."""
    zeros = torch.zeros((), dtype=like.dtype).expand(like.shape)
    return nn.Parameter(zeros, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else zeros


def empty(module: nn.Module) -> None:
    """Make all tensors of `module` hollow that are not deferred; those it shares are shared no more."""
    for part in module.modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in own:
            if not is_deferred(tensor):
                setattr(part, name, hollow(tensor))


def defer(tensor: Tensor, read: Callable[[], Tensor]) -> None:
    """Let `read` make the values of the hollow `tensor`, of its shape and of any dtype."""
    setattr(tensor, _READ, read)


def is_deferred(tensor: Tensor) -> bool:
    """Whether a tensor's values have to be asked for."""
    return hasattr(tensor, _READ)


def values(tensor: Tensor) -> Tensor:
    """Return the values of a tensor, in the dtype they are read in; of one that is not deferred, itself."""
    read: Callable[[], Tensor] | None = getattr(tensor, _READ, None)
    return tensor if read is None else read()


def lend(module: nn.Module, made: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy of a layer whose own parameters are what `made` gives for each."""
    filled = copy.copy(module)
    filled._parameters = dict(module._parameters)
    for name, parameter in module.named_parameters(recurse=False):
        filled._parameters[name] = nn.Parameter(made(parameter), requires_grad=False)
        setattr(filled._parameters[name], _LENT, parameter)
    return filled


def take_back(module: nn.Module) -> None:
    """Put parameters of layers that were lent, and that `module` still has, back to what they stood for.

    A bias goes unchanged into the layer that replaces its layer, and stays shared with whom it was shared.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = getattr(parameter, _LENT, parameter)


def is_read(parameter: Tensor) -> bool:
    """Whether a parameter's values are those that are stored: it is deferred, or was lent."""
    return is_deferred(parameter) or hasattr(parameter, _LENT)


@torch.no_grad()
def multiply(parameter: Tensor, factor: Tensor) -> nn.Parameter:
    """Return what `is_read` times `factor`: of a deferred parameter a deferred one; of one that was lent, one that is not."""
    if not is_deferred(parameter):
        return nn.Parameter(parameter * factor, requires_grad=parameter.requires_grad)
    made = nn.Parameter(hollow(parameter).detach(), requires_grad=parameter.requires_grad)
    defer(made, lambda: values(parameter).to(parameter.dtype) * factor.to("cpu"))
    return made


def select(parameter: Tensor, dim: int, kept: Tensor) -> nn.Parameter:
    """Return a deferred parameter with the entries `kept` (K,) of a deferred one along `dim`."""
    shape = list(parameter.shape)
    shape[dim] = len(kept)
    zeros = torch.zeros((), dtype=parameter.dtype).expand(shape)
    made = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
    defer(made, lambda: values(parameter).index_select(dim, kept))
    return made
