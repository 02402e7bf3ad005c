"""Train and evaluate what a plan names, several runs at a time, each in processes of its own."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.harness import write_results
from benchmarks.study.plan import Plan, Run

REPOSITORY = Path(__file__).resolve().parents[2]
PLAN_FILE = "plan.json"
# One thread per run. And glibc is told to keep freed memory: it would hand it back to the system after each step of the
# decoder, and half of an evaluation's time would go into asking for it again.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_MMAP_THRESHOLD_": str(2**31)}


def run_all(plan: Plan, folder: Path, *, jobs: int) -> None:
    """Do what is not done yet; a killed study goes on where it was, inside of a run too.

    Raises:
        ValueError: `folder` holds another study.
        RuntimeError: a run failed; the message names its log. The runs that were under way are finished first.
    """
    claim(plan, folder)
    todo = [run for run in plan.runs() if not is_done(run, folder)]
    print(f"{folder}: {len(plan.runs())} runs, {len(todo)} to do, {jobs} at a time", flush=True)
    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(do, run, plan, folder) for run in todo]
        try:
            for number, finished in enumerate(as_completed(running), start=1):
                name = finished.result()
                passed = time.monotonic() - start
                left = passed / number * (len(todo) - number)
                print(f"{number}/{len(todo)} {name}; {passed / 60:.0f} min, about {left / 60:.0f} left", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def claim(plan: Plan, folder: Path) -> None:
    """Note in `folder` which plan its runs are of."""
    path = folder / PLAN_FILE
    if not path.exists():
        write_results(path, plan.as_json())
    elif json.loads(path.read_text(encoding="utf-8")) != plan.as_json():
        raise ValueError(f"--folder {folder}: it holds runs of another plan, see {path}; valid: another folder")


def is_done(run: Run, folder: Path) -> bool:
    return (run.folder(folder) / "evaluation" / "metrics.json").is_file()


def do(run: Run, plan: Plan, folder: Path) -> str:
    """Train and evaluate one; its output goes into `study.log` of its folder."""
    place = run.folder(folder).resolve()
    place.mkdir(parents=True, exist_ok=True)
    commands = (
        ["train.py", *run.training, f"hydra.run.dir={place}"],
        ["eval.py", f"checkpoint={place}", *plan.evaluation],
    )
    log = place / "study.log"
    for command in commands:
        with log.open("a", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=REPOSITORY,
                env=os.environ | ENVIRONMENT,
                stdout=file,
                stderr=file,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}, see {log}")
    return str(run.folder(Path()))
