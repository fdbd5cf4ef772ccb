"""Make what reads and writes a residual stream narrower, in place: structure only, values are put in afterwards.

Shape alphabet: C channels, K channels left.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mmcompress.surgery.linears import selected


def without_gain(norm: nn.Module) -> nn.Module:
    """Return a copy of a norm with a `weight` (C,) of ones."""
    return _with_gain(norm, torch.ones_like(norm.get_parameter("weight")))


@torch.no_grad()
def is_rms_norm(norm: nn.Module) -> bool:
    """Whether a module gives out x / rms(x) times its weight (C,), and has nothing else; found out by trying.

    Such a norm commutes with rotations. One that subtracts the mean does not; of one that multiplies by 1 + weight, the gain is
    not the weight.
    """
    parameters = dict(norm.named_parameters())
    if parameters.keys() != {"weight"} or parameters["weight"].dim() != 1:
        return False
    channels = len(parameters["weight"])
    generator = torch.Generator().manual_seed(0)
    probe, turn = (torch.randn(rows, channels, generator=generator) for rows in (4, channels))
    turn = torch.linalg.qr(turn).Q
    plain, scaled = (_with_gain(norm, gain) for gain in (torch.ones(channels), torch.linspace(-0.5, 2, channels)))
    made = plain(probe)
    pairs = (
        (made.square().mean(-1), torch.ones(4)),
        (plain(probe @ turn), made @ turn),
        (scaled(probe), made * scaled.get_parameter("weight")),
    )
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)


def _with_gain(norm: nn.Module, gain: Tensor) -> nn.Module:
    made = copy.deepcopy(norm)  # not `copy.copy`: that shares the hooks
    made.register_parameter("weight", nn.Parameter(gain, requires_grad=False))
    return made


def narrow_rows(module: nn.Module, name: str, width: int) -> None:
    """Cut the parameter `name` (…, C) of `module` to (…, K); an embedding's width follows."""
    parameter = module.get_parameter(name)
    setattr(module, name, selected(parameter, parameter.dim() - 1, torch.arange(width)))
    if isinstance(module, nn.Embedding):
        module.embedding_dim = width


def mixed_norm(norm: nn.Module, width: int) -> nn.Sequential:
    """Return `norm`, K wide already, with a Linear (K, K) behind it: plain modules, which quantize, train and export."""
    weight = norm.get_parameter("weight")
    mix = nn.Linear(width, width, bias=False, device="meta", dtype=weight.dtype)
    made = torch.zeros(width, width, dtype=weight.dtype, device=weight.device)
    mix.weight = nn.Parameter(made, requires_grad=weight.requires_grad)
    return nn.Sequential(norm, mix).train(norm.training)
