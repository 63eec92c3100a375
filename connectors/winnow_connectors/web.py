"""Reading over HTTP with bounded patience: plain web servers, and S3 requests that we sign ourselves.

obstore's HTTP store knows no query strings and answers only with a Content-Length, so urllib3 does this part.
"""

from __future__ import annotations

import random
import re
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    ResponseError,
    SSLError,
)

from winnow import uris
from winnow.errors import CallError
from winnow_connectors.objects import (
    Chunks,
    ObjectInfo,
    Patience,
    check_size,
    check_version,
    fetch_error,
    storage_error,
)

T = TypeVar("T")
Headers = Callable[[], Mapping[str, str]]
"""Makes the headers of one attempt (a signature holds the time)."""

_MAX_REDIRECTS = 5
_MAX_BROKEN_BODIES = 3
"""A body that stalls or ends early is asked for this often, and no longer than ``Patience.retry_s``."""
_EXPIRED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


def kind_of_status(status: int, code: str = "") -> tuple[str, bool]:
    """The failure kind of an HTTP status (and S3 error code), and whether it may pass when tried again."""
    if status in (404, 410):
        return "missing", False
    if status in (401, 403, 407) or code in _EXPIRED:
        return "forbidden", False
    if status in (412, 416):
        return "changed", False
    return "unavailable", status in (408, 425, 429) or status >= 500


class HttpFault(Exception):
    """One request failed. Stays inside the connectors: callers see FetchError or StorageError.

    Attributes:
        kind: as in ``winnow.errors.FAILURE_KINDS``.
        detail: what happened, for a message.
        passing: the same request may succeed later.
        retry_after_s: how long the server asks to wait.
        status: HTTP status; None when there was no answer.
        body: start of the answer.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        passing: bool,
        retry_after_s: float = 0.0,
        status: int | None = None,
        body: bytes = b"",
    ) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail, self.passing, self.retry_after_s = kind, detail, passing, retry_after_s
        self.status, self.body = status, body


class HttpClient:
    """A pool of connections; safe to use from many threads."""

    def __init__(self, patience: Patience, *, num_connections: int, redirect: bool) -> None:
        self.patience = patience
        retries = urllib3.Retry(
            total=None, connect=0, read=0, status=0, other=0, redirect=_MAX_REDIRECTS if redirect else False
        )
        self._options: dict[str, Any] = {
            "maxsize": num_connections,
            "timeout": urllib3.Timeout(connect=patience.silence_s, read=patience.silence_s),
            "retries": retries,
        }
        self._pools: dict[str | None, urllib3.PoolManager] = {}

    def retrying(self, once: Callable[[], T]) -> T:
        """The result of ``once``, called again with backoff while it fails in ways that may pass.

        Raises:
            HttpFault: the last failure.
        """
        deadline = time.monotonic() + self.patience.retry_s
        attempt = 0
        while True:
            try:
                return once()
            except HttpFault as fault:
                attempt += 1
                pause_s = max(min(0.1 * 2**attempt, 10.0) * random.uniform(0.5, 1.0), fault.retry_after_s)
                broken = fault.kind in ("stalled", "incomplete") and attempt >= _MAX_BROKEN_BODIES
                if not fault.passing or broken or time.monotonic() + pause_s > deadline:
                    fault.detail += f", after {attempt} attempts" if attempt > 1 else ""
                    raise
                time.sleep(pause_s)

    @contextmanager
    def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        body: bytes | None = None,
        silence_s: float | None = None,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """A successful response whose body is still to be read; what goes wrong while it is open is an HttpFault.

        ``body`` is sent; ``silence_s`` is the longest wait for the answer instead of ``Patience.silence_s``.
        """
        response: urllib3.BaseHTTPResponse | None = None
        complete = False
        options: dict[str, Any] = {"body": body, "preload_content": False}
        if silence_s is not None:
            options["timeout"] = urllib3.Timeout(connect=self.patience.silence_s, read=silence_s)
        try:
            response = self._pool(url).request(
                method, url, headers={"User-Agent": "winnow", "Accept-Encoding": "identity", **headers}, **options
            )
            if response.status >= 300:
                raise _refusal(response)
            yield response
            complete = True
        except HTTPError as error:
            raise _fault(error, in_body=response is not None) from None
        finally:
            if response is not None:
                if complete:
                    response.release_conn()
                else:
                    response.close()

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Straight, or through the proxy that the environment names for this server."""
        scheme, _, rest = url.partition("://")
        proxy = urllib.request.getproxies().get(scheme)
        if proxy is not None and urllib.request.proxy_bypass(rest.partition("/")[0]):
            proxy = None
        if proxy not in self._pools:
            make = urllib3.PoolManager if proxy is None else lambda **kw: urllib3.ProxyManager(proxy, **kw)
            self._pools[proxy] = make(**self._options)
        return self._pools[proxy]

    def read(self, uri: str, url: str, headers: Headers, *, version: str, max_bytes: int) -> bytes:
        """The whole body of ``url``, which messages call ``uri``.

        Raises:
            FetchError: for the reason its kind says.
        """

        def once() -> bytes:
            conditions = if_match(version)
            with self.open("GET", url, {**headers(), **conditions}) as response:
                info = info_of(uri, response.headers)
                check_version(info, version)
                check_size(uri, info.size, max_bytes)
                return self._body(uri, response, max_bytes)

        try:
            return self.retrying(once)
        except HttpFault as fault:
            raise fetch_error(fault.kind, uri, fault.detail) from None

    def _body(self, uri: str, response: urllib3.BaseHTTPResponse, max_bytes: int) -> bytes:
        deadline = time.monotonic() + self.patience.object_s
        body = bytearray()
        # read1 gives what has arrived; read would wait until the whole piece is there, however slowly it drips.
        while piece := response.read1(1 << 18):
            body += piece
            if len(body) > max_bytes:
                raise fetch_error("too_many_bytes", uri, f"the limit is {max_bytes:,}")
            if time.monotonic() > deadline:
                detail = f"{len(body):,} bytes in {self.patience.object_s:g} s"
                raise HttpFault("stalled", detail, passing=False)
        if not body:
            raise fetch_error("empty", uri)
        return bytes(body)

    def stat(self, uri: str, url: str, headers: Callable[[str], Mapping[str, str]]) -> ObjectInfo:
        """What the headers tell; ``headers`` is given the method. Servers that know no HEAD are asked with GET.

        Raises:
            FetchError: for the reason its kind says.
        """

        def once(method: str) -> ObjectInfo:
            try:
                with self.open(method, url, headers(method)) as response:
                    info = info_of(uri, response.headers)
                    if method == "GET":
                        response.close()  # instead of reading the body
                    return info
            except HttpFault as fault:
                if method == "HEAD" and fault.detail.startswith(("405", "501")):
                    return once("GET")
                raise

        try:
            return self.retrying(lambda: once("HEAD"))
        except HttpFault as fault:
            raise fetch_error(fault.kind, uri, fault.detail) from None


