"""Every other URL scheme, through fsspec: ``ftp``, ``sftp``, ``hf``, ``hdfs``, ``memory`` and more.

For reading images only. Schemes other than ``memory`` are not exercised by the tests.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from winnow import uris
from winnow.errors import CallError, FetchError
from winnow_connectors.objects import CHUNK, Chunks, ObjectInfo, check_size, check_version, fetch_error, storage_error

_ETAGS = ("ETag", "etag", "e_tag", "content_md5", "blob_id")
_TIMES = ("mtime", "LastModified", "last_modified", "modified", "created")


class FsspecFiles:
    """Files of any file system that fsspec knows, with the settings that its library takes from the environment."""

    def read(self, uri: str, *, version: str, max_bytes: int) -> bytes:
        """The whole file."""
        try:
            system, path = _open(uri)
            info = _info(uri, "", system.info(path))
            check_version(info, version)
            check_size(uri, info.size, max_bytes)
            with system.open(path, "rb") as file:
                data: bytes = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:
            raise _fault(uri, error) from None
        check_size(uri, len(data), max_bytes)
        if info.size is not None and len(data) != info.size:
            raise fetch_error("incomplete", uri, f"{len(data):,} of {info.size:,} bytes")
        return data

    def stat(self, uri: str) -> ObjectInfo:
        """What is known of one file."""
        try:
            system, path = _open(uri)
            return _info(uri, uris.name_of(uri), system.info(path))
        except (OSError, ValueError) as error:
            raise _fault(uri, error) from None

    def list(self, uri: str) -> Chunks:
        """Everything under a folder, or the one file.

        Raises:
            CallError: there is nothing of that name.
            StorageError: the folder cannot be read.
        """
        try:
            system, path = _open(uri)
            if system.isfile(path):
                yield [self.stat(uri)]
                return
            if not system.exists(path):
                raise CallError(f"{uris.redact(uri)} does not exist; check the name")
            chunk: list[ObjectInfo] = []
            for _, _, files in system.walk(path, detail=True, on_error="raise"):
                for found in files.values():
                    key = found["name"].removeprefix(path).lstrip("/")
                    chunk.append(_info(uris.join(uri, key), key, found))
                    if len(chunk) == CHUNK:
                        yield chunk
                        chunk = []
            if chunk:
                yield chunk
        except (OSError, ValueError) as error:
            raise storage_error("list", uri, f"{type(error).__name__}: {error}") from None


def _open(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and what it calls the file."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise CallError(
            f"{uris.redact(uri)} cannot be reached: {error}; known schemes are file, s3, gs, az, http, https "
            "and what fsspec knows once its package is installed"
        ) from None
    return system, path


def _info(uri: str, key: str, found: dict[str, Any]) -> ObjectInfo:
    if found.get("type") == "directory":
        raise fetch_error("missing", uri, "there is a folder of that name")
    etag = next((str(found[name]) for name in _ETAGS if found.get(name)), None)
    time = next((found[name] for name in _TIMES if found.get(name)), None)
    modified: datetime | None = None
    if isinstance(time, datetime):
        modified = time if time.tzinfo else time.replace(tzinfo=UTC)
    elif isinstance(time, int | float):
        modified = datetime.fromtimestamp(time, UTC)
    return ObjectInfo(uri, key, found.get("size"), etag, modified)


def _fault(uri: str, error: Exception) -> FetchError:
    kind = "unavailable"
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        kind = "missing"
    elif isinstance(error, PermissionError):
        kind = "forbidden"
    elif isinstance(error, TimeoutError):
        kind = "stalled"
    return fetch_error(kind, uri, f"{type(error).__name__}: {error}")
