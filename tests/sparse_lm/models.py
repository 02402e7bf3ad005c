"""Models of random weights, large enough that attention matters."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

SIZES = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **SPECIAL, num_attention_heads=6, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, **SPECIAL, num_attention_heads=6, num_key_value_heads=6),
    "gpt2": GPT2Config(**SPECIAL, vocab_size=128, n_embd=48, n_layer=2, n_head=6, n_positions=64),
}


def model_of(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_ids(*shape, seed=0):
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))
