"""Does attention masking train better tokenizers than a learned mask token? `python -m benchmarks.study`

    python -m benchmarks.study                  everything, under two hours on two cores; goes on where it was stopped
    python -m benchmarks.study --only analysis  tables and pictures anew, from runs that are there

Trains what `benchmarks/study/plan.py` lists, evaluates it with `eval.py`, then measures speed and memory of each
variant. Writes benchmarks/results/study.json, docs/images/study_<data>.png and the tables of docs/study.md.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import parse, parser, write
from benchmarks.study import figures, page
from benchmarks.study.analysis import analyse
from benchmarks.study.plan import PLAN, Plan
from benchmarks.study.runs import REPOSITORY, run_all
from benchmarks.study.speed import measure_speed

PAGE = REPOSITORY / "docs" / "study.md"


def main(arguments: Sequence[str] | None = None, *, plan: Plan = PLAN, page_path: Path = PAGE) -> None:
    command = parser("study", __doc__, repeats=24)
    command.add_argument("--folder", type=Path, default=Path("runs/study"), help="of the runs, default runs/study")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, default one per core")
    command.add_argument("--only", choices=("runs", "speed", "analysis"), help="one part of it")
    options = parse(command, arguments)
    wanted = {options.only} if options.only else {"runs", "speed", "analysis"}
    known: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    content: dict[str, Any] = {name: known[name] for name in ("studies", "speed") if name in known}
    if "runs" in wanted:
        run_all(plan, options.folder, jobs=options.jobs)
    if "speed" in wanted:
        torch.set_num_threads(1)  # As the runs have it.
        content["speed"] = {data.name: measure_speed(data, repeats=options.repeats) for data in plan.data}
    if "analysis" in wanted:
        content["studies"] = analyse(plan, options.folder)
    write(options, content)
    if "studies" in content and "speed" in content:
        for study in content["studies"]:
            picture = page_path.parent / "images" / f"study_{study['data']}.png"
            figures.draw(study).savefig(picture, dpi=110)
        page_path.write_text(page.fill_in(page_path.read_text(encoding="utf-8"), content), encoding="utf-8")
        print(f"written to {page_path}")


if __name__ == "__main__":
    main()
