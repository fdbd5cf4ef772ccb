"""AdaRound: learning for each weight whether it goes up or down, so that the output changes least.

The nearest place of a grid is the best one for a weight alone, not for all weights of a row together. A row lies between its
places rounded down, f, and those one step s above them. AdaRound (Nagel et al. 2020, arXiv 2004.10568, sections 3.2 and 3.3) lets
each weight stand in between, q = s (f + h(V)), and learns V by Adam:

    h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)        zeta 1.1, gamma -0.1
    loss = error of the output + lambda * sum(1 - |2 h(V) - 1|^beta)

The second term, the regulariser, is off during the first fifth, and then pushes every h to 0 or 1: with beta 20 only those that are
nearly there, and as it falls to 2 all. V begins where q = w. What h is at the end decides.

Deliberate differences:

* The error is (w - q) H (w - q)' for the second moment H = E[x x'] of the layer's inputs: what the paper estimates from batches of
  samples, exactly. No input has to be kept, and so few iterations do.
* A weight's part of the regulariser is multiplied by s^2 H_jj, twelve times what rounding it alone costs. So lambda has a meaning
  whatever the units of inputs and weights, and however much some inputs are larger than others: where it is above 1/4, the loss has
  no minimum left between 0 and 1 at beta 2. With one lambda for all, an attention's queries lost three times as much.
* No activation function follows, and inputs are those of the float model, as for GPTQ (see `passes.quantize_moments`).
* A row that comes out worse than rounded to nearest on the same grid is rounded to nearest.
* A weight that lies on its grid stays where it is, and so does one beyond its ends: so a weight that is 0 stays 0.

Shape alphabet: R rows (outputs), C columns (inputs), G groups of S columns each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmcompress.ops.gptq import output_error
from mmcompress.ops.grouped import Grouped, on_grid
from mmcompress.ops.rounding import UINT4, Levels

ZETA, GAMMA = 1.1, -0.1
FIRST_BETA, LAST_BETA = 20.0, 2.0
WARM_UP = 0.2
"""The share of iterations without regulariser."""
LAMBDA = 0.3
RATE = 0.1
"""Adam's; with 0.03 it is too slow for so few iterations, 0.3 gains nothing."""
ITERATIONS = 200
"""Of three Linears of SmolLM2 (groups of 32) they leave 0.21, 0.21 and 0.22 of what rounding to nearest does to outputs, 500 leave
0.27, 0.15 and 0.18 in two and a half times the time, which is a minute for ten million weights already."""
AT_ONCE = 2**18
"""Weights that are learned together: as many as stay in a core's caches, a dozen numbers for each."""
WORKING_BYTES = 12 * 4 * AT_ONCE


def adaround(
    weight: Tensor,
    moment: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    levels: Levels = UINT4,
    iterations: int = ITERATIONS,
) -> Grouped:
    """Round `weight` (R, C) to the grids (R, G) so that the output changes least, for inputs of second moment `moment` (C, C)."""
    plain = on_grid(weight, scale, zero_point, levels)
    moment = moment.float()
    rows = max(1, AT_ONCE // weight.shape[1])
    codes = torch.cat(
        [
            _learned(weight[part], moment, scale[part], zero_point[part], levels, iterations)
            for part in (slice(start, start + rows) for start in range(0, len(weight), rows))
        ]
    )
    learned = Grouped(codes, scale, zero_point)
    worse, better = (output_error(weight, each.dequantized(), moment) for each in (plain, learned))
    return learned.where(better < worse, plain)


def rectified(values: Tensor) -> Tensor:
    """Return h(V): the part of a step that each weight goes up."""
    return values.sigmoid().mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def regulariser(parts: Tensor, beta: float) -> Tensor:
    """Return 1 - |2 h - 1|^beta, which is 0 for parts of a step h that are 0 or 1."""
    return 1 - (2 * parts - 1).abs().pow(beta)


def slope(parts: Tensor, beta: float) -> Tensor:
    """Return the derivative of the regulariser by h."""
    sides = 2 * parts - 1
    return sides.abs().pow_(beta - 1).mul_(sides.sign()).mul_(-2 * beta)


def annealed(progress: float) -> float:
    """Return beta where `progress`, 0..1, of the regularised iterations are done: along half a cosine."""
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 + math.cos(math.pi * progress)) / 2


def _learned(
    weight: Tensor, moment: Tensor, scale: Tensor, zero_point: Tensor, levels: Levels, iterations: int
) -> Tensor:
    """Return codes (R, C)."""
    size = weight.shape[1] // scale.shape[1]
    step, zero = (each.float().repeat_interleave(size, 1) for each in (scale, zero_point))
    places = weight.detach().float() / step
    down = places.floor()
    part = places - down
    down += zero
    free = (part > 0) & (down >= levels.low) & (down < levels.high)
    base = torch.where(free, down, (places.round() + zero).clamp_(levels.low, levels.high))
    # Rows have a loss of their own each. As large as this, none is too small for what Adam adds to its denominators.
    unit = (step.square() * moment.diagonal()).mean(1, keepdim=True)
    step /= torch.where(unit > 0, unit, torch.ones_like(unit)).sqrt()
    left = (places + zero - base).mul_(step)
    moved = step * free
    alone = step.square() * moment.diagonal()
    values = ((part - GAMMA) / (ZETA - GAMMA)).logit_()
    optimizer = torch.optim.Adam([values], lr=RATE, fused=True)
    first = round(WARM_UP * iterations)
    for iteration in range(iterations):
        sigmoid = values.sigmoid()
        parts = sigmoid * (ZETA - GAMMA) + GAMMA
        inside = (parts > 0) & (parts < 1)
        parts.clamp_(0, 1)
        gradient = ((left - parts * moved) @ moment).mul_(moved).mul_(-2)
        if iteration >= first:
            gradient.add_(slope(parts, annealed((iteration - first) / (iterations - first))).mul_(alone), alpha=LAMBDA)
        values.grad = gradient.mul_(sigmoid.mul_(1 - sigmoid)).mul_(inside).mul_(ZETA - GAMMA)
        optimizer.step()
    up = (rectified(values) >= 0.5) & free
    return (base + up).to(levels.dtype)
