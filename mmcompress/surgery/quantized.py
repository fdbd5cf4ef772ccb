"""Layers whose weights are stored as 8-bit integers, and that leave as QuantizeLinear/DequantizeLinear when exported.

A quantized layer takes the place of an nn.Linear, nn.Conv2d or nn.Embedding and keeps its call signature:

    weight_int8         the weight's shape, int8, symmetric: weight = weight_int8 * weight_scale
    weight_scale        (C,) one per output channel (Linear, Conv2d) or per row (Embedding)
    input_scale         () and
    input_zero_point    () uint8 or int8, of the layer's input; only where activations are quantized too (W8A8)
    input_gain          (in,) what a Linear's input is multiplied by before it is rounded, the weight having been divided by
                        it: channels of very different size then share one grid (SmoothQuant). Optional.
    output_scale        () and
    output_zero_point   () int8, always 0: what a Linear gives out, bias included, is rounded to this grid. Only of Linears that
                        make queries and keys, whose product engines then compute of integers. Optional.
    bias                as before, trainable

Instead of an input's one grid each token may have its own (`tokens`, see `ops.token_rounding`): nothing is stored then. A Linear
whose weights alone are integers may let runtimes round its inputs while they multiply (`rounds_inputs`), which in onnxruntime makes
a single token ten times as fast, as it then unpacks nothing (python -m bench.eight_bits).

Where a Linear shares its weight with an embedding table, as language models' last layers do, a scale per row of the table is a
scale per output channel of the Linear. So a `TiedLinear` has no integers and scales of its own: it reads the table's.

All but the bias are buffers. In torch the arithmetic is done in float on rounded values, with gradients straight through the
rounding, so such a model can be evaluated anywhere and distilled. While exporting, the rounding is written as the operators of
`surgery.rounding_operators`.

Scales follow the model's dtype (`.half()`, `.bfloat16()`); the rounding itself is always computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcompress.ops.rounding import INT8, WEIGHT_INT8, Levels
from mmcompress.surgery.quantized_int8 import Int8, on_grid
from mmcompress.surgery.token_operators import block_of, product_int8, token_product


class QuantizedLinear(Int8):
    """nn.Linear with int8 weights; inputs (..., in) -> (..., out)."""

    rounds_inputs = False
    """Whether runtimes may round inputs to 8 bits, block by block, that are floats here."""
    block: int
    """How many inputs are rounded together then; 0 where no block divides them."""
    output_scale: Tensor | None
    output_zero_point: Tensor | None

    def __init__(
        self, linear: nn.Linear, inputs: Levels | None, levels: Levels = WEIGHT_INT8, gain: Tensor | None = None
    ) -> None:
        weight = linear.weight.detach()
        super().__init__(weight if gain is None else weight / gain.to(weight), levels, inputs)
        if gain is not None:
            # A copy: layers that share an input share its gain, and a checkpoint stores each tensor once.
            self.input_gain = gain.to(weight, copy=True)
        self._take_place_of(linear)

    def _take_place_of(self, linear: nn.Linear) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.block = block_of(self.in_features)
        self.bias = linear.bias
        self.register_buffer("output_scale", None)
        self.register_buffer("output_zero_point", None)

    def add_output_grid(self, scale: Tensor | None = None) -> None:
        """Round what the layer gives out to int8, symmetric, with `scale` () or one that a checkpoint fills."""
        like = self.weight_scale
        self.output_scale = torch.ones((), dtype=like.dtype, device=like.device)
        self.output_zero_point = torch.zeros((), dtype=INT8.dtype, device=like.device)
        if scale is not None:
            self.output_scale.copy_(scale)

    def output_grid(self) -> tuple[float, int] | None:
        if self.output_scale is None or self.output_zero_point is None:
            return None
        return float(self.output_scale), int(self.output_zero_point)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_gain is None else x * self.input_gain
        if torch.compiler.is_exporting():
            y = self._product(x)
            y = y if self.bias is None else y + self.bias
        else:
            y = self._linear(self.rounded_input(x), self.bias)
        if self.output_scale is None or self.output_zero_point is None:
            return y
        return on_grid(y, self.output_scale, self.output_zero_point)

    def _product(self, x: Tensor) -> Tensor:
        """Return x weight' as a graph computes it."""
        if self.in_blocks:
            return product_int8(x, self.weight_int8, self.weight_scale, self.block)
        matrix = torch.ops.mmcompress.int8_matrix(self.weight_int8, self.weight_scale)
        return self.rounded_input(x) @ matrix if self.tokens is None else token_product(x, matrix, self.tokens)

    @property
    def reason_for_cpus(self) -> str:
        blocks = "is multiplied in blocks, as onnxruntime and OpenVINO do; TensorRT takes whole matrices only"
        return blocks if self.in_blocks else super().reason_for_cpus

    @property
    def in_blocks(self) -> bool:
        """Whether a graph multiplies the integers as they are, in blocks."""
        return self.rounds_inputs and self.input_grid() is None and self.block > 0

    @property
    def repeated_bytes(self) -> int:
        blocks = self.in_features // self.block if self.in_blocks else 1
        return (blocks - 1) * self.weight_scale.nbytes

    def extra_repr(self) -> str:
        outputs = "" if self.output_scale is None else ", int8 outputs"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._grid_name()}{outputs}"


