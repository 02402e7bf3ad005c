"""Ways to make things go wrong: processes that die, disks that are full, bytes that flip."""

import multiprocessing
import os
import resource
import shutil
import signal
from contextlib import contextmanager

import torch

from tests.training.support import At, load, run_with, small_config

FOLDER = "checkpoints"


def die():
    """As `kill -9` does it: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(function, *args):
    """The exit code of a process that does nothing but this; forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flextok.training.run"])
    process = context.Process(target=_with_threads, args=(torch.get_num_threads(), function, *args))
    process.start()
    process.join(timeout=90)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs
    return process.exitcode


def in_a_fork(function, *args):
    """The exit code of a copy of this process that does nothing but this: at once, but it must not compute much."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _with_threads(num_threads, function, *args):
    torch.set_num_threads(num_threads)  # Another number rounds differently.
    function(*args)


def run_and_die(folder, step, place, *overrides):
    run_with(small_config(folder, *overrides), At(step, place, die))


@contextmanager
def files_end_at(num_bytes):
    """The system lets no file grow beyond this: writing fails in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def run_and_fill_the_disk(cfg, step, place, num_bytes):
    """From that place on no file of the run can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        run_with(cfg, At(step, place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def copy_of(run, folder):
    shutil.copytree(run, folder, dirs_exist_ok=True)
    return folder


def cut(file, num_bytes):
    file.write_bytes(file.read_bytes()[:num_bytes])


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 0xFF
    file.write_bytes(content)


def steps_on_disk(folder):
    """`{name: step}` of the checkpoints of a run."""
    return {path.name: load(folder, path.name)["global_step"] for path in (folder / FOLDER).iterdir()}
