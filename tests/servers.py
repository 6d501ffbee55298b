"""Servers on 127.0.0.1: HTTP that counts, delays, fails and lies, S3 (moto), and a line between two that can be cut."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Answer:
    """What a server is about to say to a request for a range."""

    status: int
    headers: dict[str, str]
    body: bytes
    hang_up: bool = False
    """Close the connection in the middle of the body."""


Trick = Callable[[int, Answer], Answer]
"""Gets the number of the request (from 1) and changes its answer."""


@dataclass
class Web:
    """A running server of a folder."""

    url: str
    folder: Path
    requests: list[str] = field(default_factory=list)
    """Path and query of every request."""
    sent: int = 0
    """Bytes of all bodies."""
    seconds: float = 0.0
    """How long a request waits for its answer."""
    rate: float = 0.0
    """Bytes per second of one connection; 0: as fast as it goes."""
    trick: Trick | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, target: str, wanted: str | None) -> Answer:
        with self.lock:
            self.requests.append(target)
            number = len(self.requests)
        time.sleep(self.seconds)
        path = self.folder / unquote(urlsplit(target).path).lstrip("/")
        if not path.is_file():
            return self._tricked(number, Answer(404, {}, b"not here"))
        status = path.stat()
        size = status.st_size
        headers = {"ETag": f'"{status.st_mtime_ns}-{status.st_size}"', "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if found is None:
            return self._tricked(number, Answer(200, headers, path.read_bytes()))
        first, last = int(found[1]), min(int(found[2]), size - 1)
        if first >= size:
            return self._tricked(number, Answer(416, {"Content-Range": f"bytes */{size}"}, b""))
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        with path.open("rb") as file:
            file.seek(first)
            return self._tricked(number, Answer(206, headers, file.read(last - first + 1)))

    def _tricked(self, number: int, answer: Answer) -> Answer:
        return answer if self.trick is None else self.trick(number, answer)

    def count(self, sent: int) -> None:
        with self.lock:
            self.sent += sent


@contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """A web server that knows byte ranges, for the time of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = web.answer(self.path, self.headers.get("Range"))
            self.send_response(answer.status)
            headers = {"Content-Length": str(len(answer.body)), **answer.headers}
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            if not headers["Content-Length"]:
                self.close_connection = True
            self.end_headers()
            body = answer.body[: len(answer.body) // 2] if answer.hang_up else answer.body
            try:
                for start in range(0, len(body), 1 << 18):
                    part = body[start : start + (1 << 18)]
                    self.wfile.write(part)
                    web.count(len(part))
                    if web.rate:
                        time.sleep(len(part) / web.rate)
            except OSError:  # the client had enough
                self.close_connection = True
            if answer.hang_up:
                self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that went away is part of the game."""

    server = Server(("127.0.0.1", 0), Handler)
    web = Web(f"http://127.0.0.1:{server.server_address[1]}", folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """An S3 server (moto) that this process finds by its environment, for the time of the block: address, client."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        values = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "the-key", "AWS_REGION": "us-east-1",
            "AWS_SECRET_ACCESS_KEY": "the-secret-of-the-key", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        yield values["AWS_ENDPOINT_URL"], client
    finally:
        server.stop()


class Line:
    """Passes every connection on to a port, until it is cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._door.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := one.recv(1 << 16):
                other.sendall(content)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Ends all connections, and takes no more."""
        for end in (self._door, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
