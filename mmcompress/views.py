"""Views of a model: where its towers, blocks, attentions and feed-forwards are, by dotted path from the model.

Paths can be recorded, compared and used on meta tensors. Views are made afresh by `Bundle.towers()` each time; surgery makes older
ones stale.

Shape alphabet: B batch, N tokens, C channels, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Readout = Literal["class", "mean", "attention", "all", "states"]
"""What makes a tower's output of its tokens. "all" needs each in its place; "states" are looked at by the cross-attention of a
decoder, which takes them in any number."""
Counts = Literal["heads", "kv_heads", "width", "head_dim", "scale"]
"""What attentions keep beside their weights: how many heads, heads * head_dim, head_dim, and the factor of their logits, which is
computed from head_dim."""
Numbering = Literal["each", "block", "after"]
"""How a value counts the blocks of a tower: one entry for each; the index of one or several blocks; or how many blocks come before
a place in the stack (negative: from the end, -1 behind the last)."""


@dataclass(frozen=True)
class Attention:
    """One multi-head attention: `writers` make queries, keys and values, `reader` mixes the heads' outputs."""

    path: str
    """The module that is called with hidden states."""
    writers: tuple[str, ...]
    """Paths of the q, k, v Linears; their rows are (heads * head_dim), of k and v (kv_heads * head_dim). A single path is a
    fused Linear: its rows are those of q, k and v one after the other, of equally many heads."""
    reader: str
    """Path of the output Linear; its columns are (heads * head_dim)."""
    heads: int
    kv_heads: int
    """Where there are fewer than `heads`, each serves as many query heads in a row (grouped-query attention)."""
    head_dim: int
    bookkeeping: tuple[tuple[str, str, Counts], ...] = ()
    """(module path, attribute, what it counts): numbers transformers keeps beside the weights and that surgery must follow."""
    per_head: tuple[str, ...] = ()
    """Names of parameters (positions, heads) that hold a column for each head: a table of relative position biases."""
    why_whole: str = ""
    """Where heads cannot be cut: why not, for a person."""
    why_rigid: str = ""
    """Where heads cannot become narrower: why not, for a person."""
    turned: bool = False
    """Whether the places of tokens turn queries and keys behind their Linears (rotary), so that others are multiplied."""
    window: float = 0
    """How many keys a query sees, where those are not all; where windows differ, the mean over the queries."""


@dataclass(frozen=True)
class Mlp:
    """One feed-forward: `writers` is (up,) or (gate, up), `reader` is down. Units are its hidden neurons."""

    path: str
    writers: tuple[str, ...]
    reader: str
    neurons: int
    activation: str
    """Name of the activation, as in the config: removing a silenced neuron is exact only where act(0) = 0."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in a feed-forward's place: each token goes through the `top` of them that a router likes best.

    The router's softmax over its rows' logits is cut to these and sums to 1 again.
    """

    path: str
    """The module that is called with hidden states."""
    router: str
    """Path of the module whose `weight` (experts, C) has a row for each; it gives out (logits (T, experts), weights (T, top),
    indices (T, top))."""
    stacked: tuple[str, ...]
    """Names of the parameters (experts, rows, columns) that hold the weights of all, one after the other; quantized, their holder
    has integers in their place (see `surgery.experts`)."""
    experts: int
    top: int
    neurons: int
    """Of one expert."""
    bookkeeping: tuple[tuple[str, str], ...] = ()
    """(module path, attribute): integers transformers keeps beside the weights that count experts."""

    @property
    def holder(self) -> str:
        """Path of the module that has what is stacked, and is called with states, indices and weights."""
        return self.stacked[0].rpartition(".")[0]


