"""What the tests of passes on decoders share: the small model that listens and writes, and what it makes of things."""

from __future__ import annotations

from typing import Any

import torch

from mmcompress.bundle import Bundle
from mmcompress.passes.base import Context
from tests import tiny

TABLE, LAST = "model.decoder.embed_tokens", "proj_out"
"""The embedding table and the Linear that share one weight."""


def bundle(seed: int = 0) -> Bundle:
    return tiny.bundle("whisper", seed)


def context(count: int = 6, **more: Any) -> Context:
    return Context(**{"data": tiny.spoken(count), "num_samples": count, "batch_size": 3, **more})


def outputs(made: Bundle, inputs: dict[str, dict[str, torch.Tensor]] | None = None) -> dict[str, torch.Tensor]:
    """Return what each tower makes of its example inputs, and what the whole model writes."""
    inputs = inputs or examples(made)
    with torch.inference_mode():
        made.model.eval()
        found = {name: made.encode(name, given) for name, given in inputs.items()}
        heard, ids = inputs["audio"]["input_features"], inputs["decoder"]["decoder_input_ids"]
        return {**found, "whole": made.model(input_features=heard, decoder_input_ids=ids).logits}


def examples(made: Bundle) -> dict[str, dict[str, torch.Tensor]]:
    return {tower.name: made.example_inputs(tower.name, 2) for tower in made.towers()}


def same(one: Bundle, other: Bundle) -> bool:
    """Whether both give the same bits."""
    inputs = examples(one)
    first, second = outputs(one, inputs), outputs(other, inputs)
    return all(torch.equal(first[name], second[name]) for name in first)


def tied(made: Bundle) -> bool:
    """Whether the float table and the last Linear are one parameter."""
    return made.module(TABLE).weight is made.module(LAST).weight
