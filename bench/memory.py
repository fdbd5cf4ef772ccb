"""Peak memory of pruning and quantizing, and the start of the command line.

A CLIP of ViT-L/14 size (427 M parameters, 1.6 GiB in fp32, random weights) is written once; each pass then runs in a process of its
own. The claim: peak - interpreter with torch and transformers imported <= 1.5 x the model.

    python -m bench.memory [--only PASS]      writes bench/results/memory.json; of named passes only their rows
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import assets
from bench.cells import write_result
from mmcompress.measure.machine import machine_facts
from mmcompress.measure.memory import interpreter_baseline, peak_rss_of_command

IMPORTS = ("torch", "transformers", "mmcompress.jobs.compress")
PASSES = {
    "prune": ["prune", "--ratio", "0.3"],
    "prune, magnitude": ["prune", "--ratio", "0.3", "--score", "magnitude", "--compensate", "none"],
    "quantize W8A8": ["quantize", "--scheme", "W8A8"],
    "quantize W8A16": ["quantize", "--scheme", "W8A16"],
}


def write_model(folder: Path) -> int:
    """Write the model with the demo's preprocessing; return its bytes in memory."""
    script = f"""
import torch
from transformers import CLIPConfig, CLIPModel
from mmcompress import checkpoint
demo = checkpoint.load({str(demo())!r})
end = demo.model.config.text_config.eos_token_id
vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=49408, eos_token_id=end)
vision |= dict(patch_size=14, image_size=112)
model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768))
model.save_pretrained({str(folder)!r})
demo.processor.save({str(folder)!r})
print(sum(p.numel() * p.element_size() for p in model.parameters()))
"""
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


def demo() -> Path:
    """The demo's checkpoint, for its preprocessing files."""
    import mmcompress.demo

    return Path(mmcompress.demo.__file__).parent / "clip"


def write_data(folder: Path) -> None:
    """32 noise images with texts."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for index in range(32):
        Image.fromarray(generator.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"drawing number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def help_seconds(runs: int = 9) -> list[float]:
    """Seconds of `mmc --help`, each in a new process."""
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mmcompress.cli", "--help"], check=True, capture_output=True)
        found.append(round(time.perf_counter() - started, 3))
    return sorted(found)


def main() -> None:
    """Measure, and write the document after every pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PASSES, help="repeatable; all by default")
    wanted = parser.parse_args().only or list(PASSES)
    file = assets.RESULTS / "memory.json"
    kept = json.loads(file.read_text())["passes"] if file.exists() else {}
    document: dict[str, Any] = {"command": "python -m bench.memory", "machine": machine_facts(), "passes": kept}
    document["help_seconds"] = help_seconds()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        size = write_model(work / "model")
        write_data(work / "data")
        baseline = interpreter_baseline(IMPORTS)
        document |= {"model_mib": round(size / 2**20), "interpreter_mib": round(baseline / 2**20)}
        for name in wanted:
            arguments = PASSES[name]
            command = [sys.executable, "-m", "mmcompress.cli", arguments[0], str(work / "model"), *arguments[1:]]
            command += ["-o", str(work / name), "--data", str(work / "data"), "--quiet"]
            peak = peak_rss_of_command([*command, "--num-samples", "16", "--batch-size", "4"])
            share = (peak.peak - baseline) / size
            document["passes"][name] = {
                "peak_mib": round(peak.peak / 2**20),
                "above_interpreter_in_models": round(share, 3),
            }
            write_result(file, document)
            print(name, document["passes"][name], flush=True)


if __name__ == "__main__":
    main()
