"""`demo`: its options become the page, its mistakes one line; it serves this machine alone unless told otherwise."""

import argparse
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flextok.cli import build_parser, main
from flextok.cli.demo import load_workbench
from tests.demo.support import free_port
from tests.support import REPOSITORY, export_small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_small_model(tmp_path_factory.mktemp("models") / "small")


def parsed(*words) -> argparse.Namespace:
    return build_parser("demo").parse_args(["demo", *(str(word) for word in words)])


@pytest.fixture
def launched(monkeypatch):
    """What is launched is kept, not served."""
    seen = {}
    monkeypatch.setenv("GRADIO_TEMP_DIR", "restored")

    class App:
        def block_thread(self):
            seen["uploads"] = Path(os.environ["GRADIO_TEMP_DIR"])
            seen["mode"] = seen["uploads"].stat().st_mode & 0o777

    monkeypatch.setattr(
        "flextok.demo.app.build_app", lambda bench, **options: seen.update(bench=bench, **options) or App()
    )
    monkeypatch.setattr("flextok.demo.server.launch", lambda app, **options: seen.update(options) or "http://there/")
    return seen


def test_the_defaults_serve_the_embedded_photos_to_this_machine_alone():
    args = parsed()
    assert (args.checkpoint, args.host, args.port) == (["embedded:photos"], "127.0.0.1", 7860)
    assert (args.max_file_mb, args.max_waiting) == (10, 32)


def test_options_reach_the_page(model, launched, capsys):
    words = ("--steps", 3, "--guidance-scale", 2, "--perform-norm-guidance", "--seed", 5, "--max-file-mb", 2)
    assert main(["demo", "--checkpoint", str(model), str(model), *map(str, words), "--max-waiting", "4"]) == 0
    bench, sampling, limits = launched["bench"], launched["sampling"], launched["limits"]
    assert [(one.name, one.image_size, one.num_tokens) for one in bench.models] == [(str(model), 8, 8)] * 2
    assert (sampling.timesteps, sampling.guidance_scale, sampling.perform_norm_guidance) == (3, 2.0, True)
    assert (bench.seed, limits.max_file_bytes, limits.max_waiting) == (5, 2 << 20, 4)
    assert (launched["host"], launched["port"]) == ("127.0.0.1", 7860)
    # Uploads are nobody else's, and gone in the end.
    assert (launched["mode"], launched["uploads"].exists()) == (0o700, False)
    assert "-> http://there/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "no/such/run"], "--checkpoint no/such/run: .*does not exist; valid are"),
        (["--checkpoint", "embedded:cats"], "--checkpoint embedded:cats: no model 'cats' comes with the package"),
        (["--device", "abacus"], "--checkpoint embedded:photos: .*abacus"),
        (["--port", "0"], "--port is 0: it must be at least 1"),
        (["--port", "65536"], "--port is 65536: valid are 1 to 65535"),
        (["--max-file-mb", "0"], "--max-file-mb is 0"),
        (["--max-waiting", "0"], "--max-waiting is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--steps", "0"], "steps is 0: valid are 1 to 100"),
        (["--guidance-scale", "0.5"], "guidance is 0.5"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, launched):
    assert main(["demo", *words]) == 1
    error = capsys.readouterr().err
    assert re.search(f"^error: {message}", error)
    assert error.count("\n") == 1
    assert "uploads" not in launched


def test_without_gradio_it_is_said_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("flextok.cli.demo.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "error: the demo needs gradio: pip install 'flextok[demo]'\n"


def test_models_of_any_kind_stand_side_by_side(model):
    bench = load_workbench(parsed("--checkpoint", model, "embedded:photos"))
    assert [(one.name, one.image_size) for one in bench.models] == [(str(model), 8), ("embedded:photos", 32)]
    assert bench.max_tokens == 32


def test_other_hosts_are_a_warning(monkeypatch, caplog):
    from flextok.demo import server

    class App:
        def launch(self, **options):
            return None, f"http://{options['server_name']}/", None

    caplog.set_level(logging.WARNING)
    limits = server.Limits(max_file_bytes=1, max_waiting=1)
    assert server.launch(App(), host="127.0.0.1", port=1, limits=limits) == "http://127.0.0.1/"
    assert caplog.messages == []
    server.launch(App(), host="0.0.0.0", port=1, limits=limits)
    assert "--host 0.0.0.0: whoever reaches this machine can use the demo" in caplog.messages[0]


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(model):
    port = free_port()
    words = [sys.executable, "-m", "flextok", "demo", "--checkpoint", str(model), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == f"-> http://127.0.0.1:{port}/  (Ctrl-C ends it)\n"
        # The port is taken: the next one says so.
        again = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
        assert again.returncode == 1
        assert f"{port}" in again.stderr
        assert again.stderr.startswith("error: ")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
