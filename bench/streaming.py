"""Time and peak memory of quantizing models that do not fit: weights rounded layer by layer, never the model in memory.

Models of Qwen2.5-VL's sizes are made from their configs with random weights, in bfloat16 shards of 2 GiB. The claim: peak -
interpreter <= twice the largest shard, whatever the model's size; and layers are rounded to the same bits as in memory.

    python -m bench.streaming [3b] [7b]      writes bench/results/streaming.json

On disk the model (7b: 16 GiB) and the result (8 GiB) lie beside each other until the result is loaded, which takes 8 GiB of memory.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from bench import assets
from bench.cells import write_result
from mmcompress import streamed
from mmcompress.errors import MmcError, OutOfMemory
from mmcompress.families import family_for
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.memory import interpreter_baseline, peak_rss_of_command
from mmcompress.ops.rounding import WEIGHT_INT8, choose_scale, quantize
from mmcompress.weights import INDEX, weight_files

VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": 14,
    "window_size": 112,
}
VISION |= {"fullatt_block_indexes": [7, 15, 23, 31]}  # type: ignore[dict-item]
SIZES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie": True,
    },
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
CLAIM = 2
"""Shards, above the interpreter."""
IMPORTS = ("torch", "transformers", "mmcompress.jobs.compress")


def architecture(size: str) -> tuple[Any, Any]:
    """Return the config and the model, to be made on the meta device."""
    text = dict(SIZES[size])
    tie = text.pop("tie")
    width = text["hidden_size"] // text["num_attention_heads"]
    rope = {"rope_type": "default", "mrope_section": [width // 8, 3 * width // 16, 3 * width // 16], "rope_theta": 1e6}
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={**text, "rope_parameters": rope},
        vision_config={**VISION, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tie,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    model_class: Any = family_for(config.to_dict()).model_class(config)
    return config, model_class(config)


def write_model(size: str, directory: Path) -> int:
    """Write the checkpoint shard by shard; return its parameters."""
    with torch.device("meta"):
        config, model = architecture(size)
    directory.mkdir()
    config.save_pretrained(directory)
    shards, generator = streamed.Shards(directory, torch.bfloat16, limit=2**31), torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        shards.add(name, (torch.randn(tensor.shape, generator=generator) * 0.02), parameter=True)
    shards.finish()
    return sum(tensor.numel() for tensor in model.parameters())


def measure(size: str, work: Path) -> dict[str, Any]:
    """Make the model, quantize it in a process of its own, and load the result in another, the model being gone by then.

    Raises OutOfMemory before anything is written when the disk is too small, MmcError when a command fails, when its peak is above
    the claim, or when a layer is not rounded as it is in memory.
    """
    require_disk(size, work)
    model, out = work / size, work / f"{size}-w8a16"
    say(f"{size}: writing the model")
    parameters = write_model(size, model)
    files = weight_files(model)
    largest = max(file.stat().st_size for file in files)
    document: dict[str, Any] = {
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in files),
        "shards": len(files),
        "largest_shard_mib": round(largest / 2**20),
        "interpreter_mib": round(interpreter_baseline(IMPORTS) / 2**20),
    }
    say(f"{size}: {document['bytes'] / 2**30:.1f} GiB in {len(files)} shards; inspecting")
    document |= timed("inspect", ["-m", "mmcompress.cli", "inspect", str(model)])
    say(f"{size}: quantizing")
    words = ["quantize", str(model), "-o", str(out), "--scheme", "W8A16"]
    document |= timed("quantize", ["-m", "mmcompress.cli", *words])
    above = (document["quantize_peak_mib"] - document["interpreter_mib"]) / document["largest_shard_mib"]
    document["above_interpreter_in_shards"] = round(above, 2)
    document["bytes_quantized"] = sum(file.stat().st_size for file in weight_files(out))
    say(f"{size}: comparing layers")
    document["layers_compared"] = compare(model, out)
    shutil.rmtree(model)
    say(f"{size}: loading the result")
    document |= timed("load_quantized", ["-c", f"import mmcompress as mmc; mmc.load({str(out)!r})"])
    if above > CLAIM:
        say(json.dumps(document))
        raise MmcError(f"{size}: the peak is {above:.2f} shards above the interpreter, and {CLAIM} were claimed")
    return document


def require_disk(size: str, work: Path) -> None:
    """Raise OutOfMemory when `work` has no room for the model in bfloat16 and, beside it, in 8 bits with a little over."""
    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in architecture(size)[1].parameters())
    needed, free = round(parameters * (2 + 1.05)), shutil.disk_usage(work).free
    if needed > free:
        raise OutOfMemory(
            f"{size} needs {needed / 2**30:.0f} GiB of disk; {work} has {free / 2**30:.0f} GiB free",
            hint="set TMPDIR to a larger disk",
        )


def timed(what: str, arguments: list[str]) -> dict[str, Any]:
    """Run Python in a process of its own; return seconds and peak memory, whose names begin with `what`.

    Raises MmcError when it fails.
    """
    peak = peak_rss_of_command([sys.executable, *arguments])
    if peak.result != 0:
        raise MmcError(f"{what} ended with {peak.result}: python {' '.join(arguments)}")
    return {f"{what}_seconds": round(peak.seconds, 1), f"{what}_peak_mib": round(peak.peak / 2**20)}


def compare(model: Path, out: Path, count: int = 8) -> int:
    """Round `count` layers here, spread over the model, and compare with what was written; return how many there were.

    Raises MmcError for one that differs.
    """
    source, made = places(model), places(out)
    rounded = sorted(name.removesuffix("_int8") for name in made if name.endswith(".weight_int8"))
    chosen = [name for name in rounded if name in source][:: max(1, len(rounded) // count)]
    for name in chosen:
        weight = read(source, name).float()
        scale, zero_point = choose_scale(weight, WEIGHT_INT8, axis=0)
        codes = quantize(weight, scale, zero_point, WEIGHT_INT8, axis=0)
        if not (torch.equal(codes, read(made, f"{name}_int8")) and torch.equal(scale, read(made, f"{name}_scale"))):
            raise MmcError(f"{name} in {out} is not what rounding it gives")
    return len(chosen)


def places(directory: Path) -> dict[str, Path]:
    """Return the file that holds each tensor of a checkpoint in several files."""
    found = json.loads((directory / INDEX).read_text())["weight_map"]
    return {name: directory / file for name, file in found.items()}


def read(where: dict[str, Path], name: str) -> torch.Tensor:
    """Return one tensor."""
    with safe_open(where[name], "pt") as opened:
        return opened.get_tensor(name)


def say(text: str) -> None:
    """Tell what goes on."""
    print(text, file=sys.stderr, flush=True)


def measure_each(
    file: Path, command: str, sizes: Sequence[str], measured: Callable[[str, Path], dict[str, Any]]
) -> None:
    """Measure the sizes asked for, one after the other, and keep what was measured before of the others."""
    document = json.loads(file.read_text()) if file.exists() else {"models": {}}
    document |= {"command": command, "machine": machine_facts()}
    for size in sys.argv[1:] or sizes:
        with tempfile.TemporaryDirectory() as place:
            document["models"][size] = measured(size, Path(place))
        write_result(file, document)
        print(size, document["models"][size], flush=True)


if __name__ == "__main__":
    measure_each(assets.RESULTS / "streaming.json", "python -m bench.streaming", ("3b", "7b"), measure)
