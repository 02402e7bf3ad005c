"""Replay the steps of a Dockerfile without a container engine.

  python docker/replay.py docker/Dockerfile.cpu -- train.py --help

COPY, RUN, ENV, ARG and WORKDIR happen in a temporary folder that stands for the root of the image, with a fresh virtual
environment for the base image's Python and nothing of the caller's environment. Users and packages of the system
are not touched: lines of RUN that call `useradd`, `userdel`, `apt-get` or `install --directory` are left out and said
so. Then the entry point is run with what follows `--`. `--build-arg NAME=VALUE` is docker's, before the file.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

OF_THE_SYSTEM = ("useradd", "userdel", "apt-get", "install --directory", "rm -rf /var/lib/apt", "python3 -m venv")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("arguments", nargs="*", help="what the entry point gets")
    options = parser.parse_args()
    context = Path(
        subprocess.run(
            ["git", "-C", options.dockerfile.parent, "rev-parse", "--show-toplevel"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    arguments = dict(argument.split("=", 1) for argument in options.build_arg)
    with tempfile.TemporaryDirectory() as folder:
        return replay(options.dockerfile, context, Path(folder), arguments, options.arguments)


def replay(dockerfile: Path, context: Path, root: Path, build_arguments: dict[str, str], command: list[str]) -> int:
    """Run all steps below `root`; the exit status is that of the entry point."""
    venv.create(root / "opt/venv", with_pip=True)
    environment = {"PATH": f"{root}/opt/venv/bin:/usr/bin:/bin", "HOME": str(root)}
    # Where this machine gets its packages is no business of the image.
    environment |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    workdir, entrypoint = root, []
    for instruction, text in instructions(dockerfile.read_text(encoding="utf-8")):
        print(f"--> {instruction} {text}", flush=True)
        if instruction == "ARG":
            name, _, default = text.partition("=")
            environment[name] = build_arguments.get(name, default)
        elif instruction == "ENV":
            pairs = dict(pair.split("=", 1) for pair in text.split())
            environment |= {name: value for name, value in pairs.items() if name != "PATH"}
        elif instruction == "WORKDIR":
            workdir = root / text.lstrip("/")
            workdir.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            copy(context, workdir, text)
        elif instruction == "RUN":
            for step in text.split(" && "):
                if step.strip().startswith(OF_THE_SYSTEM):
                    print(f"    left out: {step.strip()}", flush=True)
                else:
                    subprocess.run(["sh", "-euc", step], cwd=workdir, env=environment, check=True)
        elif instruction == "ENTRYPOINT":
            entrypoint = re.findall(r'"([^"]*)"', text)
    return subprocess.run([*entrypoint, *command], cwd=workdir, env=environment).returncode


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction and its text, lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            yield instruction.upper(), " ".join(rest.split())


def copy(context: Path, workdir: Path, text: str) -> None:
    """`COPY [--chown=..] source.. destination`; of the whole context what git knows."""
    *sources, destination = [word for word in text.split() if not word.startswith("--")]
    for source in sources:
        listed = subprocess.run(
            ["git", "-C", context, "ls-files", "-z", "--cached", "--others", "--exclude-standard", source],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        files = [name for name in listed.split("\0") if name]
        if not files:
            raise FileNotFoundError(f"COPY {source}: git knows no such file in {context}")
        for name in files:
            target = workdir / destination / (name if source == "." else Path(name).name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(context / name, target)


if __name__ == "__main__":
    sys.exit(main())
