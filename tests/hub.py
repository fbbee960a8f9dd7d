"""A local stand-in for the Hugging Face hub: one file, HEAD and GET with ranges, and faults on demand."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `content` as PATH at any of `revisions`.

    `faults` are used up by GETs in turn: ("close", n) and ("reset", n) break the connection after n bytes, ("hold", n)
    sends n bytes and waits for `release`, ("whole", n) ignores the range. `requests` lists what was asked for.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.status, self.error_code = content, 200, ""
        self.announced_size = len(content)
        self.revisions = {COMMIT, "main"}
        self.faults: deque[tuple[str, int]] = deque()
        self.requests: list[tuple[str, str, str | None]] = []
        self.release = threading.Event()

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def ranges(self) -> list[str | None]:
        """Range headers of the GETs so far."""
        return [asked for method, _, asked in self.requests if method == "GET"]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed or reset is part of the test."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", self.path, None))
        if self._begin(self.server.status):
            self._describe(self.server.announced_size)
            self.end_headers()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        if "/resolve/" not in self.path:  # the library's own questions
            self.send_error(404)
            return
        self.server.requests.append(("GET", self.path, asked))
        fault, count = self.server.faults.popleft() if self.server.faults else ("none", 0)
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and fault != "whole" else 0
        if not self._begin(206 if start else 200):
            return
        body = self.server.content[start:]
        if start:
            size = len(self.server.content)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self._describe(len(body))
        self.end_headers()
        if fault in ("close", "reset", "hold"):
            self.wfile.write(body[:count])
            self._break(fault)
        else:
            self.wfile.write(body)

    def _begin(self, status: int) -> bool:
        revision = self.path.partition("/resolve/")[2].partition("/")[0]
        found = revision in self.server.revisions
        self.send_response(status if found else 404)
        if found and status < 400:
            return True
        self.send_header("X-Error-Code", self.server.error_code if found else "RevisionNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def _describe(self, length: int) -> None:
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{hashlib.sha256(self.server.content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(self.server.announced_size))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")

    def _break(self, fault: str) -> None:
        self.wfile.flush()
        if fault == "hold":
            self.server.release.wait(30)
        if fault == "reset":
            # Closing with unsent data discarded makes the kernel send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the name of the base class
        """Quiet."""


@contextmanager
def serve(content: bytes) -> Iterator[Hub]:
    """A hub that lives as long as the block."""
    hub = Hub(content)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
