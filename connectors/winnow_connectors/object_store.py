"""Object storage: where images are read from, and the keys and values that a warehouse is made of.

======================  =======================================  ==================================
scheme                  through                                  warehouse
======================  =======================================  ==================================
``file`` and paths      the operating system                     yes
``s3``                  obstore; odd keys by requests of ours    yes (conditional PUT is needed)
``gs``, ``az``          obstore (not exercised by the tests)     yes (not exercised by the tests)
``http``, ``https``     urllib3                                  no
any other               fsspec (``memory`` is in the tests)      no
======================  =======================================  ==================================
"""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from winnow import uris
from winnow.config import StorageConfig
from winnow.errors import CallError, FetchError, StorageError
from winnow_connectors.objects import (
    Backend,
    Chunks,
    KeyValueBackend,
    NotFoundError,
    ObjectInfo,
    Patience,
    check_size,
    fetch_error,
)

if TYPE_CHECKING:
    from winnow_connectors.buckets import Buckets
    from winnow_connectors.credentials import S3Access

__all__ = ["NotFoundError", "ObjectInfo", "ObjectStore", "ObjectStores"]

T = TypeVar("T")
_BUCKETS = ("s3", "gs", "az")


class ObjectStores:
    """Everything that can be read, each URI in the way that its ``[storage."prefix"]`` section says.

    The longest matching section wins. Can be pickled: what travels are the settings, and each process opens its own
    connections and looks up its own keys. Safe to use from many threads.

    Args:
        storage: the sections, by URI prefix.
        base_dir: folder of ``winnow.toml``, at which relative paths start.
        fetch_timeout_s: longest silence of a server, and longest connect, in seconds.
        retry_timeout_s: how long failures that may pass are tried again, in seconds.
        max_concurrency: reads in flight at once in this process.
    """

    def __init__(
        self,
        storage: Mapping[str, StorageConfig],
        base_dir: Path,
        *,
        fetch_timeout_s: float = 60.0,
        retry_timeout_s: float = 120.0,
        max_concurrency: int = 64,
    ) -> None:
        # Longest first, so that the first match is the one that counts.
        self._storage = sorted(
            ((_section_prefix(name), config) for name, config in storage.items()), key=lambda item: -len(item[0])
        )
        self._base_dir = base_dir.absolute()
        self._patience = Patience(fetch_timeout_s, retry_timeout_s)
        self._max_concurrency = max_concurrency
        self._open()

    def _open(self) -> None:
        self._backends: dict[tuple[str, str], Backend] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        sections = ", ".join(uris.redact(prefix) for prefix, _ in self._storage)
        return f"ObjectStores([{sections}], {str(self._base_dir)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """The settings only: no connections, threads or keys."""
        return {name: value for name, value in vars(self).items() if name not in ("_backends", "_threads", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def canonical(self, source: str) -> str:
        """The canonical URI of a URI or of a path relative to ``base_dir``. Raises CallError, see ``winnow.uris``."""
        return uris.canonical(source, self._base_dir)

    def at(self, uri: str) -> ObjectStore:
        """The keys and values under one folder or prefix.

        Raises:
            CallError: this kind of storage cannot hold a warehouse.
        """
        uri = self.canonical(uri)
        scheme = uris.scheme_of(uri)
        if scheme != "file" and scheme not in _BUCKETS:
            raise CallError(
                f"{uris.redact(uri)} cannot be written to; choose a folder, s3://bucket/prefix, gs://… or az://…"
            )
        self._backend(uri)  # faults in the settings show now, not at the first access
        return ObjectStore(self, uri if uri == "file:///" else uri.rstrip("/"))

    async def read(self, uri: str, *, version: str, max_bytes: int, size: int | None = None) -> bytes:
        """One image, checked to be the version that was ingested; never more than ``max_bytes`` in memory.

        Dozens may be in flight: the work is done in threads.

        Args:
            uri: canonical.
            version: as ``ObjectInfo.version`` gave it; ``unversioned`` is not checked.
            max_bytes: largest object that is read.
            size: bytes as ingested, if known: spares the request for objects that are too large or empty.

        Raises:
            FetchError: ``forbidden``, ``missing``, ``changed``, ``unavailable``, ``stalled``, ``incomplete``,
                ``too_many_bytes`` or ``empty``.
            CallError: the scheme or the settings for it are wrong.
        """
        check_size(uri, size, max_bytes)
        data = await self._in_thread(uri, lambda backend: backend.read(uri, version=version, max_bytes=max_bytes))
        if version == uris.UNVERSIONED and size is not None and len(data) != size:
            raise fetch_error("changed", uri, f"it has {len(data):,} bytes now, it had {size:,}")
        check_size(uri, len(data), max_bytes)
        return data

    async def stat(self, uri: str) -> ObjectInfo:
        """What is known of one object.

        Raises:
            FetchError: it is missing, or storage does not answer.
        """
        return await self._in_thread(uri, lambda backend: backend.stat(uri))

    def download(self, uri: str) -> bytes:
        """A whole file that a job needs, such as a checkpoint; of any size.

        Raises:
            StorageError: it is missing, access is refused, or storage keeps failing.
        """
        try:
            return asyncio.run(self.read(self.canonical(uri), version=uris.UNVERSIONED, max_bytes=sys.maxsize))
        except FetchError as error:
            raise StorageError(error.message) from None

    def version(self, uri: str) -> str:
        """The version of a file now. Raises StorageError, as ``download`` does."""
        try:
            return asyncio.run(self.stat(self.canonical(uri))).version
        except FetchError as error:
            raise StorageError(error.message) from None

    def list(self, uri: str) -> Chunks:
        """Everything under a folder or prefix, recursively, in chunks; a single object gives itself.

        Nothing is left out: hidden files and zero-byte "folders" come too. Memory does not grow with the number of
        objects. The order is the store's.

        Raises:
            CallError: nothing of that name exists, or it cannot be listed.
            StorageError: access is refused, or storage keeps failing.
        """
        uri = self.canonical(uri)
        return self._backend(uri).list(uri)

    async def _in_thread(self, uri: str, call: Callable[[Backend], T]) -> T:
        backend = self._backend(uri)
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._max_concurrency, thread_name_prefix="winnow-fetch")
            work = self._threads.submit(call, backend)
        future = asyncio.wrap_future(work)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved, also if nobody waits
        # Every backend bounds itself; this bounds what it cannot, such as a network file system that hangs. While the
        # work is queued for a thread, nothing is late yet.
        limit_s = self._patience.retry_s + 2 * self._patience.object_s
        try:
            while not (await asyncio.wait([future], timeout=limit_s))[0]:
                if work.running():
                    raise fetch_error("stalled", uri, f"no answer in {limit_s:g} s")
            return future.result()
        finally:
            work.cancel()  # if we were cancelled and it is still queued

    def s3_access(self, uri: str) -> S3Access:
        """Who asks for the objects of an ``s3://`` URI, and where: for programs that read them for us.

        Raises:
            CallError: the file or the profile of its keys is missing or incomplete.
        """
        from winnow_connectors.credentials import resolve

        return resolve(self._section(uri)[1], self._base_dir)

    def _section(self, uri: str) -> tuple[str, StorageConfig]:
        """The section that a URI belongs to, with its prefix."""
        return next(
            ((prefix, config) for prefix, config in self._storage if uris.is_under(uri, prefix)), ("", StorageConfig())
        )

    def _backend(self, uri: str) -> Backend:
        scheme = uris.scheme_of(uri)
        prefix, config = self._section(uri)
        kind = scheme if scheme in ("file", "http", "https", *_BUCKETS) else "fsspec"
        with self._lock:
            if (kind, prefix) not in self._backends:
                self._backends[kind, prefix] = self._make(kind, config)
            return self._backends[kind, prefix]

    def _make(self, kind: str, config: StorageConfig) -> Backend:
        # Imported where needed: a run over local files loads neither obstore nor urllib3.
        if kind == "file":
            from winnow_connectors.local_files import LocalFiles

            return LocalFiles()
        if kind in _BUCKETS:
            from winnow_connectors.buckets import Buckets

            return Buckets(kind, config, self._base_dir, self._patience, num_connections=self._max_concurrency)
        if kind in ("http", "https"):
            from winnow_connectors.web import WebServers

            return WebServers(self._patience, num_connections=self._max_concurrency)
        from winnow_connectors.fsspec_files import FsspecFiles

        return FsspecFiles()


class ObjectStore:
    """Keys and values under one folder or prefix. Made by ``ObjectStores.at``; can be pickled.

    Keys are names with ``/`` between folders. Writes are atomic: a reader sees all of a value or nothing.
    """

    def __init__(self, stores: ObjectStores, uri: str) -> None:
        self._stores = stores
        self.uri = uri

    def __repr__(self) -> str:
        return f"ObjectStore({self.uri!r})"

    @property
    def _backend(self) -> KeyValueBackend:
        return self._stores._backend(self.uri)  # type: ignore[return-value]  # ObjectStores.at lets no other kind in

    def _uri(self, key: str) -> str:
        if not key or any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError(f"key {key!r} is no name under {self.uri}; keys look like folder/name.json")
        return uris.join(self.uri, key)

    def get(self, key: str) -> bytes:
        """The value.

        Raises:
            NotFoundError: there is none.
            StorageError: storage refuses or keeps failing.
        """
        return self._backend.get(self._uri(key))

    def put(self, key: str, data: bytes) -> None:
        """Write or replace.

        Raises:
            StorageError: storage refuses or keeps failing.
        """
        self._backend.put(self._uri(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write unless the key exists already. Of many calls at once, in any processes, exactly one returns True.

        Raises:
            StorageError: storage refuses or keeps failing; the value may or may not have been written.
        """
        return self._backend.create(self._uri(key), data)

    def exists(self, key: str) -> bool:
        """Whether there is a value. Raises StorageError."""
        return self._backend.exists(self._uri(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All values under a folder of keys (all for ""); ``ObjectInfo.key`` is what ``get`` takes.

        Raises:
            StorageError: storage refuses or keeps failing.
        """
        folder = prefix.rstrip("/")
        for info in self._backend.list_folder(self._uri(folder) if folder else self.uri):
            yield ObjectInfo(
                uri=info.uri,
                key=f"{folder}/{info.key}" if folder else info.key,
                size=info.size,
                etag=info.etag,
                last_modified=info.last_modified,
                mtime_ns=info.mtime_ns,
            )

    def delete(self, key: str) -> None:
        """Remove the value if there is one. Raises StorageError."""
        self._backend.delete(self._uri(key))

    def delta_uri(self, key: str = "") -> str:
        """What the deltalake package calls this place: a URL, percent-encoded.

        Raises:
            CallError: the place holds ``%`` and two hex digits, which deltalake decodes once too often.
        """
        scheme, bucket, path = uris.split(uris.join(self.uri, key))
        if re.search("%[0-9A-Fa-f]{2}", path):
            raise CallError(f"{self.uri} holds a percent sign that Delta tables cannot stand; choose another folder")
        return f"{scheme}://{bucket}{quote(path)}" if scheme == "file" else f"{scheme}://{bucket}/{quote(path)}"

    def delta_options(self) -> dict[str, str]:
        """``storage_options`` for the deltalake package on the same place. They hold keys: never log them."""
        if uris.scheme_of(self.uri) == "file":
            return {}
        backend: Buckets = self._backend  # type: ignore[assignment]  # every other kind that ObjectStores.at lets in
        return backend.delta_options()


def _section_prefix(name: str) -> str:
    """A section's name in the spelling of canonical URIs: ``S3A://photos/`` is ``s3://photos/``."""
    scheme, _, rest = name.partition("://")
    return uris.canonical(name) if rest else f"{uris.canonical(f'{scheme}://x').partition('://')[0]}://"