class QuantizedConv2d(Int8):
    """nn.Conv2d with int8 weights: (B, in, h, w) -> (B, out, h', w'). Zero padding only, as patch embeddings use."""

    def __init__(self, conv: nn.Conv2d, inputs: Levels | None, levels: Levels = WEIGHT_INT8) -> None:
        super().__init__(conv.weight, levels, inputs)
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded_input(x)
        if torch.compiler.is_exporting():
            weight = torch.ops.mmcompress.int8_filters(self.weight_int8, self.weight_scale)
        else:
            weight = self.weight
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {self._grid_name()}"


class QuantizedEmbedding(Int8):
    """nn.Embedding with int8 rows: only the rows looked up become floats. ids (...) -> (..., C)."""

    def __init__(self, embedding: nn.Embedding, levels: Levels = WEIGHT_INT8) -> None:
        super().__init__(embedding.weight, levels, None)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        if self.master is not None:
            # Indexing would add gradients up in any order.
            rows = functional.embedding(ids.flatten(), self.master, self.padding_idx)
            return self.rounded(rows, ids.flatten()).reshape(*ids.shape, self.embedding_dim)
        return self.weight_int8[ids].to(self.weight_scale.dtype) * self.weight_scale[ids].unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._grid_name()}"


class TiedLinear(QuantizedLinear):
    """A QuantizedLinear whose integers and scales are those of `table`, which holds, stores and converts them alone.

    It can have no `input_gain`: the table's rows would have to be divided by it too.
    """

    table: QuantizedEmbedding

    def __init__(self, linear: nn.Linear, inputs: Levels | None, table: QuantizedEmbedding) -> None:
        nn.Module.__init__(self)
        # Not a submodule, or the state dict would hold the table's buffers a second time. Copies share it like any other object.
        object.__setattr__(self, "table", table)
        self._add_input_grid(inputs)
        self._take_place_of(linear)

    @property
    def weight_int8(self) -> Tensor:  # type: ignore[override]
        """The table's: (out, in), a row for each of its entries."""
        return self.table.weight_int8

    @property
    def weight_scale(self) -> Tensor:  # type: ignore[override]
        """The table's: (out,)."""
        return self.table.weight_scale

    def weight_rows(self, start: int, stop: int) -> Tensor:
        return self.table.weight_rows(start, stop)


def quantized(
    module: nn.Module,
    inputs: Levels | None,
    levels: Levels = WEIGHT_INT8,
    gain: Tensor | None = None,
    table: nn.Module | None = None,
) -> QuantizedLinear | QuantizedConv2d | QuantizedEmbedding:
    """Return the int8 counterpart of a layer, sharing its bias.

    `inputs` is the grid of its input (None: weights only), `gain` (in,) a Linear's `input_gain`; `table` is the quantized
    embedding whose weight a Linear shares.
    """
    made: QuantizedLinear | QuantizedConv2d | QuantizedEmbedding
    if table is not None:
        assert isinstance(module, nn.Linear), f"a {type(module).__name__} cannot share a table's weight"
        assert isinstance(table, QuantizedEmbedding), f"the table is a {type(table).__name__}; quantize it first"
        assert gain is None, "the table's rows are not divided by it"
        made = TiedLinear(module, inputs, table)
    elif isinstance(module, nn.Linear):
        made = QuantizedLinear(module, inputs, levels, gain)
    elif isinstance(module, nn.Conv2d):
        made = QuantizedConv2d(module, inputs, levels)
    else:
        assert isinstance(module, nn.Embedding), f"{type(module).__name__} has no int8 form; ask can_quantize first"
        made = QuantizedEmbedding(module, levels)
    return made.train(module.training)


def drop_ties(model: nn.Module) -> None:
    """Strike from transformers' list of tied parameters those that are quantized, and so no parameters any more.

    It would look for them when a checkpoint is loaded (5.23).
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for target, source in list(ties.items()):
        if not {target, source} & parameters:
            del ties[target]


def can_quantize(module: nn.Module) -> bool:
    """Whether `quantized` takes this layer.

    Exact types only: a subclass may be read by its owner without being called, as nn.MultiheadAttention does with its output
    projection. Padding other than zeros would have to be quantized as well.
    """
    if type(module) is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) in (nn.Linear, nn.Embedding)
