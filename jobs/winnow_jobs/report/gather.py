"""What the tables say, as plain numbers: everything is added up by SQL, so that memory does not grow with the images.

Labels of the audit reserve are never read here: what they say was said by a look of ``winnow accept``, which was paid
for, and is taken from there. No image of the reserve is shown either, because people answer them blind.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from winnow import __version__
from winnow.audit import AuditStatistics, CurvePoint, Share
from winnow.errors import FAILURE_KINDS, WinnowError
from winnow.intervals import wilson
from winnow.masks import BACKGROUNDS
from winnow.models.cards import BASE
from winnow_jobs.accept import newest_answers, statistics_of
from winnow_jobs.review import FINISHED, reviewed_tasks
from winnow_jobs.review_status import status_of
from winnow_jobs.vectors import quoted

if TYPE_CHECKING:
    from winnow.config import Kind
    from winnow.evaluation import Slice
    from winnow_connectors.query import QueryEngine
    from winnow_connectors.registry import Version
    from winnow_jobs.review_status import ReviewStatus
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

NUM_RUNS = 12
NUM_PICTURES = 12
NUM_CLASSES = 40
NUM_MISTAKES = 12
NUM_EXAMPLES = 3
NUM_LOOKS = 8

_STEPS = 200
"""Steps of confidence in which images are counted."""

_BINS = 15
"""Of the calibration plot."""

_TELLING = frozenset({"folder", "source", "group"})
"""Columns whose values are names of folders or people's own."""


@dataclass(frozen=True)
class RunRow:
    """One run, with its verdict in a sentence."""

    run_id: str
    job: str
    status: str
    started_at: datetime
    num_asked: int | None
    num_failed: int | None
    verdict: str


@dataclass(frozen=True)
class Failure:
    """Images that failed for one reason.

    Attributes:
        stage, error: as in ``outcomes``.
        meaning: of the error, in words.
        num_images: that failed so.
        examples: ids of some of them, the lowest.
    """

    stage: str
    error: str
    meaning: str
    num_images: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationBin:
    """Images of like confidence: their mean confidence, and how many answers are right."""

    confidence: float
    right: Share


@dataclass(frozen=True)
class ClassRow:
    """How one class fares on the images of the test split."""

    name: str
    num_labelled: int
    num_answered: int
    num_right: int


@dataclass(frozen=True)
class Measured:
    """A classification model against the labels of the test split.

    Attributes:
        accuracy: share of right answers.
        calibration: bins that hold images, the lowest first.
        ece: expected calibration error.
        curve: error against coverage.
        classes: the most frequent first.
        cells: images by label and answer; None stands for every class that is not among ``names``.
        names: classes of the confusion matrix, as winnow.toml has them, then by name.
        mistakes: label, answer, images; the most frequent first.
    """

    accuracy: Share
    calibration: tuple[CalibrationBin, ...]
    ece: float
    curve: tuple[CurvePoint, ...]
    classes: tuple[ClassRow, ...]
    cells: Mapping[tuple[str | None, str | None], int]
    names: tuple[str, ...]
    mistakes: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Look:
    """One look at the audit, as it was said then."""

    number: int
    at: datetime
    model: str
    verdict: str
    statistics: AuditStatistics | None


@dataclass(frozen=True)
class EpochPoint:
    """One epoch of ``winnow train``: losses in nats per image or pixel, and the score on val; None without val."""

    epoch: int
    train_loss: float
    val_loss: float | None
    val_score: float | None


@dataclass(frozen=True)
class ModelPoint:
    """A model version as its card has it.

    Attributes:
        name: ``<task>@<n>``.
        num_labels: images that it learned from.
        measure: ``accuracy`` or ``mean IoU``.
        split: that it was measured on: ``test``, else ``val``.
        value: None when it was measured on no image.
        num_measured: images.
        low, high: 95 % interval of an accuracy.
        classes: score by class: F1 or IoU.
        production: it answers now.
        epochs: how a whole network was trained; empty for a head.
        best_epoch: whose weights these are; 0 for a head.
    """

    name: str
    num_labels: int
    measure: str
    split: str
    value: float | None
    num_measured: int
    low: float | None
    high: float | None
    classes: Mapping[str, float | None]
    production: bool
    epochs: tuple[EpochPoint, ...] = ()
    best_epoch: int = 0


