import hydra
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flextok.training.objective import RectifiedFlowObjective
from flextok.training.repa import FrozenTeacher, RepaTerm
from flextok.training.run import build, run
from tests.support import randomize
from tests.training.support import largest_difference, load, small_config
from tests.training.test_distributed import HERE, TWO, launch

transformers = pytest.importorskip("transformers")


def repa_config(folder, teacher, *overrides):
    repa = ("objective=repa", f"objective.repa.teacher={teacher}", "objective.repa.hidden_dim=24")
    return small_config(folder, *repa, *overrides)


def batch(size=8):
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"rgb": images.split(1), "rng": torch.Generator().manual_seed(0)}


def test_features_are_those_of_the_patches_at_the_models_grid(teacher_folder):
    teacher = FrozenTeacher.load(teacher_folder)
    images = torch.cat(batch(16)["rgb"])
    features = teacher(images, (4, 4))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = teacher.model(pixel_values=((images + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
    torch.testing.assert_close(features.flatten(1, 2), expected)
    assert not features.requires_grad


def sizes_seen_by(teacher):
    """A list that will hold the shape of every batch its network gets."""
    seen = []
    teacher.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"].shape), with_kwargs=True
    )
    return seen


def test_images_are_resized_to_as_many_patches_as_the_model_has(teacher_folder):
    teacher = FrozenTeacher.load(teacher_folder)
    seen = sizes_seen_by(teacher)
    assert teacher(torch.zeros(2, 3, 40, 40), (2, 3)).shape == (2, 2, 3, 16)
    assert seen == [(2, 3, 8, 12)]


def test_images_of_256_pixels_become_224_for_a_grid_of_16():
    config = transformers.Dinov2Config(
        hidden_size=4, num_hidden_layers=1, num_attention_heads=1, patch_size=14, image_size=518
    )
    teacher = FrozenTeacher(transformers.Dinov2Model(config))
    seen = sizes_seen_by(teacher)
    assert teacher(torch.zeros(1, 3, 256, 256), (16, 16)).shape == (1, 16, 16, 4)
    assert seen == [(1, 3, 224, 224)]


def test_registers_of_a_teacher_are_no_patches():
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, patch_size=4, image_size=8, num_register_tokens=3
    )
    teacher = FrozenTeacher(transformers.Dinov2WithRegistersModel(config))
    images = torch.cat(batch()["rgb"])
    bottom = images.clone()
    bottom[..., 4:, :4] = 1.0
    assert teacher(images, (2, 2)).shape == (3, 2, 2, 8)
    # With one layer every patch sees the others, but most changes where the image did.
    change = (teacher(bottom, (2, 2)) - teacher(images, (2, 2))).norm(dim=-1).mean(0)
    assert change.argmax() == 2


def test_the_term_is_the_negative_cosine_per_patch(teacher_folder):
    term = RepaTerm(teacher=teacher_folder, dim=5, num_layers=1)
    images, features = batch()["rgb"], torch.randn(3, 2, 2, 5)
    data = {"dec_patches_repa_layer": features.split(1)}
    projected, target = term.projector(features), term.teacher(torch.cat(images), (2, 2))
    expected = -(F.normalize(projected, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()
    torch.testing.assert_close(term(images, [data, data]), torch.stack([expected, expected]))


@pytest.mark.parametrize(("num_layers", "shapes"), [(1, [[7, 5]]), (3, [[4, 5], [4, 4], [7, 4]])])
def test_the_projector_has_the_layers_asked_for(num_layers, shapes):
    class Teacher(nn.Module):
        config = type("Config", (), {"patch_size": 4, "hidden_size": 7})

    term = RepaTerm(teacher=Teacher(), dim=5, hidden_dim=4, num_layers=num_layers)
    assert [list(p.shape) for p in term.parameters() if p.ndim == 2] == shapes


def test_the_teacher_is_frozen_and_no_part_of_the_term(teacher_folder):
    term = RepaTerm(teacher=teacher_folder, dim=5).train()
    assert all(name.startswith("projector.") for name in term.state_dict())
    assert not term.teacher.model.training
    assert not any(p.requires_grad for p in term.teacher.model.parameters())


@pytest.mark.parametrize("layer", [0, 1])
def test_the_term_reaches_the_layers_up_to_the_chosen_one(teacher_folder, tmp_path, layer):
    cfg = repa_config(tmp_path, teacher_folder, f"size.intermediate_layer={layer}", "size.null_condition_prob=0")
    model = randomize(hydra.utils.instantiate(cfg.model, _convert_="all")).train()
    objective = hydra.utils.instantiate(cfg.objective, _convert_="all")
    losses = objective(model, batch())
    assert losses.keys() == {"total", "flow_prefix", "repa"}
    torch.testing.assert_close(losses["total"], losses["flow_prefix"] + 0.5 * losses["repa"])
    losses["repa"].backward()
    blocks = model.decoder.module_dict["dec_transformer"].blocks
    reached = [any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters()) for block in blocks]
    assert reached == [True, layer == 1]
    assert all(p.grad is not None for p in objective.parameters())


def test_the_term_is_averaged_over_prefix_and_full_length(teacher_folder, tmp_path):
    packer = "model.encoder.module_dict.enc_seq_packer.sampled_keep_k_read_key=null"
    cfg = repa_config(tmp_path, teacher_folder, "objective.full_weight=1", packer)
    model = randomize(hydra.utils.instantiate(cfg.model, _convert_="all")).train()
    losses = hydra.utils.instantiate(cfg.objective, _convert_="all")(model, batch())
    flow = (losses["flow_prefix"] + losses["flow_full"]) / 2
    torch.testing.assert_close(losses["total"], flow + 0.5 * losses["repa"])


def test_training_lowers_the_term(teacher_folder, tmp_path):
    cfg = repa_config(tmp_path, teacher_folder)
    model = hydra.utils.instantiate(cfg.model, _convert_="all").train()
    objective = hydra.utils.instantiate(cfg.objective, _convert_="all")
    optimizer = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=3e-3)
    terms = []
    for _ in range(20):
        losses = objective(model, batch())
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        terms.append(losses["repa"].item())
    assert terms[-1] < terms[0] - 0.2


def test_a_run_saves_and_resumes_the_projector_but_not_the_teacher(teacher_folder, tmp_path):
    from flextok.training.checkpoints import load_run

    quick = ("callbacks.pictures=null", "callbacks.best=null", "trainer.max_steps=4")
    run(repa_config(tmp_path / "full", teacher_folder, *quick))
    run(repa_config(tmp_path / "short", teacher_folder, *quick, "trainer.max_steps=2"))
    run(repa_config(tmp_path / "rest", teacher_folder, *quick, f"ckpt_path={tmp_path / 'short'}"))
    full, rest = load(tmp_path / "full"), load(tmp_path / "rest")
    for part in ("state_dict", "ema", "optimizer_states"):
        assert largest_difference(full[part], rest[part]) == 0.0, part
    extra = {f"objective.repa.projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert {name for name in full["state_dict"] if not name.startswith("model.")} == extra
    assert {name for name in full["ema"]["weights"] if not name.startswith("model.")} == extra
    # The tokenizer itself is the one of a run without REPA.
    plain = build(small_config(tmp_path / "plain")).module.model.state_dict()
    assert load_run(tmp_path / "full")[0].state_dict().keys() == plain.keys()


# --- two processes ----------------------------------------------------------------------------------------------------


class TeacherStaysOut(Callback):
    """Fails the run if a process exchanges anything of the teacher with the others, or two teachers differ."""

    def on_train_end(self, trainer, pl_module):
        shared = trainer.strategy.model
        assert isinstance(shared, DistributedDataParallel)
        teacher = pl_module.objective.repa.teacher.model
        exchanged = {id(p) for p in shared.parameters()}
        assert len(exchanged) > 10
        assert not [name for name, p in teacher.named_parameters() if id(p) in exchanged or p.grad is not None]
        sums = torch.stack([p.double().sum() for p in teacher.parameters()])
        for theirs in trainer.strategy.all_gather(sums):
            assert torch.equal(theirs, sums)


def test_two_processes_give_the_gradient_of_one_and_exchange_no_teacher(teacher_folder, tmp_path):
    def overrides(folder):
        return (
            *("objective=repa", f"objective.repa.teacher={teacher_folder}", "objective.repa.hidden_dim=24"),
            *(
                "objective._target_=tests.training.support.DrawsOfEachImage",
                "trainer.max_steps=1",
                "callbacks.pictures=null",
            ),
            f"+callbacks.gradients={{_target_: {HERE}.SaveGradients, folder: {folder}}}",
        )

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    run(small_config(one, *overrides(one)))
    apart = f"+callbacks.apart={{_target_: {__name__}.TeacherStaysOut}}"
    assert launch(two, *TWO, *overrides(two), apart) == [0, 0]
    whole = torch.load(one / "gradients_0.pt")
    assert any(name.startswith("objective.repa.projector.") for name in whole)
    for rank in range(2):
        halves = torch.load(two / f"gradients_{rank}.pt")
        assert halves.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(halves[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert not [name for name in load(two)["state_dict"] if "teacher" in name]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_exactly(teacher_folder, tmp_path):
    repa = ("objective=repa", f"objective.repa.teacher={teacher_folder}", "objective.repa.hidden_dim=24")
    assert launch(tmp_path / "full", *TWO, *repa, "trainer.max_steps=4") == [0, 0]
    assert launch(tmp_path / "short", *TWO, *repa, "trainer.max_steps=2") == [0, 0]
    rest = ("trainer.max_steps=4", f"ckpt_path={tmp_path / 'short'}")
    assert launch(tmp_path / "rest", *TWO, *repa, *rest) == [0, 0]
    for part in ("state_dict", "ema", "optimizer_states"):
        assert largest_difference(load(tmp_path / "full")[part], load(tmp_path / "rest")[part]) <= 1e-6, part


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_teacher_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"objective.repa.teacher='.*nothing' cannot be loaded: .* valid: a folder"):
        FrozenTeacher.load(str(tmp_path / "nothing"))
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    )
    with pytest.raises(ValueError, match=r"objective.repa.teacher is a BertModel.* valid: a DINOv2"):
        FrozenTeacher(bert)


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"num_layers": 0}])
def test_impossible_terms_are_refused(teacher_folder, options):
    with pytest.raises(ValueError, match=f"objective.repa.{next(iter(options))}="):
        RepaTerm(teacher=teacher_folder, dim=4, **options)


def test_what_lacks_features_or_images_is_refused(teacher_folder, small_model):
    term = RepaTerm(teacher=teacher_folder, dim=32, features_read_key="nothing")
    with pytest.raises(ValueError, match=r"features_read_key='nothing' is not written"):
        RectifiedFlowObjective(repa=term)(small_model, batch())
    small_model.vae.force_vae_encode = False
    data = batch()
    data["vae_latents"] = data.pop("rgb")
    with pytest.raises(ValueError, match=r"objective.repa needs 'rgb', which the data has not; valid: images, or"):
        RectifiedFlowObjective(repa=term)(small_model, data)
    term.features_read_key = "mixed"
    mixed = {"mixed": [torch.zeros(1, 2, 2, 4), torch.zeros(1, 3, 3, 4)]}
    with pytest.raises(ValueError, match=r"valid: \[1, rows, columns, width\], of one size"):
        term(batch()["rgb"], [mixed])
