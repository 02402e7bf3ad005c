"""Training with sharded weights: the numbers of a run that is not, checkpoints as folders, whatever kills it."""

import csv
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning import Callback

from flextok.__main__ import main
from flextok.config import check_config, compose
from flextok.evaluation.source import find_source
from flextok.training import fsdp, sharded_checkpoint
from flextok.training.checkpoint_files import DurableCheckpointIO, put_in_place
from flextok.training.checkpoints import checkpoint_of_run, load_run, read_checkpoint
from flextok.training.preemption import EXIT_CODE
from flextok.training.resume import checkpoint_to_resume
from flextok.training.run import run
from flextok.training.sharded_checkpoint import META, is_sharded_checkpoint
from tests.training.support import largest_difference, launch, load, small_config
from tests.training.test_preemption import signal_at

HERE, SUPPORT = "tests.training.test_fsdp", "tests.training.support"
TWO = ("trainer=fsdp_cpu", "data.batch_size=200", "callbacks.last.every_n_steps=2")
SAME_DRAWS = (f"objective._target_={SUPPORT}.DrawsOfEachImage",)
PARTS = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step")


# --- what the processes run -------------------------------------------------------------------------------------------


class KillWhileSaving(Callback):
    """Rank 0 dies at a step, when the parts of its checkpoint are written and `meta.pt` is not."""

    def __init__(self, step):
        self.step = step

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.global_step == self.step:
            sharded_checkpoint._write_meta = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


class BadGradient(Callback):
    """One number of the gradient of one rank is not finite, in one step."""

    def __init__(self, step):
        self.step = step

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step and trainer.global_rank == 1:
            gradients = [p.grad.to_local() for p in pl_module.parameters() if p.grad is not None]
            next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = float("nan")


