"""SmolLM2 out of GGUF: rows where transformers rotates them, words cut as it was taught them, its own manner of talk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from bench.smolvlm import (
    AROUND,
    BLOCK,
    IMAGE,
    assembled,
    halves_apart,
    language_config,
    language_weights,
    read_gguf,
    tokenizer_of,
)

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WIDTH, HEADS, SHARED, NEURONS = 8, 2, 1, 12


def facts() -> dict[str, Any]:
    """Return what a GGUF file says of a model with one block and hardly any words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*CONTROLS, *letters, "12", "th", "Ġth"]
    return {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * len(CONTROLS) + [1] * (len(words) - len(CONTROLS)),
        "tokenizer.ggml.merges": ["1 2", "t h", "Ġ th"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "llama.context_length": 64,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": NEURONS,
        "llama.block_count": 1,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": SHARED,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 4,
        "llama.rope.freq_base": 100000.0,
    }


def tensors(words: int) -> dict[str, torch.Tensor]:
    """Return the tensors of such a file."""
    sizes = {
        "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (8, WIDTH), "attn_k": (4, WIDTH), "attn_v": (4, WIDTH),
        "attn_output": (WIDTH, 8), "ffn_gate": (NEURONS, WIDTH), "ffn_up": (NEURONS, WIDTH), "ffn_down": (WIDTH, NEURONS),
    }  # fmt: skip
    made = {f"blk.0.{name}.weight": torch.randn(size) for name, size in sizes.items()}
    assert set(sizes) == set(BLOCK)
    return made | {"token_embd.weight": torch.randn(words, WIDTH), "output_norm.weight": torch.ones(WIDTH)}


def test_rows_rotated_together_move_half_a_head_apart() -> None:
    # Two heads of 4 rows. GGUF pairs 0 with 1 and 2 with 3; transformers pairs the first with the third.
    rows = torch.arange(8.0)[:, None]
    assert halves_apart(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_attention_does_not_depend_on_whose_order_it_is() -> None:
    """Scores of GGUF's way to rotate, neighbours together, are those of transformers' way with the rows moved."""
    torch.manual_seed(0)
    width, place = 8, 3
    angles = place * 100000.0 ** (-torch.arange(width // 2) / (width // 2))
    query, key, states = torch.randn(width, 5), torch.randn(width, 5), torch.randn(2, 5)

    def neighbours(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(rows.unflatten(0, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(at), at)).flatten()

    def halves(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cos, sin = at.cos().repeat(2), at.sin().repeat(2)
        return rows * cos + torch.cat([-rows[width // 2 :], rows[: width // 2]]) * sin

    theirs = neighbours(query @ states[0], angles) @ neighbours(key @ states[1], angles * 0)
    ours = halves(halves_apart(query, 1) @ states[0], angles) @ halves(halves_apart(key, 1) @ states[1], angles * 0)
    torch.testing.assert_close(ours, theirs)


def test_words_are_cut_by_merges_and_digits_stand_alone() -> None:
    tokenizer = tokenizer_of(facts())
    ids = tokenizer(f"th th12<|im_end|>{AROUND}<row_1_col_2>{IMAGE}")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "th", "Ġth", "1", "2", "<|im_end|>", AROUND, "<row_1_col_2>", IMAGE,
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("th  é\n12")["input_ids"]) == "th  é\n12"


def test_it_talks_as_it_was_taught() -> None:
    tokenizer = tokenizer_of(facts())
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    asked = [{"role": "user", "content": "hi"}]
    written = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert written == f"{system}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    assert f"user\n{IMAGE}hi<|im_end|>" in tokenizer.apply_chat_template(shown, tokenize=False)
    own = [{"role": "system", "content": "be brief"}, *asked]
    assert tokenizer.apply_chat_template(own, tokenize=False).startswith("<|im_start|>system\nbe brief<|im_end|>\n")


def test_everything_real_is_in_its_place_and_the_rest_the_same_every_time() -> None:
    said = facts()
    tokenizer = tokenizer_of(said)
    config = language_config(said, len(tokenizer))
    torch.manual_seed(1)
    found = tensors(len(said["tokenizer.ggml.tokens"]))
    weights = language_weights(found, config)
    vision = {"image_size": 16, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    models = [assembled(config, weights, tokenizer.convert_tokens_to_ids(IMAGE), vision) for _ in range(2)]
    language = models[0].model.text_model
    assert torch.equal(language.layers[0].mlp.down_proj.weight, found["blk.0.ffn_down.weight"])
    assert torch.equal(language.layers[0].self_attn.k_proj.weight, halves_apart(found["blk.0.attn_k.weight"], SHARED))
    table = language.embed_tokens.weight
    assert models[0].lm_head.weight is table
    known = len(found["token_embd.weight"])
    assert torch.equal(table[:known], found["token_embd.weight"])
    torch.testing.assert_close(table[known:], found["token_embd.weight"].mean(0).expand(len(table) - known, -1))
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_a_reader_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "gguf.py").write_text("raise ImportError('no such format')")
    with pytest.raises(RuntimeError, match="gguf failed: ImportError: no such format"):
        read_gguf(tmp_path / "model.gguf", tmp_path)