class WebServers:
    """Objects at http(s) URLs. One URL is one object: the web has no listing, so a list of URLs comes as a manifest."""

    def __init__(self, patience: Patience, *, num_connections: int) -> None:
        self._client = HttpClient(patience, num_connections=num_connections, redirect=True)

    def read(self, uri: str, *, version: str, max_bytes: int) -> bytes:
        """The whole object."""
        return self._client.read(uri, uri, dict, version=version, max_bytes=max_bytes)

    def stat(self, uri: str) -> ObjectInfo:
        """What its headers tell."""
        return self._client.stat(uri, uri, lambda _: {})

    def list(self, uri: str) -> Chunks:
        """The one object that the URL names.

        Raises:
            CallError: the URL names a folder.
            StorageError: the server cannot be asked.
        """
        if uri.partition("?")[0].endswith("/"):
            raise CallError(
                f"{uris.redact(uri)} is a folder on a web server, and the web has no listing; "
                "give a manifest (CSV or Parquet with a column uri) of the URLs"
            )
        yield [self.stat(uri)]


def if_match(version: str) -> dict[str, str]:
    """The condition that makes a server refuse another version; empty where ``version`` is no strong ETag."""
    # The comparison in check_version decides; this spares the transfer. A version made of size and time, or a weak
    # ETag, which If-Match never matches (RFC 9110, 13.1.1), is compared only.
    if version == uris.UNVERSIONED or version.startswith("W/") or re.fullmatch(r"\d+-\d{15,}", version):
        return {}
    return {"If-Match": f'"{version}"'}


def info_of(uri: str, headers: Mapping[str, str]) -> ObjectInfo:
    """What response headers tell of an object; headers that make no sense tell nothing."""
    length = headers.get("Content-Length", "")
    try:
        modified = parsedate_to_datetime(headers["Last-Modified"])
    except (KeyError, ValueError):
        modified = None
    size = int(length) if length.isdecimal() else None
    return ObjectInfo(uri, uris.name_of(uri), size, headers.get("ETag") or None, modified)


def _refusal(response: urllib3.BaseHTTPResponse) -> HttpFault:
    body = response.read(4096)
    found = re.search(rb"<Code>(\w+)</Code>", body)
    code = found[1].decode() if found else ""
    kind, passing = kind_of_status(response.status, code)
    detail = f"{response.status} {code or response.reason or ''}".strip()
    if region := response.headers.get("x-amz-bucket-region"):
        detail += f"; the bucket is in region {region}"
    wait = response.headers.get("Retry-After", "")
    retry_after_s = min(float(wait), 30.0) if wait.isdecimal() else 0.0
    return HttpFault(kind, detail, passing=passing, retry_after_s=retry_after_s, status=response.status, body=body)


def _fault(error: HTTPError, *, in_body: bool) -> HttpFault:
    while isinstance(error, MaxRetryError) and isinstance(error.reason, HTTPError):
        error = error.reason
    if isinstance(error, ResponseError):
        return HttpFault("unavailable", "too many redirects", passing=False)
    if isinstance(error, SSLError):
        return HttpFault("unavailable", "the server's certificate is not accepted", passing=False)
    if isinstance(error, NameResolutionError):
        return HttpFault("unavailable", "the server's name is not known", passing=True)
    if isinstance(error, ConnectTimeoutError | NewConnectionError):
        return HttpFault("unavailable", "no connection to the server", passing=True)
    if isinstance(error, ReadTimeoutError):
        return HttpFault("stalled", "silence", passing=True)
    if in_body:
        return HttpFault("incomplete", "the connection broke", passing=True)
    return HttpFault("unavailable", "the connection broke before an answer", passing=True)


def list_error(uri: str, fault: HttpFault) -> Exception:
    """The failure of a listing as a StorageError."""
    hint = {
        "missing": "there is no such bucket; check its name and the endpoint",
        "forbidden": "access is refused; check the credentials and their right to list",
    }.get(fault.kind, "storage kept failing; check the endpoint, or try again later")
    return storage_error("list", uri, f"{hint} ({fault.detail})")
