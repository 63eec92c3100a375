"""Arrow schema of every table. Tables are append-only events; what is current is a view.

Times are UTC microseconds. ``run`` is the ``run_id`` of the run that wrote the row.
"""

from __future__ import annotations

import pyarrow as pa

FORMAT_VERSION = 3
"""Version of the warehouse layout, kept in ``warehouse.json``."""

_TIME = pa.timestamp("us", tz="UTC")
_STRINGS = pa.map_(pa.string(), pa.string())


def _schema(**columns: pa.DataType) -> pa.Schema:
    """Columns in order; a name that ends in ``_`` loses it and is required (not null)."""
    return pa.schema(
        [pa.field(name.removesuffix("_"), kind, nullable=not name.endswith("_")) for name, kind in columns.items()]
    )


SCORED_LABEL = pa.struct([pa.field("label", pa.string()), pa.field("score", pa.float32())])
"""One entry of ``predictions.top5``."""

RLE = pa.struct([pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.string())])
"""A mask as COCO's compressed run-length encoding: size [height, width] and counts; see ``winnow.masks``."""

TABLES: dict[str, pa.Schema] = {
    # event: added, changed (a new version of a known uri), replaced (its former version), vanished
    "images": _schema(
        image_id_=pa.string(),
        seen_at_=_TIME,
        event_=pa.string(),
        uri_=pa.string(),
        version_=pa.string(),
        source_=pa.string(),
        size=pa.int64(),
        last_modified=_TIME,
        split_=pa.string(),
        group_=pa.string(),
        audit_=pa.bool_(),
        parent=pa.string(),
        metadata=_STRINGS,
        run_=pa.string(),
    ),
    # status: answered, failed
    "outcomes": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        model_=pa.string(),
        run_=pa.string(),
        status_=pa.string(),
        stage=pa.string(),
        error=pa.string(),
        message=pa.string(),
        retryable=pa.bool_(),
        sha256=pa.string(),
        num_bytes=pa.int64(),
        format=pa.string(),
        width=pa.int32(),
        height=pa.int32(),
        pixel_hash=pa.string(),
        phash=pa.string(),
        at_=_TIME,
    ),
    "predictions": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        model_=pa.string(),
        run_=pa.string(),
        label_=pa.string(),
        confidence_=pa.float32(),
        margin_=pa.float32(),
        entropy_=pa.float32(),
        top5_=pa.list_(SCORED_LABEL),
        probabilities=pa.list_(pa.float32()),
        classes=pa.list_(pa.string()),
        disagreement=pa.float32(),
        at_=_TIME,
    ),
    "segments": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        model_=pa.string(),
        run_=pa.string(),
        label_=pa.string(),
        area_share_=pa.float32(),
        confidence_=pa.float32(),
        entropy_=pa.float32(),
        disagreement=pa.float32(),
        box_=pa.list_(pa.float32()),
        rle_=RLE,
        at_=_TIME,
    ),
    "embeddings": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        model_=pa.string(),
        run_=pa.string(),
        vector_=pa.list_(pa.float32()),
        at_=_TIME,
    ),
    # kind: bytes, pixels, near; one row per member of a group of two or more
    "duplicates": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        model_=pa.string(),
        group_id_=pa.string(),
        kind_=pa.string(),
        representative_=pa.string(),
        similarity_=pa.float32(),
        hamming=pa.int32(),
        num_images_=pa.int32(),
        run_=pa.string(),
        at_=_TIME,
    ),
    "neighbours": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        model_=pa.string(),
        nearest_=pa.string(),
        similarity_=pa.float32(),
        k_=pa.int32(),
        outlier_score_=pa.float32(),
        run_=pa.string(),
        at_=_TIME,
    ),
    "queue": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        round_=pa.int32(),
        model=pa.string(),
        reason_=pa.string(),
        score=pa.float64(),
        rank_=pa.int64(),
        policy_=pa.string(),
        audit_=pa.bool_(),
        run_=pa.string(),
        at_=_TIME,
    ),
    "pushes": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        round_=pa.int32(),
        server_=pa.string(),
        project_=pa.int64(),
        task_id_=pa.int64(),
        model=pa.string(),
        run_=pa.string(),
        at_=_TIME,
    ),
    # event: created, changed, deleted, skipped, imported; origin: imported, label_studio, consensus
    "labels": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        event_=pa.string(),
        origin_=pa.string(),
        label=pa.string(),
        value=pa.string(),
        sha256=pa.string(),
        server=pa.string(),
        project=pa.int64(),
        annotation_id=pa.int64(),
        annotator=pa.string(),
        seconds=pa.float64(),
        model=pa.string(),
        model_label=pa.string(),
        changed_by_person=pa.bool_(),
        audit=pa.bool_(),
        reason=pa.string(),
        round=pa.int32(),
        updated_at_=_TIME,
        run_=pa.string(),
    ),
    "accepted": _schema(
        image_id_=pa.string(),
        task_=pa.string(),
        model_=pa.string(),
        label=pa.string(),
        threshold_=pa.float64(),
        bound_=pa.float64(),
        audit_snapshot_=pa.string(),
        run_=pa.string(),
        at_=_TIME,
    ),
    # event: made, measured, promoted, rolled_back
    "models": _schema(
        task_=pa.string(),
        version_=pa.string(),
        event_=pa.string(),
        location=pa.string(),
        sha256=pa.string(),
        metrics=pa.string(),
        detail=pa.string(),
        run_=pa.string(),
        at_=_TIME,
    ),
    # status: finished, abandoned, stopped
    "runs": _schema(
        run_id_=pa.string(),
        job_=pa.string(),
        status_=pa.string(),
        started_at_=_TIME,
        finished_at_=_TIME,
        config_=pa.string(),
        digest_=pa.string(),
        code_version_=pa.string(),
        host=pa.string(),
        tasks=pa.list_(pa.string()),
        num_asked=pa.int64(),
        num_answered=pa.int64(),
        num_failed=pa.int64(),
        counts=pa.map_(pa.string(), pa.int64()),
        failures=pa.map_(pa.string(), pa.int64()),
        seconds=pa.map_(pa.string(), pa.float64()),
        images_per_s=pa.float64(),
        peak_memory_bytes=pa.int64(),
        bound_by=pa.string(),
        ceiling_share=pa.float64(),
        verdict=pa.string(),
    ),
}
"""Schema of every table by name."""
