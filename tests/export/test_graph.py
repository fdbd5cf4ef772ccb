"""Rewrites keep what a graph computes: small graphs written by hand, run before and after."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnxscript import ir

from mmcompress.export import graph as rewriting

RNG = np.random.default_rng(0)


def build(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    """Parse a graph; constants become initialisers."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def rewritten(model: onnx.ModelProto, expected: dict[str, int], atol: float = 1e-6) -> onnx.ModelProto:
    """Simplify, check that exactly the `expected` rewrites applied and that the outputs are what they were."""
    made = ir.from_proto(model)
    counts = rewriting.simplify(made)
    assert {name: count for name, count in counts.items() if count} == expected
    after = ir.to_proto(made)
    onnx.checker.check_model(after, full_check=True)
    inputs = {
        value.name: RNG.normal(size=[d.dim_value or 2 for d in value.type.tensor_type.shape.dim]).astype(np.float32)
        for value in model.graph.input
    }
    for before, now in zip(
        ReferenceEvaluator(model).run(None, inputs), ReferenceEvaluator(after).run(None, inputs), strict=True
    ):
        np.testing.assert_allclose(now, before, atol=atol)
    return after


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_layer_scale_goes_into_a_float_linear():
    model = build(
        """g (float[B, 4] x) => (float[B, 3] y) {
             p = MatMul(x, w)
             l = Add(p, b)
             y = Mul(l, s)
           }""",
        w=normal(4, 3), b=normal(3), s=normal(3),
    )  # fmt: skip
    assert operators(rewritten(model, {"fold_channel_scales": 1})) == ["MatMul", "Add"]


@pytest.mark.parametrize("signs", [[1, 1, 1], [1, -1, -1]])
def test_layer_scale_goes_into_the_scale_of_an_integer_linear(signs):
    model = build(
        """g (float[B, 4] x) => (float[B, 3] y) {
             d = DequantizeLinear <axis: int = 1> (w, c)
             p = MatMul(x, d)
             l = Add(p, b)
             y = Mul(s, l)
           }""",
        w=RNG.integers(-127, 128, (4, 3)).astype(np.int8),
        c=np.array([0.1, 0.2, 0.3], np.float32), b=normal(3), s=np.array(signs, np.float32) * 0.5,
    )  # fmt: skip
    after = rewritten(model, {"fold_channel_scales": 1})
    assert operators(after) == ["DequantizeLinear", "MatMul", "Add"]
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer]
    # 0.1, 0.2, 0.3 times 0.5; a scale stays positive, a sign goes into the integers.
    assert any(np.allclose(array, [0.05, 0.1, 0.15]) for array in arrays if array.shape == (3,))
    assert any(array.dtype == np.int8 for array in arrays)


def test_a_sign_cannot_go_into_integers_that_have_no_negative():
    model = build(
        """g (float[B, 2] x) => (float[B, 2] y) {
             d = DequantizeLinear <axis: int = 1> (w, c)
             p = MatMul(x, d)
             l = Add(p, b)
             y = Mul(l, s)
           }""",
        w=np.array([[-128, 1], [2, 3]], np.int8), c=np.array([0.1, 0.2], np.float32), b=normal(2),
        s=np.array([-1, 1], np.float32),
    )  # fmt: skip
    rewritten(model, {})


def test_a_linear_that_is_used_twice_keeps_its_scale():
    model = build(
        """g (float[B, 4] x) => (float[B, 4] y, float[B, 4] z) {
             p = MatMul(x, w)
             l = Add(p, b)
             y = Mul(l, s)
             z = Relu(l)
           }""",
        w=normal(4, 4), b=normal(4), s=normal(4),
    )  # fmt: skip
    rewritten(model, {})


def test_integers_that_two_linears_share_keep_their_scale():
    model = build(
        """g (float[B, 4] x) => (float[B, 4] y, float[B, 4] z) {
             d = DequantizeLinear <axis: int = 1> (w, c)
             p = MatMul(x, d)
             l = Add(p, b)
             y = Mul(l, s)
             z = MatMul(x, d)
           }""",
        w=RNG.integers(-127, 128, (4, 4)).astype(np.int8), c=np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        b=normal(4), s=normal(4),
    )  # fmt: skip
    rewritten(model, {})