@dataclass(frozen=True)
class Picture:
    """An image to be shown, and what the model answered."""

    image_id: str
    uri: str
    version: str
    size: int | None
    label: str
    confidence: float
    segments: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True)
class TaskReport:
    """All about one task.

    Attributes:
        name, kind: of the task.
        classes: as configured.
        production: version in production.
        model: whose answers are shown: of production if it has answered, else the newest; None without answers.
        num_answered: current originals that it has answered.
        labels: labelled images by split, the audit reserve left out.
        histogram: images by confidence, in 20 steps.
        measured: on the test split; None without labels there, and for masks.
        looks: at the audit, the newest first.
        slices: of the test images, the worst first; None when they cannot be told.
        versions: the oldest first.
        least, most: the images that the model is least and most certain of.
        review: None when nothing was ever queued.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    production: str
    model: str | None
    num_answered: int
    labels: Mapping[str, int]
    histogram: tuple[int, ...]
    measured: Measured | None
    looks: tuple[Look, ...]
    slices: tuple[Slice, ...] | None
    versions: tuple[ModelPoint, ...]
    least: tuple[Picture, ...] = ()
    most: tuple[Picture, ...] = ()
    review: ReviewStatus | None = None

    @property
    def answers_are_of_production(self) -> bool:
        return self.model is not None and is_of(self.model, self.production)


@dataclass(frozen=True)
class Report:
    """All that a page shows.

    Attributes:
        name: of the workspace's folder.
        made_at: UTC.
        code_version: of Winnow.
        splits: current originals by split, the audit reserve left out.
        num_audit: images of the reserve.
        num_copies: augmented copies.
        num_failed: images that failed.
        failures: by reason, the most frequent first.
        runs: the newest first.
        num_runs: all that there are.
        tasks: in the order of winnow.toml.
    """

    name: str
    made_at: datetime
    code_version: str
    splits: Mapping[str, int]
    num_audit: int
    num_copies: int
    num_failed: int
    failures: tuple[Failure, ...]
    runs: tuple[RunRow, ...]
    num_runs: int
    tasks: tuple[TaskReport, ...] = field(default=())

    @property
    def num_images(self) -> int:
        return sum(self.splits.values()) + self.num_audit


def gather(workspace: Workspace, tasks: Sequence[str] = ()) -> Report:
    """Ask the tables.

    Args:
        workspace: configuration and warehouse.
        tasks: only these; all but embeddings by default.

    Raises:
        CallError: no such task, or one of embeddings; no warehouse.
    """
    config = workspace.config
    reviewed = [name for name, task in config.tasks.items() if task.kind != "embedding"]
    names = [name for each in dict.fromkeys(tasks) for name in reviewed_tasks(workspace, each)] or reviewed
    workspace.warehouse.check()
    runs = workspace.runs()
    engine = workspace.query_engine()
    images = engine.sql(
        "SELECT split, audit, parent IS NOT NULL AS copy, count(*) AS num FROM current_images GROUP BY ALL"
    ).to_pylist()
    originals = [row for row in images if not row["copy"]]
    failures = _failures(engine, tasks)
    return Report(
        name=workspace.folder.name,
        made_at=datetime.now(UTC),
        code_version=__version__,
        splits={
            split: sum(row["num"] for row in originals if row["split"] == split and not row["audit"])
            for split in ("train", "val", "test")
        },
        num_audit=sum(row["num"] for row in originals if row["audit"]),
        num_copies=sum(row["num"] for row in images if row["copy"]),
        num_failed=sum(each.num_images for each in failures),
        failures=failures,
        runs=tuple(_run(row) for row in runs.slice(0, NUM_RUNS).to_pylist()),
        num_runs=runs.num_rows,
        tasks=tuple(_task(workspace, engine, name) for name in names),
    )


def is_of(model: str, version: str) -> bool:
    """Whether answers, by their column ``model``, are of a version: alone, or the mean over its augmented views."""
    task, _, number = version.partition("@")
    if number == BASE:
        return not model.startswith(f"{task}@")
    return model == version or model.startswith(f"{version}+")


def _run(row: Mapping[str, Any]) -> RunRow:
    verdict = row["verdict"] or ""
    if row["status"] not in ("finished", "open"):  # the reason may name files
        verdict = f"given up, nothing of it counts; `winnow runs show {row['run_id']}` says why"
    columns = ("run_id", "job", "status", "started_at", "num_asked", "num_failed")
    return RunRow(**{name: row[name] for name in columns}, verdict=verdict)


def _failures(engine: QueryEngine, tasks: Sequence[str]) -> tuple[Failure, ...]:
    of_tasks = f"AND task IN ({', '.join(map(quoted, tasks))})" if tasks else ""
    rows = engine.sql(
        f"""
        SELECT stage, error, count(DISTINCT image_id) AS num_images, min(DISTINCT image_id, {NUM_EXAMPLES}) AS examples
        FROM failures WHERE current {of_tasks} GROUP BY stage, error ORDER BY num_images DESC, error
        """
    ).to_pylist()
    return tuple(
        Failure(
            stage=row["stage"] or "",
            error=row["error"] or "",
            meaning=FAILURE_KINDS[row["error"]].meaning if row["error"] in FAILURE_KINDS else "",
            num_images=row["num_images"],
            examples=tuple(row["examples"]),
        )
        for row in rows
    )


# ----------------------------------------------------------------------------------------------------------- one task


def _task(workspace: Workspace, engine: QueryEngine, name: str) -> TaskReport:
    config = workspace.config.tasks[name]
    registry = workspace.warehouse.registry
    production = registry.production(name)
    model = _shown_model(engine, name, config.kind, production)
    cells = [] if model is None else _cells(engine, name, config.kind, model)
    least, most = ((), ()) if model is None else _pictures(engine, name, config.kind, model)
    labels = _labels(engine, name)
    is_class = config.kind == "classification"
    return TaskReport(
        name=name,
        kind=config.kind,
        classes=tuple(config.classes or ()),
        production=production,
        model=model,
        num_answered=sum(cell.num for cell in cells),
        labels=labels,
        histogram=_histogram(cells),
        measured=_measured(engine, name, model, config.classes or (), cells)
        if is_class and model is not None
        else None,
        looks=_looks(workspace, engine, name) if is_class else (),
        slices=_slices(workspace, name) if model is not None and labels.get("test") else (),
        versions=tuple(_point(version) for version in reversed(registry.versions(name))),
        least=least,
        most=most,
        review=_review(engine, name),
    )


def _shown_model(engine: QueryEngine, task: str, kind: Kind, production: str) -> str | None:
    table = "segments" if kind == "segmentation" else "predictions"
    rows = engine.sql(
        f"""
        WITH finished AS (SELECT run_id AS run, finished_at FROM runs WHERE status = 'finished')
        SELECT model FROM {table} JOIN finished USING (run) WHERE task = {quoted(task)}
        GROUP BY model ORDER BY max(finished_at) DESC, model
        """
    )
    models: list[str] = rows["model"].to_pylist()
    return next((model for model in models if is_of(model, production)), models[0] if models else None)


def _answers(task: str, kind: Kind, model: str) -> str:
    """SQL: image_id, label and confidence; of masks the largest class that is no background, and the mean by area."""
    if kind == "classification":
        return newest_answers(task, model)
    grounds = ", ".join(map(quoted, sorted(BACKGROUNDS)))
    return f"""
        SELECT image_id, coalesce(arg_max(label, area_share) FILTER (label NOT IN ({grounds})), min(label)) AS label,
            sum(area_share::DOUBLE * confidence) AS confidence
        FROM ({_segments(task, model)}) GROUP BY image_id"""


def _segments(task: str, model: str) -> str:
    """SQL: the segments of the model's newest answer to every image."""
    return f"""
        SELECT image_id, label, area_share, confidence, rle
        FROM segments JOIN (SELECT run_id AS run, finished_at FROM runs WHERE status = 'finished') USING (run)
        WHERE task = {quoted(task)} AND model = {quoted(model)}
        QUALIFY rank() OVER (PARTITION BY image_id ORDER BY finished_at DESC, run) = 1"""


