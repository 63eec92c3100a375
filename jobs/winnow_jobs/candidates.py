"""What a selection knows of images: the candidates that people could see, those that people know, and their vectors.

Legend: N candidates, sorted by image_id; M of them have a vector of D numbers; R references: images that people know.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.coreset import Coverage
from winnow.similarity import BLOCK_ROWS, Floats, NearRule
from winnow.splits import audit_positions
from winnow_jobs.vectors import Ids, Vectors, as_ids, positions, quoted

if TYPE_CHECKING:
    from winnow_connectors.query import QueryEngine

logger = logging.getLogger(__name__)

_IN_MEMORY_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Question:
    """What people are to be asked about.

    Attributes:
        task, model: whose answers are looked at.
        kind: of the task, ``classification`` or ``segmentation``.
    """

    task: str
    model: str
    kind: str

    @property
    def table(self) -> str:
        """Where the answers are."""
        return "segments" if self.kind == "segmentation" else "predictions"

    def count_answers(self, engine: QueryEngine) -> tuple[int, int]:
        """Rows that the model wrote, and those of them that know how much augmented views disagree."""
        (row,) = engine.sql(
            f"WITH {_FINISHED} SELECT count(*) AS answers, count(disagreement) AS views FROM {self.table} "
            f"SEMI JOIN finished USING (run) WHERE {self._is_mine}"
        ).to_pylist()
        return row["answers"], row["views"]

    def next_round(self, engine: QueryEngine) -> int:
        """Number of the next round of the task's queue, from 1 on."""
        (row,) = engine.sql(
            f"WITH {_FINISHED} SELECT coalesce(max(round), 0) + 1 AS round FROM queue SEMI JOIN finished USING (run) "
            f"WHERE task = {quoted(self.task)}"
        ).to_pylist()
        return int(row["round"])

    def audit_images(self, engine: QueryEngine) -> list[str]:
        """Originals of the audit reserve that the model answered and nobody has seen, in the order of their hashes."""
        wanted = """
            SELECT image_id, "group" FROM current_images ANTI JOIN known USING (image_id)
            WHERE audit AND parent IS NULL
            """
        rows = engine.sql(
            f'{self._with(wanted)} SELECT image_id, "group" FROM wanted SEMI JOIN answers USING (image_id)'
        )
        ids, groups = (rows[name].to_pylist() for name in ("image_id", "group"))
        return [image_id for _, image_id in sorted(zip(audit_positions(groups).tolist(), ids, strict=True))]

    def candidates(self, engine: QueryEngine, columns: Iterable[str], labels: Labels) -> Images:
        """What a policy may choose from: current originals of the train split that nobody has seen for the task.

        Never of the audit reserve, nor what must not be trained on.

        Args:
            engine: over the tables.
            columns: of the answers, to be read as numbers.
            labels: where the classes get their numbers.
        """
        wanted = """
            SELECT image_id FROM current_images ANTI JOIN known USING (image_id) ANTI JOIN quarantined USING (image_id)
            WHERE split = 'train' AND NOT audit AND parent IS NULL
            """
        names = sorted(set(columns))
        numbers = "".join(f", a.{name}::FLOAT" for name in names)
        statement = f"""
            {self._with(wanted)}
            SELECT image_id, a.label, {_HASHES}, true{numbers}
            FROM wanted JOIN answers AS a USING (image_id) LEFT JOIN hashes AS h USING (image_id)
            ORDER BY image_id
            """
        return Images.read(engine, statement, names, labels)

    def references(self, engine: QueryEngine, labels: Labels) -> Images:
        """Originals that people know, also such as are gone. Without the audit reserve, which serves nothing else."""
        wanted = """
            SELECT image_id, max(split) AS split
            FROM images SEMI JOIN known USING (image_id) SEMI JOIN finished USING (run)
            GROUP BY image_id HAVING NOT bool_or(audit) AND max(parent) IS NULL
            """
        statement = f"""
            {self._with(wanted)}
            SELECT image_id, coalesce(l.label, a.label), {_HASHES}, w.split = 'train'
            FROM wanted AS w LEFT JOIN labelled AS l USING (image_id) LEFT JOIN answers AS a USING (image_id)
                LEFT JOIN hashes AS h USING (image_id)
            ORDER BY image_id
            """
        return Images.read(engine, statement, [], labels)

    @property
    def _is_mine(self) -> str:
        return f"task = {quoted(self.task)} AND model = {quoted(self.model)}"

    def _with(self, wanted: str) -> str:
        """Common table expressions about the images that a statement wants, which may use ``known``.

        ``labelled`` and ``known``: all images that are labelled, and those that ever were in the queue as well;
        ``answers``: the model's newest to each wanted image; ``hashes``: of its bytes and pixels.
        """
        of_task = f"task = {quoted(self.task)}"
        return f"""
WITH {_FINISHED},
labelled AS (SELECT image_id, any_value(label) AS label FROM current_labels WHERE {of_task} GROUP BY image_id),
known AS (
    SELECT image_id FROM labelled
    UNION SELECT image_id FROM queue SEMI JOIN finished USING (run) WHERE {of_task}
),
wanted AS ({wanted}), {self._answers},
hashes AS (
    SELECT image_id, max(sha256) AS sha256, max(pixel_hash) AS pixel_hash, max(phash) AS phash
    FROM outcomes SEMI JOIN wanted USING (image_id) SEMI JOIN finished USING (run)
    WHERE status = 'answered' GROUP BY image_id
)"""

    @property
    def _answers(self) -> str:
        if self.kind == "classification":
            return f"""
answers AS (
    SELECT image_id, label, confidence, margin, entropy, disagreement
    FROM predictions SEMI JOIN wanted USING (image_id) JOIN finished USING (run) WHERE {self._is_mine}
    QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY run_finished_at DESC, "at" DESC) = 1
)"""
        # Means over all pixels, summed in one order. An image's class is that of its classes which fewest images show,
        # wanted or not.
        return f"""
parts AS (
    SELECT image_id, label, area_share, confidence, entropy, disagreement FROM segments JOIN finished USING (run)
    WHERE {self._is_mine}
    QUALIFY rank() OVER (PARTITION BY image_id ORDER BY run_finished_at DESC, "at" DESC) = 1
),
places AS (SELECT label, row_number() OVER (ORDER BY count(*), label) AS place FROM parts GROUP BY label),
answers AS (
    SELECT image_id, arg_min(label, place) AS label,
        sum(area_share::DOUBLE * confidence ORDER BY place) AS confidence, NULL::FLOAT AS margin,
        sum(area_share::DOUBLE * entropy ORDER BY place) AS entropy,
        sum(area_share::DOUBLE * disagreement ORDER BY place) AS disagreement
    FROM parts SEMI JOIN wanted USING (image_id) JOIN places USING (label) GROUP BY image_id
)"""


