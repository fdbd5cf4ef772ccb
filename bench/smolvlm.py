"""A model of SmolVLM's shape around the real SmolLM2-135M-Instruct, and English text to measure its language model with.

What is real: the language model (in the 4 bits its package has it in, made floats again), its words and its manner of talk. What is
not: the vision encoder, SigLIP base at 256 pixels, and the connector have random weights, so it sees nothing. Speed, memory, export
and what compression does to a real language model of 30 blocks are measured with it, not what it says of pictures.

The text is Python's own manual, which every interpreter carries: a paragraph is asked for what follows it.
"""

import json
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIDE, FOLD = 256, 4
IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
LIMIT = 2048
COUNTS = {"test": 240, "train": 64}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def build_smolvlm(package: Path, out: Path) -> None:
    """Write the SmolVLMForConditionalGeneration folder (bfloat16) to `out`, SmolLM2's GGUF file being in `package`."""
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    language = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, AROUND, WHOLE]})
    tokenizer.chat_template, tokenizer.model_max_length, tokenizer.padding_side = CHAT_TEMPLATE, LIMIT, "left"
    text = {
        key: value
        for key, value in language.config.to_dict().items()
        if key not in ("quantization_config", "architectures", "dtype", "transformers_version")
    }
    words = -(-len(tokenizer) // 64) * 64
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": SIDE,
            "patch_size": 16,
        },
        text_config={**text, "vocab_size": words, "max_position_embeddings": LIMIT, "pad_token_id": 2},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=FOLD,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = SmolVLMForConditionalGeneration(config)
    known = {
        name.removeprefix("model."): value for name, value in language.state_dict().items() if name != "lm_head.weight"
    }
    table = known.pop("embed_tokens.weight")
    model.model.text_model.load_state_dict(known | {"embed_tokens.weight": _longer(table, words)}, strict=True)
    model.tie_weights()
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=32, eos_token_id=ends, pad_token_id=2, bos_token_id=1
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    pixels = SmolVLMImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    pixels.save_pretrained(out)


def _longer(table: torch.Tensor, words: int) -> torch.Tensor:
    """Return the word table (V, C) with rows of the mean word behind it."""
    return torch.cat([table, table.mean(0, keepdim=True).expand(words - len(table), -1)])


def paragraphs() -> list[str]:
    """Return the manual's paragraphs that are prose, one line each."""
    found = []
    for name in sorted(topics):
        for part in topics[name].split("\n\n"):
            line = " ".join(part.split())
            letters = sum(character.isalpha() or character == " " for character in line)
            if 200 <= len(line) <= 700 and letters > 0.9 * len(line) and not re.search(r">>>|::=|\*\*\*|===", line):
                found.append(line)
    return list(dict.fromkeys(found))


def write_text(out: Path, split: Literal["test", "train"]) -> None:
    """Write questions to go on with a text: the first half of a paragraph, and its second half as the answer.

    Every fifth paragraph is for training, which has grey pictures with one question in four, so that a calibration has pictures in
    it. Raises ValueError where the manual is too short.
    """
    lines, count = [], COUNTS[split]
    found = [line for number, line in enumerate(paragraphs()) if (number % 5 == 0) == (split == "train")]
    if len(found) < count:
        raise ValueError(f"this interpreter's manual has {len(found)} such paragraphs; {count} are asked for")
    Image.new("RGB", (SIDE, SIDE), (128, 128, 128)).save(out / "grey.png")
    for number in range(count):
        words = found[number * len(found) // count].split()
        half = len(words) // 2
        row = {
            "id": f"{number:03d}",
            "question": f"Go on with this text: {' '.join(words[:half])}",
            "answers": [" ".join(words[half:])],
        }
        shown = {"file_name": "grey.png"} if split == "train" and number % 4 == 3 else {}
        lines.append(json.dumps(row | shown, ensure_ascii=False) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
