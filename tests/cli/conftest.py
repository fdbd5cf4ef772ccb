"""The real entry of `mmc` in this process, a small checkpoint and a little data to go wrong with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmcompress import checkpoint
from mmcompress.cli.__main__ import main
from tests import tiny


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message; there is one, on one line, and a hint follows it as the last line."""
        *_, message, hint = self.err.strip().splitlines()
        assert message.startswith("error: "), self.err
        assert hint.startswith("hint: "), self.err
        assert "Traceback" not in self.err
        return message.removeprefix("error: ")

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Mmc = Callable[..., Outcome]


@pytest.fixture
def mmc(capsys: pytest.CaptureFixture[str]) -> Mmc:
    """Run a command through the entry point."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        said = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        return Outcome(code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP on disk; tests that damage it take a copy."""
    directory = tmp_path_factory.mktemp("models") / "clip"
    checkpoint.save(tiny.bundle("clip"), directory)
    (directory / "mmc.json").unlink()  # as it comes from a hub
    return directory


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six pictures with texts."""
    return tiny.write_pairs(tmp_path / "pictures", 6)
