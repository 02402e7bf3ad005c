"""How many tokens the blocks really get, and who answers attention: no fast path may silently fall back."""

import pytest
import torch

from flextok.attention import engine
from flextok.attention.engine import record_backends
from flextok.model.trunks.transformers import set_attention_backend
from tests.support import FORMS, small_tokenizer, tokens_processed

PATCHES, REGISTERS, STEPS = 64, 16, 3
KEEP_KS = [4, 1, 16]
BATCH = len(KEEP_KS)
ENCODER_ROW = BATCH * (PATCHES + REGISTERS)
FULL_ROW = BATCH * (PATCHES + REGISTERS)

# Per sample: 64 patches; what is left of 16 registers at keep_k = 4, 1, 16. In evaluation both forms that hide
# registers leave them out.
PACKED = 64 + 4 + 64 + 1 + 64 + 16
CONDITIONAL = {"mask_token": 64 + 4 + 1 + 64 + 1 + 1 + 64 + 16, "attention_mask": PACKED, "packed": PACKED}
# The null condition at every register that there is: one for all.
UNCONDITIONAL = dict.fromkeys(FORMS, 3 * (64 + 1))

every_form = pytest.mark.parametrize("form", FORMS)


def latents(sizes=((8, 8),) * BATCH):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, h, w, generator=generator) for h, w in sizes]


def conditions(**given):
    generator = torch.Generator().manual_seed(1)
    return {"enc_registers_quant": list(torch.randn(BATCH, 1, REGISTERS, 6, generator=generator)), **given}


def decode(model, data, **options):
    return model.pipeline(data, timesteps=STEPS, vae_image_sizes=8, verbose=False, **options)


@every_form
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_training(form, backend):
    model = small_tokenizer(form, "size.null_condition_prob=0.5").train()
    set_attention_backend(model, backend)
    with tokens_processed(model) as tokens, record_backends() as backends:
        data = model({"vae_latents": latents(), "rng": torch.Generator().manual_seed(0)})
    kept = sum(data["train_keep_k"])
    assert 3 <= kept < 3 * 16
    cut = BATCH * PATCHES + kept
    assert 0 < sum(data["sampled_null"]) < BATCH
    encoded = sum(PATCHES + k for k, null in zip(data["train_keep_k"], data["sampled_null"], strict=True) if not null)
    assert tokens == {"enc_transformer": [encoded], "dec_transformer": [cut if form == "packed" else FULL_ROW]}
    assert backends == ["sdpa" if backend == "auto" else backend] * 2


@every_form
def test_training_on_images_of_several_sizes(form):
    model, sizes = small_tokenizer(form, "size.null_condition_prob=0").train(), ((8, 8), (4, 8), (6, 2))
    with tokens_processed(model) as tokens, record_backends() as backends:
        data = model({"vae_latents": latents(sizes), "rng": torch.Generator().manual_seed(0)})
    patches, kept = 64 + 32 + 12, sum(data["train_keep_k"])
    row = patches + (kept if form == "packed" else 3 * 16)
    assert tokens == {"enc_transformer": [patches + kept], "dec_transformer": [row]}
    assert backends == ["sdpa", "sdpa"]


def test_flex_cannot_train_on_a_cpu_and_says_so():
    model = small_tokenizer("packed").train()
    set_attention_backend(model, "flex")
    with pytest.raises(ValueError, match="'flex' cannot be used here: .*backward.*these can: auto, sdpa, reference"):
        model({"vae_latents": latents()})


@every_form
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "flex"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0], ids=["conditional", "guided"])
def test_decoding(form, backend, guidance_scale):
    """With guidance both branches are one row, so each step is one pass."""
    model = small_tokenizer(form).eval()
    set_attention_backend(model, backend)
    with tokens_processed(model) as tokens, record_backends() as backends:
        decode(model, conditions(eval_keep_k=KEEP_KS), guidance_scale=guidance_scale)
    row = CONDITIONAL[form] + (UNCONDITIONAL[form] if guidance_scale > 1 else 0)
    assert tokens == {"enc_transformer": [], "dec_transformer": [row] * STEPS}
    assert backends == ["sdpa" if backend == "auto" else backend] * STEPS


@every_form
def test_decoding_all_registers(form):
    model = small_tokenizer(form).eval()
    with tokens_processed(model) as tokens:
        decode(model, conditions(), guidance_scale=3.0)
    # Without keep_k the null condition alone has equal tokens.
    assert tokens["dec_transformer"] == [3 * (64 + 16) + 3 * (64 + 1)] * STEPS


@every_form
def test_no_registers_at_all(form):
    model = small_tokenizer(form).eval()
    with tokens_processed(model) as tokens:
        decode(model, conditions(eval_keep_k=[0, 0, 0]))
    assert tokens["dec_transformer"] == [3 * (64 + (form == "mask_token"))] * STEPS


