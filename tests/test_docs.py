"""What README and docs say works: commands run or at least compose, code runs, names, links and trees are true."""

import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module
from itertools import dropwhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image

from flextok.config import CONFIG_FOLDER, check_config, compose
from flextok.utils.config_safety import ALLOWED_TARGETS
from tests.support import RECORDED, REPOSITORY
from tests.training.support import small_config

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
RUN = "runs/digits/2026-11-21_10-00-00"
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

# The published layout, as small as it gets: 256 registers and images of 256 pixels, one block of width 64.
SMALL_RELEASE = (
    *("model=flextok_d12_d12", "size.encoder_depth=1", "size.decoder_depth=1", "size.intermediate_layer=0"),
    *("vae=kl", "latent.path=my_vae", "latent.channels=4", "data.image_size=256", "data.batch_size=1"),
)
# Enough of an evaluation to see that it works; one image has no covariance.
QUICK_EVALUATION = (
    *("evaluation.num_images=2", "evaluation.steps=1", "evaluation.grid_images=1", "evaluation.device=cpu"),
    "++data.num_workers=0",
)


def blocks(document: Path) -> list[tuple[str, str]]:
    """`(language, text)` of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


# --- commands and code ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder that holds everything the documents name: a run, images, a VAE, a published model."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from transformers import Dinov2Config, Dinov2Model

    from flextok.training.run import run
    from flextok.utils.export import export_model

    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(RECORDED / "tiny_vae", "my_vae")
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 4, "image_size": 16}
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained("my_dinov2")
        (folder / "my_images").mkdir()
        for i in range(6):
            Image.new("RGB", (40, 30), (40 * i, 90, 120)).save(f"my_images/{i}.jpg")
        shutil.copy("my_images/0.jpg", "cat.jpg")
        for name in ("my_text.txt", "my_other_text.txt"):
            Path(name).write_text("Once upon a time there was a small model. " * 50)
        write_data_sets(sorted(Path("my_images").iterdir()))
        steps = (
            "size.registers=16",
            "trainer.max_steps=2",
            "trainer.val_check_interval=2",
            "callbacks.last.every_n_steps=1",
        )
        run(small_config(folder / RUN, *steps, "optimizer.total_steps=2", "optimizer.warmup_steps=0"))
        config = OmegaConf.to_container(compose(SMALL_RELEASE).model, resolve=True)
        # `from_pretrained` prefers a folder to a repository of the same name.
        for name in ("released", "EPFL-VILAB/flextok_d18_d28_dfn"):
            export_model(instantiate(config), config, name)
        Path("my_report").mkdir()
        protocol = {"num_images": 1, "split": "test", "distances": {}}
        report = {"protocol": protocol, "results": [{"keep_k": 1, "psnr": 9.0}], "vae": {"psnr": 30.0}, "tokens": {}}
        Path("my_report/metrics.json").write_text(json.dumps(report))
    return folder


def write_data_sets(files):
    """The same images in LitData chunks and in a table of Hugging Face."""
    import datasets

    from flextok.data.streaming_writer import write_streaming_split

    for split in ("train", "val", "test"):
        write_streaming_split(f"my_chunks/{split}", ((file.name, file.read_bytes()) for file in files))
    rows = {"image": [str(file) for file in files], "name": [file.name for file in files]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk("my_table")


def run_train(arguments, caplog):
    """Not trained: composed, checked, and its modules run over shapes alone."""
    from flextok.cli.model_config import from_full_config
    from flextok.cli.module_table import trace_modules

    if {"--help", "--cfg"} & set(arguments):
        done = subprocess.run([sys.executable, "train.py", *arguments], cwd=REPOSITORY, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        return
    config = compose([word.split(",")[0] if "-m" in arguments else word for word in arguments if word != "-m"])
    check_config(config)
    trace_modules(*from_full_config(config))
    assert not caplog.records, [record.getMessage() for record in caplog.records]


def run_eval(arguments, caplog):
    from flextok.evaluation.run import run

    smaller = ["data.image_size=64"] if "data=image_folder" in arguments else []
    config = compose([*arguments, *QUICK_EVALUATION, *smaller], "eval")
    check_config(config)
    metrics, folder = run(config)
    assert metrics["protocol"]["num_images"] in (1, 2)  # Six images leave one for a split.
    assert (folder / "metrics.json").exists()


def run_flextok(arguments, caplog):
    from flextok.cli import main

    assert main(arguments) == 0


def run_train_lm(arguments, caplog):
    """A few small steps."""
    quick = ["--steps", "2", "--batch-size", "2", "--width", "16", "--heads", "2", "--device", "cpu"]
    run_flextok(["train-lm", *arguments, *quick], caplog)


def run_sparse_eval(arguments, caplog):
    """A single needle."""
    quick = ["--needles", "1", "--depths", "0.5", "--windows", "1", "--densities", "0.3", "--device", "cpu"]
    run_flextok(["sparse-eval", *arguments, *quick], caplog)


def run_train_hash(arguments, caplog):
    """A few small steps."""
    quick = ["--steps", "2", "--batch-size", "1", "--sequences", "4", "--sampler-steps", "1", "--device", "cpu"]
    run_flextok(["train-hash", *arguments, *quick], caplog)


def run_demo(arguments, caplog):
    """Not served: its options are known, and its models load."""
    from flextok.cli import build_parser
    from flextok.cli.demo import load_workbench

    args = build_parser("demo").parse_args(["demo", *arguments])
    assert len(load_workbench(args).models) == len(args.checkpoint)


def run_benchmark(arguments, caplog):
    """Not measured: the command exists and knows its options."""
    name, *options = arguments
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(name, run_name="__main__")
    assert not ended.value.code
    assert all(option in said.getvalue() for option in options if option.startswith("--"))


def run_torchrun(arguments, caplog):
    """Not launched: torchrun knows the options, and what they launch is checked as if it ran alone."""
    from torch.distributed.run import parse_args

    parsed = parse_args(arguments)
    run_alone = {"train.py": run_train, "eval.py": run_eval}[parsed.training_script]
    run_alone(parsed.training_script_args, caplog)


def run_make(arguments, caplog):
    makefile = (REPOSITORY / "Makefile").read_text()
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name}\s*\?=" if is_variable else rf"^{name}:", makefile, flags=re.MULTILINE), word


COMMANDS = {
    ("python", "train.py"): run_train,
    ("python", "eval.py"): run_eval,
    ("python", "-m", "flextok", "demo"): run_demo,
    ("python", "-m", "flextok", "train-lm"): run_train_lm,
    ("python", "-m", "flextok", "train-hash"): run_train_hash,
    ("python", "-m", "flextok", "sparse-eval"): run_sparse_eval,
    ("python", "-m", "flextok"): run_flextok,
    ("python", "-m"): run_benchmark,
    ("torchrun",): run_torchrun,
    ("make",): run_make,
}


def run_command(words, caplog):
    words = list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))  # variables of the environment
    for start, runner in COMMANDS.items():
        if tuple(words[: len(start)]) == start:
            return runner(words[len(start) :], caplog)
    raise ValueError(f"no test knows the command {shlex.join(words)}")


def write_file_block(text: str) -> bool:
    """Write a block that begins with a comment such as `# my_modules.py` into that file; False for any other.

    In a config the package comes first, for Hydra reads only the first lines.
    """
    name = re.match(r"(?:# @package .*\n)?# ([\w/]+\.(?:py|yaml))\n", text)
    if name is None:
        return False
    Path(name[1]).parent.mkdir(parents=True, exist_ok=True)
    Path(name[1]).write_text(text)
    return True


@each_document
def test_commands_and_code_work_in_their_order(document, prepared, tmp_path, monkeypatch, caplog):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # The hub itself is not asked.
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: "uploaded")
    for language, text in blocks(document):
        if write_file_block(text):
            continue
        assert language != "yaml", "no test knows what to do with it: its first line has to name a file"
        if language == "sh":
            for words in commands(text):
                caplog.clear()
                try:
                    run_command(words, caplog)
                except Exception as error:
                    raise AssertionError(f"{document.name}: {shlex.join(words)}") from error
        elif language == "python":
            exec(compile(text, str(document), "exec"), {})


def test_the_examples_of_extending_learn(tmp_path, monkeypatch):
    """Two steps with each example, which the commands only compose, and the noise is there in training alone."""
    from flextok.training.checkpoints import load_run
    from flextok.training.run import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for _, text in blocks(REPOSITORY / "docs/extending.md"):
        if not write_file_block(text) and text.startswith("import numpy"):
            exec(compile(text, "extending.md", "exec"), {})
    short = (
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "optimizer.total_steps=2",
        "optimizer.warmup_steps=0",
    )
    for name, overrides in {
        "noisy": ["model=noisy"],
        "windowed": ["model=windowed", "size.registers=8"],
        "array": ["data=array", "data.file=my_images.npy"],
    }.items():
        config = small_config(
            Path(name),
            "hydra.searchpath=[my_configs]",
            *overrides,
            *short,
            "optimizer.warmup_steps=0",
            "data.batch_size=64",
        )
        check_config(config)
        assert run(config)["train/loss"] > 0
    model, _ = load_run("noisy", trust=True)
    noise = model.encoder.module_dict["enc_noise"]
    entries = [torch.zeros(1, 4, 6)]
    assert noise({"enc_registers": entries})["enc_registers"] is entries
    assert noise.train()({"enc_registers": entries})["enc_registers"].tensor.std() > 0.05
    windowed, _ = load_run("windowed", trust=True)
    with torch.no_grad():
        mask = windowed.encode({"rgb": [torch.zeros(1, 3, 8, 8)]})["enc_block_mask"]
    # 4 patches, which see no register, and 8 registers, of which the last sees 4.
    assert mask[0, 0, -1].tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert not mask[0, 0, :4, 4:].any()


@each_document
def test_fenced_blocks_name_a_language_we_check(document):
    assert {language for language, _ in blocks(document)} <= {"sh", "python", "yaml", "text", "bibtex"}


def test_the_output_of_describe_is_the_real_one(capsys):
    readme = blocks(REPOSITORY / "README.md")
    shown = next(text for language, text in readme if language == "text" and text.startswith("module "))
    words = next(w for language, text in readme if language == "sh" for w in commands(text) if "describe" in w)
    run_flextok(words[3:], None)
    real = capsys.readouterr().out.splitlines()
    missing = [line for line in shown.splitlines() if line != "..." and line not in real]
    assert missing == []


# --- trees, tables and names ------------------------------------------------------------------------------------------


def tree_entries() -> dict[str, str]:
    """`{path: description}` of the tree in the README; folders end in a slash."""
    text = next(text for _, text in blocks(REPOSITORY / "README.md") if text.startswith("train.py "))
    entries, parents = {}, []
    for line in text.splitlines():
        indent, name, description = re.fullmatch(r"( *)(\S+)(?: \*)?(?: {2,}(.*))?", line).groups()
        parents = parents[: len(indent) // 2]
        entries["".join(parents) + name] = description or ""
        if name.endswith("/"):
            parents.append(name)
    return entries


def test_the_tree_lists_every_file_of_the_package_and_nothing_else():
    files = {
        path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("flextok/**/*.py") if path.stat().st_size
    }
    assert {path for path in tree_entries() if path.startswith("flextok/") and path.endswith(".py")} == files


def test_the_tree_describes_what_exists():
    for path, description in tree_entries().items():
        assert (REPOSITORY / path).exists(), path
        assert description or path.endswith("/"), f"{path} has no description"


def test_the_tree_marks_the_files_that_checkpoints_name():
    text = (REPOSITORY / "README.md").read_text()
    marked = set(re.findall(r"^ *(\w+\.py) \*", text, flags=re.MULTILINE))
    ours = {"flextok.pixel_vae.PixelVAE", "flextok.model.preprocessors.dropout_sampler.DropoutSampler"}
    fixed = {target.rsplit(".", 2)[1] + ".py" for target in ALLOWED_TARGETS - ours}
    assert fixed <= marked


def config_groups() -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for file in CONFIG_FOLDER.glob("*/**/*.yaml"):
        groups.setdefault(file.parent.relative_to(CONFIG_FOLDER).as_posix(), set()).add(file.stem)
    return groups


def test_the_tree_lists_every_config_group_with_its_options():
    entries = tree_entries().items()
    described = {
        path.removeprefix("configs/").rstrip("/"): text for path, text in entries if path.startswith("configs/")
    }
    assert {name for name in described if not name.endswith(".yaml")} - {""} == set(config_groups())
    for group, options in config_groups().items():
        assert options <= set(re.findall(r"\w+", described[group])), group


def test_the_table_of_groups_is_complete():
    rows = re.findall(
        r"^\| `([\w/]+)` \| ([^|]*) \|", (REPOSITORY / "docs/configuration.md").read_text(), flags=re.MULTILINE
    )
    table = {group: set(re.findall(r"`(\w+)`", options)) for group, options in rows if group in config_groups()}
    assert table == config_groups() | {"model": config_groups()["model"] - {"flextok"}}


@each_document
def test_options_named_in_the_text_exist(document):
    for group, option in re.findall(r"`(\w+)=(\w+)`", prose(document)):
        assert group not in config_groups() or option in config_groups()[group], f"{group}={option}"


@each_document
def test_dotted_names_can_be_imported(document):
    for name in re.findall(r"`(flextok(?:\.\w+)+)`", document.read_text()):
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_the_dictionary_holds_every_class_outside_the_layers():
    text = (REPOSITORY / "docs/names.md").read_text()
    classes = {name for name in ALLOWED_TARGETS if name.rsplit(".", 1)[1][0].isupper() and ".layers." not in name}
    assert {name for name in classes if f"`{name}`" not in text} == set()


def test_the_table_of_faults_is_that_of_the_tests():
    """As many as that: `pytest -m fault`."""
    text = (REPOSITORY / "docs/resuming.md").read_text().partition("## What can go wrong")[2]
    described = re.findall(r"^\| ([^|]+) \|[^|]+\|[^|]+\|$", text, flags=re.MULTILINE)[1:]
    tests = [path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py")]
    injected = {name for test in tests for name in re.findall(r'^@pytest\.mark\.fault\("(.+)"\)$', test, re.MULTILINE)}
    assert sorted(described) == sorted(injected)
    assert len(injected) >= 12


# --- links, pictures, results -----------------------------------------------------------------------------------------


@each_document
def test_links_and_pictures_exist(document):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if not target.startswith(("https://", "#")) and not (document.parent / target.partition("#")[0]).exists():
            missing.append(target)
    assert missing == []


def test_results_are_filled_in():
    text = (REPOSITORY / "README.md").read_text()
    results = re.search(r"<!-- results -->\n(.*?)<!-- /results -->", text, flags=re.DOTALL)
    assert results is not None
    assert "|" in results[1], "measured numbers are missing"
