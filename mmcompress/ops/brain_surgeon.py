"""How much the output of a Linear changes when input channels go and the weights of the others are refitted: optimal brain surgeon.

Let H be the second moments of the inputs and W the weights (out, C). When the channels S of a unit go and all others are refitted
by least squares, the mean squared error of the output grows by

    trace( W_S ([H^-1]_SS)^-1 W_S' )          [H^-1]_SS^-1: what of x_S the other channels do not tell (the Schur complement)

and what is left has ``W_K - W_S ([H^-1]_SS)^-1 [H^-1]_SK`` and the inverse ``[H^-1]_KK - [H^-1]_KS ([H^-1]_SS)^-1 [H^-1]_SK``.
Scores come from removing units for good, one after the other, the cheapest first: of two that say the same, one is worth nothing
as long as the other stays, and much once that has gone.

Sources and deliberate differences: Hassibi and Stork 1993 (single weights); SparseGPT (Frantar and Alistarh 2023), which does not
refit before it compares; whole columns and heads: ZipLM (Kurtic et al. 2023). A unit that became cheaper because
another went before it gets that one's score, so that scores order units as they went. Where there are more than 64 units,
candidates are looked for 64 times: twice as many as go until the next time, and each of them is chosen knowing what went before.

Shape alphabet: C channels = U units of equal width D, K channels kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 64


def removal_costs(weight: Tensor, inverse: Tensor, units: int) -> Tensor:
    """Return how much the output's mean squared error grows when a unit goes, of each: weight (out, C), inverse (C, C) -> (U,)."""
    blocks = inverse.unflatten(0, (units, -1)).unflatten(2, (units, -1)).diagonal(dim1=0, dim2=2)  # (D, D, U)
    columns = weight.T.unflatten(0, (units, -1))  # (U, D, out)
    explained = torch.linalg.solve(blocks.permute(2, 0, 1), columns)
    return (columns * explained).sum((1, 2)).clamp_min(0)


def eliminate(weight: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return the refitted weight (out, K) and the inverse (K, K) once the channels `gone` are: weight (out, C), inverse (C, C)."""
    left = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    left[gone] = False
    kept = left.nonzero().squeeze(1)
    shared = inverse[kept[:, None], gone]  # (K, gone)
    factor = torch.linalg.solve(inverse[gone[:, None], gone], shared.T).T
    return weight[:, kept] - weight[:, gone] @ factor.T, inverse[kept[:, None], kept] - factor @ shared.T


def surgeon_scores(weight: Tensor, second: Tensor, units: int) -> Tensor:
    """Return by how much the error grew when each unit went (U,), float64: weight (out, C), second moments (C, C), not singular.

    Ascending in the order in which they went; the last unit to go is worth what was left of the output.
    """
    width = weight.shape[1] // units
    weight = weight.double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second.double()))
    scores = torch.zeros(units, dtype=torch.float64, device=weight.device)
    left = torch.arange(units, device=weight.device)
    step = math.ceil(units / ROUNDS)
    highest = 0.0
    while len(left):
        cheap = removal_costs(weight, inverse, len(left)).sort(stable=True).indices[: 2 * step]
        going, costs = _one_by_one(weight, inverse, cheap, min(step, len(left)), width)
        for unit, cost in zip(left[going].tolist(), costs, strict=True):
            highest = max(cost, math.nextafter(highest, math.inf))
            scores[unit] = highest
        staying = torch.ones(len(left), dtype=torch.bool, device=left.device)
        staying[going] = False
        left = left[staying]
        if len(left):
            weight, inverse = eliminate(weight, inverse, _columns(going, width))
    return scores


def _one_by_one(weight: Tensor, inverse: Tensor, units: Tensor, count: int, width: int) -> tuple[Tensor, list[float]]:
    """Return which `count` of `units` go, in order, each the cheapest once those before it are gone, and what they cost."""
    columns = _columns(units, width)
    # Eliminating a unit changes the others' weights and their part of the inverse by what is in these parts alone.
    weight, inverse = weight[:, columns], inverse[columns[:, None], columns]
    going: list[int] = []
    costs: list[float] = []
    places = list(range(len(units)))
    while len(going) < count:
        found = removal_costs(weight, inverse, len(places))
        cheapest = int(found.argmin())
        costs.append(float(found[cheapest]))
        going.append(places.pop(cheapest))
        if places:
            gone = _columns(torch.tensor([cheapest], device=units.device), width)
            weight, inverse = eliminate(weight, inverse, gone)
    return units[going], costs


def _columns(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