def _tested(task: str) -> str:
    """SQL: labels of test images. Those of the audit reserve stay unseen."""
    return f"""
        SELECT image_id, l.label AS said FROM current_labels AS l JOIN current_images AS i USING (image_id)
        WHERE l.task = {quoted(task)} AND l.label IS NOT NULL AND NOT coalesce(l.audit, false)
            AND i.split = 'test' AND NOT i.audit AND i.parent IS NULL"""


@dataclass(frozen=True)
class _Cell:
    """Images of like confidence and outcome: ``right`` is None where nobody said what is right, or only the audit."""

    step: int
    bin: int
    right: bool | None
    num: int
    confidence: float


def _cells(engine: QueryEngine, task: str, kind: Kind, model: str) -> list[_Cell]:
    tested = _tested(task) if kind == "classification" else "SELECT NULL::VARCHAR AS image_id, NULL::VARCHAR AS said"
    rows = engine.sql(
        f"""
        SELECT least(floor(a.confidence::FLOAT * {_STEPS}::FLOAT)::INTEGER, {_STEPS}) AS step,
            greatest(least(ceil(a.confidence * {_BINS})::INTEGER, {_BINS}) - 1, 0) AS bin,
            a.label = t.said AS right, count(*) AS num, sum(a.confidence::DOUBLE) AS confidence
        FROM ({_answers(task, kind, model)}) AS a SEMI JOIN (FROM current_images WHERE parent IS NULL) USING (image_id)
            LEFT JOIN ({tested}) AS t USING (image_id)
        GROUP BY ALL
        """
    ).to_pylist()
    return [_Cell(**row) for row in rows]


