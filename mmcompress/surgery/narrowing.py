"""Make what reads and writes a residual stream narrower, in place: structure only, values are put in afterwards.

Shape alphabet: C channels, K channels left.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mmcompress.surgery.linears import selected


def without_gain(norm: nn.Module) -> nn.Module:
    """Return a copy of a norm with a `weight` (C,) of ones and, where it has one, a `bias` (C,) of zeros."""
    made = _with_gain(norm, torch.ones_like(norm.get_parameter("weight")))
    if centres(made) and norm.bias is not None:
        made.register_parameter("bias", nn.Parameter(torch.zeros_like(norm.get_parameter("bias")), requires_grad=False))
    return made


def centres(norm: nn.Module) -> bool:
    """Whether a module is a LayerNorm over channels with gains: an RMS norm of what is left without the mean."""
    return type(norm) is nn.LayerNorm and norm.elementwise_affine and len(norm.normalized_shape) == 1


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


def narrow_norm(norm: nn.Module, width: int) -> None:
    """Make a norm of C channels one of K."""
    for name, _ in list(norm.named_parameters(recurse=False)):
        narrow_rows(norm, name, width)
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        norm.normalized_shape = (width,)


def give_bias(linear: nn.Linear) -> None:
    """Give a Linear without a bias (out,) one of zeros."""
    if linear.bias is None:
        weight = linear.weight
        made = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        linear.bias = nn.Parameter(made, requires_grad=weight.requires_grad)


def with_product(norm: nn.Module, width: int, bias: bool = False) -> nn.Sequential:
    """Return `norm` of C channels with a Linear (C, `width`) behind it: plain modules, which quantize, train and export."""
    weight = norm.get_parameter("weight")
    product = nn.Linear(len(weight), width, bias=False, device="meta", dtype=weight.dtype)
    made = torch.zeros(width, len(weight), dtype=weight.dtype, device=weight.device)
    product.weight = nn.Parameter(made, requires_grad=weight.requires_grad)
    if bias:
        give_bias(product)
    return nn.Sequential(norm, product).train(norm.training)
