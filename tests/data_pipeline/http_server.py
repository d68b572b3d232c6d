"""A local web server of a folder, with Range requests and with errors on demand."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FolderServer(ThreadingHTTPServer):
    """Serves a folder at `url`.

    ranges: whether Range requests are answered with the range, or with the whole file. failures:
    each file's first requests that are answered with status 503. requests: number by path.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, ranges: bool, failures: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = ranges
        self.failures = failures
        self.requests: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FolderServer

    def __init__(self, request: Any, address: Any, server: FolderServer) -> None:
        super().__init__(request, address, server, directory=str(server.folder))

    def log_message(self, *_: object) -> None:
        """Keep the output of the tests readable."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        self.server.requests[self.path] += 1
        if self.server.requests[self.path] <= self.server.failures:
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        total = len(data)
        wanted = self.headers.get("Range")
        if self.server.ranges and wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        else:
            self.send_response(200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def served(folder: Path, *, ranges: bool = True, failures: int = 0) -> Iterator[FolderServer]:
    """A server of `folder` in a thread."""
    server = FolderServer(folder, ranges, failures)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
