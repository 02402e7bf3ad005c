"""A demo that is served, and a visitor who speaks to it without a browser."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from flextok.cli.loaded_model import image_size_of
from flextok.demo.app import build_app
from flextok.demo.server import Limits, launch
from flextok.demo.workbench import DemoModel, Sampling, Workbench
from flextok.evaluation.source import find_source

PLAIN = Sampling(timesteps=1, guidance_scale=1.0, perform_norm_guidance=False)


def load_workbench(*folders: Path | str, max_remembered: int = 64) -> Workbench:
    models = []
    for folder in folders:
        model = find_source(str(folder), runs=Path("none")).load(weights="ema")[0].eval()
        models.append(DemoModel(Path(folder).name, model, image_size_of(model, None)))
    return Workbench(models, seed=0, max_remembered=max_remembered)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def served(workbench: Workbench, **limits: int) -> Iterator[tuple[Any, str]]:
    """The app, and the address where it is served until the block ends."""
    chosen = Limits(**{"max_file_bytes": 1 << 20, "max_waiting": 8} | limits)
    app = build_app(workbench, sampling=PLAIN, limits=chosen)
    try:
        yield app, launch(app, host="127.0.0.1", port=free_port(), limits=chosen)
    finally:
        app.close(verbose=False)


class Visitor:
    """One session with a served demo, as the page has it."""

    def __init__(self, app: Any, address: str) -> None:
        # Nobody closes a session: no connection outlives its answer.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=f"{address}gradio_api/", timeout=60, trust_env=False, limits=limits)
        self.session = uuid4().hex
        self.calls = {entry["targets"][0][1]: entry["id"] for entry in reversed(app.config["dependencies"])}

    def upload(self, content: bytes, name: str) -> httpx.Response:
        return self.http.post("upload", files={"files": (name, content)})

    def join(self, event: str, *inputs: Any, **extra: Any) -> httpx.Response:
        body = {"fn_index": self.calls[event], "data": list(inputs), "session_hash": self.session, **extra}
        return self.http.post("queue/join", json=body)

    def ask(self, event: str, *inputs: Any, **extra: Any) -> dict[str, Any]:
        """What the server answers to an event: `success` and its `output`."""
        joined = self.join(event, *inputs, **extra)
        if joined.status_code != 200:
            return {"success": False, "status": joined.status_code, "output": joined.json()}
        with self.http.stream("GET", "queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("the answer broke off")

    def drop(self, content: bytes, name: str, keep_k: int, *, steps: int = 1) -> dict[str, Any]:
        path = self.upload(content, name).json()[0]
        return self.ask("upload", file_data(path, name), keep_k, steps, 1.0, False)


def file_data(path: str, name: str) -> dict[str, Any]:
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
