"""The labels that a training learns from: which images, checked, and kept with the run so that it can be repeated."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from winnow.errors import CallError
from winnow.splits import SPLITS
from winnow_jobs.vectors import quoted

if TYPE_CHECKING:
    from winnow.config import TaskConfig
    from winnow_connectors.query import QueryEngine

LABELS = "labels.parquet"
"""Where a training keeps its labels, in the folder of its run."""

UNLABELLED = "unlabelled.parquet"
"""And images without labels that it looks at."""

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("version", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("split", pa.string()),
        pa.field("group", pa.string()),
        pa.field("label", pa.string()),
        pa.field("value", pa.string()),
    ]
)

_LABELLED = """
SELECT i.image_id, i.uri, i.version, i.size, i.split, i."group", l.label, l.value,
    coalesce(i.parent, i.image_id) AS original, i.parent IS NOT NULL AS is_copy,
    i.audit OR coalesce(l.audit, false) AS audit, i.image_id IN (SELECT image_id FROM quarantined) AS leaking
FROM current_labels AS l JOIN current_images AS i USING (image_id)
WHERE l.task = {task}
ORDER BY i.image_id
"""


_UNLABELLED = """
SELECT image_id, uri, version, size FROM current_images
WHERE split = 'train' AND parent IS NULL AND NOT audit AND image_id NOT IN (SELECT image_id FROM quarantined)
    AND image_id NOT IN (SELECT image_id FROM current_labels WHERE audit)
