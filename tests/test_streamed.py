"""Layer by layer gives the same files as all at once, in the memory of a layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmcompress import checkpoint, passes, streamed
from mmcompress.errors import MmcError, UsageError
from mmcompress.jobs import compress as job
from mmcompress.recipe import parse
from mmcompress.surgery import quantized_int8
from tests import tiny

ROUND: dict[str, Any] = {"quantize": {"scheme": "W8A16"}}
FOUR_BITS: dict[str, Any] = {"quantize": {"scheme": "W4A16", "group_size": 16}}
EQUALIZE: dict[str, Any] = {"quantize": {**FOUR_BITS["quantize"], "scaling": "equalize"}}
RECIPE = {"steps": [ROUND]}
CUT: dict[str, Any] = {"prune": {"ratio": 0.05, "score": "magnitude", "compensate": "none", "multiple": 1}}
EXPERTS: dict[str, Any] = {"prune": {"ratio": 0.05, "units": ["experts"], "score": "magnitude"}}
SHORTEN: dict[str, Any] = {"prune": {"ratio": 0.1, "score": "random", "units": ["blocks"]}}
MERGE: dict[str, Any] = {"merge-tokens": {"keep": 0.7}}
RUNS: list[tuple[str, list[dict[str, Any]]]] = [
    *((name, [ROUND]) for name in ("llava_dinov2", "qwen2_5_vl", "whisper", "clip")),
    # fused, grouped and ungated layers, position tables with a column for each head, batch norms
    *((name, [CUT, ROUND]) for name in ("qwen2_5_vl", "clap", "blip", "whisper", "clip")),
    ("llava_dinov2", [SHORTEN, CUT, CUT]),
    ("qwen2_5_vl", [SHORTEN, ROUND]),
    ("qwen3_vl_moe", [EXPERTS, FOUR_BITS]),
    *((name, [FOUR_BITS]) for name in ("llava_dinov2", "qwen2_5_vl", "whisper")),
    ("llava_dinov2", [{"quantize": {"scheme": "FP8", "activations": "dynamic", "target": "cuda"}}]),
    ("whisper", [{"quantize": {"scheme": "W8A8", "activations": "dynamic"}}]),
    *((name, [EQUALIZE]) for name in ("qwen2_5_vl", "whisper")),
    ("clip", [MERGE, CUT, ROUND]),
    ("siglip", [MERGE]),
    (
        "clip",
        [{"quantize": {"scheme": "W8A16", "towers": ["vision"]}}, {"prune": {**CUT["prune"], "towers": ["text"]}}],
    ),
]


def stored(name: str, place: Path) -> Path:
    """A checkpoint in bfloat16, as it would come from elsewhere."""
    bundle = tiny.bundle(name)
    bundle.source = bundle.source.__class__(**{**vars(bundle.source), "dtype": "bfloat16"})
    checkpoint.save(bundle, place)
    (place / "mmc.json").unlink()
    return place


@pytest.fixture(params=["llava_dinov2", "qwen2_5_vl", "whisper", "clip"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return stored(request.param, tmp_path / "model")


@pytest.mark.parametrize(("name", "steps"), RUNS, ids=lambda value: value if isinstance(value, str) else _named(value))
def test_the_files_are_those_of_a_run_in_memory(
    name: str, steps: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = stored(name, tmp_path / "model"), parse({"steps": steps})
    with monkeypatch.context() as patched:
        patched.setattr(streamed, "can_stream", lambda made: False)
        whole = job.compress(model, recipe, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("the whole model was loaded"))
        result = job.compress(model, recipe, tmp_path / "streamed")
    assert "accuracy was not measured" in [finding.text for finding in result.findings]
    assert result.rows == whole.rows
    names = sorted(file.name for file in (tmp_path / "streamed").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "whole").iterdir() if file.name != "reports")
    for name in names:
        one, other = ((tmp_path / kind / name).read_bytes() for kind in ("streamed", "whole"))
        if name == "mmc.json":
            first, second = (without_measurements(json.loads(text)) for text in (one, other))
            assert first == second
        elif name not in ("README.md", "recipe.yaml"):  # they tell what was measured
            assert one == other, name


def test_experts_stored_with_two_sides_swapped_are_turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first checkpoints of Qwen3-VL-MoE store them: (experts, inputs, outputs)."""
    model = stored("qwen3_vl_moe", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    turned = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
    swapped = stored("qwen3_vl_moe", tmp_path / "swapped")
    save_file(turned, swapped / "model.safetensors", metadata={"format": "pt"})
    want = checkpoint.load(model).model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in checkpoint.load(swapped).model.state_dict().items())
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("the whole model was loaded"))
    for place in (model, swapped):
        job.compress(place, parse({"steps": [EXPERTS]}), tmp_path / f"small-{place.name}")
    one, other = ((tmp_path / f"small-{place.name}" / "model.safetensors").read_bytes() for place in (model, swapped))
    assert one == other


