"""Reading exported directories back, and saying clearly what is wrong with damaged ones."""

from __future__ import annotations

import json
import shutil

import pytest

from mmcompress.errors import UsageError
from mmcompress.export.artifact import FILE_NAME, is_artifact, open_artifact


@pytest.fixture
def copied(clip_export, tmp_path):
    target = tmp_path / "artifact"
    shutil.copytree(clip_export.artifact.directory, target)
    return target


def edit(directory, **changes):
    path = directory / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(directory, words):
    with pytest.raises(UsageError, match=words) as caught:
        open_artifact(directory)
    assert caught.value.hint


def test_a_copy_is_the_same_artifact_elsewhere(copied, clip_export):
    artifact = open_artifact(copied)
    assert artifact.components == clip_export.artifact.components
    assert artifact.path("text") == copied / "text.onnx"
    assert artifact.bytes == sum(path.stat().st_size for path in copied.glob("*.onnx"))


def test_a_checkpoint_is_no_artifact(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not is_artifact(tmp_path)
    refused(tmp_path, "has no artifact.json")


def test_one_flipped_byte_is_found(copied):
    path = copied / "vision.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(copied, "vision.onnx is damaged")
    assert open_artifact(copied, verify=False)


def test_a_cut_off_file_is_found_without_reading_it(copied):
    path = copied / "text.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"text\.onnx is damaged"):
        open_artifact(copied, verify=False)


@pytest.mark.parametrize("name", ["vision.onnx", "tokenizer.json"])
def test_missing_files(copied, name):
    (copied / name).unlink()
    refused(copied, f"{name} is missing")


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 1, "components": [{}]}'])
def test_a_damaged_description(copied, content):
    (copied / FILE_NAME).write_text(content)
    refused(copied, r"artifact\.json is damaged")


def test_a_newer_schema(copied):
    edit(copied, schema=99)
    refused(copied, "schema 99")


def test_a_file_outside_the_directory(copied):
    components = json.loads((copied / FILE_NAME).read_text())["components"]
    components[0]["file"] = "../vision.onnx"
    edit(copied, components=components)
    refused(copied, "outside")


def test_an_unknown_component_names_the_closest(copied):
    with pytest.raises(UsageError, match="no component 'visoin'") as caught:
        open_artifact(copied).path("visoin")
    assert caught.value.hint == "did you mean 'vision'?"
