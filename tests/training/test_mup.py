"""muP: with one learning rate, every layer moves as far in a wide model as in a narrow one."""

import pytest
import torch
from torch import nn

from flextok.config import check_config
from flextok.model.data_dict import RNG_KEY
from flextok.model.init import init_linear, set_base_shapes, width_multiples
from flextok.model.layers.mup_readout import MuReadoutFSDP
from flextok.training.optim import mup_divisors, parameter_groups
from flextok.training.run import build, run
from tests.training.support import largest_difference, load, small_config

WIDTHS = (64, 128, 256)
STEPS = 3
SEEDS = (0, 1)  # A narrow layer has few numbers: their mean over two models is steadier.
# The movement of a layer at one width over that at another. Measured: at most 1.5 with muP, and without it 5 for the
# velocity and more than 2 for most layers, where the widths differ by 4.
FACTOR = 2.0


def config(folder, width, *overrides):
    widths = (f"size.encoder_width={width}", f"size.decoder_width={width}", "size.null_condition_prob=0")
    steep = ("optimizer.lr=1e-3", "optimizer.warmup_steps=0", "optimizer.weight_decay=0", "dropout=packed")
    cfg = small_config(folder, *widths, *steep, *overrides)
    check_config(cfg)
    return cfg


def activations(model, data):
    """The output of every linear layer and block, by its name, and the predicted velocity."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.rpartition(".")[0].endswith("blocks"):

            def note(module, inputs, output, name=name):
                found[name] = output.detach().float()

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        decoded = model.decoder(model.flow_matching_noise_module(model.encode({**data, RNG_KEY: fixed()})))
    for handle in handles:
        handle.remove()
    found["velocity"] = torch.cat(list(decoded[model.pipeline.reconst_write_key]))
    return found


def fixed():
    return torch.Generator().manual_seed(11)


def movements(folder, width, *overrides):
    """By layer, how far its activations have moved after a few steps."""
    module = build(config(folder, width, *overrides)).module
    model, optimizer = module.model.train(), module.configure_optimizers()["optimizer"]
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    data = {model.vae.images_read_key: images.split(1)}
    before = activations(model, data)
    for _ in range(STEPS):
        optimizer.zero_grad()
        module.objective(model, {**data, RNG_KEY: fixed()})["total"].backward()
        optimizer.step()
    after = activations(model, data)
    return {name: (after[name] - before[name]).abs().mean().item() for name in after}


def growth(folder, *overrides):
    """By layer, its largest movement over its smallest among the widths."""
    measured = [[movements(folder, width, f"seed={seed}", *overrides) for seed in SEEDS] for width in WIDTHS]
    means = [{name: sum(one[name] for one in models) for name in models[0]} for models in measured]
    grown = {name: [mean[name] for mean in means] for name in means[0]}
    assert all(min(values) > 0 for values in grown.values())
    return {name: max(values) / min(values) for name, values in grown.items()}


def test_layers_move_as_far_whatever_the_width(tmp_path):
    grown = growth(tmp_path, f"mup_base_width={WIDTHS[0]}")
    assert len(grown) > 30
    assert {name: factor for name, factor in grown.items() if factor > FACTOR} == {}


def test_the_same_check_finds_that_standard_parametrisation_does_not(tmp_path):
    grown = growth(tmp_path)
    assert sum(factor > FACTOR for factor in grown.values()) > len(grown) / 2
    assert grown["velocity"] > 1.5 * FACTOR


# --- the rules --------------------------------------------------------------------------------------------------------


def layers(width, base, *, readout=False):
    """An input layer, a hidden one and an output, with their base shapes."""
    last = MuReadoutFSDP if readout else nn.Linear
    wide, narrow = (nn.Sequential(nn.Linear(6, w), nn.Linear(w, w), last(w, 5)) for w in (width, base))
    set_base_shapes(wide, narrow)
    return wide


@pytest.mark.parametrize("style", ["xavier", "trunc_normal"])
def test_weights_start_as_at_the_base_width_but_for_the_number_of_inputs(style):
    torch.manual_seed(0)
    stds = {}
    for width in (512, 128):
        wide = layers(width, 128)
        for layer in wide:
            init_linear(layer, style, mup=True)
        stds[width] = [layer.weight.std().item() for layer in wide]
    ratios = [wide / narrow for wide, narrow in zip(stds[512], stds[128], strict=True)]
    assert ratios == pytest.approx([1, 1 / 2, 1 / 4], rel=0.15)
    assert [layer.bias.abs().max().item() for layer in wide] == [0, 0, 0]


def test_rates_are_divided_by_the_number_of_inputs_and_decay_stays():
    wide = layers(512, 128)
    groups = parameter_groups(wide.named_parameters(), weight_decay=0.5, lr=0.1, divisors=mup_divisors(wide))
    names = {id(p): name for name, p in wide.named_parameters()}
    found = {tuple(names[id(p)] for p in group["params"]): group for group in groups}
    divided = found["1.weight", "2.weight"]
    assert divided["lr"] == pytest.approx(0.1 / 4)
    assert divided["lr"] * divided["weight_decay"] == pytest.approx(0.1 * 0.5)
    assert found[("0.weight",)].get("lr", 0.1) == 0.1
    assert found["0.bias", "1.bias", "2.bias"].get("lr", 0.1) == 0.1
    assert sorted(sum(found, ())) == sorted(names.values())


def test_parts_with_a_rate_of_their_own_are_divided_too():
    wide = layers(512, 128)
    options = {"weight_decay": 0.0, "lr": 0.1, "divisors": mup_divisors(wide)}
    groups = parameter_groups(wide.named_parameters(), lr_scales={"1": 0.1}, **options)
    (rate,) = (group["lr"] for group in groups if any(p is wide[1].weight for p in group["params"]))
    assert rate == pytest.approx(0.1 * 0.1 / 4)


def test_a_readout_divides_its_inputs_and_keeps_its_rate():
    torch.manual_seed(0)
    wide = layers(512, 128, readout=True)
    x = torch.randn(3, 512)
    torch.testing.assert_close(wide[2](x), nn.functional.linear(x / 4, wide[2].weight, wide[2].bias))
    assert mup_divisors(wide) == {"0.weight": 1, "1.weight": 4, "2.weight": 1}
    with pytest.raises(ValueError, match="muP needs base shapes: call flextok.model.init.set_base_shapes"):
        MuReadoutFSDP(4, 2)(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="muP needs base shapes"):
        init_linear(nn.Linear(4, 2), mup=True)


def test_what_grows_with_the_width_is_found_in_the_model(tmp_path):
    model = build(config(tmp_path, 128, "mup_base_width=64")).module.model
    multiples = {name: width_multiples(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert multiples["encoder.module_dict.enc_patch_emb.patch_proj"] == (2, 1)
    assert multiples["encoder.module_dict.enc_transformer.blocks.0.attn.wq"] == (2, 2)
    assert multiples["encoder.module_dict.enc_to_latents.proj"] == (1, 2)
    assert multiples["decoder.module_dict.dec_from_latents.proj"] == (2, 1)
    assert multiples["decoder.module_dict.dec_to_patches.proj"] == (1, 2)
    # The gated MLP rounds its width.
    assert {(round(out), round(inputs)) for out, inputs in multiples.values()} == {(1, 2), (2, 1), (2, 2)}


@pytest.mark.slow
def test_a_run_resumes_exactly_and_is_a_usual_model(tmp_path):
    quick = ("mup_base_width=64", "callbacks.pictures=null", "callbacks.best=null", "trainer.max_steps=4")
    run(config(tmp_path / "full", 128, *quick))
    run(config(tmp_path / "short", 128, *quick, "trainer.max_steps=2"))
    run(config(tmp_path / "rest", 128, *quick, f"ckpt_path={tmp_path / 'short'}"))
    full, rest = load(tmp_path / "full"), load(tmp_path / "rest")
    for part in ("state_dict", "ema", "optimizer_states"):
        assert largest_difference(full[part], rest[part]) == 0.0, part
    plain = build(config(tmp_path / "plain", 128)).module.state_dict()
    assert {name: t.shape for name, t in plain.items()} == {name: t.shape for name, t in full["state_dict"].items()}


def test_a_base_width_that_gives_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mup_base_width=48 cannot be used; valid: a multiple of size.head_dim=32"):
        config(tmp_path, 64, "mup_base_width=48")
