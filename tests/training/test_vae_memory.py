"""Training on latents without the VAE in memory: nobody sees it, pictures and exports have it all the same."""

import gc
import logging
import shutil
import weakref

import pytest
import torch
from hydra.utils import instantiate

from flextok import vae_wrapper
from flextok.cli import main
from flextok.config import check_config, compose
from flextok.flextok_wrapper import FlexTokFromHub
from flextok.training.checkpoints import load_run
from flextok.training.run import build, run
from flextok.utils.checkpoint import load_model_from_safetensors, load_shapes
from tests.data_modules.images import write_images
from tests.support import RECORDED, max_difference
from tests.training.support import SMALL, largest_difference, load

TINY_VAE = RECORDED / "tiny_vae"
ON_DEMAND = {"hf_hub_path": str(TINY_VAE), "frozen": True, "in_memory": False}
KEYS = {
    "images_read_key": "rgb",
    "vae_latents_read_key": "latents_in",
    "vae_latents_write_key": "latents",
    "images_reconst_write_key": "rgb_out",
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Folders of images and of their latents."""
    folder = tmp_path_factory.mktemp("vae_memory")
    write_images(folder / "images", 20)
    images = ("data=image_folder", f"data.root={folder / 'images'}", "data.num_workers=0", "data.image_size=32")
    vae = ("vae=kl", f"latent.path={TINY_VAE}", "latent.channels=4")
    assert main(["--traceback", "latents", str(folder / "latents"), *images, *vae, "--dtype", "fp32"]) == 0
    return folder / "latents"


def config(folder, latents, *overrides, vae=TINY_VAE):
    small = [word for word in SMALL if word not in ("vae=pixel", "data=digits", "data.image_size=8")]
    data = ("data=latents", f"data.root={latents}", "data.batch_size=4", "data.num_workers=0", "data.image_size=32")
    network = ("vae=kl", f"latent.path={vae}", "latent.channels=4", "size.patch=2", f"paths.run={folder}")
    cfg = compose([*small, *data, *network, "trainer.max_steps=4", "optimizer.total_steps=4", *overrides])
    check_config(cfg)
    return cfg


@pytest.fixture(scope="module")
def trained(latents, tmp_path_factory):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    run(config(folder, latents))
    return folder


def weights_of_vae():
    return instantiate({"_target_": "flextok.vae_wrapper.StableDiffusionVAE", **KEYS, "hf_hub_path": str(TINY_VAE)})


# --- what is in memory ------------------------------------------------------------------------------------------------


def test_no_parameter_of_the_vae_has_memory(latents, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        absent = build(config(tmp_path, latents)).module
    present = build(config(tmp_path, latents, "model.vae.in_memory=true")).module
    saved = sum(p.numel() for p in weights_of_vae().parameters())
    assert saved > 20_000
    assert f"the VAE's {saved:,} parameters are not in memory" in caplog.text
    assert absent.model.vae.vae is None
    assert not [*absent.model.vae.parameters(), *absent.model.vae.buffers()]
    assert sum(p.numel() for p in present.parameters()) - sum(p.numel() for p in absent.parameters()) == saved
    # The weights that are trained start as they would beside the VAE.
    ours, theirs = absent.state_dict(), present.state_dict()
    assert {name for name in theirs if name not in ours} == {name for name in theirs if name.startswith("model.vae.")}
    assert largest_difference(ours, {name: theirs[name] for name in ours}) == 0.0


def test_with_images_the_vae_is_in_memory():
    assert compose(["vae=kl", f"latent.path={TINY_VAE}"]).model.vae.in_memory is True
    assert compose(["vae=kl", f"latent.path={TINY_VAE}", "data=latents"]).model.vae.in_memory is False


def test_pictures_read_it_once_and_leave_nothing_behind(latents, tmp_path, monkeypatch):
    read, original = [], vae_wrapper._load_autoencoder

    def reading(path):
        network = original(path)
        read.append(weakref.ref(network))
        return network

    monkeypatch.setattr(vae_wrapper, "_load_autoencoder", reading)
    run(config(tmp_path / "absent", latents, "trainer.val_check_interval=2"))
    assert len(read) == 2  # one for each validation
    gc.collect()
    assert [reference() for reference in read] == [None, None]
    run(config(tmp_path / "present", latents, "trainer.val_check_interval=2", "model.vae.in_memory=true"))
    assert len(read) == 3
    for step in (2, 4):
        pictures = [tmp_path / kind / f"pictures/step_{step:06d}.png" for kind in ("absent", "present")]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_training_gives_the_weights_it_gives_beside_the_vae(latents, trained, tmp_path):
    run(config(tmp_path, latents, "model.vae.in_memory=true"))
    absent, present = load(trained)["state_dict"], load(tmp_path)["state_dict"]
    assert not [name for name in absent if name.startswith("model.vae.")]
    assert largest_difference(absent, {name: present[name] for name in absent}) == 0.0


def test_encoding_and_decoding_read_it_for_one_call():
    absent = vae_wrapper.StableDiffusionVAE(**KEYS, **ON_DEMAND, sample_posterior=False)
    present = vae_wrapper.StableDiffusionVAE(**KEYS, **ON_DEMAND | {"in_memory": True}, sample_posterior=False)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours, theirs = (vae.autoencode({"rgb": images.split(1)}) for vae in (absent, present))
    assert absent.vae is None
    for name in ("latents", "rgb_out"):
        assert max_difference(torch.cat(list(ours[name])), torch.cat(list(theirs[name]))) == 0.0
    assert (absent.latent_dim, absent.downsample_factor) == (present.latent_dim, present.downsample_factor)
    assert absent.scaling_factor == present.scaling_factor


def test_it_is_gone_after_an_error_too():
    vae = vae_wrapper.StableDiffusionVAE(**KEYS, **ON_DEMAND)
    with vae.loaded(torch.device("cpu")):
        assert vae.vae is not None
        assert not [*vae.state_dict(), *vae.parameters(), *vae.children()]
        with pytest.raises(RuntimeError):
            vae.decode({"latents_in": torch.zeros(1, 3, 2, 2).split(1)})
        assert vae.vae is not None
    with pytest.raises(RuntimeError):
        vae.decode({"latents_in": torch.zeros(1, 3, 2, 2).split(1)})
    assert vae.vae is None


# --- what becomes of such a run ---------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_exactly(latents, trained, tmp_path):
    first = config(tmp_path / "first", latents)
    first.trainer.max_steps = 2
    run(first)
    run(config(tmp_path / "rest", latents, f"ckpt_path={tmp_path / 'first'}"))
    for part in ("state_dict", "ema", "optimizer_states"):
        assert largest_difference(load(tmp_path / "rest")[part], load(trained)[part]) == 0.0, part


def test_a_loaded_run_is_whole(trained):
    model, cfg = load_run(trained)
    expected = weights_of_vae().state_dict()
    assert largest_difference(dict(model.vae.state_dict()), dict(expected)) == 0.0
    assert cfg.model.vae.in_memory
    tokens = model.tokenize(torch.zeros(1, 3, 32, 32))
    assert model.detokenize(tokens, vae_image_sizes=4, timesteps=1, verbose=False).shape == (1, 3, 32, 32)


def test_an_export_is_whole(trained, tmp_path):
    assert main(["--traceback", "export", str(trained), str(tmp_path / "out")]) == 0
    shapes = load_shapes(tmp_path / "out/model.safetensors")
    names = {f"vae.{name}" for name in weights_of_vae().state_dict()}
    assert {name for name in shapes if name.startswith("vae.")} == names
    assert "in_memory" not in (tmp_path / "out/config.json").read_text()
    ours, theirs = load_run(trained)[0], FlexTokFromHub.from_pretrained(str(tmp_path / "out"))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decoded = []
    for model in (ours, theirs, load_model_from_safetensors(tmp_path / "out/model.safetensors")):
        torch.manual_seed(0)
        decoded.append(model.detokenize(model.tokenize(images), vae_image_sizes=4, timesteps=2, verbose=False))
    assert max_difference(decoded[0], decoded[1]) == max_difference(decoded[0], decoded[2]) == 0.0


def test_a_run_starts_from_an_export_with_a_vae(latents, trained, tmp_path):
    assert main(["--traceback", "export", str(trained), str(tmp_path / "out")]) == 0
    start = f"init_from={tmp_path / 'out/model.safetensors'}"
    ours = build(config(tmp_path, latents, start, "seed=5")).module.model.state_dict()
    theirs = load_run(trained)[0].state_dict()
    assert largest_difference(ours, {name: theirs[name] for name in ours}) == 0.0


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"hf_hub_path": None}, {"frozen": False}, {"compile_encode_fn": True}])
def test_what_it_cannot_go_with_is_refused(change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"model.vae.in_memory=False cannot go with .*{name}={change[name]}"):
        vae_wrapper.StableDiffusionVAE(**KEYS, **ON_DEMAND | change)


def test_a_folder_without_weights_is_found_before_training(latents, tmp_path):
    (tmp_path / "vae").mkdir()
    shutil.copy(TINY_VAE / "config.json", tmp_path / "vae")
    with pytest.raises(Exception, match=r"latent.path='.*vae' has no weights"):
        build(config(tmp_path / "run", latents, vae=tmp_path / "vae"))
    with pytest.raises(OSError, match="neither a local folder"):
        vae_wrapper.StableDiffusionVAE(**KEYS, **ON_DEMAND | {"hf_hub_path": str(tmp_path / "nothing")})