class NoRoom(Callback):
    """The disk of one rank is full when it saves."""

    def __init__(self, rank):
        self.rank = rank

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert launch(folder, *TWO, *SAME_DRAWS) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of the same run, of which one process was killed when it saved step 6; it was saved after step 4."""
    folder = tmp_path_factory.mktemp("killed")
    kill = f"+callbacks.kill={{_target_: {HERE}.KillWhileSaving, step: 6}}"
    assert launch(folder, *TWO, *SAME_DRAWS, kill)[0] == -signal.SIGKILL
    return folder


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_does(undisturbed, tmp_path):
    run(small_config(tmp_path, *SAME_DRAWS, "callbacks.pictures=null"))
    ours, theirs = load(undisturbed), load(tmp_path)
    for part in PARTS:
        assert largest_difference(ours[part], theirs[part]) <= 1e-4, part
    assert ours.keys() == theirs.keys()


def test_rank_zero_writes_pictures_of_weights_that_no_process_has(undisturbed):
    assert {path.name for path in undisturbed.glob("pictures/*")} == {"step_000004.png", "step_000008.png"}


# --- interruptions ----------------------------------------------------------------------------------------------------


def test_a_process_killed_while_it_saves_leaves_the_checkpoint_before(killed):
    begun = killed / "checkpoints" / ".last.ckpt.tmp"
    assert list(begun.glob("*.distcp"))
    assert not is_sharded_checkpoint(begun)
    assert load(killed)["global_step"] == 4
    assert load(killed, "previous.ckpt")["global_step"] == 2


def test_a_killed_run_goes_on_exactly(undisturbed, killed, tmp_path):
    assert launch(tmp_path, *TWO, *SAME_DRAWS, f"ckpt_path={killed}") == [0, 0]
    ours, theirs = load(tmp_path), load(undisturbed)
    for part in PARTS:
        assert largest_difference(ours[part], theirs[part]) == 0.0, part
    assert "interrupted with" not in (tmp_path / "rank_0.log").read_text()


def test_one_process_without_shards_goes_on_and_says_what_that_changes(undisturbed, killed, tmp_path, caplog):
    run(small_config(tmp_path, *SAME_DRAWS, f"ckpt_path={killed}", "callbacks.pictures=null"))
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    for part in PARTS:
        assert largest_difference(load(tmp_path)[part], load(undisturbed)[part]) <= 1e-4, part
    assert "interrupted with 2 processes and goes on with 1" in caplog.text


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_reads_like_any_other(undisturbed, tmp_path):
    last, best = (undisturbed / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    assert is_sharded_checkpoint(last)
    assert is_sharded_checkpoint(best)
    checkpoint = read_checkpoint(last)
    for weights, stored in (("ema", checkpoint["ema"]["weights"]), ("raw", checkpoint["state_dict"])):
        model, cfg = load_run(undisturbed, weights=weights)
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        assert largest_difference({name: state[name] for name in stored}, dict(stored)) == 0.0
        assert cfg.size.registers == 4
    assert load_run(shutil.copytree(last, tmp_path / "alone.ckpt"))[1].size.registers == 4
    assert main(["export", str(best), str(tmp_path / "exported")]) == 0
    shapes = read_checkpoint(last, values=False)["state_dict"]
    assert {name: t.shape for name, t in shapes.items()} == {n: t.shape for n, t in checkpoint["state_dict"].items()}


def test_evaluation_finds_a_sharded_checkpoint(undisturbed):
    source = find_source("latest", runs=undisturbed.parent)
    assert source.weights_file == checkpoint_of_run(source.path)
    source = find_source(str(undisturbed / "checkpoints" / "best.ckpt"), runs=undisturbed.parent)
    assert (source.kind, source.run_folder) == ("checkpoint", undisturbed)
    assert source.load(weights="ema")[1] == "ema"


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a bit of a part": lambda folder: flip_a_bit(next(folder.glob("__0_*"))),
    "a lost part": lambda folder: next(folder.glob("__1_*")).unlink(),
    "a bit of the rest": lambda folder: flip_a_bit(folder / META),
    "the rest cut short": lambda folder: os.truncate(folder / META, 999),
    "the rest lost": lambda folder: (folder / META).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(undisturbed, tmp_path, damage, caplog):
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "last.ckpt")
    path, content = checkpoint_to_resume("auto", tmp_path)
    assert (path.name, content["global_step"]) == ("previous.ckpt", 6)
    assert "last.ckpt cannot be read" in caplog.text
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read.*others here: .*previous\.ckpt"):
        read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")


class Intruder:
    def __reduce__(self):
        return os.abort, ()


def change_meta(folder, change):
    meta = torch.load(folder / META, weights_only=True)
    change(meta)
    torch.save(meta, folder / META)


def test_an_index_that_would_run_code_is_refused(undisturbed, tmp_path):
    folder = Path(shutil.copytree(undisturbed / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt"))
    index = folder / ".metadata"
    index.write_bytes(pickle.dumps(Intruder()))
    change_meta(folder, lambda meta: meta["checksums"].update({".metadata": sharded_checkpoint._checksum(index)}))
    with pytest.raises(ValueError, match="abort, which no index needs"):
        read_checkpoint(folder)


def test_tensors_that_are_larger_than_the_files_are_refused(undisturbed, tmp_path):
    folder = Path(shutil.copytree(undisturbed / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt"))
    huge = {"huge": torch.empty(2**40, device="meta")}
    change_meta(folder, lambda meta: meta["checkpoint"]["state_dict"].update(huge))
    with pytest.raises(ValueError, match="said to be larger than"):
        read_checkpoint(folder)


def test_a_file_and_a_folder_of_one_name_replace_each_other(undisturbed, tmp_path):
    path = Path(shutil.copytree(undisturbed / "checkpoints" / "best.ckpt", tmp_path / "best.ckpt"))
    DurableCheckpointIO().save_checkpoint({"new": 2}, path)
    assert read_checkpoint(path) == {"new": 2}
    put_in_place(Path(shutil.copytree(undisturbed / "checkpoints" / "best.ckpt", tmp_path / "new")), path)
    assert is_sharded_checkpoint(path)


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_a_loss_scaler_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.precision.*bf16-mixed or 32-true with trainer=fsdp"):
        check_config(compose(["experiment=digits", "trainer=fsdp_cpu", "trainer.precision=16-mixed"]))


def test_processes_with_unequal_numbers_of_validation_batches_are_refused(monkeypatch):
    strategy = fsdp.ShardedStrategy()
    monkeypatch.setattr(fsdp, "of_all_ranks", lambda value: [value, 2])
    strategy.check_validation([2])
    with pytest.raises(ValueError, match="the processes have 3, 2 validation batches.*valid: another data.eval_batch"):
        strategy.check_validation([3])


# --- longer ones ------------------------------------------------------------------------------------------------------

QUICK = ("callbacks.pictures=null", "data.batch_size=200")
HARD = ("objective=prefix_and_full", "size.act_checkpoint=true", "trainer.accumulate_grad_batches=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [((), 1e-4), (HARD, 1e-4), (("trainer.precision=bf16-mixed",), 1e-2), (("compile=true",), 1e-4)],
    ids=["plain", "several passes", "bf16", "compiled"],
)
def test_it_gives_the_numbers_of_ddp(tmp_path, overrides, tolerance):
    for trainer in ("ddp_cpu", "fsdp_cpu"):
        assert launch(tmp_path / trainer, *QUICK, f"trainer={trainer}", *overrides) == [0, 0]
    ours, theirs = load(tmp_path / "fsdp_cpu"), load(tmp_path / "ddp_cpu")
    assert largest_difference(ours["state_dict"], theirs["state_dict"]) <= tolerance
    assert largest_difference(ours["ema"]["weights"], theirs["ema"]["weights"]) <= tolerance


def final_losses(folder):
    """The last value of each loss in `metrics.csv`."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: float(row[name]) for row in rows for name in row if "loss" in name and row[name]}


