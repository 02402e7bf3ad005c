"""Serve the page: to this machine unless told otherwise, and with nothing open that the page does not need."""

import ipaddress
import logging
from dataclasses import dataclass
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware

from flextok.demo.style import CSS, theme

logger = logging.getLogger(__name__)

# Visitors whose image is held; who comes after them pushes out the one that was away longest.
MAX_SESSIONS = 64
# The browser asks nobody but this server, whatever Gradio's page would like to load from elsewhere.
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What visitors may ask for: bytes of a file, and requests of all of them that wait for their turn."""

    max_file_bytes: int
    max_waiting: int


class PolicyHeaders:
    """Sends `CONTENT_POLICY` with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = CONTENT_POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_policy)


def launch(app: gr.Blocks, *, host: str, port: int, limits: Limits) -> str:
    """Begin to serve the page, in a thread, at the address that is returned.

    Raises:
        OSError: The port is taken, or the host is none of this machine's.
    """
    if not is_loopback(host):
        logger.warning(
            "--host %s: whoever reaches this machine can use the demo, and it asks for no password; "
            "127.0.0.1, the default, serves this machine alone",
            host,
        )
    _, address, _ = app.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        max_file_size=limits.max_file_bytes,
        state_session_capacity=MAX_SESSIONS,
        allowed_paths=[],
        share=False,
        quiet=True,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        css=CSS,
        theme=theme(),
        app_kwargs={"middleware": [Middleware(PolicyHeaders)], "docs_url": None, "redoc_url": None},
    )
    return address


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
