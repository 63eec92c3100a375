"""What all stores of objects share: what is known of an object, how patient to be, how failures are worded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from winnow import uris
from winnow.errors import FetchError, StorageError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CHUNK = 1000
"""Objects per list that a listing yields."""


class NotFoundError(StorageError):
    """No object has that key."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a store tells about an object without sending it.

    Attributes:
        uri: canonical, see ``winnow.uris``.
        key: its name under the place that was listed, decoded, with ``/`` between folders.
        size: bytes; None when the server does not say.
        etag: as the store spells it; None for local files and servers without.
        last_modified: time of the last change, UTC.
        mtime_ns: the same since 1970 in ns where the store knows it that finely (local files).
    """

    uri: str
    key: str
    size: int | None
    etag: str | None
    last_modified: datetime | None
    mtime_ns: int | None = None

    @property
    def version(self) -> str:
        """The version that ``ObjectStores.read`` enforces."""
        mtime_ns = self.mtime_ns
        if mtime_ns is None and self.last_modified is not None:
            mtime_ns = (self.last_modified - _EPOCH) // timedelta(microseconds=1) * 1000
        return uris.version_of(self.etag, self.size, mtime_ns)


Chunks = Iterator[list[ObjectInfo]]
"""A listing: lists of at most ``CHUNK`` objects."""


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds.

    Attributes:
        silence_s: longest pause of a server that should be sending, and longest connect.
        retry_s: how long failures that may pass are tried again, with backoff.
    """

    silence_s: float = 60.0
    retry_s: float = 120.0

    @property
    def object_s(self) -> float:
        """Longest time one request may take as a whole, however slowly the bytes drip."""
        return max(10 * self.silence_s, 30.0)


class Backend(Protocol):
    """One kind of storage. All calls block: ``ObjectStores`` runs many of them in threads."""

    def read(self, uri: str, *, version: str, max_bytes: int) -> bytes:
        """The whole object. Raises FetchError."""

    def stat(self, uri: str) -> ObjectInfo:
        """What is known of one object. Raises FetchError."""

    def list(self, uri: str) -> Chunks:
        """Everything under a folder or prefix, or the one object. Raises StorageError, CallError."""


class KeyValueBackend(Backend, Protocol):
    """Storage that a warehouse can live in."""

    def get(self, uri: str) -> bytes:
        """The whole object. Raises NotFoundError, StorageError."""

    def put(self, uri: str, data: bytes) -> None:
        """Write or replace, at once for all readers. Raises StorageError."""

    def create(self, uri: str, data: bytes) -> bool:
        """Write unless it exists; False when it does. Raises StorageError."""

    def exists(self, uri: str) -> bool:
        """Whether there is such an object. Raises StorageError."""

    def list_folder(self, uri: str) -> Iterator[ObjectInfo]:
        """All objects under ``uri`` + ``/``; nothing when there are none. Raises StorageError."""

    def delete(self, uri: str) -> None:
        """Remove it if it is there. Raises StorageError."""


_SENTENCES = {
    "forbidden": "storage refused access; check the credentials and their rights to list and read",
    "missing": "there is no such object any more; ingest again to mark it as vanished",
    "changed": "the object changed since it was ingested; ingest again",
    "unavailable": "storage kept failing; try again later with --retry-failures",
    "stalled": "the bytes stopped arriving; try again later with --retry-failures, or raise predict.fetch_timeout_s",
    "incomplete": "fewer bytes arrived than announced; try again later with --retry-failures",
    "too_many_bytes": "the object is larger than predict.max_bytes; raise it to read such objects",
    "empty": "the object has no bytes; replace it or exclude it",
}


def fetch_error(kind: str, uri: str, detail: str = "") -> FetchError:
    """The failure of one object, in a sentence that says what to do."""
    return FetchError(kind, uris.redact(f"{uri}: {_SENTENCES[kind]}" + (f" ({detail})" if detail else "")))


def storage_error(verb: str, uri: str, detail: str) -> StorageError:
    """The failure of a place as a whole: ``verb`` is what was tried, such as ``list``."""
    return StorageError(uris.redact(f"cannot {verb} {uri}: {detail}"))


def check_size(uri: str, size: int | None, max_bytes: int) -> None:
    """Refuse an object by its announced size, before its bytes are asked for.

    Raises:
        FetchError: ``empty`` or ``too_many_bytes``.
    """
    if size == 0:
        raise fetch_error("empty", uri)
    if size is not None and size > max_bytes:
        raise fetch_error("too_many_bytes", uri, f"{size:,} bytes; the limit is {max_bytes:,}")


def check_version(info: ObjectInfo, version: str) -> None:
    """Refuse an object that is not the one that was ingested.

    Raises:
        FetchError: ``changed``.
    """
    if version != uris.UNVERSIONED and info.version != version:
        raise fetch_error("changed", info.uri, f"it is now {info.version}, it was {version}")