def attention(scale_of: str, **constants: np.ndarray) -> onnx.ModelProto:
    return build(
        f"""g (float[2, 5, 6] x) => (float[2, 2, 5, 5] y) {{
             qp = MatMul(x, wq)
             q = Add(qp, bq)
             k = MatMul(x, wk)
             qs = Reshape(q, heads)
             ks = Reshape(k, heads)
             qt = Transpose <perm: ints = [0, 2, 1, 3]> (qs)
             kt = Transpose <perm: ints = [0, 2, 3, 1]> (ks)
             a = MatMul(qt, kt)
             s = Mul(a, factor)
             {scale_of}
           }}""",
        wq=normal(6, 6), bq=normal(6), wk=normal(6, 6), heads=np.array([0, 5, 2, 3]),
        factor=np.array(0.577, np.float32), **constants,
    )  # fmt: skip


def test_attention_scale_goes_into_the_queries():
    assert "Mul" not in operators(rewritten(attention("y = Softmax(s)"), {"fold_attention_scales": 1}))


def test_attention_scale_stays_where_scores_are_used_twice():
    rewritten(attention("t = Softmax(s)\n y = Add(a, t)"), {})


def test_attention_scale_stays_where_queries_are_rounded_first():
    """Their linear times the scale would be rounded to other places; the product's own scale takes it in OpenVINO."""
    model = build(
        """g (float[2, 5, 6] x, float[2, 6, 5] k) => (float[2, 5, 5] y) {
             qp = MatMul(x, wq)
             q = Add(qp, bq)
             c = QuantizeLinear(q, step, zero)
             r = DequantizeLinear(c, step, zero)
             a = MatMul(r, k)
             s = Mul(a, factor)
             y = Softmax(s)
           }""",
        wq=normal(6, 6), bq=normal(6), step=np.array(0.1, np.float32), zero=np.array(0, np.int8),
        factor=np.array(0.577, np.float32),
    )  # fmt: skip
    rewritten(model, {})


def attention_output(end: str, weights: str = "Softmax", **constants: np.ndarray) -> onnx.ModelProto:
    """Two heads of three channels over five tokens, given the scores; `mixed` (2, 5, 6) is what the output layer would read."""
    return build(
        f"""g (float[2, 5, 6] x, float[2, 2, 5, 5] s) => (float[2, 5, 6] y) {{
             vp = MatMul(x, wv)
             v = Add(vp, bv)
             vs = Reshape(v, heads)
             vt = Transpose <perm: ints = [0, 2, 1, 3]> (vs)
             a = {weights}(s)
             h = MatMul(a, vt)
             ht = Transpose <perm: ints = [0, 2, 1, 3]> (h)
             mixed = Reshape(ht, joined)
             {end}
           }}""",
        wv=normal(6, 6), bv=normal(6), heads=np.array([0, 5, 2, 3]), joined=np.array([0, 5, 6]), gain=normal(6), **constants,
    )  # fmt: skip


def test_an_output_layers_gain_goes_into_the_values():
    after = rewritten(attention_output("y = Mul(mixed, gain)"), {"fold_value_gains": 1})
    assert "Mul" not in operators(after)


def test_an_output_layers_gain_stays_where_it_is_not_a_gain_of_attention():
    rewritten(attention_output("t = Mul(mixed, gain)\n y = Add(t, mixed)"), {})  # the heads' outputs are used twice
    rewritten(attention_output("y = Mul(mixed, gain)", weights="Relu"), {})
    rewritten(attention_output("y = Mul(mixed, rows)", rows=normal(5, 1)), {})


def test_masks_that_hide_nothing_disappear():
    constants = {"shown": np.ones((1, 1, 5, 1), bool), "zero": np.float32(0), "low": np.float32(-1e4)}
    shape = np.array([2, 1, 5, 5])
    mask = "e = Expand(shown, shape)\n m = Where(e, zero, low)\n t = Add(s, m)\n y = Softmax(t)"
    after = rewritten(
        attention(mask, shape=shape, **{name: np.asarray(value) for name, value in constants.items()}),
        {"drop_open_masks": 1, "fold_attention_scales": 1},
    )
    assert "Where" not in operators(after)


