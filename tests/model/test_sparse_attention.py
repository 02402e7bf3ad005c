"""Sparse attention in encoder and decoder: which layers and steps, what stays the same, and what is refused."""

import math
from functools import lru_cache

import pytest
import torch
from omegaconf import OmegaConf

from flextok.attention.density import record_density
from flextok.attention.sparse import save_hat_weights
from flextok.config import CONFIG_FOLDER, check_config, compose
from flextok.model.sparse_attention import SparseAttention, set_sparse_attention
from flextok.reconstruct import Encoded, decode_tokens, encode_inputs
from tests.attention.sparse.problems import hash_weights
from tests.support import FORMS, max_difference, small_tokenizer

PRESETS = sorted(path.stem for path in (CONFIG_FOLDER / "attention" / "sparse").glob("*.yaml"))
CONTENT = [{"type": "SinkMasker", "sink_size": 1}, {"type": "OracleTopK", "heavy_size": 3}]
DRAWN = [{"type": "SinkMasker", "sink_size": 1}, {"type": "RandomSamplingMasker", "sampling_rate": 0.2}]
WINDOW = [{"type": "LocalMasker", "window_size": 4, "mode": "centered"}]
KEEP_KS = [3, 16, 7, 3]


def attention(*overrides):
    """The node `attention` of eval.py, as the command line gives it."""
    config = compose(["checkpoint=x", "attention=sparse", *overrides], "eval")
    return OmegaConf.to_container(config.attention, resolve=True)


def sparse(maskers=CONTENT, **options):
    return SparseAttention.from_mapping({**defaults(), "maskers": maskers, **options})


@lru_cache
def defaults():
    return attention()


@pytest.fixture
def hat_file(tmp_path):
    """Weights for two layers of 2 heads of width 16."""
    widened = hash_weights(2, bits=32, width=32, layers=(0, 1))
    for parts in widened.values():
        for side in ("query", "key"):
            parts[f"{side}_matrix"][0] = parts[f"{side}_matrix"][0].repeat(1, 2, 1)
    save_hat_weights(widened, tmp_path / "hat.safetensors")
    return tmp_path / "hat.safetensors"


def preset(name, hat_file, *overrides):
    file = [f"attention.hash.file={hat_file}"] if name == "hash" else []
    return SparseAttention.from_mapping(attention(f"attention/sparse={name}", *file, *overrides))


def encoded(model, batch=4):
    """Tokens of fixed latents, of images that are named."""
    latents = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return encode_inputs(
            model, {"vae_latents": list(latents.split(1))}, [f"image {i}" for i in range(batch)], seed=0
        )


def decode(model, tokens, settings, *, keep_k=KEEP_KS, only=None, **options):
    """Images of all, or of one sample alone."""
    set_sparse_attention(model, settings)
    if only is not None:
        parts = {name: getattr(tokens, name)[only : only + 1] for name in ("keys", "tokens", "quants", "latents")}
        tokens, keep_k = Encoded(**parts), keep_k[only : only + 1]
    with torch.no_grad():
        return decode_tokens(model, tokens, keep_k=keep_k, seed=0, **{"timesteps": 3, **options})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_is_dense_at_full_budget(name, hat_file):
    model = small_tokenizer("mask_token").eval()
    tokens = encoded(model)
    for keep_k in (KEEP_KS, [16] * 4):
        dense = decode(model, tokens, None, keep_k=keep_k)
        found = decode(model, tokens, preset(name, hat_file, "attention.budget=0.05"), keep_k=keep_k)
        error = max_difference(found, dense)
        assert 1e-3 < error < math.inf
        full = decode(model, tokens, preset(name, hat_file, "attention.budget=1"), keep_k=keep_k)
        # Samples of equal length are the same call; others are computed in other batches. MagicPig finds most keys.
        tol = 0.3 * error if name == "magicpig" else 1e-6 if keep_k == KEEP_KS else 0.0
        assert max_difference(full, dense) <= tol


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("maskers", [WINDOW, CONTENT, DRAWN], ids=["geometric", "content", "drawn"])
def test_samples_do_not_depend_on_the_rest_of_the_batch(form, maskers):
    model = small_tokenizer(form).eval()
    tokens, settings = encoded(model), sparse(maskers)
    for options in ({}, {"guidance_scale": 3.0, "guidance_every": 2}):
        together = decode(model, tokens, settings, **options)
        assert max_difference(together, decode(model, tokens, None, **options)) > 1e-3
        for only in range(4):
            alone = decode(model, tokens, settings, only=only, **options)
            assert max_difference(alone, together[only : only + 1]) < 1e-5


