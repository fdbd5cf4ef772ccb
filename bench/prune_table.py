"""Every score and every allocation of `prune` at several ratios, on three real models: accuracy against random units, no training.

- `encoder`: the DINOv2-S + MiniLM dual encoder; R@1 on the held-out vendor's drawings.
- `heads`: its attention heads alone, which relevance ranks; and heads that become narrower instead.
- `speech`: Whisper tiny.en, both towers; words of the test sentences.
- `answers`: the mini-VLM, both towers; held-out questions.
- `words`: its language model alone, where scores may ask what units say.

A ratio is the share of all towers' parameters that goes, embeddings and projections counted in. What stays is refitted by least
squares, random units too, so that only the selection differs. Each result is judged in torch, paired with the original (n and
intervals), with random selections (several seeds), and with the default: Taylor scores, shared out by the knapsack.

The statistics that scores and repairs are made from are those of the uncut model, the same for every row: they are taken once.

    python -m bench.prune_table encoder [--samples 0] [--ratio 0.3 …] [--method obs …] [--kept FOLDER]

writes bench/results/prune_table.json; rows it holds already for the same samples are not measured again. FOLDER keeps
evaluations, so that a further run compares with them.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from bench import assets
from bench.cells import read, write_result
from mmcompress import checkpoint, pipeline
from mmcompress.bundle import Bundle
from mmcompress.data import Dataset, open_data
from mmcompress.evaluate import evaluation
from mmcompress.evaluate.evaluation import Evaluation, compare, evaluate
from mmcompress.evaluate.store import read_evaluation, write_evaluation
from mmcompress.evaluate.tasks import TASKS
from mmcompress.evaluate.verdict import random_findings
from mmcompress.measure.machine import machine_facts
from mmcompress.packed import cache_dir
from mmcompress.passes import prune_dims, prune_effects, prune_repair, prune_surgeon
from mmcompress.passes.base import Context
from mmcompress.passes.prune import Prune
from mmcompress.passes.prune_ranking import ranked
from mmcompress.surgery.watch import Sums

RESULT = assets.RESULTS / "prune_table.json"
RANDOM, DEFAULT = "random", "taylor"
SEEDS = 3
METHODS: dict[str, dict[str, Any]] = {
    RANDOM: {"score": "random"},
    DEFAULT: {"score": "taylor"},
    "taylor-even": {"score": "taylor", "allocate": "even"},
    "taylor-evolutionary": {"score": "taylor", "allocate": "evolutionary", "evaluations": 50},
    "taylor-contrastive": {"objective": "contrastive"},
    "taylor-signed": {"score": "taylor-signed", "objective": "contrastive"},
    "taylor-absolute": {"score": "taylor-absolute"},
    "obs": {"score": "obs"},
    "obs-even": {"score": "obs", "allocate": "even"},
    "obs-evolutionary": {"score": "obs", "allocate": "evolutionary", "evaluations": 50},
    "activation": {"score": "activation"},
    "activation-balanced": {"score": "activation", "balance": True},
    "magnitude": {"score": "magnitude"},
    "relevance": {"score": "relevance"},
    "taylor-answers": {"score": "taylor", "objective": "answers"},
    "direct-effect": {"score": "direct-effect"},
    "head-dims": {"units": ("head-dims",)},
    "head-dims-magnitude": {"units": ("head-dims",), "score": "magnitude"},
    "head-dims-random": {"units": ("head-dims",), "score": "random"},
}
NARROWER = ("head-dims", "head-dims-magnitude", "head-dims-random")
ANYWHERE = (RANDOM, DEFAULT, "obs", "taylor-even", "obs-even", "taylor-absolute", "activation", "magnitude")


@dataclass(frozen=True)
class Contest:
    """What is pruned, and how that is judged."""

    model: Callable[[], Path]
    methods: tuple[str, ...]
    calibration: Callable[[], Dataset]
    looked_at: int
    """How many samples scores and repairs are made from."""
    task: str
    data: Callable[[], Dataset]
    samples: int
    """How many of them by default; 0: all."""
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the pass, where they are not the usual ones."""