@pytest.mark.slow
def test_the_embedded_experiment_killed_in_the_middle_ends_with_the_loss_of_a_run_that_was_not(tmp_path):
    long = ("experiment=digits", *TWO, "callbacks.pictures=null", "data.batch_size=64", "trainer.max_steps=100")
    long = (*long, "trainer.val_check_interval=50", "optimizer.total_steps=100", "callbacks.last.every_n_steps=20")
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    assert launch(whole, *long) == [0, 0]
    assert -signal.SIGKILL in launch(first, *long, f"+callbacks.kill={{_target_: {SUPPORT}.KillAt, step: 55}}")
    assert load(first)["global_step"] == 40
    assert launch(second, *long, f"ckpt_path={first}") == [0, 0]
    ours, theirs = final_losses(second), final_losses(whole)
    assert "val/flow_loss" in theirs
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
def test_all_processes_leave_out_a_step_that_one_found_bad(tmp_path):
    bad = f"+callbacks.bad={{_target_: {HERE}.BadGradient, step: 3}}"
    assert launch(tmp_path, *TWO, "callbacks.pictures=null", bad) == [0, 0]
    for rank in range(2):
        assert "step 4: the gradient is not finite" in (tmp_path / f"rank_{rank}.log").read_text()
    assert all(tensor.isfinite().all() for tensor in load(tmp_path)["state_dict"].values())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_process_stops_all(tmp_path, rank):
    no_room = f"+callbacks.no_room={{_target_: {HERE}.NoRoom, rank: {rank}}}"
    assert launch(tmp_path, *TWO, "callbacks.pictures=null", "callbacks.best=null", no_room) == [1, 1]
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_saves_the_step_of_both(undisturbed, tmp_path):
    overrides = (*TWO, *SAME_DRAWS, "callbacks.last.every_n_steps=100", "ckpt_path=auto")
    told = signal_at("within the step", 4, rank=1, signum=int(signal.SIGTERM))
    assert launch(tmp_path, *overrides, told) == [EXIT_CODE, 0]
    assert 5 <= load(tmp_path)["global_step"] <= 7
    assert launch(tmp_path, *overrides) == [0, 0]
    for part in PARTS:
        assert largest_difference(load(tmp_path)[part], load(undisturbed)[part]) == 0.0, part


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 400), (3, 133)])
def test_another_number_of_processes_goes_on(killed, tmp_path, world_size, batch_size):
    other = (*TWO, *SAME_DRAWS, f"data.batch_size={batch_size}", f"ckpt_path={killed}")
    assert launch(tmp_path, *other, world_size=world_size) == [0] * world_size
    assert load(tmp_path)["global_step"] == 8
    text = (tmp_path / "rank_0.log").read_text()
    assert f"interrupted with 2 processes and goes on with {world_size}" in text


@pytest.mark.slow
def test_a_run_without_shards_goes_on_with_them(finished_run, tmp_path):
    overrides = (*TWO, f"ckpt_path={finished_run}", "trainer.max_steps=12")
    assert launch(tmp_path, *overrides) == [0, 0]
    assert load(tmp_path)["global_step"] == 12
    assert "interrupted with 1 processes and goes on with 2" in (tmp_path / "rank_0.log").read_text()