@pytest.mark.parametrize("maskers", [WINDOW, CONTENT], ids=["geometric", "content"])
def test_registers_that_are_hidden_are_as_those_that_are_left_out(maskers):
    """Maskers see the visible tokens of a sample, so both forms have the same keys."""
    hidden, packed = (small_tokenizer(form).eval() for form in ("attention_mask", "packed"))
    packed.load_state_dict(hidden.state_dict())
    hidden.decoder.module_dict["dec_seq_packer"].shortens_rows = False
    tokens = encoded(packed)
    found = [decode(model, tokens, sparse(maskers)) for model in (hidden, packed)]
    assert max_difference(*found) < 1e-5


def test_off_is_what_it_was_before():
    model = small_tokenizer("mask_token").eval()
    tokens = encoded(model)
    before = decode(model, tokens, None)
    decode(model, tokens, sparse(DRAWN))
    assert torch.equal(decode(model, tokens, None), before)


def test_masks_are_made_in_every_nth_pass_and_kept_for_each_branch(monkeypatch):
    from flextok.attention.sparse import ResearchAttention

    model = small_tokenizer("mask_token").eval()
    tokens, made = encoded(model), []
    build = ResearchAttention.build_mask

    def counted(self, q, *args, **options):
        made.append(len(q))
        return build(self, q, *args, **options)

    monkeypatch.setattr(ResearchAttention, "build_mask", counted)
    images = {}
    for every in (1, 2, 6):
        made.clear()
        images[every] = decode(model, tokens, sparse(masks_every=every), keep_k=[16] * 4, timesteps=6)
        # Two layers, each for the whole batch.
        assert made == [4] * 2 * math.ceil(6 / every)
    assert torch.equal(images[1], decode(model, tokens, sparse(), keep_k=[16] * 4, timesteps=6))
    assert max_difference(images[1], images[2]) > 1e-4
    made.clear()
    decode(model, tokens, sparse(masks_every=4), keep_k=[16] * 4, timesteps=6, guidance_scale=3.0, guidance_every=3)
    # The unconditional branch runs in passes 0 and 3, and has masks of its own of pass 0; both make theirs anew then.
    assert sum(made) == 2 * (4 + 4 + 4)
    made.clear()
    decode(model, tokens, sparse(masks_every=2), keep_k=[16] * 4, timesteps=3, sampler="heun")
    assert sum(made) == 2 * 4 * 3  # Five passes.


def test_reused_masks_do_not_depend_on_the_rest_of_the_batch():
    model = small_tokenizer("mask_token").eval()
    tokens, settings = encoded(model), sparse(DRAWN, masks_every=2)
    together = decode(model, tokens, settings, guidance_scale=3.0, timesteps=4)
    for only in range(4):
        alone = decode(model, tokens, settings, only=only, guidance_scale=3.0, timesteps=4)
        assert max_difference(alone, together[only : only + 1]) < 1e-5


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_first_and_last_steps_can_stay_dense(sampler):
    model = small_tokenizer("mask_token").eval()
    tokens, options = encoded(model), {"timesteps": 4, "sampler": sampler}
    dense = decode(model, tokens, None, **options)
    assert torch.equal(decode(model, tokens, sparse(dense_first_steps=3, dense_last_steps=1), **options), dense)
    assert torch.equal(decode(model, tokens, sparse(dense_first_steps=9), **options), dense)
    passes = {"euler": [1, 1, 1, 1], "heun": [2, 2, 2, 1]}[sampler]
    for first, last in ((0, 0), (1, 0), (0, 1), (2, 1)):
        with record_density() as density:
            found = decode(model, tokens, sparse(WINDOW, dense_first_steps=first, dense_last_steps=last), **options)
        assert max_difference(found, dense) > 1e-3
        if first + last == 0:
            whole = density.share
        sparse_passes = sum(passes[first : 4 - last])
        expected = (sparse_passes * whole + sum(passes) - sparse_passes) / sum(passes)
        assert density.share == pytest.approx(expected)


def test_layers_can_stay_dense_or_have_lists_of_their_own():
    model = small_tokenizer("mask_token").eval()
    tokens = encoded(model)
    images = {
        "first": decode(model, tokens, sparse(layers=[0])),
        "last": decode(model, tokens, sparse(layers=[1])),
        "both": decode(model, tokens, sparse()),
        "mixed": decode(model, tokens, sparse(layers={"0": None, 1: WINDOW})),
    }
    pairs = [(a, b) for a in images for b in images if a < b]
    assert all(max_difference(images[a], images[b]) > 1e-4 for a, b in pairs)
    assert torch.equal(decode(model, tokens, sparse(layers={0: CONTENT, 1: CONTENT})), images["both"])
    with record_density() as density:
        decode(model, tokens, sparse([{"type": "OracleTopK", "heavy_size": 8}], layers=[1]), keep_k=[16] * 4)
    assert density.share == pytest.approx((1 + 8 / 80) / 2)


