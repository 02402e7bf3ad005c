"""The snippet of the README works as written, and importing the package costs nothing."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.support import RECORDED, REPOSITORY


def test_images_become_tokens_and_any_number_of_them_becomes_images(recorded_folder):
    from flextok import FlexTokFromHub

    model = FlexTokFromHub.from_pretrained(str(recorded_folder / "tiny_flextok")).eval()
    token_ids = model.tokenize(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert [ids.shape for ids in token_ids] == [(1, 16)] * 2
    assert all(ids.dtype == torch.int64 for ids in token_ids)
    for k in (1, 4, 8, 16):
        images = model.detokenize(
            [ids[:, :k] for ids in token_ids],
            vae_image_sizes=8,
            timesteps=4,
            guidance_scale=7.5,
            verbose=False,
        )
        assert images.shape == (2, 3, 64, 64)
        assert torch.isfinite(images).all()


def test_a_model_with_256_registers_decodes_1_16_64_and_256_tokens(tmp_path):
    """The published snippet at the published number of tokens; only the width is small."""
    from hydra.utils import instantiate

    from flextok import FlexTokFromHub
    from flextok.config import compose
    from flextok.utils.export import export_model

    size = {"registers": 256, "patch": 4, "encoder_depth": 1, "decoder_depth": 2, "head_dim": 16}
    widths = {"encoder_width": 32, "decoder_width": 32}
    overrides = ["data.image_size=32", *(f"size.{name}={value}" for name, value in (size | widths).items())]
    config = compose(overrides).model
    export_model(instantiate(config, _convert_="all"), config, tmp_path)

    model = FlexTokFromHub.from_pretrained(str(tmp_path))
    token_ids = model.tokenize(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert [ids.shape for ids in token_ids] == [(1, 256)] * 2
    for k in (1, 16, 64, 256):
        images = model.detokenize([ids[:, :k] for ids in token_ids], vae_image_sizes=32, timesteps=2, verbose=False)
        assert images.shape == (2, 3, 32, 32)
        assert torch.isfinite(images).all()


def test_samples_of_different_length_share_one_call(recorded_folder):
    from flextok import FlexTokFromHub

    model = FlexTokFromHub.from_pretrained(str(recorded_folder / "tiny_flextok")).eval()
    lengths = (1, 7, 16)
    ids = [torch.arange(length)[None] for length in lengths]
    generators = [torch.Generator().manual_seed(length) for length in lengths]
    options = {"vae_image_sizes": 8, "timesteps": 4, "verbose": False}
    together = model.detokenize(ids, generator=generators, **options)
    for i, length in enumerate(lengths):
        generator = [torch.Generator().manual_seed(length)]
        alone = model.detokenize(ids[i : i + 1], generator=generator, **options)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_model_folder_needs_both_files(missing, tmp_path):
    from flextok import FlexTokFromHub

    shutil.copytree(RECORDED / "tiny_flextok", tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no {missing}; a model folder holds both"):
        FlexTokFromHub.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no_such_folder", "./no/such", "/no/such/folder", "no/such/folder", ""])
def test_a_name_that_is_no_folder_and_no_hub_model_is_refused(name):
    from flextok import FlexTokFromHub

    with pytest.raises(ValueError, match=r"valid|no config\.json"):
        FlexTokFromHub.from_pretrained(name)


def test_a_hub_name_goes_on_to_the_hub():
    from flextok import FlexTokFromHub

    with pytest.raises(OSError, match="Hub"):
        FlexTokFromHub.from_pretrained("owner/model")


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"vae": "${x}"}'])
def test_a_damaged_config_file_is_named(text, tmp_path):
    from flextok import FlexTokFromHub

    shutil.copytree(RECORDED / "tiny_flextok", tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        FlexTokFromHub.from_pretrained(tmp_path)


def test_pickled_weights_are_refused():
    from flextok import FlexTokFromHub

    with pytest.raises(ValueError, match=r"weights\.bin: pickled weights are not loaded; valid: model\.safetensors"):
        FlexTokFromHub._load_as_pickle(None, "weights.bin", "cpu", strict=True)


def loaded_after(statement):
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import flextok; flextok.__version__")
    heavy = {"torch", "numpy", "hydra", "omegaconf", "diffusers", "lightning", "PIL", "huggingface_hub"}
    assert not loaded & heavy


def test_importing_the_model_loads_neither_diffusers_nor_lightning():
    loaded = loaded_after("from flextok import FlexTok, FlexTokFromHub")
    assert "torch" in loaded
    assert not loaded & {
        "diffusers",
        "transformers",
        "lightning",
        "torchvision",
        "matplotlib",
        "wandb",
        "sklearn",
    }


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import flextok

    with pytest.raises(AttributeError, match="FlexTik"):
        _ = flextok.FlexTik
