"""The vectors of an embedding task: one model's, of finished runs, streamed in the order of the files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from winnow.config import Config
from winnow.errors import CallError, StorageError
from winnow_connectors.tables import Tables

if TYPE_CHECKING:
    import pyarrow.dataset as ds

    from winnow_connectors.query import QueryEngine

Ids = NDArray[np.bytes_]
"""Image ids as ASCII."""

_BATCH_ROWS = 8192
_COLUMNS = ["image_id", "vector"]


def embedding_task(config: Config, name: str | None) -> str:
    """The embedding task of that name; the only one of the configuration without a name.

    Raises:
        CallError: no such task, another kind of task, or more than one to choose from.
    """
    if name is not None:
        if (kind := config.task(name).kind) != "embedding":
            raise CallError(f'task {name!r} is a {kind} task; vectors come from tasks with kind = "embedding"')
        return name
    names = [name for name, task in config.tasks.items() if task.kind == "embedding"]
    if not names:
        raise CallError(
            'no embedding task is configured; add one to winnow.toml, such as [tasks.alike] with kind = "embedding" '
            'and model = "torchvision/mobilenet_v2@IMAGENET1K_V1", then run `winnow predict`'
        )
    if len(names) > 1:
        raise CallError(f"there are several embedding tasks; choose one with --task: {', '.join(names)}")
    return names[0]


@dataclass(frozen=True)
class Vectors:
    """All vectors of a task and model as of now, of finished runs.

    Args:
        dataset: a snapshot of the table ``embeddings``.
        runs: finished runs that were known before the snapshot.
        task, model: whose vectors.
    """

    dataset: ds.Dataset
    runs: pa.Array
    task: str
    model: str

    @classmethod
    def open(cls, tables: Tables, task: str, model: str) -> Vectors:
        """A snapshot. ``runs`` is read first: what is opened later holds all rows of the runs that it names."""
        runs = tables.dataset("runs").to_table(columns=["run_id"], filter=pc.field("status") == "finished")
        return cls(tables.dataset("embeddings"), pa.array(runs["run_id"].to_pylist(), pa.string()), task, model)

    @property
    def _mine(self) -> pc.Expression:
        return (pc.field("task") == self.task) & (pc.field("model") == self.model) & pc.field("run").isin(self.runs)

    @property
    def is_empty(self) -> bool:
        return bool(self.dataset.head(1, columns=["image_id"], filter=self._mine).num_rows == 0)

    def ids(self) -> Iterator[Ids]:
        """Image ids, batch by batch, in the order of ``stream``; no vector is read."""
        for batch in self.dataset.scanner(columns=["image_id"], filter=self._mine).to_batches():
            yield as_ids(batch.column(0))

    def stream(self) -> Iterator[tuple[Ids, NDArray[np.float32]]]:
        """Image ids (N,) and vectors (N, D), batch by batch, also of images that are gone; memory stays flat.

        Raises:
            StorageError: vectors of one model differ in length.
        """
        num_dimensions = None
        # Little is read ahead: a scanner on its own would fill gigabytes. Twice as quick as through DuckDB.
        scanner = self.dataset.scanner(
            columns=_COLUMNS, filter=self._mine, batch_size=_BATCH_ROWS, fragment_readahead=1, batch_readahead=2
        )
        for batch in scanner.to_batches():
            if batch.num_rows:
                vectors = _vectors_ND(batch)
                if num_dimensions not in (None, vectors.shape[1]):
                    raise StorageError(
                        f"table 'embeddings' holds vectors of {num_dimensions} and of {vectors.shape[1]} numbers by "
                        f"{self.model} for task {self.task!r}; one of its runs was made by another program"
                    )
                num_dimensions = vectors.shape[1]
                yield as_ids(batch.column(0)), vectors

    def of_image(self, image_id: str) -> NDArray[np.float32] | None:
        """The vector (D,) of one image, or None. Reads the ids, and the vectors of one file only."""
        wanted = self._mine & (pc.field("image_id") == image_id)
        for fragment in self.dataset.get_fragments(filter=self._mine):
            if fragment.to_table(columns=["image_id"], filter=wanted).num_rows:
                (batch, *_) = fragment.to_table(columns=_COLUMNS, filter=wanted).to_batches()
                return np.array(_vectors_ND(batch)[0])
        return None


def as_ids(column: pa.Array | pa.ChunkedArray) -> Ids:
    """A column of image ids as ASCII of 32 characters, which numpy compares and sorts."""
    return np.array(column.to_pylist(), dtype="S32")


def select_ids(engine: QueryEngine, statement: str) -> Ids:
    """The image ids that a statement's first column gives, sorted."""
    parts = [as_ids(batch.column(0)) for batch in engine.reader(statement)]
    return np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype="S32")


def positions(ids_N: Ids, wanted_M: Ids) -> NDArray[np.int64]:
    """Where each wanted id stands among sorted ids, int64 (M,); -1 where it does not."""
    if not len(ids_N):
        return np.full(len(wanted_M), -1, dtype=np.int64)
    found = np.minimum(np.searchsorted(ids_N, wanted_M), len(ids_N) - 1)
    return np.where(ids_N[found] == wanted_M, found, -1)


def quoted(text: str) -> str:
    """Text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _vectors_ND(batch: Any) -> NDArray[np.float32]:
    column = batch.column(1)
    flat: NDArray[np.float32] = column.flatten().to_numpy()
    if len(flat) % len(column) or not pc.all(pc.equal(pc.list_value_length(column), len(flat) // len(column))).as_py():
        raise StorageError("table 'embeddings' holds vectors of different lengths in one file; it was damaged")
    return flat.reshape(len(column), -1)
