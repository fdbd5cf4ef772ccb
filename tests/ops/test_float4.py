"""E2M1 in blocks: every code, ties, scales of both formats by hand, and the outside implementations."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from mmcompress.ops.float4 import BLOCKS, block_scales, fake_float4, from_codes, rounded, to_codes, whole_scale


def test_every_code_is_its_own_nearest() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = from_codes(codes)
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert to_codes(values).tolist() == codes.tolist()


def test_rounding_is_that_of_another_implementation() -> None:
    """All multiples of 1/64 up to 8, with every tie among them, both signs: as ml_dtypes has it."""
    steps = torch.arange(-512, 513) / 64
    theirs = steps.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert to_codes(steps).tolist() == theirs.tolist()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert from_codes(to_codes(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_mxfp4_by_hand() -> None:
    """Largest 6: scale 1. Largest 7: 2 covers it; 1 cuts it off at 6, which is nearer to all the others here. Nothing: zeros."""
    rows = torch.zeros(3, 32)
    rows[0, :4] = torch.tensor([6.0, 3.0, -1.5, 0.5])
    rows[1, :4] = torch.tensor([7.0, 1.5, -1.5, 0.5])
    found = rounded(rows, whole_scale(rows.abs().max(), "mxfp4"), "mxfp4")
    assert found.scale.dtype == torch.uint8
    assert block_scales(found.scale)[:2, 0].tolist() == [1.0, 1.0]
    values = from_codes(found.codes) * block_scales(found.scale).repeat_interleave(32, 1)
    assert values[:2, :4].tolist() == [[6.0, 3.0, -1.5, 0.5], [6.0, 1.5, -1.5, 0.5]]
    assert (values[2] == 0).all()
    # 8 on its own: 4 at a scale of 2, not 6.
    alone = torch.zeros(1, 32)
    alone[0, 0] = 8.0
    found = rounded(alone, torch.ones(()), "mxfp4")
    assert float(from_codes(found.codes)[0, 0] * block_scales(found.scale)[0, 0]) == 8.0


def test_nvfp4_by_hand() -> None:
    """The largest weight 6 * 448 leaves the matrix a scale of 1; its block has 448, another, of 12, 2 or 3."""
    rows = torch.zeros(1, 32)
    rows[0, 0], rows[0, 16], rows[0, 17] = 2688.0, 12.0, 6.0
    whole = whole_scale(rows.abs().max(), "nvfp4")
    assert float(whole) == 1.0
    found = rounded(rows, whole, "nvfp4")
    assert found.scale.dtype == torch.float8_e4m3fn
    values = from_codes(found.codes) * block_scales(found.scale).repeat_interleave(16, 1)
    assert values[0, [0, 16, 17]].tolist() == [2688.0, 12.0, 6.0]
    # 12, 9 and 3: at 2 a step they are 6, 4.5 and 1.5, at 3 they are 4, 3 and 1.
    rows[0, 16:19] = torch.tensor([12.0, 9.0, 3.0])
    found = rounded(rows, whole, "nvfp4")
    assert block_scales(found.scale)[0].tolist() == [448.0, 3.0]
    assert from_codes(found.codes)[0, 16:19].tolist() == [4.0, 3.0, 1.0]


@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_the_better_of_two_scales_is_taken(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator) * torch.logspace(-4, 1, 64)[:, None]
    size = BLOCKS[form]
    whole = whole_scale(weight.abs().max(), form)  # type: ignore[arg-type]
    found = rounded(weight, whole, form)  # type: ignore[arg-type]
    made = from_codes(found.codes) * block_scales(found.scale).repeat_interleave(size, 1) * whole
    error = (made - weight).square().unflatten(1, (-1, size)).sum(-1)
    blocks = weight.unflatten(1, (-1, size))
    for factor in (0.5, 1.0, 2.0):
        if form == "nvfp4" and factor != 1.0:
            continue
        scale = block_scales(found.scale) * whole * factor
        other = fake_float4(blocks, scale[..., None])
        assert (error <= (other - blocks).square().sum(-1) * (1 + 1e-4) + 1e-12).float().mean() > 0.99
    relative = (made - weight).norm(dim=1) / weight.norm(dim=1)
    assert relative.max() < 0.2


def test_gradients_pass_where_nothing_is_cut_off() -> None:
    x = torch.tensor([0.3, -2.4, 6.5], requires_grad=True)
    fake_float4(x, torch.ones(())).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]
