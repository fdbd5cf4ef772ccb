"""Time and peak memory of quantizing models that do not fit to calibration samples, layer by layer: integers for activations too.

Models of Qwen2.5-VL's shape are made from their configs with random weights, in bfloat16 shards, beside the mini-VLM's tokenizer,
and are shown questions about pictures. With random weights accuracy means nothing; time and memory are those of trained ones.

    python -m bench.streaming_data [1b] [7b]      writes bench/results/streaming_data.json
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from bench import assets
from bench.mini_vlm import CHAT_TEMPLATE
from bench.streaming import IMPORTS, measure_each, say, timed, write_model
from mmcompress.measure.memory import interpreter_baseline
from mmcompress.weights import weight_files

SIDE, SAMPLES = 224, 16
SPECIAL = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
RUNS = {"1b": "W8A8", "7b": "W8A8"}


def write_preprocessing(directory: Path) -> None:
    """Write a tokenizer that knows Qwen's special tokens, and pictures of 224 pixels; say their numbers in the config."""
    tokenizer = AutoTokenizer.from_pretrained(assets.mini_vlm())
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())})
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<image>", picture)
    tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessorPil(min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE).save_pretrained(directory)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    numbers = {key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL.items()}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config |= numbers
    config["text_config"] |= ends
    file.write_text(json.dumps(config))


def measure(size: str, work: Path) -> dict[str, Any]:
    """Make the model and quantize it in a process of its own."""
    model, out = work / size, work / f"{size}-out"
    say(f"{size}: writing the model")
    parameters = write_model(size, model)
    write_preprocessing(model)
    scheme = RUNS[size]
    # Random weights keep no cosine, and which groups of layers cost how much is not what is timed.
    words = ["quantize", str(model), "-o", str(out), "--scheme", scheme, "--sensitivity-samples", "0"]
    words += ["--data", str(assets.vqa("training")), "--num-samples", str(SAMPLES), "--batch-size", "4"]
    say(f"{size}: quantizing")
    document: dict[str, Any] = {
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in weight_files(model)),
        "largest_shard_mib": round(max(file.stat().st_size for file in weight_files(model)) / 2**20),
        "interpreter_mib": round(interpreter_baseline(IMPORTS) / 2**20),
        "scheme": scheme,
        "samples": SAMPLES,
    }
    document |= timed("quantize", ["-m", "mmcompress.cli", *words])
    document["bytes_quantized"] = sum(file.stat().st_size for file in weight_files(out))
    shutil.rmtree(model)
    return document


if __name__ == "__main__":
    measure_each(assets.RESULTS / "streaming_data.json", "python -m bench.streaming_data", tuple(RUNS), measure)
