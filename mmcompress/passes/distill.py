"""Recover accuracy: pull what a compressed model embeds or answers towards its teacher's. Values change, structure does not.

The recommended set of losses for CLIP-like models is feature + interactive + relational (CLIP-KD, Yang et al. 2024, table 6).
Where images and texts do not belong together, the interactive loss gives way to affinity with the other modality's vectors
(DIME-FM, Sun et al. 2023). The scale of the logits does not train: it is the teacher's and the student keeps it.

Of a model that answers in text, the tower that writes learns the teacher's distributions of the next token along the data's
answers (word-level distillation, Kim and Rush 2016), every other tower the teacher's hidden states; each tower by itself, so that
any choice of towers can train.

Quantized layers hold integers, which have no gradient: only their biases learn. With train: quantized-weights they hold floats
while they train, rounded in every forward (quantization-aware training; see `surgery.master_weights`).

Weights that `sparsify` made 0 stay 0 (see `surgery.kept_zeros`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmcompress.bundle import Bundle, DualEncoder, TeacherForced
from mmcompress.errors import UsageError
from mmcompress.passes.base import Context, Plan, Work
from mmcompress.passes.distill_answers import BATCH as ANSWERS
from mmcompress.passes.distill_job import UPDATES, trainable, updatable
from mmcompress.passes.distill_pairs import BATCH as PAIRS
from mmcompress.passes.distill_run import distill, merging_ledgers, read_job


@dataclass(frozen=True)
class Distill:
    """Recover accuracy by training towards a teacher's embeddings, hidden states and answers.

    Runs alone or in several processes: under `torchrun`, on CPUs (over gloo) or with `--device cuda` on one GPU each, or on GPUs
    under `accelerate launch --multi_gpu`. On CPUs `accelerate launch` starts one process whatever its `--num_processes`. What is
    tested is two CPU processes under `torchrun`. Continues after being killed where the run has a work folder.
    """

    name: ClassVar[str] = "distill"

    teacher: str = ""
    """The checkpoint to learn from; empty: the uncompressed original."""
    epochs: float | None = None
    """How often every training sample is seen; 0 changes nothing; default 1, or as often as `max_minutes` allow."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    max_minutes: float | None = None
    """Make as many steps as fit into this time, at most `epochs` or `steps` where given; decided once, by timing the first."""
    batch_size: int | None = None
    """Samples that go through the towers at once, in each process; default 64, of models that answer in text 8."""
    accumulate: int = 1
    """Batches in one step; the contrastive losses see all of them as one batch (costs a third more time)."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; default 1e-4, with fewer than 100 steps a hundredth of that for each; 1e-3 suits
    train: norms-and-biases, projection and lora."""
    weight_decay: float = 0.01
    """Decay of the weights of linear and convolution layers; norms, biases and embedding tables have none."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; it falls as half a cosine afterwards."""
    anneal: float = 0.0
    """Of a student that merges tokens: share of the steps in which it comes down from all its tokens to the merges it was made
    with, along half a cosine; 0: it merges them all from the first step."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    ema: float = 0.0
    """Decay of the moving average of the weights that becomes the result, such as 0.99; 0: the last step's weights."""
    feature: float = 4.0
    """Weight of the squared distance between student and teacher vectors, the strongest single loss."""
    interactive: float | None = None
    """Weight of the contrastive loss between student and teacher; default 1 for paired data, 0 else."""
    relational: float = 1.0
    """Weight of the KL between both models' similarities: images with texts if paired, within each modality else."""
    logit: float = 0.0
    """Weight of the KL between both models' logits, each with its own scale and bias; for paired data."""
    affinity: float | None = None
    """Weight of the KL between both models' similarities to the teacher's other modality; default 1 for unpaired data, 0 else."""
    temperature: float = 2.0
    """Softens both sides of the logit and affinity losses."""
    answer: float = 1.0
    """Of models that answer in text: weight of the KL between both models' next tokens along the data's answers."""
    cross_entropy: float = 0.0
    """Of models that answer in text: weight of the cross entropy of the data's answers themselves."""
    hidden: float = 1.0
    """Of models that answer in text: weight of the squared distance of other towers' hidden states, relative to their variance."""
    pairing: Literal["auto", "paired", "unpaired"] = "auto"
    """Whether image i belongs to text i; auto: if every sample has both."""
    towers: tuple[str, ...] = ()
    """Towers that train, the others stay as they are to the bit; empty: all the data has samples for."""
    train: Literal["all", "norms-and-biases", "projection", "lora", "quantized-weights"] = "all"
    """Which parameters of these towers train; norms-and-biases: everything one-dimensional; projection: what leads from a tower
    into the shared space, or into the language model (the connector); lora: updates of low rank of the Linears in the blocks,
    added to their weights at the end; quantized-weights: all, and the weights that are stored as integers or 8-bit floats, on
    the grids they have (quantization-aware training)."""
    rank: int = 16
    """Rank of the updates with train: lora."""
    augment: bool = False
    """Crop and recolour the images lightly, never mirror them."""
    cache_teacher: bool | None = None
    """Run the teacher once per plain image, not in every step; default: unless augment, where it sees the changed image. What a
    teacher answers is too much to keep: it always runs in every step."""
    keep_worse: bool = False
    """Keep what training made even if the loss on held-back samples rose; otherwise the weights from before are put back then."""
    amp: bool = True
    """Compute in bfloat16 where the device has it in hardware (CUDA; CPUs with AMX or AVX512-BF16)."""
    save_minutes: float = 5.0
    """How often the state to continue from is written; 0: after every step."""
    seed: int | None = None
    """Order, choice of captions, augmentation; default: the run's seed."""

    def __post_init__(self) -> None:
        positive = ("batch_size", "accumulate", "learning_rate", "temperature", "max_minutes", "rank")
        not_negative = ("epochs", "steps", "weight_decay", "clip", "save_minutes", "seed")
        weights = ("feature", "interactive", "relational", "logit", "affinity")
        of_answers = ("answer", "cross_entropy", "hidden")
        for name in (*positive, *not_negative, *weights, *of_answers):
            value = getattr(self, name)
            if value is None or (math.isfinite(value) and (value > 0 or (value == 0 and name not in positive))):
                continue
            raise UsageError(f"distill.{name} is {value}; expected {name} {'>' if name in positive else '>='} 0")
        for name in ("warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"distill.{name} is {getattr(self, name)}; expected 0 <= {name} < 1")
        if not 0 <= self.anneal <= 1:
            raise UsageError(
                f"distill.anneal is {self.anneal}; expected 0 <= anneal <= 1", hint="0.5 anneals in half of the steps"
            )
        if not any(getattr(self, name) or getattr(self, name) is None for name in (*weights, *of_answers)):
            raise UsageError("all losses of distill have weight 0", hint="remove feature: 0 to get the default")

    @property
    def neutral(self) -> bool:
        """Whether there is nothing to do."""
        return self.steps == 0 if self.steps is not None else self.epochs == 0

    @property
    def rounds(self) -> float | None:
        """How often every training sample is seen; None: as often as there is time for."""
        return 1.0 if self.epochs is None and self.max_minutes is None else self.epochs

    def control(self, decisions: Mapping[str, Any] | None = None) -> None:
        """Return None: nothing is selected."""

    def seconds(self, bundle: Bundle, work: Work) -> float:
        """The student sees every sample forwards and backwards in every epoch; the teacher once, or each time where it is live."""
        if self.neutral:
            return 0.0
        live = not isinstance(bundle.family, DualEncoder)
        step = (self.batch_size or (ANSWERS if live else PAIRS)) * self.accumulate
        rounds = math.inf if self.rounds is None else self.rounds
        seen = rounds * work.dataset if self.steps is None else self.steps * step
        training = (4 if live else 3) * seen * work.forward
        if self.max_minutes is not None:
            training = min(training, 60 * self.max_minutes)
        return training + work.dataset * work.forward

    def check(self, bundle: Bundle) -> None:
        """Raise UsageError for models that neither embed nor answer, and when nothing in the chosen towers can train."""
        if not isinstance(bundle.family, DualEncoder | TeacherForced):
            raise UsageError(
                f"distill learns embeddings in a shared space or answers in text, and {bundle.family.name} models give neither",
                hint="prune with compensate=least-squares repairs a model without training",
            )
        if isinstance(bundle.family, DualEncoder) and bundle.family.media != "vision":
            raise UsageError(
                f"distill trains models of images and texts, and the texts of {bundle.family.name} describe sound",
                hint="prune with compensate=least-squares repairs a model without training",
            )
        for name in self.towers:
            bundle.tower(name)
        towers = self.towers or tuple(tower.name for tower in bundle.towers())
        if self.train == UPDATES:
            updatable(bundle, towers)
        else:
            trainable(bundle, towers, self.train)

    def plan(self, bundle: Bundle, context: Context) -> Plan:
        """Decide which towers train, on how many samples, in how many steps (a limit where `max_minutes` is given)."""
        if self.neutral:
            return Plan({"steps": 0})
        job = read_job(self, bundle, context)
        if self.anneal:
            merging_ledgers(bundle, job.towers)
        for remark in job.remarks:
            context.progress.say(remark)
        return Plan(job.decisions(bundle))

    def apply(self, bundle: Bundle, plan: Plan) -> None:
        """Change nothing: distillation has no structure to make again."""

    def fit(self, bundle: Bundle, context: Context) -> dict[str, Any]:
        """Train; return the steps made, loss and cosine to the teacher before and after on held-back samples, and the curve.

        Raises UsageError without data or teacher, when the teacher's vectors do not fit, and when training diverges.
        """
        return {"steps": 0} if self.neutral else distill(self, bundle, context)