_FINISHED = """
finished AS (
    SELECT run_id AS run, max(finished_at) AS run_finished_at FROM runs WHERE status = 'finished' GROUP BY run_id
)"""

_HASHES = """
    if(h.sha256 IS NULL, 0::UBIGINT, hash(h.sha256)), if(h.pixel_hash IS NULL, 0::UBIGINT, hash(h.pixel_hash)),
    coalesce(('0x' || h.phash)::UBIGINT, 0)"""


class Labels:
    """Numbers for the names of classes, in the order in which they are met."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def of(self, column: pa.Array) -> NDArray[np.int64]:
        """Number of each name, int64; -1 for null."""
        encoded = column.dictionary_encode()
        codes = [self._numbers.setdefault(name, len(self._numbers)) for name in encoded.dictionary.to_pylist()]
        places = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.asarray(np.array([*codes, -1], dtype=np.int64)[places])


@dataclass(frozen=True)
class Images:
    """Candidates or references, sorted by image_id.

    Attributes:
        ids_N: image ids.
        classes_N: number of the label, or else of the predicted class; -1 where unknown.
        bytes_N, pixels_N: 64 bits of a hash of the file, and of its pixels; 0 where unknown.
        phashes_N: perceptual hashes; 0 where unknown.
        is_center_N: of references, images of the train split: those that candidates should lie far from.
        numbers: columns of the answers, float32 (N,); NaN where unknown.
    """

    ids_N: Ids
    classes_N: NDArray[np.int64]
    bytes_N: NDArray[np.uint64]
    pixels_N: NDArray[np.uint64]
    phashes_N: NDArray[np.uint64]
    is_center_N: NDArray[np.bool_]
    numbers: Mapping[str, NDArray[np.float32]]

    @classmethod
    def read(cls, engine: QueryEngine, statement: str, names: Sequence[str], labels: Labels) -> Self:
        """Rows of a statement, whose columns are as the attributes; ``names`` are those of ``numbers``."""
        kinds: list[Any] = [np.uint64, np.uint64, np.uint64, np.bool_, *[np.float32] * len(names)]
        parts: list[list[NDArray[Any]]] = [[np.zeros(0, kind)] for kind in ("S32", np.int64, *kinds)]
        for batch in engine.reader(statement):
            parts[0].append(as_ids(batch.column(0)))
            parts[1].append(labels.of(batch.column(1)))
            for part, column, kind in zip(parts[2:], batch.columns[2:], kinds, strict=True):
                part.append(column.to_numpy(zero_copy_only=False).astype(kind))
        columns = [np.concatenate(part) for part in parts]
        return cls(
            ids_N=columns[0],
            classes_N=columns[1],
            bytes_N=columns[2],
            pixels_N=columns[3],
            phashes_N=columns[4],
            is_center_N=columns[5],
            numbers=dict(zip(names, columns[6:], strict=True)),
        )

    def same_as(self, references: Images) -> NDArray[np.bool_]:
        """Where the bytes or the pixels are those of a reference, bool (N,)."""
        same_bytes_N = (self.bytes_N != 0) & np.isin(self.bytes_N, references.bytes_N)
        same_pixels_N = (self.pixels_N != 0) & np.isin(self.pixels_N, references.pixels_N)
        return np.asarray(same_bytes_N | same_pixels_N)


@dataclass(frozen=True)
class Covered:
    """The candidates that have a vector.

    Attributes:
        coverage: their vectors, and how the references cover them.
        indices_M: number of each among the candidates.
        rows_N: of each candidate in ``coverage``; -1 without a vector.
    """

    coverage: Coverage
    indices_M: NDArray[np.int64]
    rows_N: NDArray[np.int64]

    @classmethod
    def read(
        cls,
        vectors: Vectors,
        candidates: Images,
        references: Images,
        *,
        rule: NearRule,
        num: int,
        order_N: NDArray[np.int64],
    ) -> Self | None:
        """Read the candidates' vectors, then compare them with those of the references; None if no candidate has one.

        Args:
            vectors: of a task and model.
            candidates: whose vectors are kept.
            references: whose vectors are compared with them.
            rule: what a near-duplicate is.
            num: how many candidates may be chosen, at most.
            order_N: the candidate with the smallest number here comes first while nothing is covered.
        """
        num_candidates = len(candidates.ids_N)
        has_vector_N = np.zeros(num_candidates + 1, dtype=np.bool_)
        for image_ids in vectors.ids():
            has_vector_N[positions(candidates.ids_N, image_ids)] = True  # others have -1: the last place
        indices_M = np.flatnonzero(has_vector_N[:-1])
        if not indices_M.size:
            return None
        rows_N = np.full(num_candidates, -1, dtype=np.int64)
        rows_N[indices_M] = np.arange(len(indices_M))
        vectors_MD: Floats = np.zeros((0, 0), dtype=np.float32)
        known_RD: Floats = vectors_MD
        known_R = np.zeros(len(references.ids_N), dtype=np.bool_)
        for image_ids, batch_ND in vectors.stream():
            if not vectors_MD.size:
                vectors_MD = _room(len(indices_M), batch_ND.shape[1])
                known_RD = _room(len(known_R), batch_ND.shape[1])
            indices = positions(candidates.ids_N, image_ids)
            found = np.flatnonzero(indices >= 0)
            vectors_MD[rows_N[indices[found]]] = batch_ND[found]
            indices = positions(references.ids_N, image_ids)
            found = np.flatnonzero(indices >= 0)
            known_RD[indices[found]] = batch_ND[found]
            known_R[indices[found]] = True
        phashes_M, start = candidates.phashes_N[indices_M], int(order_N[indices_M].argmin())
        coverage = Coverage(vectors_MD, phashes_M, rule, num=num, start=start)
        known = np.flatnonzero(known_R)
        for first in range(0, len(known), BLOCK_ROWS):
            block = known[first : first + BLOCK_ROWS]
            coverage.refer(known_RD[block], references.phashes_N[block], references.is_center_N[block])
        return cls(coverage, indices_M, rows_N)


def _room(num: int, num_dimensions: int) -> NDArray[np.float32]:
    """An array for the vectors; beyond 4 GB in a temporary file, which goes away with the array."""
    if num * num_dimensions * 4 <= _IN_MEMORY_BYTES:
        return np.empty((num, num_dimensions), dtype=np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=(num, num_dimensions))