def _named(steps: list[dict[str, Any]]) -> str:
    return "+".join(next(iter(step)) for step in steps)


def without_measurements(document: dict[str, object]) -> dict[str, object]:
    del document["measured"]
    document["recipe"].pop("tasks")  # type: ignore[attr-defined]
    for record in document["records"]:  # type: ignore[attr-defined]
        del record["seconds"]
    return document


def test_many_shards_hold_what_one_does(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job.compress(model, parse(RECIPE), tmp_path / "one")
    monkeypatch.setattr(streamed, "SHARD_BYTES", 20_000)
    job.compress(model, parse(RECIPE), tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    found = {}
    for file in files:
        part = load_file(tmp_path / "many" / file)
        assert all(index["weight_map"][name] == file for name in part)
        found |= part
    want = load_file(tmp_path / "one" / "model.safetensors")
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    first, second = (checkpoint.load(tmp_path / kind).model.state_dict() for kind in ("one", "many"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("steps", [[ROUND], [CUT, FOUR_BITS]], ids=["8-bits", "cut-4-bits"])
@pytest.mark.parametrize("written", [1, 4])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    steps: list[dict[str, Any]], written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = stored("llava_dinov2", tmp_path / "model"), parse({"steps": steps})
    monkeypatch.setattr(streamed, "SHARD_BYTES", 20_000)
    job.compress(model, recipe, tmp_path / "whole")
    write, read = streamed.Shards._write, quantized_int8.choose_scale if steps == [ROUND] else None

    def killed(self: streamed.Shards) -> None:
        if self.count == written:
            raise KeyboardInterrupt  # which leaves what is there, as a killed process does
        write(self)

    with monkeypatch.context() as patched:
        patched.setattr(streamed.Shards, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            job.compress(model, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="an interrupted run lies in"):
        job.compress(model, recipe, tmp_path / "out")
    other = parse({"steps": steps, "seed": 1})
    with pytest.raises(UsageError, match="was another one: recipe changed"):
        job.compress(model, other, tmp_path / "out", resume=True)
    made: list[str] = []
    if read is not None:
        monkeypatch.setattr(
            quantized_int8, "choose_scale", lambda w, *a, **k: (made.append(w.device.type), read(w, *a, **k))[1]
        )
    job.compress(model, recipe, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()
    # What was written is not rounded again: it has no values.
    assert read is None or {"meta", "cpu"} == set(made[len(made) // 2 :])


def test_a_run_killed_while_it_hands_its_files_over_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = stored("clip", tmp_path / "model"), parse(RECIPE)
    monkeypatch.setattr(streamed, "SHARD_BYTES", 20_000)
    job.compress(model, recipe, tmp_path / "whole")

    def killed(*_: object) -> None:
        (tmp_path / ".out.partial" / "weights-0").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(streamed.Shards, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            job.compress(model, recipe, tmp_path / "out")
    job.compress(model, recipe, tmp_path / "out", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def same_weights(one: Path, other: Path) -> bool:
    names = sorted(file.name for file in one.glob("model*"))
    assert len(names) > 2
    assert names == sorted(file.name for file in other.glob("model*"))
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_no_more_than_a_layer_has_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tiny.bundle("llava_clip"), tmp_path / "model")
    (tmp_path / "model" / "mmc.json").unlink()
    seen = []
    replace = streamed.Written.replace

    def counted(self: streamed.Written, path: str, module: torch.nn.Module) -> None:
        replace(self, path, module)
        seen.append(max(tensor.untyped_storage().nbytes() for tensor in self.model.state_dict().values()))

    monkeypatch.setattr(streamed.Written, "replace", counted)
    job.compress(tmp_path / "model", parse({"steps": [CUT, ROUND]}), tmp_path / "out")
    assert len(seen) > 30
    assert max(seen) <= 8  # one number


def test_no_integers_become_floats_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tiny.bundle("qwen2_5_vl"), tmp_path / "model")
    monkeypatch.setattr(quantized_int8, "dequantize", lambda *a, **k: pytest.fail("a weight was unpacked"))
    job.compress(tmp_path / "model", parse(RECIPE), tmp_path / "out")


def test_names_of_older_checkpoints_are_known(tmp_path: Path) -> None:
    bundle = tiny.bundle("llava_clip")
    checkpoint.save(bundle, tmp_path / "new")
    checkpoint.save(bundle, tmp_path / "old")
    bundle.model.save_pretrained(tmp_path / "old")  # in the class's first format
    assert "language_model.lm_head.weight" in load_file(tmp_path / "old" / "model.safetensors")
    for kind in ("new", "old"):
        (tmp_path / kind / "mmc.json").unlink()
        job.compress(tmp_path / kind, parse(RECIPE), tmp_path / f"{kind}-out")
    first, second = (tmp_path / f"{kind}-out" / "model.safetensors" for kind in ("new", "old"))
    assert first.read_bytes() == second.read_bytes()


def test_a_checkpoint_that_lacks_a_tensor_leaves_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint.save(tiny.bundle("clip"), tmp_path / "model")
    (tmp_path / "model" / "mmc.json").unlink()
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UsageError, match=r"lacks visual_projection\.weight"):
        job.compress(tmp_path / "model", parse(RECIPE), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "params", "streams"),
    [
        ("quantize", {"scheme": "W8A16"}, True),
        ("quantize", {"scheme": "w8a16", "vision_scheme": "W16A16"}, True),
        ("quantize", {"scheme": "W8A16", "vision_scheme": "W8A8"}, False),
        ("quantize", {"scheme": "W4A16", "vision_scheme": "W8A16"}, True),
        ("quantize", {"scheme": "W4A16", "rounding": "gptq"}, False),
        ("quantize", {"scheme": "W8A16", "rounding": "gptq"}, True),
        ("quantize", {"scheme": "W4A16", "rounding": "adaround"}, False),
        ("quantize", {"scheme": "W4A16", "scaling": "equalize"}, True),
        ("prune", {"score": "magnitude"}, False),
        ("prune", {"score": "magnitude", "compensate": "none"}, True),
        ("prune", {"score": "magnitude", "compensate": "none", "crosscheck": True}, False),
        ("prune", {"score": "random", "units": ("blocks",)}, True),
        ("prune", {"score": "activation", "compensate": "none"}, False),
        ("merge-tokens", {"keep": 0.5}, True),
        ("distill", {}, False),
    ],
)
def test_what_streams(name: str, params: dict[str, object], streams: bool) -> None:
    assert streamed.can_stream(passes.build(name, params)) == streams


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    bundle = tiny.bundle("clip")
    with torch.no_grad():
        bundle.model.text_projection.weight[0, 0] = torch.inf
    checkpoint.save(bundle, tmp_path / "model")
    recipe = parse(
        {"steps": [{"prune": {"ratio": 0.1, "score": "magnitude", "compensate": "none", "towers": ["vision"]}}]}
    )
    with pytest.raises(MmcError, match=r"text_projection\.weight has NaN or infinity"):
        job.compress(tmp_path / "model", recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_layer_of_several_parts_is_written_when_its_last_part_is(tmp_path: Path) -> None:
    """Experts have two stacks; of the layer written last, some tensors may be missing."""

    def begun(*names: str) -> streamed.Shards:
        place = tmp_path / str(len(names))
        place.mkdir()
        first = streamed.Shards(place, torch.float32, limit=4)
        for name in (*names, "waiting.x"):
            first.add(name, torch.ones(1), parameter=True)
        return streamed.Shards(place, torch.float32, limit=4)

    half = begun("a.weight", "b.one.x")
    assert [half.has_all_of(path) for path in ("a", "b", "b.one", "c")] == [True, False, False, False]
    whole = begun("a.weight", "b.one.x", "b.two.x", "bc.weight")
    assert [whole.has_all_of(path) for path in ("a", "b", "b.one", "b.two", "bc")] == [True, True, True, True, False]