CONTESTS = {
    "encoder": Contest(
        assets.dual_encoder,
        (*ANYWHERE, "taylor-contrastive", "taylor-signed", "taylor-evolutionary", "obs-evolutionary"),
        lambda: open_data(assets.training_pairs()), 128, "retrieval", lambda: open_data("demo:test"), 0,
    ),
    "heads": Contest(
        assets.dual_encoder,
        (RANDOM, DEFAULT, "taylor-absolute", "obs", "activation", "magnitude", "relevance", *NARROWER),
        lambda: open_data(assets.training_pairs()), 128, "retrieval", lambda: open_data("demo:test"), 0,
        (0.05, 0.1, 0.15), {"units": ("heads",)},
    ),
    "speech": Contest(
        assets.whisper_tiny, ANYWHERE,
        lambda: open_data(assets.speech("train")), 32, "transcription", lambda: open_data(assets.speech("test")), 60,
    ),
    "answers": Contest(
        assets.mini_vlm, (*ANYWHERE, "activation-balanced"),
        lambda: open_data(str(assets.vqa("training"))), 64, "vqa", lambda: open_data(str(assets.vqa("heldout"))), 60,
    ),
    "words": Contest(
        assets.mini_vlm,
        (RANDOM, DEFAULT, "obs", "activation", "activation-balanced", "magnitude", "taylor-answers", "direct-effect"),
        lambda: open_data(str(assets.vqa("training"))), 64, "vqa", lambda: open_data(str(assets.vqa("heldout"))), 200,
        (0.1, 0.2), {"towers": ("language",)},
    ),
}  # fmt: skip


