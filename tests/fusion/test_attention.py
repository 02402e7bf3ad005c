"""Our attention in models of several families: exact where it runs, a clear error where it cannot, restored always."""

from contextlib import nullcontext

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gpt_oss import GptOssConfig

from flextok.fusion import fusion_attention, generate_fused, pack_segments
from tests.fusion.recorded import random_ids
from tests.support import max_difference

SIZES = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
WINDOW = 6
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "llama 24:8": LlamaConfig(**SIZES, num_attention_heads=24, num_key_value_heads=8),
    "qwen2": Qwen2Config(**SIZES, **HEADS),
    "qwen2 window": Qwen2Config(**SIZES, **HEADS, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, **HEADS),
    "mistral": MistralConfig(**SIZES, **HEADS, sliding_window=None),
    "mistral window": MistralConfig(**SIZES, **HEADS, sliding_window=WINDOW),
    "gpt2": GPT2Config(vocab_size=128, n_embd=48, n_layer=2, n_head=6, n_positions=64),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


def model_of(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@each_family
@pytest.mark.parametrize("backend", ["sdpa", "flex", "eager"])
def test_each_wording_is_read_as_the_model_reads_it_alone(name, backend):
    model, segments = model_of(FAMILIES[name]), random_ids(9, 14, 5)
    out = generate_fused(
        model, [pack_segments(segments, tail=[7])], max_new_tokens=1, return_logits=True, backend=backend
    )
    start = 0
    for segment in segments:
        with torch.no_grad():
            alone = model(torch.tensor([segment])).logits[0]
        assert max_difference(out.prefill_logits[0][start : start + len(segment)], alone) < 1e-4
        start += len(segment)


@each_family
def test_one_wording_is_generated_on_as_the_model_does_it(name):
    model, (prompt,) = model_of(FAMILIES[name]), random_ids(15)
    out = generate_fused(model, [pack_segments([prompt])], max_new_tokens=8)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(out.sequences[0], expected[0, len(prompt) :])


@each_family
def test_cached_batches_are_recomputed_single_prompts(name):
    model = model_of(FAMILIES[name])
    prompts = [
        pack_segments(random_ids(9, 4, 12), prefix=[5, 6, 7], tail=[8], separator=[9]),
        pack_segments(random_ids(3, 7, seed=1), tail=[8, 10]),
    ]
    options = {"max_new_tokens": 5, "return_logits": True, "gap_keys": "hidden"}
    together = generate_fused(model, prompts, **options)
    for row, prompt in enumerate(prompts):
        alone = generate_fused(model, [prompt], use_cache=False, backend="eager", **options)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert max_difference(together.step_logits[row], alone.step_logits[0]) < 1e-4


def test_a_window_hides_what_is_further_back_in_positions():
    """All wordings are equally near to the answer, so the window leaves each of them its last tokens."""
    model = model_of(FAMILIES["mistral window"])
    model.model.layers = model.model.layers[:1]
    segments = random_ids(9, 9)
    options = {"max_new_tokens": 1, "return_logits": True}
    logits = generate_fused(model, [pack_segments(segments, tail=[7])], **options).step_logits
    for place, is_seen in ((3, False), (4, True)):
        changed = [[*segments[0][:place], 100, *segments[0][place + 1 :]], segments[1]]
        other = generate_fused(model, [pack_segments(changed, tail=[7])], **options).step_logits
        assert (max_difference(logits, other) > 1e-4) == is_seen


def test_bfloat16_models_run_and_agree_within_rounding():
    model, prompt = model_of(FAMILIES["llama"]), pack_segments(random_ids(9, 4), tail=[8])
    options = {"max_new_tokens": 1, "return_logits": True, "weights": [[1, 2]]}
    exact = generate_fused(model, [prompt], **options).prefill_logits[0]
    rounded = generate_fused(model.bfloat16(), [prompt], **options).prefill_logits[0]
    assert rounded.dtype == torch.bfloat16
    assert max_difference(rounded, exact) < 0.05 * float(exact.abs().max())


# --- refusals ---------------------------------------------------------------------------------------------------------

SMALL_MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED = {
    "no choice of attention": (
        BloomConfig(vocab_size=128, hidden_size=48, n_layer=1, n_head=6),
        "BloomForCausalLM does not take its attention from transformers' AttentionInterface",
    ),
    "capped scores": (Gemma2Config(**SIZES, **HEADS), "Gemma2Attention has softcap"),
    "sinks": (GptOssConfig(**SIZES, **HEADS, **SMALL_MOE), "GptOssAttention has s_aux"),
    "another kind of layer": (
        LlamaConfig(**SIZES, **HEADS, layer_types=["full_attention", "chunked_attention"]),
        "layers of type chunked_attention; valid: full_attention and sliding_attention",
    ),
    "a window that only the mask knows": (
        LlamaConfig(**SIZES, **HEADS, layer_types=["full_attention", "sliding_attention"]),
        "LlamaAttention has a sliding window in the mask only",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_models_with_more_than_a_mask_are_refused(config, message):
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        generate_fused(model, [pack_segments(random_ids(5, 4), tail=[7])], max_new_tokens=2)
    assert model.config._attn_implementation == before


def test_a_model_in_training_mode_is_refused_if_it_drops_weights():
    model = model_of(LlamaConfig(**SIZES, **HEADS, attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        generate_fused(model, [pack_segments(random_ids(5), tail=[7])], max_new_tokens=1)


def test_without_our_mask_or_with_another_one_there_is_no_answer():
    model, ids = model_of(FAMILIES["llama"]), torch.tensor(random_ids(6))
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with fusion_attention(model), torch.no_grad():
        for mask in (None, everything):
            with pytest.raises(ValueError, match="needs fusion_mask"):
                model(ids, attention_mask=mask)


@pytest.mark.parametrize("context", [nullcontext(), pytest.raises(RuntimeError, match="on purpose")])
def test_the_former_attention_comes_back(context):
    model = model_of(FAMILIES["llama"])
    with context, fusion_attention(model):
        assert model.config._attn_implementation == "flextok_fusion"
        if not isinstance(context, nullcontext):
            raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "eager"