@dataclass(frozen=True)
class Block:
    """One transformer block.

    A pre-norm block computes ``x += attend(x)`` then ``x += feed(x)``; `attend` and `feed` are the block's children to call in
    order, `attention` being one of `attend`. A block that is not of this shape (post-norm) leaves both empty, and passes
    that change tokens inside it refuse.
    """

    path: str
    index: int
    attention: Attention
    mlp: Mlp | None
    """None where the block has `experts`."""
    attend: tuple[str, ...] = ()
    feed: tuple[str, ...] = ()
    cross: Attention | None = None
    """In a decoder that looks at an encoder: queries come from this block's tokens, keys and values from the encoder's output."""
    norms: tuple[str, ...] = ()
    """In a pre-norm block that nothing else reads or adds to: paths of the norms before attention and feed-forward."""
    experts: Experts | None = None
    """What this block has in place of `mlp`."""
    scales: tuple[str, ...] = ()
    """Names of parameters (C,) that multiply what attention and feed-forward give out, before it is added."""

    @property
    def feeding(self) -> Mlp | Experts:
        """The feed-forward, of one kind or the other."""
        found = self.mlp or self.experts
        assert found is not None, f"{self.path} has neither a feed-forward nor experts"
        return found


@dataclass(frozen=True)
class TokenStream:
    """The tokens that flow through a tower's blocks."""

    tokens: int
    """N at the model's own input size, protected ones included."""
    protected: int
    """Leading class/register tokens that are never merged or dropped."""
    readout: Readout
    """What the tower's output is read from."""
    pool: str = ""
    """For readout "attention": path of the nn.MultiheadAttention whose keys are the tokens."""
    blocks: int = 0
    """For readout "all": how many blocks there are up to where the tokens are read; 0: the whole tower."""


@dataclass(frozen=True)
class Residual:
    """Where the stream of states (B, N, C) begins and ends that a tower's blocks read through norms and add to."""

    width: int
    """C."""
    rows: tuple[str, ...]
    """Names of parameters (…, C) whose rows go in: tables of words and places, class tokens, the end of a picture's line."""
    makers: tuple[str, ...]
    """Paths of Linears and convolutions outside the blocks whose outputs go in: a connector's last, the patch embedding."""
    norm: str
    """Path of the norm behind the last block."""
    readers: tuple[str, ...] = ()
    """Paths of the Linears that read what it gives out, and are all that does; none: something else does."""
    entry: str = ""
    """Where nothing goes in but what a norm before the first block gives out: its path."""


@dataclass(frozen=True)
class Positions:
    """A table that has a row for every place of a text, of which a text reads the first ones."""

    table: str
    """Path of the nn.Embedding."""
    first: int = 0
    """The row of the first token; those before belong to padding."""
    key: str = "max_position_embeddings"
    """The config key that counts the rows."""


@dataclass(frozen=True)
class Line:
    """An encoder's tokens that stand in a line, as many as a sample has, and all look at one another."""

    protected: int
    """Leading tokens that say what the others mean: the class token."""


@dataclass(frozen=True)
class Connector:
    """What makes a language model's image tokens of a vision encoder's, each picture or tile by itself."""

    path: str
    """The module that is called with (R, N, C) and gives (R, M, C'); R pictures or tiles."""
    tokens: int
    """M, as the model was made."""
    grid: tuple[int, int]
    """Rows and columns of the patches they stand for, row by row."""
    scorer: str = ""
    """Path of the attention whose weights say what the encoder looked at: the last one the tokens have been through."""
    leading: int = 0
    """Tokens before the patches in that attention; the first is the class token."""


@dataclass(frozen=True)
class Prompt:
    """What a language model is given of pictures."""

    path: str
    """The module that is called with input_ids."""
    image_tokens: tuple[int, ...]
    """The ids that stand for a picture's tokens."""
    first: int = 0
    """How many blocks are given something of the picture beside its tokens, or add to them: they need all."""
    both_ways: bool = False
    """Whether the prompt's tokens look at one another in both directions."""


