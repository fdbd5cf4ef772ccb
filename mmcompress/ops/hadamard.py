"""Rotations that spread what is in one channel over all: Hadamard matrices with random signs, or any orthogonal matrix.

A Hadamard matrix H (C, C) holds only 1 and -1 and has H'H = C I. With signs D drawn at random, D H / sqrt(C) turns a vector whose
energy lies in few channels into one whose entries are alike in size (incoherence: QuIP#, Tseng et al. 2024, arXiv 2402.04396,
section 3; QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 3). Orders are products of 2 and of what Paley's constructions
make of a prime q:

    q = 3 mod 4     order q + 1        I + S, S = (0, 1'; -1, Q)
    q = 1 mod 4     order 2 (q + 1)    S x (1, 1; 1, -1) + I x (1, -1; -1, -1), S = (0, 1'; 1, Q)

where Q (q, q) says at (i, j) whether i - j is a square modulo q: 1, -1, or 0 where it is 0. So widths such as 384 = 32 * 12, 576 =
16 * 36 and 1152 = 32 * 36 have one. Where no construction is known here, the rotation is drawn uniformly, which spreads almost as
well: its largest entry is sqrt(2 log C) times as large.

Shape alphabet: C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.ops.residual import random_directions


def hadamard(order: int) -> Tensor | None:
    """Return a matrix (order, order) of 1 and -1 with orthogonal rows, float64; None where no construction is known here."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    found = _paley(order)
    if found is not None or order % 2:
        return found
    half = hadamard(order // 2)
    return None if half is None else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)


def hadamard_rotation(channels: int, generator: torch.Generator) -> Tensor:
    """Return D H / sqrt(C) (C, C) with signs D drawn; an orthogonal matrix drawn uniformly where no H is known; float64."""
    found = hadamard(channels)
    if found is None:
        return random_directions(channels, channels, generator)
    signs = 2.0 * torch.randint(2, (channels, 1), generator=generator) - 1
    return signs * found / channels**0.5


def _paley(order: int) -> Tensor | None:
    if order % 4 == 0 and _is_prime(order - 1):
        return _bordered(order - 1, -1) + torch.eye(order, dtype=torch.float64)
    prime = order // 2 - 1
    if order % 4 == 0 and prime % 4 == 1 and _is_prime(prime):
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        others = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(prime, 1), ones) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), others)
    return None


def _bordered(prime: int, corner: int) -> Tensor:
    """Return S (prime + 1, prime + 1): Q below a row of ones and beside a column of `corner`."""
    numbers = torch.arange(prime)
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[numbers.square() % prime] = 1
    residues[0] = 0
    made = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0] = 1, corner
    made[1:, 1:] = residues[(numbers[:, None] - numbers) % prime]
    return made


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
