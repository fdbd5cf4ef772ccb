"""Recipes: strict keys with the closest one named, overrides, and that the resolved recipe reads back as itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmcompress import recipe
from mmcompress.errors import UsageError

FULL = """
seed: 7
data: {calibration: a, evaluation: b, num_samples: 12}
tasks: [retrieval, zero-shot]
steps:
  - prune: {ratio: 0.3}
  - merge_tokens: {keep: 0.7}
  - quantize
export: {to: onnx, runners: [onnxruntime]}
gates: {max_drop: {retrieval.r1: 0.02}, min_speedup: 2}
"""


def test_a_full_recipe_is_read_and_reads_back_as_itself() -> None:
    made = recipe.parse(yaml.safe_load(FULL))
    assert [step.name for step in made.steps] == ["prune", "merge-tokens", "quantize"]
    assert made.gates.min_speedup == 2.0
    assert made.data.num_samples == 12
    assert recipe.parse(yaml.safe_load(made.to_yaml())) == made


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("stps: []", "no key 'stps'", "'steps'"),
        ("steps: []", "no steps", "mmc passes"),
        ("steps: prune", "expected a list", "- "),
        ("steps: [{prune: 3}]", "steps.prune is 3", "parameter"),
        ("steps: [{prune: {}, quantize: {}}]", "a step is", "- "),
        ("{steps: [prune], gates: {max_drp: {}}}", "gates has no key 'max_drp'", "'max_drop'"),
        ("{steps: [prune], gates: {max_drop: 0.1}}", "gates.max_drop is 0.1", "metric"),
        ("{steps: [prune], seed: x}", "recipe.seed is 'x'; expected int", "default"),
        ("{steps: [prune], seed: true}", "recipe.seed is True; expected int", "default"),
        ("{steps: [prune], data: {num_samples: -1}}", "data.num_samples is -1", "default"),
        ("{steps: [prune], gates: {max_size: .nan}}", "gates.max_size is nan", "default"),
        (
            "{steps: [prune], export: {to: tensorrt}}",
            "export.to is 'tensorrt'; expected one of nothing, onnx",
            "default",
        ),
        ("{steps: [prune], export: {precision: fp8}}", "export.precision is 'fp8'", "default"),
        ("- prune", "a recipe is a mapping", "recipes/"),
    ],
)
def test_mistakes_name_the_key_and_what_to_do(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        recipe.parse(yaml.safe_load(text))
    assert hint in caught.value.hint


def test_overrides_reach_steps_sections_and_top_level_keys() -> None:
    made = recipe.parse(
        yaml.safe_load(FULL),
        ["prune.ratio=0.5", "merge_tokens.keep=0.25", "data.num-samples=3", "seed=1"],
    )
    assert made.steps[0].params == {"ratio": 0.5}
    assert made.steps[1].params == {"keep": 0.25}
    assert (made.data.num_samples, made.seed) == (3, 1)


def test_both_spellings_of_a_key_are_read() -> None:
    made = recipe.parse(yaml.safe_load("{steps: [prune], data: {num-samples: 3}, gates: {max-size: 0.5}}"))
    assert (made.data.num_samples, made.gates.max_size) == (3, 0.5)


@pytest.mark.parametrize("text", ["ratio", "prun.ratio=1", "ratio=1", "steps=1", "data.x=1", "prune.units=[heads"])
def test_bad_overrides_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        recipe.parse(yaml.safe_load(FULL), [text])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe"):
        recipe.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("steps: [prune")
    with pytest.raises(UsageError, match="not YAML.*line 1"):
        recipe.read(tmp_path / "bad.yaml")
