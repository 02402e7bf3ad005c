"""From training to a published checkpoint and back: what leaves a run is what every loader gives."""

import json
import re

import pytest
import torch
from hydra.utils import instantiate

from flextok import FlexTokFromHub
from flextok.config import compose
from flextok.evaluation.run import open_split
from flextok.training.checkpoints import load_run
from flextok.utils.checkpoint import load_metadata, load_model_from_safetensors, load_safetensors
from flextok.utils.export import official_config
from tests.end_to_end.support import QUICK, decode, evaluate, outline, rows, train
from tests.support import RECORDED, max_difference, python_output

FORMS = ("mask_token", "attention_mask")
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def digits():
    return next(iter(open_split({**compose().data, "eval_batch_size": 8}, "test")))["image"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "load",
    [FlexTokFromHub.from_pretrained, lambda folder: load_model_from_safetensors(folder / "model.safetensors")],
    ids=["hub", "file"],
)
def test_an_export_gives_the_tokens_and_images_of_the_averaged_weights(form, load, released, digits):
    run, export = released(form)
    trained, loaded = load_run(run)[0], load(export)
    tokens = trained.tokenize(digits)
    assert len({tuple(ids[0].tolist()) for ids in tokens}) > 1, "all images have the same tokens"
    assert all(torch.equal(ours, ids) for ours, ids in zip(loaded.tokenize(digits), tokens, strict=True))
    images = {keep_k: decode(trained, tokens, keep_k=keep_k, size=8) for keep_k in (1, 2, NUM_TOKENS)}
    assert max_difference(images[1], images[NUM_TOKENS]) > 1e-3, "tokens do not matter: this test would prove nothing"
    for keep_k, expected in images.items():
        assert max_difference(decode(loaded, tokens, keep_k=keep_k, size=8), expected) < 1e-5
    raw = load_run(run, weights="raw")[0]
    assert max_difference(decode(raw, tokens, keep_k=NUM_TOKENS, size=8), images[NUM_TOKENS]) > 1e-3


def test_a_mask_token_export_has_only_what_the_published_code_knows(released):
    _, export = released("mask_token")
    config = json.loads((export / "config.json").read_text())
    assert load_metadata(export / "model.safetensors") == config
    published = json.loads((RECORDED / "tiny_flextok" / "config.json").read_text())
    # Pixels as latents are ours; everything else must be theirs.
    for part in published.keys() - {"_target_", "vae"}:
        assert outline(config[part]) == outline(published[part]), part
        # Modules run in this order.
        assert list(config[part].get("module_dict", ())) == list(published[part].get("module_dict", ())), part
    text = json.dumps(config)
    assert "drop_masked" not in text
    assert "timestep_shift" not in text
    packers = [config[part]["module_dict"][f"{part[:3]}_seq_packer"] for part in ("encoder", "decoder")]
    assert [packer["pad_to_multiple"] for packer in packers] == [128, 128]


def test_a_mask_token_export_names_its_weights_as_the_published_code_does(released):
    _, export = released("mask_token")
    size = compose(["experiment=digits"]).size
    depths = {"encoder": size.encoder_depth, "decoder": size.decoder_depth}
    official = json.loads((RECORDED / "official_shapes.json").read_text())["flextok_d12_d12"]["shapes"]
    block = re.compile(r"(encoder|decoder)\..*\.blocks\.(\d+)\.")
    expected = [name for name in official if (found := block.match(name)) is None or int(found[2]) < depths[found[1]]]
    assert load_safetensors(export / "model.safetensors", False).keys() == set(expected)
    assert FlexTokFromHub.from_pretrained(export).state_dict().keys() == set(expected)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_again_is_the_same(form, released, tmp_path):
    _, export = released(form)
    FlexTokFromHub.from_pretrained(export).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((export / "config.json").read_text())
    before, after = (FlexTokFromHub.from_pretrained(folder).state_dict() for folder in (export, tmp_path))
    assert list(before) == list(after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_evaluated_like_its_run(form, released, tmp_path):
    run, export = released(form)
    of_run = evaluate(run, tmp_path / "run")
    of_export = evaluate(export, tmp_path / "export", "data=digits")
    assert of_export["tokens"] == of_run["tokens"]
    assert [row["keep_k"] for row in of_run["results"]] == [1, 2, 4, 8, 16]
    for ours, theirs in zip(of_export["results"], of_run["results"], strict=True):
        assert ours["psnr"] == pytest.approx(theirs["psnr"], abs=1e-4)
        assert ours["ssim"] == pytest.approx(theirs["ssim"], abs=1e-5)


def test_fine_tuning_starts_where_the_export_stands(released, tmp_path):
    run, export = released("mask_token")
    standing_still = (
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "optimizer.warmup_steps=0",
        "optimizer.lr=1e-12",
    )
    train(tmp_path / "tuned", "experiment=digits", f"init_from={export / 'model.safetensors'}", *standing_still)
    train(tmp_path / "fresh", "experiment=digits", *standing_still)
    before, tuned, fresh = (rows(folder)[-1] for folder in (run, tmp_path / "tuned", tmp_path / "fresh"))
    losses = [name for name in before if name.startswith("val/flow_loss")]
    assert len(losses) == 6
    for name in losses:
        assert float(tuned[name]) == pytest.approx(float(before[name]), abs=1e-5), name
        assert abs(float(fresh[name]) - float(before[name])) > 1e-3, "training changed nothing"


def test_leaving_dropped_tokens_out_changes_no_velocity(released):
    _, export = released("attention_mask")
    config = compose(["experiment=digits", "dropout=packed"]).model
    assert official_config(config) == json.loads((export / "config.json").read_text())
    masked, packed = FlexTokFromHub.from_pretrained(export), instantiate(config, _convert_="all").eval()
    packed.load_state_dict(masked.state_dict())
    data = {
        "enc_registers_quant": list(torch.randn(4, NUM_TOKENS, 6).split(1)),
        "vae_latents_noised": list(torch.randn(4, 1, 8, 8).split(1)),
        "timesteps": torch.tensor([0.1, 0.4, 0.7, 1.0]),
    }

    @torch.no_grad()
    def velocity(model, keep_ks):
        return torch.cat(list(model.decoder({**data, "eval_keep_k": keep_ks})["vae_latents_reconst"]))

    some, every = [1, 2, 15, 16], [NUM_TOKENS] * 4
    assert max_difference(velocity(packed, some), velocity(masked, some)) < 1e-5
    assert max_difference(velocity(masked, some)[:1], velocity(masked, every)[:1]) > 1e-3


@pytest.mark.slow
def test_the_three_commands_lead_from_images_to_numbers(tmp_path):
    short = ("trainer.max_steps=2", "optimizer.warmup_steps=1", "trainer.val_check_interval=2", "data.batch_size=8")
    runs = f"paths.runs={tmp_path / 'runs'}"
    python_output("train.py", "experiment=digits", runs, *short)
    (run,) = (tmp_path / "runs" / "digits").iterdir()
    assert str(run) in python_output("-m", "flextok", "export", run, tmp_path / "export")
    table = python_output("eval.py", "checkpoint=latest", runs, *QUICK)
    assert "PSNR" in table
    assert str(run / "evaluation") in table
    (report,) = tmp_path.rglob("metrics.json")
    of_run = json.loads(report.read_text())
    of_export = evaluate(tmp_path / "export", tmp_path / "evaluation", "data=digits")
    psnrs = [[row["psnr"] for row in metrics["results"]] for metrics in (of_run, of_export)]
    assert psnrs[0] == pytest.approx(psnrs[1], abs=1e-4)