def test_the_encoder_has_maskers_of_its_own():
    model = small_tokenizer("mask_token", "size.encoder_depth=2").eval()
    dense = encoded(model)
    set_sparse_attention(model, sparse(WINDOW, part="encoder"))
    with record_density() as density:
        tokens = encoded(model)
    assert 0.1 < density.share < 0.9
    assert any(not torch.equal(a, b) for a, b in zip(tokens.quants, dense.quants, strict=True))
    set_sparse_attention(model, sparse(WINDOW, part="both"))
    assert all(torch.equal(a, b) for a, b in zip(encoded(model).quants, tokens.quants, strict=True))
    set_sparse_attention(model, sparse(WINDOW, part="decoder"))
    assert all(torch.equal(a, b) for a, b in zip(encoded(model).quants, dense.quants, strict=True))


@pytest.mark.parametrize("maskers", [WINDOW, CONTENT, DRAWN], ids=["geometric", "content", "drawn"])
def test_what_was_selected_has_a_gradient(maskers):
    model = small_tokenizer("mask_token").train()
    set_sparse_attention(model, sparse(maskers, part="both"))
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    data = model({"vae_latents": list(latents.split(1)), "rng": torch.Generator().manual_seed(0)})
    torch.cat(list(data["vae_latents_reconst"])).square().sum().backward()
    weights = [block.attn.wq.weight for block in model.decoder.module_dict["dec_transformer"].blocks]
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.maskers=[{type:Nope}]"], r"attention\.maskers\[0\]\.type='Nope'; valid: .*OracleTopK"),
        (["attention.maskers=[{type:SinkMasker}]"], r"attention\.maskers\[0\]\.sink_size: missing"),
        (["attention.maskers=[{type:OracleTopK,heavy_size:0}]"], r"attention\.maskers\[0\]\.heavy_size=0; valid"),
        (
            ["attention.maskers=[{type:MagicPig,lsh_l:2,lsh_k:2},{type:RandomSamplingMasker,sampling_rate:0.1}]"],
            "attention.maskers holds 2 samplers",
        ),
        (["attention.maskers=[{type:MagicPig,lsh_l:2,lsh_k:2,cache_keys:true}]"], r"\[0\]\.cache_keys=True: keys of"),
        (["attention.backend=varlen"], "attention.backend='varlen' takes no mask"),
        (
            ["attention/sparse=random", "attention.backend=flex"],
            "attention.backend='flex' cannot choose keys by content",
        ),
        (["attention.part=vae"], "attention.part='vae': valid are decoder, encoder, both"),
        (["attention.layers=[]"], r"attention\.layers=\[\]: valid are null"),
        (["attention.layers=[first]"], r"attention\.layers=\['first'\]: valid are null"),
        (["attention.layers={1:[{type:Nope}]}"], r"attention\.layers\.1\[0\]\.type='Nope'"),
        (["attention.masks_every=0"], "attention.masks_every=0: valid is a whole number of at least 1"),
        (["attention.dense_last_steps=-1"], "attention.dense_last_steps=-1: valid"),
        (["attention.budget=0"], "attention.budget=0: valid is a number above 0"),
        (["attention/sparse=hash"], "attention.hash.file is missing"),
        (["attention/sparse=hash", "attention.hash.file=none.safetensors"], "none.safetensors"),
    ],
)
def test_impossible_options_are_errors_before_anything_is_read(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_config(compose(["checkpoint=x", "attention=sparse", *overrides], "eval"))


def test_training_is_refused():
    with pytest.raises(ValueError, match="attention=sparse is for evaluation"):
        check_config(compose(["attention=sparse"]))


def test_what_does_not_fit_a_model_is_refused(hat_file):
    model = small_tokenizer("mask_token").eval()
    with pytest.raises(ValueError, match=r"attention\.layers: \[2\] do not exist in a trunk of depth 2; valid: 0 to 1"):
        set_sparse_attention(model, sparse(layers=[0, 2]))
    deep = small_tokenizer("mask_token", "size.decoder_depth=3").eval()
    with pytest.raises(ValueError, match=r"no weights for layer 2; it has \[0, 1\]"):
        set_sparse_attention(deep, preset("hash", hat_file))
    wide = small_tokenizer("mask_token", "size.decoder_width=64").eval()
    with pytest.raises(ValueError, match="layer 0, query, is made for 2 heads of 16; this trunk has 4 of 16"):
        set_sparse_attention(wide, preset("hash", hat_file))
    with pytest.raises(ValueError, match="hat_bits=16"):
        preset("hash", hat_file, "attention.hash.bits=16")


def test_a_mask_that_is_no_layout_is_refused():
    model = small_tokenizer("mask_token").eval()
    tokens = encoded(model)
    model.decoder.module_dict["dec_seq_packer"].return_materialized_mask = True
    with pytest.raises(ValueError, match="needs the layout of the packed row"):
        decode(model, tokens, sparse())