class Pruner:
    """Prunes one contest's model again and again."""

    def __init__(self, contest: Contest) -> None:
        self.contest = contest
        self.calibration = contest.calibration().subset(contest.looked_at, 0)
        self.scores: dict[str, list[Tensor]] = {}
        self.moments: dict[str, Sums] = {}
        self.shown: dict[str, int] = {}

    def context(self, seed: int) -> Context:
        return Context(data=self.calibration, num_samples=self.contest.looked_at, batch_size=16, seed=seed)

    def pruned(self, method: str, ratio: float, seed: int = 0) -> tuple[Bundle, dict[str, Any]]:
        """Return the model without `ratio` of its parameters, and what the plan says of how that was split."""
        bundle = checkpoint.load(self.contest.model())
        settings = Prune(ratio=ratio, **{**self.contest.options, **METHODS[method]})
        settings.check(bundle)
        with self._remembering():
            if method == RANDOM:
                plan = settings.plan(bundle, self.context(seed))
            else:
                key = json.dumps([settings.score, settings.objective, settings.balance, settings.units])
                if key not in self.scores:
                    _, groups, _, _ = settings.survey(bundle, settings.chosen(bundle))
                    self.scores[key] = ranked(settings, bundle, groups, self.context(seed))
                plan = settings.planned(bundle, self.context(seed), self.scores[key])
        settings.apply(bundle, plan)
        pipeline.verify(bundle, "prune")
        return bundle, plan.facts

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Let scores and repairs have second moments that were summed up once; they overwrite theirs."""

        def remembered(bundle: Bundle, sums: dict[str, Sums], context: Context, label: str) -> dict[str, int]:
            if not self.moments:
                towers = bundle.towers()
                blocks = [block for tower in towers for block in tower.blocks]
                parts = [part for block in blocks for part in (block.attention, block.cross, block.mlp) if part]
                self.moments = {part.reader: Sums(full=True) for part in parts}
                self.shown = prune_effects.stream_by_effect(bundle, self.moments, self.context(0), label)
            for path, own in sums.items():
                vars(own).update(vars(copy.deepcopy(self.moments[path])))
            return self.shown

        def together(bundle: Bundle, groups: Any, full: bool) -> list[list[Any]]:
            return [list(groups)]

        with (
            mock.patch.object(prune_repair, "stream_by_effect", remembered),
            mock.patch.object(prune_surgeon, "stream_by_effect", remembered),
            mock.patch.object(prune_dims, "stream_by_effect", remembered),
            mock.patch.object(prune_repair, "parts", together),
            mock.patch.object(prune_surgeon, "parts", together),
        ):
            yield


@dataclass
class Judge:
    """Evaluates, once each, and keeps what was found."""

    task: str
    data: Dataset
    kept: Path
    original: Evaluation | None = None

    def __call__(
        self, name: str, make: Callable[[], tuple[Bundle, dict[str, Any]]]
    ) -> tuple[Evaluation, dict[str, Any]]:
        path, facts = self.kept / f"{name}.npz", self.kept / f"{name}.json"
        if not path.exists():
            bundle, said = make()
            with uncontrolled():
                found = evaluate(bundle, self.data, [self.task], batch=16, reference=self.original)
            self.kept.mkdir(parents=True, exist_ok=True)
            facts.write_text(json.dumps(said))
            temporary = path.with_suffix(".writing")
            write_evaluation(found, temporary)
            temporary.replace(path)
        return read_evaluation(path), json.loads(facts.read_text())


@contextmanager
def uncontrolled() -> Iterator[None]:
    """Leave blank and other pictures out, which no row shows: they take longer than the samples do."""

    def none(*_: Any, **__: Any) -> list[Any]:
        return []

    with mock.patch.object(evaluation, "controls", none), mock.patch.object(evaluation, "answer_controls", none):
        yield


def row(task: str, found: Evaluation, facts: dict[str, Any]) -> dict[str, Any]:
    """What one model scores, and which share of the units of each kind is gone."""
    results = found.to_json()["results"][task]
    made = {name: _short(results[name]) for name in TASKS[task].headlines if name in results}
    gone = {f"{each['tower']} {each['kind']}": round(each["share"], 3) for each in facts.get("split", [])}
    search = {"search": facts["search"]} if "search" in facts else {}
    return {"scores": made, **({"gone": gone} if gone else {}), **search}


def _short(estimate: dict[str, Any]) -> dict[str, Any]:
    """An estimate, and the difference to the original, in four digits."""
    made: dict[str, Any] = {key: round(estimate[key], 4) for key in ("value", "low", "high")} | {"n": estimate["n"]}
    return made | ({"difference": _short(estimate["difference"])} if "difference" in estimate else {})


def rows_of(
    contest: Contest, pruner: Pruner, judge: Judge, ratio: float, methods: list[str]
) -> Iterator[tuple[str, Any]]:
    """Yield what each method scores at one ratio; random ones and the default first: the others are set beside them."""
    metric = TASKS[contest.task].headlines[0]
    controls = []
    for seed in range(SEEDS):
        found, facts = judge(f"{RANDOM} {ratio:g}, seed {seed}", partial(pruner.pruned, RANDOM, ratio, seed))
        controls.append(found)
        yield f"{RANDOM} {ratio:g}, seed {seed}", row(contest.task, found, facts)
    default, _ = judge(f"{DEFAULT} {ratio:g}", partial(pruner.pruned, DEFAULT, ratio))
    for method in methods:
        if method == RANDOM:
            continue
        found, facts = judge(f"{method} {ratio:g}", partial(pruner.pruned, method, ratio))
        made = row(contest.task, found, facts)
        said = [finding.text for finding in random_findings(controls, found) if metric in finding.text]
        made["against random"] = said[0]
        if method != DEFAULT:
            made["against default"] = _short(compare(default, found, 0)[contest.task][metric].to_json())
        yield f"{method} {ratio:g}", made


def main() -> None:
    """Measure what is missing, write the document, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", choices=CONTESTS)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--kept", type=Path, default=cache_dir() / "prune_table")
    options = parser.parse_args()
    contest = CONTESTS[options.contest]
    samples = contest.samples if options.samples is None else options.samples
    data = contest.data()
    data = data.subset(samples, 0) if samples else data
    judge = Judge(contest.task, data, options.kept / f"{options.contest}-{len(data)}")
    judge.original, _ = judge("original", lambda: (checkpoint.load(contest.model()), {}))
    pruner = Pruner(contest)
    for ratio in options.ratio or contest.ratios:
        document = _document(options.contest, len(data), samples, contest)
        methods = options.method or list(contest.methods)
        if all(f"{method} {ratio:g}" in document["rows"] for method in methods if method != RANDOM):
            continue
        _write(options.contest, document, "original", row(contest.task, judge.original, {}))
        for name, made in rows_of(contest, pruner, judge, ratio, methods):
            _write(options.contest, _document(options.contest, len(data), samples, contest), name, made)
            print(name, json.dumps(made["scores"]), made.get("against random", ""), flush=True)


def _document(name: str, count: int, samples: int, contest: Contest) -> dict[str, Any]:
    """What is known of a contest on as many samples."""
    whole = read(RESULT.stem)
    found: dict[str, Any] = whole.get(name, {})
    if found.get("n") == count:
        return found
    command = f"python -m bench.prune_table {name}" + (f" --samples {samples}" if samples != contest.samples else "")
    return {
        "command": command,
        "n": count,
        "calibrated_on": contest.looked_at,
        "machine": machine_facts(),
        "rows": {},
    }


def _write(contest: str, document: dict[str, Any], name: str, made: dict[str, Any]) -> None:
    """Add a row; the file is read again first: another contest may have been at work."""
    whole = read(RESULT.stem)
    document["rows"][name] = made
    whole[contest] = document
    temporary = RESULT.with_suffix(f".{contest}")
    write_result(temporary, whole)
    temporary.replace(RESULT)


if __name__ == "__main__":
    main()