@every_form
def test_guidance_that_is_off_at_some_times_halves_the_row_there(form):
    model = small_tokenizer(form).eval()
    with tokens_processed(model) as tokens:
        decode(model, conditions(eval_keep_k=KEEP_KS), guidance_scale=3.0, guidance_interval=(0.5, 0.9))
    conditional = CONDITIONAL[form]
    assert tokens["dec_transformer"] == [conditional, conditional + UNCONDITIONAL[form], conditional]


@every_form
def test_heun_takes_two_passes_per_step_and_one_in_the_last(form):
    model = small_tokenizer(form).eval()
    with tokens_processed(model) as tokens:
        decode(model, conditions(eval_keep_k=KEEP_KS), sampler="heun")
    assert tokens["dec_transformer"] == [CONDITIONAL[form]] * (2 * STEPS - 1)


@every_form
def test_encoding_computes_everything_once(form):
    model = small_tokenizer(form).eval()
    with torch.no_grad(), tokens_processed(model) as tokens, record_backends() as backends:
        model.encode({"vae_latents": latents()})
    assert tokens == {"enc_transformer": [ENCODER_ROW], "dec_transformer": []}
    assert backends == ["sdpa"]


def test_rows_padded_to_a_multiple_hold_the_next_multiple():
    """In training, where few lengths mean few compilations; decoding, the row of one length all along, pads nothing."""
    model = small_tokenizer("packed", "model.decoder.module_dict.dec_seq_packer.pad_to_multiple=32").train()
    with tokens_processed(model) as tokens:
        data = model({"vae_latents": latents(), "rng": torch.Generator().manual_seed(0)})
    row = BATCH * PATCHES + sum(data["train_keep_k"])
    assert row % 32
    assert tokens["dec_transformer"] == [row + 32 - row % 32]
    with tokens_processed(model.eval()) as tokens:
        decode(model, conditions(eval_keep_k=KEEP_KS))
    assert tokens["dec_transformer"] == [213] * STEPS


# --- once per decode, not once per step -------------------------------------------------------------------------------

OF_THE_CONDITION = ("dec_from_latents", "dec_registers_posemb_module", "dec_nested_dropout", "dec_latent_dropout")
OF_EACH_STEP = ("dec_noise_patch_emb", "dec_seq_packer", "dec_time_embedder", "dec_transformer", "dec_to_patches")


def count_calls(model):
    calls = dict.fromkeys(model.decoder.module_dict, 0)

    def count(name):
        def hook(module, inputs):
            calls[name] += 1

        return hook

    for name, module in model.decoder.module_dict.items():
        module.register_forward_pre_hook(count(name))
    return calls


@pytest.fixture
def plans(monkeypatch):
    """Layouts of the plans that are built."""
    built, build = [], engine._plan

    def noted(request, backend):
        built.append(request.mask)
        return build(request, backend)

    monkeypatch.setattr(engine, "_plan", noted)
    return built


@every_form
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0], ids=["conditional", "guided"])
@pytest.mark.parametrize("sizes", [8, [(8, 8), (4, 8), (6, 2)]], ids=["equal", "mixed"])
def test_what_does_not_change_is_computed_once_per_decode(form, sampler, guidance_scale, sizes, plans):
    model = small_tokenizer(form).eval()
    calls, data = count_calls(model), conditions(eval_keep_k=KEEP_KS)
    options = {"timesteps": 5, "verbose": False, "sampler": sampler, "guidance_scale": guidance_scale}
    model.pipeline(data, vae_image_sizes=sizes, **options)
    passes = 5 if sampler == "euler" else 9
    assert {name: calls[name] for name in OF_THE_CONDITION} == dict.fromkeys(OF_THE_CONDITION, 1)
    assert {name: calls[name] for name in OF_EACH_STEP} == dict.fromkeys(OF_EACH_STEP, passes)
    assert calls["dec_repa_unpacker"] == 0, "nobody asked for the inner layer"
    assert len(plans) == 1


def test_guidance_at_some_times_makes_two_plans(plans):
    model = small_tokenizer("packed").eval()
    options = {"guidance_scale": lambda t: 1.0 if t < 0.5 else 3.0, "timesteps": 6}
    model.pipeline(conditions(eval_keep_k=KEEP_KS), vae_image_sizes=8, verbose=False, **options)
    assert len(plans) == 2


def test_a_second_decode_plans_anew(plans):
    """Plans live as long as a decode: none is kept by the model."""
    model = small_tokenizer("packed").eval()
    for _ in range(2):
        decode(model, conditions(eval_keep_k=KEEP_KS))
    assert len(plans) == 2
    assert plans[0] is not plans[1]


def test_a_dictionary_of_training_is_planned_once_more_and_not_once_per_step(plans):
    """The layout that the training forward left in it must not hide the new one from the next step."""
    model = small_tokenizer("packed")
    data = model.train()({"vae_latents": latents()})
    assert len(plans) == 2
    decode(model.eval(), {**data, "eval_keep_k": KEEP_KS})
    assert len(plans) == 3


@every_form
def test_all_layers_of_a_training_step_share_one_plan(form, plans):
    model = small_tokenizer(form, "size.decoder_depth=3").train()
    model({"vae_latents": latents()})
    assert len(plans) == 2, "encoder and decoder"
