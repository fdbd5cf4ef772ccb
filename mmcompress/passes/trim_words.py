"""The words of a model: the table they are looked up in, the layer that writes them, and who knows a word by its number."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from mmcompress.bundle import Bundle, DualEncoder, TeacherForced
from mmcompress.errors import UsageError
from mmcompress.views import Tower


@dataclass(frozen=True)
class Words:
    """Where V words are: paths of the table and, of a model that writes, of its output layer."""

    tower: str
    size: int
    table: str
    output: str = ""
    tied: bool = False
    """Whether table and output layer are one tensor."""

    def rows(self, bundle: Bundle) -> dict[str, Tensor]:
        """Return what has a row for each word, by name; what is tied once."""
        table, output = bundle.module(self.table), bundle.module(self.output) if self.output else None
        found = {f"{self.table}.weight": table.weight}
        if output is not None:
            found |= {} if self.tied else {f"{self.output}.weight": output.weight}
            found |= {f"{self.output}.bias": output.bias} if output.bias is not None else {}
        return found  # type: ignore[return-value]

    def cut(self, bundle: Bundle, new: Mapping[int, int], values: Mapping[str, Tensor]) -> None:
        """Put a table and an output layer of `new` words (their number by what it was) in place; `values` by name, or none yet."""
        old: Any = bundle.module(self.table)
        table = of_size(old, len(new), {"weight": values.get(f"{self.table}.weight")})
        table.num_embeddings = len(new)
        table.padding_idx = new.get(old.padding_idx) if old.padding_idx is not None else None
        bundle.replace(self.table, table)
        if not self.output:
            return
        given = {name: values.get(f"{self.output}.{name}") for name in ("weight", "bias")}
        output = of_size(bundle.module(self.output), len(new), given)
        output.out_features = len(new)
        if self.tied:
            output.weight = table.weight
        bundle.replace(self.output, output)


def words_of(bundle: Bundle, name: str = "") -> Words:
    """Return the words of the tower `name`, by default the one that reads or writes texts.

    Raises UsageError where there is none, and where table or output layer are not plain floats.
    """
    if not name:
        answers = isinstance(bundle.family, TeacherForced)
        name = bundle.forced.answering if answers else "text" if isinstance(bundle.family, DualEncoder) else ""
    if not name:
        raise UsageError(
            f"words can be taken from models that embed texts or write them, and {bundle.family.name} models do neither",
            hint="mmc quantize stores word tables in 8 bits",
        )
    tower = bundle.tower(name)
    size = getattr(config_of(bundle, tower), "vocab_size", None)
    if size is None:
        raise UsageError(f"the {name} tower reads no words", hint="name the tower that does with --tower")
    tables = {path: bundle.module(path) for path in tower.embeddings}
    plain = [
        path for path, module in tables.items() if isinstance(module, nn.Embedding) and "weight" in module._parameters
    ]
    found = [path for path in plain if bundle.module(path).num_embeddings == size]
    if not found:
        names = ", ".join(f"{path} is a {type(table).__name__}" for path, table in tables.items())
        raise UsageError(
            f"the {name} tower has no plain table of {size} words: {names or 'it has no tables'}",
            hint="put trim-vocabulary before quantize",
        )
    if isinstance(bundle.family, DualEncoder):
        return Words(name, size, found[0])
    linears = [path for path in tower.heads if type(bundle.module(path)) is nn.Linear]
    outputs = [path for path in linears if bundle.module(path).out_features == size]
    if not outputs:
        raise UsageError(
            f"the {name} tower of {bundle.family.name} models has no plain output layer of {size} words",
            hint="put trim-vocabulary before quantize; models that write with a larger head are not covered",
        )
    tied = bundle.module(outputs[0]).weight is bundle.module(found[0]).weight
    return Words(name, size, found[0], outputs[0], tied)


def spoken_of(bundle: Bundle) -> set[int]:
    """Return the numbers of words that a model's settings for writing name: where answers begin, end and are padded."""
    settings = getattr(bundle.model, "generation_config", None)
    return {index for _, value in _numbers(settings) for index in _all(value)} if settings else set()


def renumber(bundle: Bundle, name: str, special: Mapping[int, int], new: Mapping[int, int], before: int) -> None:
    """Say in modules, configs and settings for writing how many words there are, and which numbers they have now.

    special: the numbers that mean one word wherever they stand; others may be defaults that mean nothing, or a mark. new: of all
    words that are left; of those never to be written the others are struck off.
    """
    tower = bundle.tower(name)
    config, settings = config_of(bundle, tower), getattr(bundle.model, "generation_config", None)
    modules = [bundle.model, *bundle.module(tower.path).modules()]
    for owner in (bundle.model.config, config, *modules):
        if vars(owner).get("vocab_size") == before:
            owner.vocab_size = len(new)
    config.vocab_size = len(new)
    for owner in (bundle.model.config, config, settings, *modules):
        if owner is None or isinstance(owner, nn.Embedding):
            continue
        for key, value in _numbers(owner):
            setattr(owner, key, _renumbered(value, special))
        for key in ("suppress_tokens", "begin_suppress_tokens"):
            listed = vars(owner).get(key)
            if listed:
                setattr(owner, key, [new[index] for index in listed if index in new])
        if vars(owner).get("forced_decoder_ids"):
            pairs = owner.forced_decoder_ids  # places in the answer, and what stands there
            owner.forced_decoder_ids = [[place, _renumbered(index, new)] for place, index in pairs]


def config_of(bundle: Bundle, tower: Tower) -> Any:
    return attrgetter(tower.config)(bundle.model.config) if tower.config else bundle.model.config


def _numbers(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that say words by number."""
    for key, value in list(vars(owner).items()):
        one = key.endswith(("_token_id", "_token_index")) or key == "padding_idx"
        if value is not None and (one or key in ("lang_to_id", "task_to_id")):
            yield key, value


def _all(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, int):
        yield value


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, dict):
        return {key: _renumbered(each, new) for key, each in value.items()}
    if isinstance(value, list):
        return [_renumbered(each, new) for each in value]
    return new.get(value, value) if isinstance(value, int) else value


def of_size(old: nn.Module, rows: int, values: Mapping[str, Tensor | None]) -> Any:
    """Return a table or output layer like `old` with so many rows: `values`, or whatever lies in memory."""
    made = copy.copy(old)
    made._parameters = dict(old._parameters)
    for name, parameter in old._parameters.items():
        if parameter is not None:
            value = values.get(name)
            value = parameter.new_empty(rows, *parameter.shape[1:]) if value is None else value
            setattr(made, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    return made
