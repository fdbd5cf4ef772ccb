"""Time and peak memory of quantizing models that do not fit: weights rounded layer by layer, never the model in memory.

Models of Qwen2.5-VL's sizes are made from their configs with random weights, in bfloat16 shards of 2 GiB. The claim: peak -
interpreter <= twice the largest shard, whatever the model's size.

    python -m bench.streaming [3b] [7b]      writes bench/results/streaming.json; needs 3 times the model's size on disk
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from bench import assets
from mmcompress import streamed
from mmcompress.families import family_for
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.memory import interpreter_baseline, peak_rss_of_command
from mmcompress.weights import weight_files

VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": 14,
    "window_size": 112,
}
VISION |= {"fullatt_block_indexes": [7, 15, 23, 31]}  # type: ignore[dict-item]
ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
SIZES: dict[str, dict[str, Any]] = {
    "3b": {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "tie": True,
    },
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie": False,
    },
}
IMPORTS = ("torch", "transformers", "mmcompress.jobs.compress")


def write_model(size: str, directory: Path) -> int:
    """Write the checkpoint shard by shard; return its parameters."""
    directory.mkdir()
    text = dict(SIZES[size])
    tie = text.pop("tie")
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={**text, "rope_parameters": ROPE},
        vision_config={**VISION, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tie,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        model: Any = family_for(config.to_dict()).model_class(config)(config)
    shards, generator = streamed.Shards(directory, torch.bfloat16, limit=2**31), torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        shards.add(name, (torch.randn(tensor.shape, generator=generator) * 0.02), parameter=True)
    shards.finish()
    return sum(tensor.numel() for tensor in model.parameters())


def measure(size: str, work: Path) -> dict[str, Any]:
    """Make the model, quantize it in a process of its own, and load the result in another."""
    model, out = work / size, work / f"{size}-w8a16"
    parameters = write_model(size, model)
    files = weight_files(model)
    largest = max(file.stat().st_size for file in files)
    baseline = interpreter_baseline(IMPORTS)
    started = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "mmcompress.cli",
        "quantize",
        str(model),
        "-o",
        str(out),
        "--scheme",
        "W8A16",
        "-q",
    ]
    peak = peak_rss_of_command(command)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    loading = peak_rss_of_command([sys.executable, "-c", f"import mmcompress as mmc; mmc.load({str(out)!r})"])
    return {
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in files),
        "bytes_quantized": sum(file.stat().st_size for file in weight_files(out)),
        "shards": len(files),
        "largest_shard_mib": round(largest / 2**20),
        "interpreter_mib": round(baseline / 2**20),
        "quantize_seconds": round(seconds, 1),
        "quantize_peak_mib": round(peak.peak / 2**20),
        "above_interpreter_in_shards": round((peak.peak - baseline) / largest, 2),
        "load_quantized_seconds": round(time.perf_counter() - started, 1),
        "load_quantized_peak_mib": round(loading.peak / 2**20),
    }


def main() -> None:
    """Measure the sizes asked for, one after the other, and keep what was measured before of the others."""
    file = assets.RESULTS / "streaming.json"
    document = json.loads(file.read_text()) if file.exists() else {"models": {}}
    document |= {"command": "python -m bench.streaming", "machine": machine_facts()}
    for size in sys.argv[1:] or SIZES:
        with tempfile.TemporaryDirectory() as place:
            document["models"][size] = measure(size, Path(place))
        file.write_text(json.dumps(document, indent=1) + "\n")
        print(size, document["models"][size], flush=True)


if __name__ == "__main__":
    main()
