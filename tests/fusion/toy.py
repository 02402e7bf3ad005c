"""A random Llama and a tokenizer made in memory, as a folder that transformers loads; questions of several lengths."""

import json
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flextok.fusion.items import Item

TEXTS = [
    "Q: what is the capital of france?\nA: paris\n",
    "Q: name the capital of italy\nA: rome\n",
    "Q: which city is the seat of government of spain?\nA: madrid\n",
    "Q: france's capital is?\nA: paris\n",
]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([".\n"])  # a newline that is not by itself, as large tokenizers have many
    return tokenizer


def toy_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        # Larger than initial weights are, so that what is attended to decides about the answer.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 * parameter.shape[-1] ** -0.5)
    return model


def save_toy(folder: Path) -> Path:
    tokenizer = toy_tokenizer()
    toy_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ITEMS = [
    Item("france", ["paris"], ["what is the capital of france?", "france's capital is?", "name the capital of france"]),
    Item("italy", ["rome", "roma"], ["name the capital of italy"]),
    Item("spain", ["madrid"], ["which city is the seat of government of spain?", "spain's capital is?"]),
    Item("peru", ["lima"], ["capital of peru?", "which city is the capital of peru?", "name the seat of peru"]),
    Item("chad", ["n'djamena"], ["name the capital of chad", "what is the capital of chad?"]),
]


def write_items(path: Path, items: list[Item]) -> Path:
    path.write_text("".join(json.dumps(vars(item)) + "\n" for item in items))
    return path
