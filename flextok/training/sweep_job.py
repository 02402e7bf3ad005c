"""A run of several processes inside a sweep (`-m`), started as a command of its own.

Lightning starts further processes by repeating the command line, which is that of the whole sweep: each of them would
run all of it. A command of its own is an ordinary run in the folder that the sweep has made for it.
"""

import os
import signal
import subprocess
import sys
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from flextok.training.distributed import is_started_from_outside

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def needs_own_command(cfg: DictConfig) -> bool:
    """Whether this is a run of a sweep for which Lightning would start further processes on this machine."""
    if HydraConfig.get().mode != RunMode.MULTIRUN or is_started_from_outside():
        return False
    return str(cfg.trainer.get("devices", 1)) != "1" and cfg.trainer.get("num_nodes", 1) == 1


def run_own_command(script: str) -> None:
    """Run `script` with the overrides of this run of the sweep, in its folder, and wait for it.

    SIGTERM, SIGUSR1 and SIGUSR2 are passed on. A run that they stop ends the sweep with its exit code.

    Raises:
        ChildProcessError: the run failed; it has said why.
    """
    hydra = HydraConfig.get()
    folder = hydra.runtime.output_dir
    quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
    of_hydra = [f"hydra.run.dir='{quoted}'", "hydra.mode=RUN", "hydra.output_subdir=null"]
    process = subprocess.Popen([sys.executable, script, *hydra.overrides.task, *of_hydra], cwd=hydra.runtime.cwd)

    def pass_on(signum: int, frame: FrameType | None) -> None:
        process.send_signal(signum)

    former = {signum: signal.signal(signum, pass_on) for signum in _PASSED_ON}
    try:
        code = process.wait()
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
    if code == os.EX_TEMPFAIL:
        raise SystemExit(code)
    if code != 0:
        raise ChildProcessError(f"the run in {folder} ended with exit code {code}; its messages are above")
