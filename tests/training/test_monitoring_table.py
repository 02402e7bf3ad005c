"""The table of docs/monitoring.md is what a run writes down."""

import csv
import re

import pytest

from flextok.training.run import run
from tests.support import REPOSITORY
from tests.training.support import small_config

# Only with a GPU, or a network that has to be downloaded.
NOT_HERE = {"memory/gpu_peak_allocated_gib", "memory/gpu_peak_reserved_gib", "train/repa"}


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    """The columns of metrics.csv of a run with everything the table knows."""
    folder = tmp_path_factory.mktemp("monitored")
    everything = ("objective=prefix_and_full", "+optimizer.lr_scales.encoder=0.5", "callbacks.pace.peak_flops=1e12")
    sizes = ("size.registers=16", "size.null_condition_prob=0.3", "data.batch_size=200", "callbacks.pictures=null")
    run(small_config(folder, *everything, *sizes, "trainer.max_steps=4"))
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["train/codebook/perplexity"] and row["train/flow_loss/null"] for row in rows)
    assert all(float(row["train/mfu"]) > 0 and float(row["train/tokens_per_second"]) > 0 for row in rows[1:])
    assert 0 <= float(rows[-1]["train/data_wait_share"]) <= 1
    assert float(rows[-1]["train/lr/encoder"]) == pytest.approx(0.5 * float(rows[-1]["train/lr"]))
    return set(rows[0])


def patterns() -> dict[str, str]:
    """A regular expression for each name of the table; `<...>` stands for a number or a word."""
    text = (REPOSITORY / "docs/monitoring.md").read_text()
    names = re.findall(r"^\| `([^`]+)` \|[^|]*\|[^|]*\|[^|]*\|$", text, flags=re.MULTILINE)
    # A bucket of one number has no second.
    return {name: re.sub(r"<\w+>", r"[\\w.]+", name.replace("-<to>", "(-<to>)?")) for name in names}


def test_every_column_is_in_the_table(columns):
    known = "|".join(patterns().values())
    assert {column for column in columns if not re.fullmatch(known, column)} == set()


def test_every_name_of_the_table_is_written(columns):
    missing = {name for name, known in patterns().items() if not any(re.fullmatch(known, column) for column in columns)}
    assert missing == NOT_HERE
