"""Experts in a graph: what is stored expert by expert, put as onnxruntime's MoE and QMoE or a product side by side want it.

    MoE, QMoE       fc1 (E, 2 * I, …): rows of gate and of what is gated in turn, where a model has all gates first
    QMoE            unsigned codes, of 4 bits two to a byte; scales and packed zero points (E, rows, blocks)
    MatMulNBits     of experts side by side: (C, E * blocks, …), where a model has (E * C, …)

A QMoE of 8 bits without blocks multiplies floats, one in blocks rounds its inputs (onnxruntime 1.32 has no other kernel for these).

Shape alphabet: C channels, E experts, I neurons of an expert, R rows of a stack's expert.
"""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from mmcompress.export.constants import constant, initializer, name, nodes
from mmcompress.export.eight_bits import ZERO_POINT

GATED, DOWN = (2, 3, 11), (5, 6, 12)
"""Inputs of a QMoE: codes, scales, zero points."""


def store_experts(model: ir.Model) -> int:
    """Put the weights of experts as the operators want them; return how many operators that were."""
    count = 0
    for node in nodes(model, "MoE"):
        stack = constant(node.inputs[2])
        assert stack is not None, f"{node.name} has no weights"
        node.replace_input_with(2, initializer(model, _in_turn(stack), f"{name(node.inputs[2])}_in_turn"))
        count += 1
    for node in nodes(model, "QMoE"):
        down = constant(node.inputs[DOWN[0]])
        states = node.inputs[0]
        width = states.shape[-1] if states is not None and states.shape is not None else None
        assert down is not None, f"{node.name} has no weights"
        assert isinstance(width, int), f"{node.name} has states of no known width"
        for places in (GATED, DOWN):
            _store_stack(model, node, places, len(down) // width)
        count += 1
    for node in nodes(model, "MatMulNBits"):
        codes, rows = constant(node.inputs[1]), node.attributes.get_int("N", 0)
        if codes is not None and codes.ndim == 2 and len(codes) != rows:
            _side_by_side(model, node, codes, len(codes) // rows)
            count += 1
    return count


def _store_stack(model: ir.Model, node: ir.Node, places: tuple[int, int, int], count: int) -> None:
    bits, block = node.attributes.get_int("expert_weight_bits", 0), node.attributes.get_int("block_size", 0)
    held = [node.inputs[place] if place < len(node.inputs) else None for place in places]
    for place, value, made in zip(places, held, _blocked([constant(one) for one in held], bits, block), strict=True):
        if made is not None:
            stack = made.reshape(count, -1, *made.shape[1:])
            stack = _in_turn(stack) if places is GATED else stack
            node.replace_input_with(place, initializer(model, stack, f"{name(value)}_of_experts"))


def _side_by_side(model: ir.Model, node: ir.Node, codes: np.ndarray, count: int) -> None:
    """Let each row of a product have the columns of all experts, one after the other."""
    bits, block = node.attributes.get_int("bits", 0), node.attributes.get_int("block_size", 0)
    points = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    codes, scale, points = _blocked([codes, constant(node.inputs[2]), points], bits, block, unpacked=True)

    def joined(stack: np.ndarray) -> np.ndarray:
        """(E * R, X) -> (R, E * X)."""
        parted = stack.reshape(count, len(stack) // count, -1)
        return np.ascontiguousarray(parted.swapaxes(0, 1)).reshape(parted.shape[1], -1)

    width = block * bits // 8
    made = [joined(codes).reshape(len(codes) // count, -1, width), joined(scale)]
    made += [] if points is None else [_packed(joined(points))]
    for place, array in enumerate(made, 1):
        node.replace_input_with(place, initializer(model, array, f"{name(node.inputs[place])}_side_by_side"))


def _blocked(
    held: list[np.ndarray | None], bits: int, block: int, unpacked: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return codes (R, bytes) unsigned, scales and zero points (R, blocks), those of 4 bits packed unless asked otherwise.

    Without blocks (0) scales are (R,).
    """
    codes, scale, points = held
    assert codes is not None, "a stack has codes"
    assert scale is not None, "a stack has scales"
    codes = codes.view(np.uint8) ^ ZERO_POINT if codes.dtype == np.int8 else codes
    if not block:
        return codes, scale, None
    scale = scale if scale.ndim == 2 else scale[:, None]
    blocks = codes.shape[1] * 8 // bits // block
    repeats = blocks // scale.shape[1]
    if points is not None:
        each = np.stack([points & 15, points >> 4], axis=-1).reshape(len(points), -1)[:, : scale.shape[1]]
        each = np.repeat(each, repeats, axis=1)
        points = each if unpacked else _packed(each)
    return codes, np.repeat(scale, repeats, axis=1), points


def _packed(points: np.ndarray) -> np.ndarray:
    """(R, blocks) -> (R, ceil(blocks / 2)), the earlier in the lower half of a byte."""
    even = np.concatenate([points, points[:, -1:]], axis=1) if points.shape[1] % 2 else points
    return even[:, 0::2] | (even[:, 1::2] << 4)


def _in_turn(stack: np.ndarray) -> np.ndarray:
    """(E, 2 * I, …), gates first -> gate, gated, gate, gated, …"""
    halves = stack.reshape(len(stack), 2, -1, *stack.shape[2:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(stack.shape)
