"""Answers of a LlavaForConditionalGeneration folder to held-out questions, slice by slice, with plain transformers only.

This is the reference that the product's own evaluation is compared with, so it shares no code with it.

    python -m bench.vlm_quality                writes bench/results/mini_vlm.json
    python -m bench.vlm_quality MODEL_FOLDER   prints only
"""

import argparse
import json
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from bench import assets

BATCH = 32


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A metadata row as a chat: earlier turns, then the question; the picture comes with the first words of the user."""
    said = [pair for turn in row.get("turns", []) for pair in zip(("user", "assistant"), turn, strict=True)]
    chat: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in [*said, ("user", row["question"])]
    ]
    chat[0]["content"].insert(0, {"type": "image"})
    return chat


def plain(text: str) -> str:
    """An answer without what does not count: case, outer space, a final full stop."""
    return " ".join(text.lower().split()).rstrip(".")


def correct(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> np.ndarray:
    """Whether each answer is one of the accepted ones: (n,) bool."""
    return np.array([plain(said) in map(plain, row["texts"]) for row, said in zip(rows, answers, strict=True)])


class Answering:
    """A folder's model in eval mode and its processor; in bfloat16, several times as fast where the CPU has it."""

    def __init__(self, folder: Path) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def answers(self, folder: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Greedy answers to the rows of a data folder, in their order."""
        found = []
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            chats = [self.processor.apply_chat_template(messages(row), add_generation_prompt=True) for row in part]
            images = [Image.open(folder / row["file_name"]) for row in part]
            batch = self.processor(text=chats, images=images, padding=True, return_tensors="pt")
            batch = batch.to(torch.bfloat16)
            tokens = self.model.generate(**batch)[:, batch["input_ids"].shape[1] :]
            found += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return found


def share(hits: np.ndarray, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """The share of hits with its 95% bootstrap interval over the questions."""
    draws = np.random.default_rng(seed).integers(0, len(hits), (resamples, len(hits)))
    low, high = np.quantile(hits[draws].mean(1), (0.025, 0.975))
    return {"value": round(float(hits.mean()), 4), "interval95": [round(float(low), 4), round(float(high), 4)]}


def majority(rows: Sequence[dict[str, Any]]) -> float:
    """What always giving the most frequent right answer would score."""
    return round(Counter(row["texts"][0] for row in rows).most_common(1)[0][1] / len(rows), 4)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The questions of a data folder."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def measure(model: Answering, folder: Path) -> dict[str, Any]:
    """Accuracy of each slice of a data folder; questions after earlier turns also by themselves."""
    rows = read_rows(folder)
    hits = correct(rows, model.answers(folder, rows))
    slices: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        slices[row["group"]].append(i)
        slices["after earlier turns" if row.get("turns") else "first question"].append(i)
    table = {}
    for name, members in sorted(slices.items()):
        asked = [rows[i] for i in members]
        table[name] = {"n": len(members), **share(hits[members]), "majority": majority(asked)}
    return table


def main() -> None:
    """Measures the built model on every held-out drawing and on the slices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    options = parser.parse_args()
    model = Answering(options.folder or assets.mini_vlm())
    started = time.monotonic()
    result = {"drawings": measure(model, assets.vqa("naming")), "slices": measure(model, assets.vqa("heldout"))}
    print(f"{time.monotonic() - started:.0f} s")
    if options.folder is None:
        trained = json.loads(assets.TRAINED_VLM.with_suffix(".json").read_text(encoding="utf-8"))
        result |= {
            "dtype": "bfloat16",
            "trained": trained,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        (assets.RESULTS / "mini_vlm.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
