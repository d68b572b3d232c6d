"""The web server of `landiff demo`: the page, and the videos by name.

Only finished videos of the demo are served: a name is looked up among them, and never used as a
path. Gradio itself serves nothing but the files of its package, since no other is allowed to it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse, PlainTextResponse, Response

from landiff.configs.base import ConfigError
from landiff.launchers.config import SampleConfig
from landiff.launchers.demo.jobs import JobQueue
from landiff.launchers.demo.library import Library
from landiff.launchers.demo.page import CSS, Page, build_page
from landiff.launchers.demo.worker import Worker

LOCAL_NAMES = ["localhost", "127.0.0.1"]
STOP_S = 5  # for open connections at the end
# Gradio needs inline scripts and eval. Nothing is loaded from other hosts.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)


class DemoServer:
    """Serves the page in a thread while `run` generates videos in the calling thread."""

    def __init__(self, config: SampleConfig, host: str, port: int) -> None:
        """config: of `landiff sample`; its `out` is the folder of all videos.

        port: 0 means any free one. Raises ConfigError if the address cannot be used.
        """
        self._socket = listen(host, port)
        self.queue = JobQueue()
        library = Library(config.out)
        app = build_app(Page(config, self.queue, library), library, local=is_local(host))
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=STOP_S)
        self._server = uvicorn.Server(settings)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self._socket.getsockname()[1]}"

    def run(self) -> None:
        """Serves until the queue is closed, or an error or a signal ends the process."""
        thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="demo-server"
        )
        thread.start()
        try:
            Worker(self.queue).work()
        finally:
            self.queue.close()
            self._server.should_exit = True
            thread.join()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address. Raises ConfigError."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port} is not between 0 and 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on --host {host} --port {port}: {error}; choose another port, or 0 "
            "for any free one"
        ) from None


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def build_app(page: Page, library: Library, *, local: bool) -> FastAPI:
    """The whole application.

    local: it is reached through loopback only. Requests that name another host are refused then,
        so that a page of a foreign domain that resolves to 127.0.0.1 cannot read videos.
    """
    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return PlainTextResponse("this page takes no requests of other sites", 403)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/videos/{folder}/{file}")
    def video(folder: str, file: str) -> FileResponse:
        result = library.find(f"{folder}/{file}")
        if result is None:
            raise HTTPException(404)
        return FileResponse(library.root / result.name, media_type="video/mp4")

    if local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return gr.mount_gradio_app(
        app,
        build_page(page),
        path="",
        allowed_paths=[],
        show_error=False,
        ssr_mode=False,
        theme=theme,
        css=CSS,
        footer_links=[],
    )
