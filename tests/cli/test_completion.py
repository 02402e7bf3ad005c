"""`flextok completion`: what a shell completes, without starting Python."""

import builtins
import shutil
import subprocess
import sys

import pytest

from flextok.cli import COMMANDS, main
from flextok.cli.completion import SHELLS

BASH = shutil.which("bash")


def script(capsys, shell):
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_in_the_script(shell, capsys):
    text = script(capsys, shell)
    assert all(command in text for command in COMMANDS)
    assert all(option in text for option in ("guidance-scale", "max-bad-fraction", "val-fraction"))


def completed(script_file, line, folder):
    """What bash offers for the last word of a line, without a program it could start."""
    words = line.split(" ")
    program = (
        f"source {script_file}; COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; "
        '_shtab_flextok; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        [BASH, "--norc", "-c", program], cwd=folder, capture_output=True, text=True, timeout=30, env={"PATH": ""}
    )
    return {word.strip() for word in done.stdout.splitlines() if word}


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flextok tok", {"tokenize"}),
        ("flextok de", {"demo", "describe", "detokenize"}),
        ("flextok tokenize --for", {"--format"}),
        ("flextok tokenize --format ", {"parquet", "webdataset"}),
        ("flextok completion ", set(SHELLS)),
        ("flextok tokenize my_i", {"my_images"}),
        ("flextok tokenize my_images out --checkpoint my_m", {"my_model"}),
    ],
)
def test_bash_completes(line, expected, capsys, tmp_path):
    file = tmp_path / "flextok.bash"
    file.write_text(script(capsys, "bash"))
    for name in ("my_images", "my_model"):
        (tmp_path / name).mkdir()
    assert completed(file, line, tmp_path) == expected


def test_printing_it_needs_no_torch():
    program = (
        "import sys; from flextok.cli import main; main(['completion', 'bash']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_without_shtab_it_says_what_to_install(monkeypatch, capsys):
    original = builtins.__import__

    def without_shtab(name, *rest):
        if name == "shtab":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_shtab)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'flextok[completion]'" in capsys.readouterr().err
