"""A real HTTP proxy in front of a real server that fails as told, for servers that cannot be made to fail::

    with FlakyProxy("http://127.0.0.1:8080") as proxy:
        proxy.faults["POST"] = ["lost", 502]   # of the next two POSTs: carried out without an answer, then refused

Faults: a status code (not passed on); ``reset`` (not passed on, the connection closes); ``lost`` (passed on, and the
connection closes before the answer); ``late`` (the connection closes first, and it is passed on half a second later).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import urllib3

Fault = int | str


class FlakyProxy:
    """The proxy; ``url`` is its address, ``passed`` counts the requests that reached the server, by method."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.passed: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.pool = urllib3.PoolManager(retries=False, timeout=60.0)
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FlakyProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)
        self.pool.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    proxy: FlakyProxy

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.proxy.lock:
            waiting = self.proxy.faults[self.command]
            fault = waiting.pop(0) if waiting else None
        if isinstance(fault, int):
            return self._answer(fault, b"Bad Gateway", "text/plain")
        if fault == "reset":
            return self._hang_up()
        if fault == "late":
            self._hang_up()
            time.sleep(0.5)
        with self.proxy.lock:
            self.proxy.passed[self.command] += 1
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        response = self.proxy.pool.request(self.command, self.proxy.upstream + self.path, body=body, headers=headers)
        if fault == "lost":
            return self._hang_up()
        if fault != "late":
            self._answer(response.status, response.data, response.headers.get("Content-Type", ""))

    do_GET = do_POST = do_PATCH = do_DELETE = _serve

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