@dataclass(frozen=True)
class Film:
    """Where a video's frames, in layers of one grid, go from a vision encoder into a language model."""

    path: str
    """The module whose methods these are; a grid is (layers, rows, columns)."""
    makers: tuple[str, ...]
    """Methods that take pixels and the grids of several pictures or videos, and give out their tokens."""
    channels: int
    """C of a token."""
    levels: int = 1
    """How many rows a token has: its own, and those beside it for the language model's first blocks."""
    tokens: str = "pooler_output"
    """The attribute of that output that lists the tokens (N, C) of each."""
    deeper: str = ""
    """The attribute that has a list of such lists, for the further levels."""
    placing: str = ""
    """The method that takes where a picture or video begins and its grid, and gives its tokens' times, rows and columns (3, N)."""
    numbering: str = ""
    """Where each layer stands by itself in a prompt: the method that finds them there."""
    grids: str = ""
    """The keyword by which that takes the grids of videos."""
    stride: int = 1
    """How many layers of a video become one before the language model is given them."""


@dataclass(frozen=True)
class Tower:
    """One modality's encoder, with its projection into the shared space."""

    name: str
    path: str
    blocks_path: str
    """Path of the nn.ModuleList that holds the blocks."""
    blocks: tuple[Block, ...]
    config: str
    """Attribute path of the tower's config inside model.config ("" for the model's own)."""
    depth_key: str
    """The config key that counts the blocks."""
    heads: tuple[str, ...] = ()
    """Paths of what follows the blocks, inside `path` or not: a projection, the connector to a language model, its output layer."""
    parameters: tuple[str, ...] = ()
    """Names of parameters that belong to the tower but to none of these modules."""
    numbered: tuple[tuple[str, str, Numbering], ...] = ()
    """(path of a module or of a config inside model.config, attribute, how it counts the tower's blocks)."""
    why_fixed_depth: str = ""
    """Where blocks cannot be removed: why not, for a person. They may then lie in several lists below `blocks_path`."""
    needed: tuple[int, ...] = ()
    """Indices of blocks that cannot go: something beside the stack reads what they give out."""
    packed: bool = False
    """Whether the blocks see the tokens of all samples in one row, (N, C) instead of (B, N, C), or a row for each window."""
    embeddings: tuple[str, ...] = ()
    """Paths of the nn.Embedding tables and the patch embedding."""
    stream: TokenStream | None = None
    positions: Positions | None = None
    """In an encoder of texts that has a learned row for every place, and reads no more of them than a text has tokens."""
    line: Line | None = None
    """In an encoder of texts or sounds whose blocks take (tokens, mask) in any number."""
    uncalled: tuple[str, ...] = ()
    """Paths of Linears whose weight their owner reads without calling them: they cannot be quantized."""
    tied: tuple[tuple[str, str], ...] = ()
    """Paths of (embedding table, Linear) that share one weight."""
    connector: Connector | None = None
    """In a vision encoder before a language model, where the image tokens may become fewer."""
    why_no_connector: str = ""
    """In a vision encoder before a language model where that is None: why they may not, for a person."""
    prompt: Prompt | None = None
    """In a language model: where image tokens stand in what it is asked, and may leave on their way through the blocks."""
    film: Film | None = None
    """In a language model that is given the frames of a video as a video."""
    why_no_film: str = ""
    """In a language model where that is None: why, for a person."""
    why_no_stream: str = ""
    """Where `stream` is None: why tokens of this tower cannot be merged, for a person."""
    residual: Residual | None = None
    """Where all that reads and writes the stream through the blocks is known, so that it may become narrower."""
    why_no_residual: str = ""
    """Where that is None: why, for a person."""

    def owns(self, name: str) -> bool:
        """Whether a parameter or module path belongs to this tower."""
        roots = (self.path, *self.heads, *self.parameters)
        return any(name == root or name.startswith(root + ".") for root in roots)

    @property
    def roots(self) -> tuple[str, ...]:
        """Paths of the modules that make up the tower, none inside another."""
        return (self.path, *(head for head in self.heads if not head.startswith(self.path + ".")))
