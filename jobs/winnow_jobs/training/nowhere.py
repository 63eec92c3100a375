"""A place for the files of Ray Train that nobody needs."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSystemHandler, FileType, PyFileSystem

_SENTINEL = ".validate_storage_marker"
"""What Ray Train writes on the driver and looks for on every node."""


def nowhere() -> PyFileSystem:
    """A file system that keeps nothing, and can be sent to workers."""
    return PyFileSystem(Nowhere())


class Nowhere(FileSystemHandler):  # type: ignore[misc]
    """A file system that keeps nothing.

    Ray Train wants a folder that all nodes share, for checkpoints that it would handle itself. Ours are written to the
    warehouse, wherever that is, so nothing must be kept there.
    """

    def get_type_name(self) -> str:
        return "nowhere"

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [FileInfo(path, type=FileType.File if path.endswith(_SENTINEL) else FileType.NotFound) for path in paths]

    def get_file_info_selector(self, selector: Any) -> list[FileInfo]:
        return []

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir(self, path: str) -> None:
        pass

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        pass

    def delete_root_dir_contents(self) -> None:
        pass

    def delete_file(self, path: str) -> None:
        pass

    def move(self, src: str, dest: str) -> None:
        pass

    def copy_file(self, src: str, dest: str) -> None:
        pass

    def normalize_path(self, path: str) -> str:
        return path

    def open_input_stream(self, path: str) -> Any:
        raise FileNotFoundError(path)

    def open_input_file(self, path: str) -> Any:
        raise FileNotFoundError(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Sink(), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Sink(), mode="w")


class _Sink:
    """Takes bytes and forgets them."""

    closed = False

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