def _histogram(cells: Sequence[_Cell]) -> tuple[int, ...]:
    counts = [0] * 20
    for cell in cells:
        counts[min(max(cell.step, 0) * 20 // _STEPS, 19)] += cell.num
    return tuple(counts)


def _measured(
    engine: QueryEngine, task: str, model: str, order: Sequence[str], cells: Sequence[_Cell]
) -> Measured | None:
    known = [cell for cell in cells if cell.right is not None]
    num = sum(cell.num for cell in known)
    if not num:
        return None
    bins, gap = [], 0.0
    for number in sorted({cell.bin for cell in known}):
        inside = [cell for cell in known if cell.bin == number]
        num_inside = sum(cell.num for cell in inside)
        confidence = sum(cell.confidence for cell in inside) / num_inside
        right = _share(sum(cell.num for cell in inside if cell.right), num_inside)
        bins.append(CalibrationBin(confidence, right))
        gap += abs(confidence * num_inside - right.num_hits)
    curve: dict[int, CurvePoint] = {}
    for step in range(_STEPS, -1, -1):
        kept = [cell for cell in known if cell.step >= step]
        num_kept = sum(cell.num for cell in kept)
        if num_kept:
            wrong = sum(cell.num for cell in kept if not cell.right)
            curve[num_kept] = CurvePoint(step / _STEPS, num_kept / num, _share(wrong, num_kept))
    rows = engine.sql(
        f"""
        WITH pairs AS MATERIALIZED (
            SELECT said, label FROM ({_tested(task)}) JOIN ({newest_answers(task, model)}) USING (image_id)
        ),
        names AS (
            SELECT name, sum(num) AS num
            FROM (SELECT said AS name, 2 AS num FROM pairs UNION ALL SELECT label, 1 FROM pairs)
            GROUP BY name ORDER BY num DESC, name LIMIT {NUM_CLASSES}
        ),
        cells AS (
            SELECT if(said IN (SELECT name FROM names), said, NULL) AS said,
                if(label IN (SELECT name FROM names), label, NULL) AS label FROM pairs
        )
        SELECT 'cell' AS part, said, label, count(*) AS num FROM cells GROUP BY ALL
        UNION ALL SELECT 'name', name, NULL, num::BIGINT FROM names
        UNION ALL (
            SELECT 'mistake', said, label, count(*) AS num FROM pairs WHERE said != label
            GROUP BY ALL ORDER BY num DESC, said, label LIMIT {NUM_MISTAKES}
        )
        UNION ALL SELECT 'labelled', said, NULL, count(*) FROM pairs GROUP BY ALL
        UNION ALL SELECT 'answered', label, NULL, count(*) FROM pairs GROUP BY ALL
        UNION ALL SELECT 'right', said, NULL, count(*) FROM pairs WHERE said = label GROUP BY ALL
        """
    ).to_pylist()

    def part(name: str) -> list[dict[str, Any]]:
        of_part = [row for row in rows if row["part"] == name]
        return sorted(of_part, key=lambda row: (-row["num"], row["said"] or "", row["label"] or ""))

    labelled, answered, found = (
        {row["said"]: row["num"] for row in part(name)} for name in ("labelled", "answered", "right")
    )
    places = {name: place for place, name in enumerate(order)}
    every = sorted(labelled.keys() | answered.keys(), key=lambda name: (-labelled.get(name, 0), name))
    return Measured(
        accuracy=_share(sum(cell.num for cell in known if cell.right), num),
        calibration=tuple(bins),
        ece=gap / num,
        curve=tuple(curve.values()),
        classes=tuple(
            ClassRow(name, labelled.get(name, 0), answered.get(name, 0), found.get(name, 0)) for name in every
        ),
        cells={(row["said"], row["label"]): row["num"] for row in part("cell")},
        names=tuple(
            sorted((row["said"] for row in part("name")), key=lambda name: (places.get(name, len(places)), name))
        ),
        mistakes=tuple((row["said"], row["label"], row["num"]) for row in part("mistake")),
    )


def _share(num_hits: int, num: int) -> Share:
    """With the interval that cards and ``winnow evaluate`` give; that of the audit is exact instead."""
    return Share(num, num_hits, num_hits / num if num else None, *wilson(num_hits, num))


def _labels(engine: QueryEngine, task: str) -> dict[str, int]:
    rows = engine.sql(
        f"""
        SELECT i.split, count(*) AS num FROM current_labels AS l JOIN current_images AS i USING (image_id)
        WHERE l.task = {quoted(task)} AND NOT coalesce(l.audit, false) AND NOT i.audit AND i.parent IS NULL
            AND (l.label IS NOT NULL OR l.value IS NOT NULL)
        GROUP BY ALL
        """
    ).to_pylist()
    return {row["split"]: row["num"] for row in rows}


def _looks(workspace: Workspace, engine: QueryEngine, task: str) -> tuple[Look, ...]:
    rows = engine.sql(
        f"""
        SELECT run_id, config, counts, finished_at, verdict FROM runs
        WHERE job = 'accept' AND status = 'finished' AND list_contains(tasks, {quoted(task)})
        ORDER BY finished_at DESC LIMIT {NUM_LOOKS}
        """
    ).to_pylist()
    return tuple(
        Look(
            number=dict(row["counts"])["look"],
            at=row["finished_at"],
            model=json.loads(row["config"])["model"],
            verdict=row["verdict"],
            statistics=statistics_of(workspace, row["run_id"]),
        )
        for row in rows
    )


def _slices(workspace: Workspace, task: str) -> tuple[Slice, ...] | None:
    """The worst slices of the test images. Names of folders are left out: they may tell more than a report should."""
    from winnow_jobs.evaluate import slices

    try:
        found = slices(workspace, task)
    except WinnowError:
        logger.warning("the slices of %s cannot be told", task, exc_info=True)
        return None
    return tuple(each for each in found if each.column not in _TELLING)


def _point(version: Version) -> ModelPoint:
    metrics = version.metrics
    split = "test" if metrics.get("test", {}).get("n") else "val"
    found: dict[str, Any] = metrics.get(split, {})
    num = int(found.get("n") or 0)
    accuracy, mean_iou = found.get("accuracy"), found.get("mean_iou")
    share = None if accuracy is None else _share(round(accuracy * num), num)
    key = "f1" if accuracy is not None else "iou"
    return ModelPoint(
        name=version.name,
        num_labels=int(metrics.get("train", {}).get("n") or 0),
        measure="mean IoU" if mean_iou is not None else "accuracy",
        split=split,
        value=accuracy if accuracy is not None else mean_iou,
        num_measured=num,
        low=None if share is None else share.low,
        high=None if share is None else share.high,
        classes={name: row.get(key) for name, row in (found.get("classes") or {}).items()},
        production=version.production,
        epochs=tuple(_epoch(row) for row in metrics.get("fit", {}).get("curve") or ()),
        best_epoch=int(metrics.get("fit", {}).get("best_epoch") or 0),
    )


def _epoch(row: Mapping[str, Any]) -> EpochPoint:
    scores = [value for key, value in row.items() if key.startswith("val_") and key != "val_loss"]
    return EpochPoint(row["epoch"], row["train_loss"], row.get("val_loss"), scores[0] if scores else None)


def _pictures(
    engine: QueryEngine, task: str, kind: Kind, model: str
) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """The images that the model is least and most certain of; of equals those of the lowest id, which is a hash."""
    rows = engine.sql(
        f"""
        WITH shown AS MATERIALIZED (
            SELECT image_id, i.uri, i.version, i.size, a.label, a.confidence::DOUBLE AS confidence
            FROM ({_answers(task, kind, model)}) AS a JOIN current_images AS i USING (image_id)
            WHERE i.parent IS NULL AND NOT i.audit
        )
        (SELECT 'least' AS part, * FROM shown ORDER BY confidence, image_id LIMIT {NUM_PICTURES})
        UNION ALL (SELECT 'most', * FROM shown ORDER BY confidence DESC, image_id LIMIT {NUM_PICTURES})
        """
    ).to_pylist()
    segments: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    if kind == "segmentation" and rows:
        ids = ", ".join(quoted(row["image_id"]) for row in rows)
        found = engine.sql(
            f"SELECT image_id, label, rle FROM ({_segments(task, model)}) WHERE image_id IN ({ids}) ORDER BY label"
        )
        for row in found.to_pylist():
            segments.setdefault(row["image_id"], []).append((row["label"], row["rle"]))
    parts: dict[str, dict[str, Picture]] = {"least": {}, "most": {}}
    for row in rows:
        part, image_id = row.pop("part"), row["image_id"]
        parts[part][image_id] = Picture(**row, segments=tuple(segments.get(image_id, ())))
    most = [each for image_id, each in parts["most"].items() if image_id not in parts["least"]]
    return (
        tuple(sorted(parts["least"].values(), key=lambda each: (each.confidence, each.image_id))),
        tuple(sorted(most, key=lambda each: (-each.confidence, each.image_id))),
    )


def _review(engine: QueryEngine, task: str) -> ReviewStatus | None:
    rows = engine.sql(
        f"WITH {FINISHED} SELECT 1 FROM queue SEMI JOIN finished USING (run) WHERE task = {quoted(task)} LIMIT 1"
    )
    return status_of(engine, task) if rows.num_rows else None
