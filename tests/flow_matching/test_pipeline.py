"""The sampler: what it does to the caller's data, what guidance means, whose randomness it uses."""

import pytest
import torch

from tests.support import Untouched, max_difference, recorded_model

CHECKPOINTS = {
    "mask_token": "tiny_flextok/model.safetensors",
    "attention_mask": "tiny_attn_masked.safetensors",
}
EQUAL, MIXED = ((8, 8),) * 3, ((8, 8), (4, 8), (6, 2))


@pytest.fixture(params=CHECKPOINTS.values(), ids=CHECKPOINTS)
def model(request, recorded_folder):
    return recorded_model(request.param)


def tokens_and_noise(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(64_000, (1, 16), generator=generator) for _ in sizes]
    noise = [torch.randn(1, 4, h, w, generator=generator) for h, w in sizes]
    return ids, noise


def data_for(model, sizes, keep_ks=(2, 5, 16)):
    ids, noise = tokens_and_noise(sizes)
    quants = [model.regularizer.indices_to_embedding(i) for i in ids]
    return {"enc_registers_quant": quants, "init_noise": noise, "eval_keep_k": list(keep_ks)}


def sample(model, data, sizes, monkeypatch, **kwargs):
    monkeypatch.setattr(model.pipeline, "noise_read_key", "init_noise")
    kwargs = {"timesteps": 4, "verbose": False, "vae_image_sizes": list(sizes)} | kwargs
    return list(model.pipeline(data, **kwargs)["vae_latents_reconst"])


@torch.no_grad()
def velocities(model, data, x, t, *, unconditional):
    call = {key: data[key] for key in ("enc_registers_quant", "eval_keep_k")}
    call |= {"vae_latents_noised": x, "timesteps": torch.full((len(x),), t)}
    if unconditional:
        call["eval_dropout_mask"] = [True] * len(x)
    return list(model.decoder(call)["vae_latents_reconst"])


def euler_by_hand(model, data, num_steps, guide):
    """One decoder call per step and branch; `guide(sample, conditional, unconditional, t)` joins them."""
    x = list(data["init_noise"])
    for i in range(num_steps, 0, -1):
        t = i / num_steps
        conditional = velocities(model, data, x, t, unconditional=False)
        unconditional = velocities(model, data, x, t, unconditional=True)
        guided = [guide(j, c, u, t) for j, (c, u) in enumerate(zip(conditional, unconditional, strict=True))]
        x = [a - v / num_steps for a, v in zip(x, guided, strict=True)]
    return x


def assert_all_close(actual, expected, tol=1e-5):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.isfinite(a).all()
        assert max_difference(a, b) < tol


@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_the_callers_tensors_lists_and_other_entries_stay_as_they_are(model, sizes, monkeypatch):
    data = data_for(model, sizes) | {
        "note": "kept",
        "extra": [torch.ones(2)],
        "vae_latents": torch.zeros(3, 1),
    }
    untouched, before = Untouched(data), dict(data)
    sample(model, data, sizes, monkeypatch, guidance_scale=3.0, perform_norm_guidance=True)
    untouched.check()
    written = {"vae_latents_reconst", "vae_latents_noised", "timesteps"}
    assert set(data) == set(before) | written
    assert all(data[key] is value for key, value in before.items())


@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_without_guidance_sampling_is_plain_euler(model, sizes, monkeypatch):
    data = data_for(model, sizes)
    expected = euler_by_hand(model, data, 4, lambda i, c, u, t: c)
    assert_all_close(sample(model, data, sizes, monkeypatch), expected)


@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_guidance_in_one_batch_equals_two_passes(model, sizes, monkeypatch):
    data = data_for(model, sizes)
    expected = euler_by_hand(model, data, 4, lambda i, c, u, t: u + 3.0 * (c - u))
    assert_all_close(sample(model, data, sizes, monkeypatch, guidance_scale=3.0), expected)


def test_a_guidance_schedule_gets_the_time_of_each_step(model, monkeypatch):
    data, seen = data_for(model, EQUAL), []

    def schedule(t):
        seen.append(t)
        return 1.0 + 2.0 * t

    sampled = sample(model, data, EQUAL, monkeypatch, guidance_scale=schedule)
    assert sorted(set(seen), reverse=True) == [1.0, 0.75, 0.5, 0.25]
    assert all(isinstance(t, float) for t in seen)
    assert_all_close(sampled, euler_by_hand(model, data, 4, lambda i, c, u, t: u + (1 + 2 * t) * (c - u)))


def test_a_schedule_that_is_always_one_equals_no_guidance(model, monkeypatch):
    data = data_for(model, EQUAL)
    constant = sample(model, data, EQUAL, monkeypatch, guidance_scale=lambda t: 1.0)
    assert_all_close(constant, sample(model, data, EQUAL, monkeypatch))


