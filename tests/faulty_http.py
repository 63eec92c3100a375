"""A real HTTP server that misbehaves as told: the storage faults of the tests come from here.

It serves what ``put`` was given, verbatim by request target (``/bucket/key?query``), so it stands in both for a plain
web server and for an S3 endpoint with path-style addresses. It understands GET, HEAD, PUT, Range, If-Match and
If-None-Match, ignores signatures, and before a right answer it works through the list of faults of that target::

    with FaultyHttp() as server:
        server.put("/bucket/cat.jpg", b"...", faults=[503, 503])  # two failures, then right
        server.put("/bucket/dog.jpg", b"...", faults=["stall"] * 99)   # never right

Faults: a status code; ``stall`` (half of the body, then silence), ``stall_head`` (not even a status line), ``trickle``
(a byte every 50 ms), ``truncate`` (half of the body, then the connection closes), ``reset`` (closes at once),
``redirect:TARGET``, ``lost`` (a PUT is stored and its answer is not sent), ``ExpiredToken`` (S3's own 400).
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Fault = int | str


@dataclass
class _Item:
    body: bytes
    etag: str | None
    faults: list[Fault] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    modified: float = field(default_factory=time.time)
    honours_if_match: bool = True
    chunked: bool = False


class FaultyHttp:
    """The server; ``url`` is its address, ``hits`` counts the requests for each target."""

    def __init__(self) -> None:
        self.items: dict[str, _Item] = {}
        self.hits: Counter[str] = Counter()
        self.seen_headers: list[dict[str, str]] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"faulty": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(
        self,
        target: str,
        body: bytes,
        *,
        etag: str | None = "",
        faults: Iterable[Fault] = (),
        honours_if_match: bool = True,
        chunked: bool = False,
    ) -> str | None:
        """Serve ``body`` at ``target``; returns its ETag (``None`` sends none, ``""`` makes one from the body)."""
        if etag == "":
            etag = f'"{hashlib.md5(body).hexdigest()}"'
        self.items[target] = _Item(body, etag, list(faults), honours_if_match=honours_if_match, chunked=chunked)
        return etag

    def __enter__(self) -> FaultyHttp:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet
    faulty: FaultyHttp

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.faulty.lock:
            self.faulty.hits[self.path] += 1
            old = self.faulty.items.get(self.path)
            fault = old.faults.pop(0) if old and old.faults else None
            if isinstance(fault, int):
                return self._answer(fault, b"<Error><Code>SlowDown</Code></Error>")
            # A target that was only prepared with faults does not exist yet: its body is empty.
            if self.headers.get("If-None-Match") == "*" and old and old.body:
                return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            etag = f'"{hashlib.md5(body).hexdigest()}"'
            own = {name: value for name, value in self.headers.items() if name.lower().startswith("x-amz-meta-")}
            self.faulty.items[self.path] = _Item(body, etag, old.faults if old else [], own)
        if fault in ("lost", "reset"):
            return self._hang_up()
        self._answer(200, b"", {"ETag": etag})

    def _serve(self, *, with_body: bool) -> None:
        with self.faulty.lock:
            self.faulty.hits[self.path] += 1
            self.faulty.seen_headers.append(dict(self.headers.items()))
            item = self.faulty.items.get(self.path)
            fault = item.faults.pop(0) if item and item.faults else None
        if item is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", with_body=with_body)
        if isinstance(fault, int):
            code = "SlowDown" if fault == 503 else "AccessDenied" if fault == 403 else "InternalError"
            return self._answer(fault, f"<Error><Code>{code}</Code></Error>".encode(), with_body=with_body)
        if fault == "ExpiredToken":
            return self._answer(400, b"<Error><Code>ExpiredToken</Code></Error>", with_body=with_body)
        if fault == "reset":
            return self._hang_up()
        if fault == "stall_head":
            return self._wait()
        if fault is not None and fault.startswith("redirect:"):
            return self._answer(302, b"", {"Location": fault.removeprefix("redirect:")}, with_body=with_body)
        self._send(item, fault, with_body)

    def _send(self, item: _Item, fault: str | None, with_body: bool) -> None:
        body, etag = item.body, item.etag
        if_match = self.headers.get("If-Match")
        if if_match is not None and item.honours_if_match and if_match != etag:
            return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>", with_body=with_body)
        headers = {"Last-Modified": formatdate(item.modified, usegmt=True), **item.headers}
        if etag is not None:
            headers["ETag"] = etag
        status = 200
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and body:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first or 0), min(int(last or len(body) - 1), len(body) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(body)}"
            body, status = body[begin : end + 1], 206
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if item.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        try:
            if fault in ("stall", "truncate"):
                half = body[: len(body) // 2]
                self.wfile.write(b"%x\r\n" % len(body) + half if item.chunked else half)
                self.wfile.flush()
                return self._wait() if fault == "stall" else self._hang_up()
            if fault == "trickle":
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    if self.faulty.closing.wait(0.05):
                        return
                return
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if item.chunked else body)
            self.wfile.flush()
        except OSError:  # the client hung up first, as it should on a body that is too large
            self.close_connection = True

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _wait(self) -> None:
        self.faulty.closing.wait(60)
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # already closed by the client
            self.connection.shutdown(socket.SHUT_RDWR)
