"""Every file below `configs/` composes into a program, and what can be run in a moment is run."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from flextok.config import CONFIG_FOLDER, check_config, compose
from tests.training.support import SMALL, small_config
from tests.training.test_recipes import RECIPES

PROGRAMS = ("train", "eval", "fuse")
FILES = sorted(path.relative_to(CONFIG_FOLDER) for path in CONFIG_FOLDER.rglob("*.yaml"))
OPTIONS = [path for path in FILES if path.parent != Path()]
# What only the user knows, and what Hydra fills in.
UNKNOWN = {"latent.path": "models/vae", "data.root": "images", "checkpoint": "runs/x", "paths.run": "runs/x"} | {
    "fusion.data.path": "items.jsonl"
}
# Groups of Hydra's own: every program has them.
HYDRA_GROUPS = {"hydra/launcher"}
# Without which an option does not fit the defaults of its program.
NEEDED = {"vae/kl.yaml": ["data.image_size=32"]}


def groups_of(program: str) -> set[str]:
    """The groups a program chooses from, as its defaults list names them."""
    defaults = yaml.safe_load((CONFIG_FOLDER / f"{program}.yaml").read_text())["defaults"]
    named = {next(iter(entry)).removeprefix("override ").strip("/") for entry in defaults if isinstance(entry, dict)}
    return named | (HYDRA_GROUPS if program == "train" else set())


def resolved(cfg: Any) -> Any:
    for field, value in UNKNOWN.items():
        parent = OmegaConf.select(cfg, field.rpartition(".")[0]) if "." in field else cfg
        if parent is not None and field.rpartition(".")[2] in list(parent):  # `in parent` skips what is missing
            OmegaConf.update(cfg, field, value)
    # A hub of a config (`flextok.yaml`) leaves sizes open for the files that build on it.
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_compose_by_themselves(program):
    assert resolved(compose(config_name=program))


@pytest.mark.parametrize("path", OPTIONS, ids=str)
def test_every_option_composes_into_a_program(path):
    group, option = str(path.parent), path.stem
    programs = [program for program in PROGRAMS if group in groups_of(program)]
    assert programs, f"no program chooses from configs/{group}"
    for program in programs:
        cfg = compose([f"{group}={option}", *NEEDED.get(path.as_posix(), [])], program)
        text = OmegaConf.to_yaml(cfg)
        if "???" in text and option == "flextok":
            continue  # The sizes are left to the files that build on it.
        assert resolved(cfg)


@pytest.mark.parametrize("path", [p for p in OPTIONS if str(p.parent) == "experiment"], ids=str)
def test_an_experiment_opens_with_its_question_and_command(path):
    lines = (CONFIG_FOLDER / path).read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# Question: ")
    assert any(line.startswith(f"# Run:      python train.py experiment={path.stem}") for line in lines)


@pytest.mark.parametrize("option", [p.stem for p in OPTIONS if str(p.parent) == "experiment" and p.stem not in RECIPES])
@pytest.mark.parametrize("dropout", [p.stem for p in OPTIONS if str(p.parent) == "dropout"])
def test_every_experiment_builds_with_every_dropout(option, dropout):
    import hydra

    cfg = compose([f"experiment={option}", f"dropout={dropout}", "paths.run=runs/x"])
    check_config(cfg)
    model = hydra.utils.instantiate(cfg.model, _convert_="all")
    assert model.num_registers == cfg.size.registers


@pytest.mark.parametrize(
    ("preset", "shortened"),
    [
        ("fdr", []),
        ("limit", []),
        ("overfit", ["trainer.max_steps=2", "optimizer.warmup_steps=0"]),
        ("profiler", ["trainer.max_steps=2", "optimizer.warmup_steps=0"]),
    ],
)
def test_every_debug_preset_runs(preset, shortened, tmp_path):
    from flextok.training.run import run

    model = [override for override in SMALL if override.partition("=")[0].startswith(("size", "data", "model"))]
    cfg = compose([*model, "trainer.accelerator=cpu", f"debug={preset}", *shortened])
    OmegaConf.update(cfg, "paths.run", str(tmp_path))
    run(cfg)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists() == (preset != "fdr")


def test_all_debug_presets_are_tried():
    names = {p.stem for p in OPTIONS if str(p.parent) == "debug"}
    assert names == {"fdr", "limit", "overfit", "profiler"}


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_other_loggers_take_numbers_and_pictures(logger, tmp_path, monkeypatch):
    pytest.importorskip(logger)
    from flextok.training.run import run

    monkeypatch.setenv("WANDB_MODE", "offline")
    run(small_config(tmp_path, f"logger={logger}", "trainer.max_steps=4"))
    assert (tmp_path / "metrics.csv").exists()
    assert any((tmp_path / logger).rglob("*"))


def test_leaving_out_all_callbacks_names_every_default_one():
    files = (CONFIG_FOLDER / f"callbacks/{name}.yaml" for name in ("none", "default"))
    none, default = (yaml.safe_load(file.read_text()) for file in files)
    assert none == {name: {"_target_": None} for name in default}


def test_composing_leaves_no_hydra_state_behind():
    compose()
    assert not HydraConfig.initialized()
