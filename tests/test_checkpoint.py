"""Checkpoints: what is saved comes back bit for bit, and every damaged one is refused in one line with nothing left behind."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from mmcompress import checkpoint, manifest, weights
from mmcompress.bundle import Bundle
from mmcompress.errors import MissingError, UsageError
from tests import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tiny.bundle("clip"), tmp_path / "model")
    return tmp_path / "model"


def same_outputs(one: Bundle, other: Bundle) -> bool:
    """Whether both give the same bits for images, texts and example inputs."""
    return bool((one.embed_images(tiny.images(2)) == other.embed_images(tiny.images(2))).all()) and bool(
        (one.embed_texts(tiny.texts(2)) == other.embed_texts(tiny.texts(2))).all()
    )


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_reload_is_bit_equal_and_so_is_plain_transformers(name: str, tmp_path: Path) -> None:
    bundle = tiny.bundle(name)
    written = checkpoint.save(bundle, tmp_path / "model")
    assert written.plain_transformers, written.why
    again = checkpoint.load(tmp_path / "model")
    assert type(again.model) is type(bundle.model)
    assert same_outputs(bundle, again)
    plain = type(bundle.model).from_pretrained(tmp_path / "model")
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in bundle.model.state_dict().items())


def test_twice_saved_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        checkpoint.save(tiny.bundle("clip"), tmp_path / name)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_half_on_disk_and_memory_holds_what_was_written(dtype: str, tmp_path: Path) -> None:
    bundle = tiny.bundle("clip")
    bundle.model.to(checkpoint.DTYPES[dtype]).save_pretrained(tmp_path / "half")
    bundle.processor.save(str(tmp_path / "half"))
    loaded = checkpoint.load(tmp_path / "half")
    assert loaded.source.dtype == dtype
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.0001)
    checkpoint.save(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").stat().st_size < 1.1 * (
        tmp_path / "half/model.safetensors"
    ).stat().st_size
    assert same_outputs(loaded, checkpoint.load(tmp_path / "again"))


def test_an_existing_output_is_never_touched(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        checkpoint.save(tiny.bundle("clip", seed=1), saved)
    assert (saved / "model.safetensors").read_bytes() == before


def test_a_failing_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_card", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tiny.bundle("clip"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_missing_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="model.safetensors is missing"):
        checkpoint.load(saved)


@pytest.mark.parametrize("keep", [4, 100, 5000])
def test_truncated_weights(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UsageError, match="damaged or cut off"):
        checkpoint.load(saved)


def test_corrupt_header(saved: Path) -> None:
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"x" * 32
    file.write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(saved)


def test_weights_of_another_width(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 50
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "mmc.json").unlink()
    with pytest.raises(UsageError, match=r"do not fit|lack"):
        checkpoint.load(saved)


def test_incomplete_weights(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "model.safetensors")
    tensors.pop("text_projection.weight")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lack 1 tensors, such as text_projection.weight"):
        checkpoint.load(saved)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_is_refused_and_never_executed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").unlink()
    with (saved / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Bomb(), file, protocol=2)
    with pytest.raises(UsageError, match="pickled") as caught:
        checkpoint.load(saved)
    assert "--allow-pickle" in caught.value.hint
    with pytest.raises(UsageError, match="weights_only|not fit"):
        checkpoint.load(saved, allow_pickle=True)
    assert not (tmp_path / "exploded").exists()


def test_a_harmless_pickle_loads_when_allowed(saved: Path) -> None:
    bundle = checkpoint.load(saved)
    (saved / "model.safetensors").unlink()
    torch.save(bundle.model.state_dict(), saved / "pytorch_model.bin")
    (saved / "mmc.json").unlink()
    assert same_outputs(bundle, checkpoint.load(saved, allow_pickle=True))


def test_an_index_may_not_point_outside(saved: Path) -> None:
    (saved / weights.INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(UsageError, match="outside"):
        checkpoint.load(saved)


@pytest.mark.parametrize("model", ["nowhere", "./no/such/dir"])
def test_no_directory(model: str) -> None:
    with pytest.raises(UsageError, match="no directory"):
        checkpoint.load(model)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no config.json"):
        checkpoint.load(tmp_path)


def test_a_config_that_is_not_json(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        checkpoint.load(saved)


def test_an_unknown_family(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "t5", "architectures": ["T5Model"]}))
    with pytest.raises(UsageError, match="T5Model is not supported"):
        checkpoint.load(saved)


def test_devices(saved: Path) -> None:
    with pytest.raises(UsageError, match="not a device"):
        checkpoint.load(saved, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="CUDA"):
            checkpoint.load(saved, device="cuda")


def test_a_damaged_manifest_is_refused(saved: Path) -> None:
    (saved / manifest.FILE_NAME).write_text('{"schema": 1}')
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(saved)


def test_a_manifest_of_the_future_is_refused(saved: Path) -> None:
    document = json.loads((saved / manifest.FILE_NAME).read_text())
    (saved / manifest.FILE_NAME).write_text(json.dumps(document | {"schema": 99, "mmc": "9.0"}))
    with pytest.raises(UsageError, match="schema 99") as caught:
        checkpoint.load(saved)
    assert "9.0" in caught.value.hint


def test_the_source_of_a_copy_is_the_same_whatever_its_place(saved: Path, tmp_path: Path) -> None:
    (saved / "mmc.json").unlink()
    shutil.copytree(saved, tmp_path / "deep/model")
    assert checkpoint.load(saved).source == checkpoint.load(tmp_path / "deep/model").source


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mapped files")
def test_a_loaded_checkpoint_is_not_mapped(tmp_path: Path) -> None:
    """Weights that are views of a mapped file keep all of it in memory until the last of them is replaced."""
    checkpoint.save(tiny.bundle("clip"), tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert loaded.embed_texts(["a cat"]).shape[0] == 1
