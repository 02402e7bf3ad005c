"""Who makes the host wait for numbers of tensors between two logged steps: on a GPU each of them would cost time."""

import sys
from collections import Counter
from pathlib import Path

import lightning
import pytest
import torch
from lightning import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import REPOSITORY
from tests.training.support import run_with, small_config

aten = torch.ops.aten
# Operations whose result, or its size, the host has to know.
READING = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten.bincount.default, aten._unique2.default, aten.unique_dim.default),
}
FOLDERS = REPOSITORY / "flextok", Path(lightning.__file__).parent, Path(torch.optim.__file__).parent
FIRST, LAST = 2, 8
"""Steps that are looked at, none of them logged; from the beginning of one to that of the other."""

# On host tensors, which were never on a GPU: lengths of the samples and what was drawn, from which sizes follow.
OF_THE_HOST = {
    ("flextok/model/keep_k.py", "sample_keep_k"),
    ("flextok/model/preprocessors/nullcond.py", "sample_null_flags"),
    ("flextok/model/packed_list.py", "offset_ranges"),
    ("flextok/model/packed_shapes.py", "_restored_rows"),
    ("flextok/attention/layout.py", "_build_rows_of"),
    ("flextok/attention/backends/sdpa.py", "_padded_plan"),
}
# On the CPU only: a check of the times; on a GPU it is left out.
ON_THE_CPU_ONLY = {("flextok/model/preprocessors/time_embedding.py", "timestep_embedding")}
# Once per step: whether the gradient was finite. On a GPU the number was copied to the host before, without waiting,
# and the host looks at it a step later.
OF_THE_GUARD = ("flextok/training/nonfinite.py", "_judge")


class HostReads(TorchDispatchMode):
    """Counts reads by the function of flextok, of lightning or of torch's optimizers that asked for them."""

    def __init__(self):
        super().__init__()
        self.by = Counter()
        self.is_on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READING:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self):
        frame = sys._getframe(2)
        while frame is not None:
            for folder in FOLDERS:
                if Path(frame.f_code.co_filename).is_relative_to(folder):
                    file = Path(frame.f_code.co_filename).relative_to(folder.parent).as_posix()
                    self.by[file, frame.f_code.co_name] += 1
                    return
            frame = frame.f_back
        self.by["unknown", "unknown"] += 1


class Watch(Callback):
    """Switches the counting on and off at the beginning of a step."""

    def __init__(self, reads):
        self.reads = reads

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == FIRST:
            self.reads.__enter__()
            self.reads.is_on = True
        elif trainer.global_step == LAST:
            self.reads.is_on = False
            self.reads.__exit__(None, None, None)


@pytest.fixture
def reads_of(monkeypatch):
    """A function that runs a config and returns `{(file, function): reads}` of the steps looked at."""

    def reads_of(cfg):
        reads = HostReads()
        with monkeypatch.context() as patch:
            for name in ("tolist", "numpy", "cpu"):  # Between devices alike they are no operation of torch.
                patch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name), reads))
            run_with(cfg, Watch(reads))
        return dict(reads.by)

    return reads_of


def counting(method, reads):
    def counted(tensor, *args, **options):
        if reads.is_on:
            reads.note()
        return method(tensor, *args, **options)

    return counted


def config(folder, *overrides):
    steps = ("trainer.max_steps=9", "trainer.log_every_n_steps=20", "trainer.val_check_interval=20")
    return small_config(folder, "data.batch_size=64", *steps, "callbacks.last.every_n_steps=20", *overrides)


def test_nothing_is_read_from_the_device_but_the_verdict_of_the_guard(tmp_path, reads_of):
    reads = reads_of(config(tmp_path))
    assert reads.pop(OF_THE_GUARD) == LAST - FIRST
    assert reads.keys() <= OF_THE_HOST | ON_THE_CPU_ONLY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_gpu(tmp_path):
    class Forbid(Callback):
        """Every synchronisation that torch knows of is an error between the two steps."""

        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step in (FIRST, LAST):
                torch.cuda.set_sync_debug_mode("error" if trainer.global_step == FIRST else "default")

    try:
        run_with(config(tmp_path, "trainer.accelerator=gpu", "trainer.precision=bf16-mixed"), Forbid())
    finally:
        torch.cuda.set_sync_debug_mode("default")