@pytest.mark.parametrize("sizes", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_normalised_guidance_keeps_one_momentum_per_sample(model, sizes, monkeypatch):
    from flextok.flow_matching.cfg_utils import MomentumBuffer, normalized_guidance

    data, buffers = data_for(model, sizes), [MomentumBuffer(-0.5) for _ in sizes]

    def guide(i, c, u, t):
        return normalized_guidance(c, u, 7.5, momentum_buffer=buffers[i], eta=0.0, norm_threshold=2.5)

    expected = euler_by_hand(model, data, 4, guide)
    options = {"guidance_scale": 7.5, "perform_norm_guidance": True}
    assert_all_close(sample(model, data, sizes, monkeypatch, **options), expected, tol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_samples_do_not_depend_on_the_rest_of_the_batch(model, guidance_scale, monkeypatch):
    data = data_for(model, MIXED)
    together = sample(model, data, MIXED, monkeypatch, guidance_scale=guidance_scale)
    for i in range(len(MIXED)):
        one = {key: value[i : i + 1] for key, value in data_for(model, MIXED).items()}
        alone = sample(model, one, MIXED[i : i + 1], monkeypatch, guidance_scale=guidance_scale)
        assert_all_close(alone, together[i : i + 1])


def test_one_generator_draws_the_noise_in_order_of_the_samples(model, monkeypatch):
    data = data_for(model, MIXED)
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(1, 4, h, w, generator=generator) for h, w in MIXED]
    expected = sample(model, data | {"init_noise": drawn}, MIXED, monkeypatch)
    del data["init_noise"]
    monkeypatch.setattr(model.pipeline, "noise_read_key", None)
    options = {"timesteps": 4, "verbose": False, "vae_image_sizes": list(MIXED)}
    out = model.pipeline(data, generator=torch.Generator().manual_seed(5), **options)
    assert_all_close(list(out["vae_latents_reconst"]), expected)


def test_one_generator_per_sample_makes_results_independent_of_the_batch(model):
    ids, _ = tokens_and_noise(EQUAL)
    options = {"timesteps": 2, "verbose": False, "vae_image_sizes": 8}

    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = model.detokenize(ids, generator=generators((1, 2, 3)), **options)
    reordered = model.detokenize([ids[2], ids[0]], generator=generators((3, 1)), **options)
    alone = model.detokenize(ids[1:2], generator=generators((2,)), **options)
    assert max_difference(reordered, together[[2, 0]]) < 1e-5
    assert max_difference(alone, together[1:2]) < 1e-5


@pytest.mark.parametrize("sizes", [8, [(8, 8), (8, 8)]], ids=["int", "list"])
def test_no_timesteps_means_25(model, sizes):
    ids, _ = tokens_and_noise(EQUAL[:2])

    def images(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return model.detokenize(ids, vae_image_sizes=sizes, generator=generator, verbose=False, **kwargs)

    implicit, none, explicit = images(), images(timesteps=None), images(timesteps=25)
    assert torch.equal(implicit, explicit)
    assert torch.equal(none, explicit)
    assert max_difference(images(timesteps=5), explicit) > 1e-4


def test_autoencode_works_with_gradients_enabled(model):
    assert torch.is_grad_enabled()
    data = {"rgb": [torch.rand(1, 3, 64, 64) * 2 - 1 for _ in range(2)]}
    untouched = Untouched(data)
    out = model.autoencode(data, timesteps=2, vae_image_sizes=8, verbose=False, guidance_scale=2.0)
    untouched.check()
    assert [image.shape for image in out["rgb_reconst"]] == [(1, 3, 64, 64)] * 2
    assert all(torch.isfinite(image).all() for image in out["rgb_reconst"])


def test_encoding_keeps_gradients_and_the_vae_has_none(model):
    out = model.encode({"rgb": [torch.rand(1, 3, 64, 64) * 2 - 1]})
    assert out["enc_registers_quant"][0].requires_grad
    assert not out["vae_latents"][0].requires_grad


def test_leftovers_of_encoding_do_not_change_what_is_decoded(model):
    images = [torch.rand(1, 3, 64, 64) * 2 - 1 for _ in range(2)]

    def decode(data):
        options = {"timesteps": 2, "vae_image_sizes": 8, "verbose": False, "guidance_scale": 2.0}
        return list(model.decode(data, generator=torch.Generator().manual_seed(0), **options)["rgb_reconst"])

    encoded = model.encode({"rgb": images})
    quants = [q.detach().clone() for q in encoded["enc_registers_quant"]]
    assert_all_close(decode(dict(encoded)), decode({"enc_registers_quant": quants}))


def test_decoding_twice_from_one_dictionary_gives_the_same(model):
    data = model.encode({"rgb": [torch.rand(1, 3, 64, 64) * 2 - 1 for _ in range(2)]})
    options = {"timesteps": 2, "vae_image_sizes": 8, "verbose": False, "guidance_scale": 2.0}
    first, second = (
        list(model.decode(data, generator=torch.Generator().manual_seed(0), **options)["rgb_reconst"]) for _ in range(2)
    )
    assert_all_close(first, second, tol=1e-6)
