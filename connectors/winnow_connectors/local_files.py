"""Local folders as a store of objects: atomic writes, versions by size and time, no following of link loops."""

# A Path for each of millions of entries is slow: names stay the plain strings that scandir gives.
# ruff: noqa: PTH103, PTH105, PTH108, PTH110, PTH112, PTH114, PTH116, PTH118, PTH120, PTH123
from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import uuid
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime

from winnow import uris
from winnow.errors import CallError, FetchError
from winnow_connectors.objects import (
    CHUNK,
    Chunks,
    NotFoundError,
    ObjectInfo,
    check_size,
    check_version,
    fetch_error,
    storage_error,
)

logger = logging.getLogger(__name__)

_KINDS = {
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.EISDIR: "missing",
    errno.ENXIO: "missing",  # a socket
    errno.ENAMETOOLONG: "missing",
    errno.ELOOP: "missing",
    errno.EACCES: "forbidden",
    errno.EPERM: "forbidden",
}
_TEMPORARY = (".winnow-", ".tmp")
"""How files begin and end that are being written; a killed process leaves them, and they are never objects."""


class LocalFiles:
    """Files under ``file:`` URIs. Objects are regular files: of devices, pipes and sockets nothing is ever read."""

    def read(self, uri: str, *, version: str, max_bytes: int) -> bytes:
        """The whole file, checked to be the same file from first to last byte."""
        path = uris.local_path(uri)
        try:
            # O_NONBLOCK: a pipe without a writer would block for ever; regular files do not mind.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
                info = _info(uri, "", os.fstat(file.fileno()))
                check_version(info, version)
                check_size(uri, info.size, max_bytes)
                data = _read_all(file.fileno(), info.size or 0)
                after = _info(uri, "", os.fstat(file.fileno()))
        except OSError as error:
            raise _fault(uri, error) from None
        if after.version != info.version:
            raise fetch_error("changed", uri, "while it was read")
        if len(data) != info.size:
            raise fetch_error("incomplete", uri, f"{len(data):,} of {info.size:,} bytes")
        return data

    def stat(self, uri: str) -> ObjectInfo:
        """Size and time of one file."""
        try:
            return _info(uri, uris.name_of(uri), os.stat(uris.local_path(uri)))
        except OSError as error:
            raise _fault(uri, error) from None

    def list(self, uri: str) -> Chunks:
        """Everything under a folder, or one file; links to files and to folders elsewhere are followed, loops are not.

        Raises:
            CallError: there is nothing of that name.
            StorageError: a folder cannot be read.
        """
        path = uris.local_path(uri)
        if not os.path.exists(path):
            raise CallError(f"{path} does not exist; give a folder, a file or a URI such as s3://bucket/folder")
        if not os.path.isdir(path):
            yield [self.stat(uri)]
            return
        chunk: list[ObjectInfo] = []
        for info in self._walk(path):
            chunk.append(info)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _walk(self, root: str) -> Iterator[ObjectInfo]:
        real_root = os.path.realpath(root)
        folders = deque([root])
        links: deque[str] = deque()
        seen_links = {real_root}
        while folders or links:
            folder = folders.popleft() if folders else links.popleft()
            if not folders and os.path.islink(folder) and folder != root:
                target = os.path.realpath(folder)
                if target in seen_links or f"{target}/".startswith(f"{real_root}/"):
                    continue  # listed under its own name, or it was followed already
                seen_links.add(target)
            found: list[str] = []
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if _is_folder(entry):
                            found.append(entry.path)
                        elif (info := self._entry(entry, root)) is not None:
                            yield info
            except OSError as error:
                detail = f"{error.strerror}; check its permissions"
                raise storage_error("list", uris.from_path(folder), detail) from None
            for path in sorted(found):
                (links if os.path.islink(path) else folders).append(path)

    def _entry(self, entry: os.DirEntry[str], root: str) -> ObjectInfo | None:
        try:
            found = entry.stat()
        except OSError:  # a link to nowhere, or removed since the folder was read
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            logger.warning("skipped %s: a broken link, or no regular file", uris.from_path(entry.path))
            return None
        # Names that are not UTF-8 cannot stand in a table: the key shows a replacement, the URI keeps their bytes.
        key = os.fsencode(os.path.relpath(entry.path, root)).decode("utf-8", "replace")
        return _info(uris.from_path(entry.path), key, found)

    def get(self, uri: str) -> bytes:
        """The whole file."""
        try:
            with open(uris.local_path(uri), "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise NotFoundError(f"{uri} does not exist") from None
        except OSError as error:
            raise storage_error("read", uri, _words(error)) from None

    def put(self, uri: str, data: bytes) -> None:
        """Write to a file beside it, then rename: readers see the old bytes or the new, never a part."""
        path = uris.local_path(uri)
        try:
            temporary = _write_beside(path, data)
            try:
                os.replace(temporary, path)
            except OSError:
                _remove(temporary)
                raise
        except OSError as error:
            raise storage_error("write", uri, _words(error)) from None

    def create(self, uri: str, data: bytes) -> bool:
        """Write to a file beside it, then hard-link it to its name, which one process alone can do."""
        path = uris.local_path(uri)
        try:
            temporary = _write_beside(path, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                _remove(temporary)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                detail = "this file system has no hard links, which create-only writing needs; use another folder"
                raise storage_error("create", uri, detail) from None
            raise storage_error("create", uri, _words(error)) from None
        return True

    def exists(self, uri: str) -> bool:
        """Whether there is such a file."""
        try:
            return stat.S_ISREG(os.stat(uris.local_path(uri)).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise storage_error("look up", uri, _words(error)) from None

    def list_folder(self, uri: str) -> Iterator[ObjectInfo]:
        """All files under a folder, without those that are still being written."""
        path = uris.local_path(uri)
        if os.path.isdir(path):
            for info in self._walk(path):
                name = info.key.rpartition("/")[2]
                if not (name.startswith(_TEMPORARY[0]) and name.endswith(_TEMPORARY[1])):
                    yield info

    def delete(self, uri: str) -> None:
        """Remove the file if it is there."""
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(uris.local_path(uri))
        except OSError as error:
            raise storage_error("delete", uri, _words(error)) from None


def _info(uri: str, key: str, found: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise fetch_error("missing", uri, f"there is {what} of that name")
    modified = datetime.fromtimestamp(found.st_mtime_ns // 1000 / 1e6, UTC)
    return ObjectInfo(uri, key, found.st_size, None, modified, found.st_mtime_ns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _read_all(descriptor: int, size: int) -> bytes:
    """At most ``size`` bytes in one piece; fewer when the file ends earlier."""
    data = os.read(descriptor, size)
    while len(data) < size and (more := os.read(descriptor, size - len(data))):
        data += more
    return data


def _write_beside(path: str, data: bytes) -> str:
    """A finished, flushed temporary file in the same folder; its path."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{_TEMPORARY[0]}{uuid.uuid4().hex}{_TEMPORARY[1]}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # such as a full disk
        _remove(temporary)
        raise
    return temporary


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _words(error: OSError) -> str:
    return f"{error.strerror or error}; check that the folder exists, its permissions and the free space"


def _fault(uri: str, error: OSError) -> FetchError:
    return fetch_error(_KINDS.get(error.errno or 0, "unavailable"), uri, error.strerror or str(error))
