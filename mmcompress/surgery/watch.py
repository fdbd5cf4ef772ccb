"""Look at what flows through a model without changing it: hooks that are always removed, statistics that are streamed.

No activation outlives the batch it came from. Padding is left out: `Watch.mask` (B, N), set before a batch, marks the tokens
that count, and applies to every watched tensor of shape (B, N, …).

Shape alphabet: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Record = Callable[[str, Tensor], None]


class Watch:
    """What a running watch can be told: which tokens of the coming batch count."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def tokens(self, states: Tensor) -> Tensor:
        """Return the states of the tokens that count, as (T, C)."""
        if self.mask is not None and states.dim() == 3 and states.shape[:2] == self.mask.shape:
            return states[self.mask.bool()]
        return states.reshape(-1, states.shape[-1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every flag is as before afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)


@contextmanager
def watch_inputs(modules: Mapping[str, nn.Module], record: Record, unmasked: Collection[str] = ()) -> Iterator[Watch]:
    """Call `record(name, tokens (T, C))` with the first input of each module, each time it is called.

    The mask says nothing about what the modules named in `unmasked` are given: all of their tokens count.
    """
    watch, everything = Watch(), Watch()

    def hook(name: str) -> Callable[..., None]:
        chosen = everything if name in unmasked else watch

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(name, chosen.tokens(first_state(args, kwargs).detach()))

        return before

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_outputs(modules: Mapping[str, nn.Module], record: Record, watch: Watch) -> Iterator[None]:
    """Call `record(name, tokens (T, C))` with what each module gives out, each time; `watch` says which tokens count."""

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            record(name, watch.tokens(output.detach()))

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_blocks(blocks: Mapping[str, nn.Module], record: Callable[[str, Tensor, Tensor], None]) -> Iterator[Watch]:
    """Call `record(name, before (T, C), after (T, C))` with the states around each block."""
    watch = Watch()

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            record(name, watch.tokens(first_state(args, kwargs).detach()), watch.tokens(states.detach()))

        return after

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in blocks.items()]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_gradients(
    modules: Mapping[str, nn.Module],
    record: Callable[[str, Tensor, Tensor], None],
    of: Literal["inputs", "outputs", "updates"] = "inputs",
) -> Iterator[None]:
    """Call `record(name, states (B, N, C), gradient (B, N, C'))` in the backward pass, for each module.

    - "inputs": the module's first input, and the gradient with respect to it;
    - "outputs": its first input, and the gradient with respect to its output;
    - "updates": what it added (its output minus its first input), and the gradient with respect to its output.

    Parameters need no gradient for this: the first watched input becomes a leaf of the graph. Forward passes with gradients
    turned off are not watched: they have no backward pass.
    """

    def before(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not torch.is_grad_enabled():
                return None
            states = first_state(args, kwargs)
            if not states.requires_grad:
                states = states.detach().requires_grad_()
            if of == "inputs":
                # A hook that held the tensor it hangs on would be a cycle, and the whole graph would outlive its batch.
                seen = states.detach()
                states.register_hook(lambda gradient: record(name, seen, gradient))
            return _with_first(args, kwargs, states)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            made = output[0] if isinstance(output, tuple) else output
            states = first_state(args, kwargs).detach()
            seen = made.detach() - states if of == "updates" else states
            made.register_hook(lambda gradient: record(name, seen, gradient))

        return hook

    handles = [m.register_forward_pre_hook(before(name), with_kwargs=True) for name, m in modules.items()]
    if of != "inputs":
        handles += [m.register_forward_hook(after(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def meter(modules: Sequence[nn.Module], read: Callable[[], int]) -> Iterator[Callable[[], int]]:
    """Yield a function that returns how much `read()` has grown inside calls of `modules`, or of what they contain.

    Some families call the parts of a tower, not the tower.
    """
    depth = started = spent = 0

    def before(*_: Any) -> None:
        nonlocal depth, started
        started = started if depth else read()
        depth += 1

    def after(*_: Any) -> None:
        nonlocal depth, spent
        depth -= 1
        spent += 0 if depth else read() - started

    inside = {part for module in modules for part in module.modules()}
    handles = [part.register_forward_pre_hook(before) for part in inside]
    handles += [part.register_forward_hook(after) for part in inside]
    try:
        yield lambda: spent
    finally:
        for handle in handles:
            handle.remove()


def padding_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the (B, N) mask of real tokens among a tower's inputs, or None where every token counts.

    A decoder's own tokens are masked by `decoder_mask`; an `attention_mask` beside it speaks of its encoder's.
    """
    for name in ("decoder_mask", "attention_mask", "pixel_attention_mask"):
        mask = inputs.get(name)
        if mask is not None and mask.dim() == 2:
            return mask
    return None


def first_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a module is given first: of a block, the states."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": states}


MOMENTS_BYTES = 2**29
"""How much all second moments kept at once may take of any model; what does not fit costs another look at the samples."""


class Sums:
    """Streamed, optionally weighted sums of one Linear's inputs: first moments, and second moments (all, or the diagonal alone).

    Kept in float32, in float64 for float64 inputs; a full second moment of C channels takes 4*C*C bytes.
    """

    def __init__(self, full: bool) -> None:
        self.full = full
        self.weight = 0.0
        self.squared_weight = 0.0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def add(self, states: Tensor, weights: Tensor | None = None) -> None:
        """Add the tokens `states` (T, C), each counted `weights` (T,) times, once by default."""
        wide = states if states.dtype == torch.float64 else states.float()
        counts = torch.ones(len(wide), device=wide.device) if weights is None else weights
        self.weight += float(counts.sum(dtype=torch.float64))
        self.squared_weight += float(counts.square().sum(dtype=torch.float64))
        weighted = wide if weights is None else wide * weights.to(wide.dtype)[:, None]
        if self.first is None or self.second is None:
            width = wide.shape[1]
            self.first = wide.new_zeros(width)
            self.second = wide.new_zeros((width, width) if self.full else width)
        self.first += weighted.sum(0)
        if self.full:
            # In place: a second (C, C) for the product would double what this costs.
            self.second.addmm_(weighted.T, wide)
        else:
            self.second += (weighted * wide).sum(0)

    @property
    def count(self) -> float:
        """How many equally weighted tokens would tell as much (Kish's effective sample size)."""
        return self.weight**2 / self.squared_weight if self.squared_weight else 0.0

    def mean(self) -> Tensor:
        """Return E[x] (C,)."""
        assert self.first is not None, "no tokens were added"
        return self.first / self.weight

    def second_moment(self) -> Tensor:
        """Return E[x x'] (C, C), or its diagonal (C,)."""
        assert self.second is not None, "no tokens were added"
        return self.second / self.weight

    def norms(self, centred: bool) -> Tensor:
        """Return sqrt(E[x^2]) per channel, or the standard deviation with `centred`: (C,)."""
        second = self.second_moment()
        diagonal = second.diagonal() if self.full else second
        if centred:
            diagonal = (diagonal - self.mean().square()).clamp_min(0)
        return diagonal.sqrt()