ORDER BY image_id LIMIT {limit}
"""


def measured_sql(task: str, config: TaskConfig) -> str:
    """SQL: the images that models of a task are measured on, those of the test split that training measures on too.

    Current originals with a person's or imported label, outside the audit reserve; columns of ``current_images``, and
    ``label`` and ``value``.
    """
    said = "l.label IS NOT NULL"
    if config.kind == "segmentation":
        said = "l.value IS NOT NULL"
    elif config.multiple_choice:
        said = f"({said} OR json_exists(l.value, '$.choices'))"
    return f"""
        SELECT i.*, l.label, l.value FROM current_labels AS l JOIN current_images AS i USING (image_id)
        WHERE l.task = {quoted(task)} AND {said} AND i.split = 'test' AND i.parent IS NULL
            AND NOT (i.audit OR coalesce(l.audit, false)) AND i.image_id NOT IN (SELECT image_id FROM quarantined)"""


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images of the three splits.

    Attributes:
        rows: of ``SCHEMA``, in the order of image ids.
        num_unsure: labels without a class or mask, which were left out.
        num_leaking: images left out because a near-duplicate of theirs lies in a split that measures.
    """

    rows: pa.Table
    num_unsure: int = 0
    num_leaking: int = 0

    def digest(self) -> str:
        """Hex digest of image ids, splits and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows.select(["image_id", "split", "label", "value"]).to_pylist():
            digest.update(json.dumps(list(row.values())).encode() + b"\n")
        return digest.hexdigest()

    def counts(self) -> dict[str, dict[str, int]]:
        """Labels by split and class."""
        found: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        for split, label in zip(self.rows["split"].to_pylist(), self.rows["label"].to_pylist(), strict=True):
            found[split][label] += 1
        return {split: dict(sorted(counter.items())) for split, counter in found.items()}

    def of(self, split: str) -> pa.Table:
        """Rows of one split."""
        return self.rows.filter(pc.equal(self.rows["split"], split))

    def to_parquet(self) -> bytes:
        return to_parquet(self.rows)

    @classmethod
    def from_parquet(cls, data: bytes) -> LabelledImages:
        return cls(from_parquet(data).cast(SCHEMA))


def to_parquet(rows: pa.Table) -> bytes:
    """A Parquet file of these rows."""
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes) -> pa.Table:
    """What ``to_parquet`` wrote."""
    return pq.read_table(pa.BufferReader(data))


def labelled_images(
    engine: QueryEngine, task: str, config: TaskConfig, *, limit: int | None = None, seed: int = 0
) -> LabelledImages:
    """The current labels of a task, of images that are still there, without those of the audit reserve.

    Of augmented copies only those of the train split count: nothing is measured on them.

    Args:
        engine: SQL over the warehouse.
        task: its name.
        config: its kind and classes.
        limit: at most this many labelled originals of the train split, drawn by hash; a larger limit only adds some.
        seed: of the drawing.

    Raises:
        CallError: no label at all, or labels that are no class of the task.
    """
    found = engine.sql(_LABELLED.format(task=quoted(task)))
    found = found.filter(pc.invert(found["audit"]))
    if not found.num_rows:
        raise CallError(
            f"no image has a label for {task}; bring labels in with the images (`winnow ingest … --pattern "
            "'{label}/*'`, or a manifest with the column label or mask)"
        )
    found = found.filter(pc.or_(pc.equal(found["split"], "train"), pc.invert(found["is_copy"])))
    if config.multiple_choice:
        said = [classes_said(*pair) is not None for pair in zip(*(found[c].to_pylist() for c in _SAID), strict=True)]
        sure = found.filter(pa.array(said, pa.bool_()))
    else:
        sure = found.filter(pc.is_valid(found["value" if config.kind == "segmentation" else "label"]))
    rows = sure.filter(pc.invert(sure["leaking"]))
    if config.kind == "classification":
        _check_known(rows, task, config)
    if limit is not None:
        rows = _draw(rows, limit, seed)
    return LabelledImages(
        rows=rows.select(SCHEMA.names).cast(SCHEMA).combine_chunks(),
        num_unsure=found.num_rows - sure.num_rows,
        num_leaking=sure.num_rows - int(pc.sum(pc.invert(sure["leaking"])).as_py() or 0),
    )


def unlabelled_images(engine: QueryEngine, labels: LabelledImages, most: int) -> pa.Table:
    """Originals of the train split whose label a training does not use, without those of the audit reserve.

    Args:
        engine: SQL over the warehouse.
        labels: those that are used.
        most: images of train and val in all: none when so many are labelled.

    Returns:
        image_id, uri, version and size, in the order of image ids, which is a random one.
    """
    known = labels.rows["image_id"].combine_chunks()
    wanted = max(0, most - labels.of("train").num_rows - labels.of("val").num_rows)
    found = engine.sql(_UNLABELLED.format(limit=wanted + len(known) if wanted else 0))
    return found.filter(pc.invert(pc.is_in(found["image_id"], value_set=known))).slice(0, wanted).combine_chunks()


_SAID = ("label", "value")


def classes_said(label: str | None, value: str | None) -> list[str] | None:
    """The classes of an image where it may have several; None when its label says none at all, such as "unsure".

    Args:
        label: of the table ``labels``: the class, where a person chose exactly one.
        value: the answer as JSON otherwise: ``{"choices": […]}``, which may be empty.
    """
    if label is not None:
        return [label]
    try:
        content = json.loads(value or "null")
    except (ValueError, RecursionError):
        return None
    choices = content.get("choices") if isinstance(content, dict) else None
    return [str(name) for name in choices] if isinstance(choices, list) else None


def _check_known(rows: pa.Table, task: str, config: TaskConfig) -> None:
    """Every label is a class.

    Raises:
        CallError: it is not; or the task has no classes.
    """
    counts = Counter(
        name
        for label, value in zip(rows["label"].to_pylist(), rows["value"].to_pylist(), strict=True)
        for name in ((classes_said(label, value) or []) if config.multiple_choice else [label])
    )
    if config.classes is None:
        names = json.dumps(sorted(counts), ensure_ascii=False)
        raise CallError(
            f"tasks.{task} has no classes, and the trained head needs them in an order; add to [tasks.{task}] in "
            f"winnow.toml: classes = {names if len(names) < 2000 else names[:2000] + ' …'}"
        )
    unknown = sorted((name for name in counts if name not in config.classes), key=lambda name: -counts[name])
    if unknown:
        shown = ", ".join(f"{name!r} ({counts[name]:,})" for name in unknown[:5])
        raise CallError(
            f"{sum(counts[name] for name in unknown):,} labels are no class of {task}: {shown}"
            f"{', …' if len(unknown) > 5 else ''}; add them to tasks.{task}.classes in winnow.toml, or correct them"
        )


def _draw(rows: pa.Table, limit: int, seed: int) -> pa.Table:
    """All rows of val and test; of train, ``limit`` originals and their copies."""
    is_train = pc.equal(rows["split"], "train")
    originals = rows.filter(pc.and_(is_train, pc.invert(rows["is_copy"])))["image_id"].to_pylist()
    ordered = sorted(originals, key=lambda image_id: hashlib.blake2b(f"{seed} {image_id}".encode()).digest())
    drawn = pc.is_in(rows["original"], value_set=pa.array(ordered[:limit], pa.string()))
    return rows.filter(pc.or_(pc.invert(is_train), drawn))