def test_masks_that_hide_something_stay():
    shown = np.ones((1, 1, 5, 5), bool)
    shown[..., 1:] = np.tri(5, 4, -1, dtype=bool)
    mask = "m = Where(shown, zero, low)\n t = Add(s, m)\n y = Softmax(t)"
    rewritten(
        attention(mask, shown=shown, zero=np.array(0, np.float32), low=np.array(-1e4, np.float32)),
        {"fold_attention_scales": 1},
    )


def test_constants_are_split_and_transposed_now():
    model = build(
        """g (float[B, 4] x) => (float[B, 3] y) {
             w1, w2 = Split <axis: int = 0, num_outputs: int = 2> (w)
             t = Transpose <perm: ints = [1, 0]> (w2)
             y = MatMul(x, t)
           }""",
        w=normal(6, 4),
    )  # fmt: skip
    assert operators(rewritten(model, {"split_constants": 1, "transpose_constants": 1})) == ["MatMul"]


def test_casts_to_the_same_dtype_disappear():
    model = build(
        """g (float[B, 4] x) => (float[B, 4] y) {
             a = Relu(x)
             c = Cast <to: int = 1> (a)
             y = Abs(c)
           }"""
    )
    assert operators(rewritten(model, {"drop_same_casts": 1})) == ["Relu", "Abs"]


def test_a_gain_goes_into_the_norm_before_it_unless_others_read_the_norm():
    text = """g (float[B, 4] x) => (float[B, 4] y%s) {
             n = LayerNormalization(x, w, b)
             y = Mul(n, gain)%s
           }"""
    constants = {"w": normal(4), "b": normal(4), "gain": normal(4)}
    folded = rewritten(build(text % ("", ""), **constants), {"fold_norm_gains": 1})
    assert operators(folded) == ["LayerNormalization"]
    # A post-norm block adds the norm's output to the next residual too.
    shared = build(text % (", float[B, 4] z", "\n             z = Add(n, x)"), **constants)
    assert operators(rewritten(shared, {})) == ["LayerNormalization", "Mul", "Add"]


def test_casts_that_change_the_dtype_stay():
    model = build(
        """g (float[B, 4] x) => (float[B, 4] y) {
             a = Cast <to: int = 11> (x)
             b = Abs(a)
             y = Cast <to: int = 1> (b)
           }"""
    )
    rewritten(model, {})


def test_masks_that_add_a_bias_stay():
    model = build(
        """g (float[2, 3] x) => (float[2, 3] y) {
             m = Where(shown, bias, low)
             y = Add(x, m)
           }""",
        shown=np.ones((1, 3), bool), bias=normal(2, 3), low=np.array(-1e4, np.float32),
    )  # fmt: skip
    rewritten(model, {})


def test_masks_that_make_the_scores_larger_stay():
    model = build(
        """g (float[1, 3] x) => (float[2, 3] y) {
             m = Where(shown, zero, low)
             y = Add(x, m)
           }""",
        shown=np.ones((2, 1), bool), zero=np.array(0, np.float32), low=np.array(-1e4, np.float32),
    )  # fmt: skip
    rewritten(model, {})


@pytest.mark.parametrize(("axis", "points"), [(0, [0, 0, 0]), (1, [3, 0, 5])])
def test_scales_per_input_and_zero_points_are_left_alone(axis, points):
    model = build(
        f"""g (float[B, 3] x) => (float[B, 3] y) {{
             d = DequantizeLinear <axis: int = {axis}> (w, c, z)
             p = MatMul(x, d)
             l = Add(p, b)
             y = Mul(l, s)
           }}""",
        w=RNG.integers(-120, 120, (3, 3)).astype(np.int8), c=np.array([0.1, 0.2, 0.3], np.float32),
        z=np.array(points, np.int8), b=normal(3), s=np.array([-0.5, 2, 1], np.float32),
    )  # fmt: skip
    rewritten(model, {})


@pytest.mark.parametrize(("second_use", "folded"), [("", 1), ("z = Abs(n)", 0)])
def test_a_gain_goes_into_the_norm_before_it(second_use, folded):
    outputs = "float[B, 4] y, float[B, 4] z" if second_use else "float[B, 4] y"
    model = build(
        f"""g (float[B, 4] x) => ({outputs}) {{
             n = LayerNormalization <axis: int = -1> (x, w, b)
             y = Mul(n, s)
             {second_use}
           }}""",
        w=normal(4), b=normal(4), s=normal(4),
    )  # fmt: skip
    rewritten(model, {"fold_norm_gains": 1} if folded else {})
