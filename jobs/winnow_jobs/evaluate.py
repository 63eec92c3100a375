"""``winnow evaluate TASK``: a model version against another one, on the same labelled images of the test split.

What is not answered yet is asked by ``predict``, of these images alone; then everything is read from the tables. The
comparison is a run and an event ``measured`` of the version. The same labels and models are compared once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from winnow.errors import CallError, MaskError, StorageError
from winnow.evaluation import (
    MEASURES,
    Comparison,
    Decision,
    Estimate,
    Pixels,
    Slice,
    compare_labels,
    compare_masks,
    cut_slices,
    decide,
    mean_iou,
    right_sets,
    share_right,
    worst_first,
)
from winnow.mask_files import read_label
from winnow.masks import LabelMap, label_map, resize_to_source, unlabelled
from winnow.metrics import confusion
from winnow.models.cards import parse_version
from winnow_connectors.ledger import digest_of
from winnow_jobs.labelled import classes_said, measured_sql
from winnow_jobs.progress import Progress
from winnow_jobs.review import MAX_ATTEMPTS, begin_anew, publish
from winnow_jobs.spec import answerer, views_of
from winnow_jobs.vectors import quoted

if TYPE_CHECKING:
    from winnow.config import TaskConfig
    from winnow.models.references import ResolvedModel
    from winnow_connectors.query import QueryEngine
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

EVALUATOR = 1
"""Raised when the same labels and answers give other figures than before."""

SLICED_BY = ("folder", "source", "format", "width", "height", "size")
"""Columns that are cut without being asked for, beside the keys of the images' metadata."""

_MAX_KEPT = 100
"""Slices that are kept with a comparison, the worst ones."""

_BATCH_IMAGES = 64
_NUM_THREADS = 8


@dataclass(frozen=True)
class EvaluateResult:
    """What a comparison found.

    Attributes:
        status: ``finished``, or ``nothing to do`` when the same was compared before.
        task: what both answer.
        candidate, against: model versions; ``against`` was in production unless it was named.
        run_id: of the comparison.
        labels: digest of the labelled images.
        comparison: the figures.
        decision: whether they are enough to promote the candidate.
        slices: of the candidate, worst first: of the columns asked for, else the worst of all.
        num_left_out: labelled images that could not be compared.
        notes: what is worth knowing, one sentence each.
    """

    status: str
    task: str
    candidate: str
    against: str
    run_id: str
    labels: str
    comparison: Comparison
    decision: Decision
    slices: tuple[Slice, ...]
    num_left_out: int
    notes: tuple[str, ...]


def evaluate(
    workspace: Workspace,
    task: str,
    *,
    candidate: str | None = None,
    against: str | None = None,
    by: Sequence[str] = (),
) -> EvaluateResult:
    """Compare two model versions on the labelled images of the test split.

    Args:
        workspace: configuration and warehouse.
        task: of classification or segmentation.
        candidate: ``<task>@<n>``; the newest version by default.
        against: likewise, or ``<task>@base``; what is in production by default.
        by: columns to cut the images by; see ``slices``.

    Raises:
        CallError: no such task, version or column, the versions are one, or no image of the test split has a label.
        JobError: what ``predict`` raises; or no image could be compared.
    """
    config = _checked_task(workspace, task)
    registry = workspace.warehouse.registry
    if candidate is None:
        versions = registry.versions(task)
        if not versions:
            raise CallError(f"{task} has no model version yet; `winnow train {task} --head` makes one")
        candidate = versions[0].name
    against = against or registry.production(task)
    if candidate == against:
        raise CallError(
            f"{candidate} would be compared with itself; name another version with --candidate or --against; "
            f"`winnow models list --task {task}` shows them"
        )
    new = workspace.task_model(task, candidate)
    old, reason = _baseline(workspace, task, config, against)
    models = [model for model in (new, old) if model is not None]
    names = [answerer(model, views_of(workspace.config, task, model)) for model in models]
    versions_asked = (candidate, against)[: len(models)]
    for _ in range(MAX_ATTEMPTS):
        started = time.monotonic()
        # In this order: what is read below holds all that was measured before the claim.
        numbers = begin_anew(workspace, f"evaluate-{task}")
        engine = workspace.query_engine()
        answers = read_answers(workspace, engine, task, names)
        if answers.num_missing:
            _ask(workspace, task, config, versions_asked)
            continue
        if not answers.images and not answers.num_left_out:
            raise CallError(
                f"no image of the test split has a label for {task}, so nothing can be compared with {against}; label "
                "some (`winnow review push`), or bring labels in with the images (`winnow ingest`)"
            )
        if not answers.images:
            raise CallError(
                f"none of the {answers.num_left_out:,} labelled test images could be read; the view failures says why; "
                "mend that, then `winnow ingest` (where they changed) or `winnow predict --retry-failures`"
            )
        call = {
            "task": task,
            "candidate": names[0],
            "against": names[1] if old is not None else None,
            "labels": answers.digest,
            "evaluator": EVALUATOR,
        }
        known = _known(engine, task, call)
        if known is None:
            comparison = answers.compare()
            detail: dict[str, Any] = {
                "against": against,
                "n": comparison.n,
                "labels": answers.digest,
                "comparison": dataclasses.asdict(comparison),
                "slices": [dataclasses.asdict(each) for each in answers.slices()[:_MAX_KEPT]],
                "left_out": answers.num_left_out,
            }
            row = {"task": task, "version": candidate, "event": "measured", "at": datetime.now(UTC)}
            run_id = publish(
                workspace,
                "evaluate",
                numbers,
                call,
                {"models": [{**row, "detail": json.dumps(detail)}]},
                {
                    "tasks": [task],
                    "counts": {"images": comparison.n, "left_out": answers.num_left_out},
                    "seconds": {"total": round(time.monotonic() - started, 3)},
                    "verdict": _verdict(candidate, against, comparison),
                },
            )
            if run_id is None:
                continue  # another evaluation was faster; look again
        else:
            run_id, detail = known
            comparison = Comparison.from_dict(detail["comparison"])
        kept = [Slice(**each) for each in detail["slices"]]
        return EvaluateResult(
            status="finished" if known is None else "nothing to do",
            task=task,
            candidate=candidate,
            against=against,
            run_id=run_id,
            labels=answers.digest,
            comparison=comparison,
            decision=decide(comparison, workspace.config.promotion),
            slices=tuple(answers.slices(by) if by else kept),
            num_left_out=detail["left_out"],
            notes=tuple(_notes(comparison, detail["left_out"], reason, models, (candidate, against))),
        )
    raise CallError(f"other calls were faster {MAX_ATTEMPTS} times; run the command again when they are done")


def slices(workspace: Workspace, task: str, columns: Sequence[str] | None = None) -> list[Slice]:
    """The score of what answers a task now on each slice of the labelled test images, worst first.

    Only of answers that are in the tables already; none without any.

    Args:
        workspace: configuration and warehouse.
        task: of classification or segmentation.
        columns: ``folder``, ``format``, ``width``, ``height``, ``size``, ``source``, ``group``, ``last_modified``, or
            keys of the images' metadata. By default all in which there are slices to compare.

    Raises:
        CallError: no such task or column.
    """
    config = _checked_task(workspace, task)
    against = workspace.warehouse.registry.production(task)
    model, _ = _baseline(workspace, task, config, against)
    if model is None:
        return []
    name = answerer(model, views_of(workspace.config, task, model))
    answers = read_answers(workspace, workspace.query_engine(), task, [name])
    return answers.slices(columns or ()) if answers.images else []


def _checked_task(workspace: Workspace, task: str) -> TaskConfig:
    config = workspace.config.task(task)
    if config.kind == "embedding":
        raise CallError(f"{task} is an embedding task, whose answers are neither right nor wrong")
    workspace.warehouse.check()
    return config


def _baseline(workspace: Workspace, task: str, config: TaskConfig, against: str) -> tuple[ResolvedModel | None, str]:
    """The model to compare with; None and the reason where it is winnow.toml's and cannot answer the task."""
    if parse_version(against)[1] is not None:
        return workspace.task_model(task, against), ""
    try:
        model = workspace.task_model(task, against)
    except CallError as error:
        return None, f"{against}, the model of winnow.toml, cannot answer {task}: {error.message.partition(';')[0]}"
    if config.kind == "segmentation":
        known = set(config.classes or model.classes)
    else:
        found = workspace.query_engine().sql(f"SELECT DISTINCT label, value FROM ({measured_sql(task, config)})")
        known = {name for row in found.to_pylist() for name in classes_said(row["label"], row["value"]) or ()}
    if known and not known & set(model.classes):
        return None, f"{against}, the model of winnow.toml, knows none of the labels' classes"
    return model, ""


def _ask(workspace: Workspace, task: str, config: TaskConfig, versions: Sequence[str]) -> None:
    """Have every version answer the labelled test images; what is answered already is not asked."""
    from winnow_jobs.predict import Asked, predict

    asked = Asked(where=f"image_id IN (SELECT image_id FROM ({measured_sql(task, config)}))")
    for version in versions:
        result = predict(workspace, [task], asked, versions=[version])
        if result.run_id is not None:
            logger.info("run %s: %s answered %s test images", result.run_id, version, f"{result.num_answered:,}")


def _known(engine: QueryEngine, task: str, call: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Run and detail of the same comparison, if there was one."""
    digest = digest_of({"job": "evaluate", **call})
    rows = engine.sql(
        f"""
        SELECT m.run, m.detail FROM models AS m JOIN runs AS r ON m.run = r.run_id
        WHERE m.event = 'measured' AND m.task = {quoted(task)} AND r.status = 'finished' AND r.digest = {quoted(digest)}
        ORDER BY r.finished_at LIMIT 1
        """
    ).to_pylist()
    return (rows[0]["run"], json.loads(rows[0]["detail"])) if rows else None


def _verdict(candidate: str, against: str, comparison: Comparison) -> str:
    name, score, found = MEASURES[comparison.measure], comparison.candidate.score, comparison.difference
    measured = f"{candidate}: {name} {score.value:.4f} on {comparison.n:,} test images"
    if found is None:
        return f"{measured}; {against} has none"
    return f"{measured}; {found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f}) against {against}"


def _notes(
    comparison: Comparison,
    num_left_out: int,
    reason: str,
    models: Sequence[ResolvedModel],
    versions: Sequence[str],
) -> Iterator[str]:
    if reason:
        yield f"{reason}; it is enough for a promotion to be measured"
    for model, version in zip(models, versions, strict=False):
        unknown = [name for name in comparison.candidate.classes if name not in model.classes]
        if unknown:
            num = sum(comparison.candidate.classes[name].n for name in unknown)
            yield f"{version} does not know {', '.join(unknown)}, so it is wrong about all {num:,} images of them"
    if num_left_out:
        yield (
            f"{num_left_out:,} labelled test images are left out: they, or their masks, cannot be read (view failures)"
        )


# -------------------------------------------------------------------------------------------------------------- answers


class Answers(ABC):
    """What models answered to the labelled images of the test split, N images.

    Attributes:
        images: what there is to cut by, of each image: columns of ``images`` and ``outcomes``.
        digest: of the images, their labels, and which of them a model could not answer.
        num_models: one or two.
        num_missing: labelled images that some model was not asked about; they are not among the images.
        num_left_out: labelled images that some model could not read.
    """

    def __init__(
        self, images: list[dict[str, Any]], digest: str, num_models: int, num_missing: int, num_left_out: int
    ) -> None:
        self.images = images
        self.digest = digest
        self.num_models = num_models
        self.num_missing = num_missing
        self.num_left_out = num_left_out

    @abstractmethod
    def compare(self) -> Comparison:
        """The first model with the second, if there is one."""

    @abstractmethod
    def score(self, model: int, inside_N: NDArray[np.bool_]) -> Estimate:
        """Of one model on some of the images."""

    def slices(self, columns: Sequence[str] = ()) -> list[Slice]:
        """Of the first model, worst first. Of all columns that have several, without any named."""
        known = _columns(self.images)
        unknown = [name for name in columns if name not in known]
        if unknown:
            raise CallError(f"column {unknown[0]!r} is unknown; the images can be cut by {', '.join(known)}")
        found = []
        for name, values in known.items():
            if name in columns or (not columns and name not in ("group", "last_modified")):
                cut = cut_slices(
                    name,
                    values,
                    lambda inside_N: self.score(0, inside_N),
                    (lambda inside_N: self.score(1, inside_N)) if self.num_models > 1 else None,
                )
                found += cut if columns or len(cut) > 1 else []
        return worst_first(found)


class LabelAnswers(Answers):
    """Of a classification task."""

    def compare(self) -> Comparison:
        return compare_labels(self._labels, self._answers(0), self._answers(1) if self.num_models > 1 else None)

    def score(self, model: int, inside_N: NDArray[np.bool_]) -> Estimate:
        return share_right(self._right[model][inside_N])

    @cached_property
    def _right(self) -> list[NDArray[np.bool_]]:
        """Which answers of each model are right; every slice asks."""
        return [right_sets(self._labels, self._answers(model)) for model in range(self.num_models)]

    @cached_property
    def _labels(self) -> list[frozenset[str]]:
        return [frozenset(classes_said(image["label"], image["value"]) or ()) for image in self.images]

    def _answers(self, model: int) -> list[frozenset[str] | None]:
        found = (image[f"answer_{model}"] for image in self.images)
        return [None if classes is None else frozenset(classes) for classes in found]


class MaskAnswers(Answers):
    """Of a segmentation task. Masks are read when they are asked for first."""

    def __init__(self, reader: MaskReader, *args: Any) -> None:
        super().__init__(*args)
        self._reader = reader
        self._pixels: list[Pixels] | None = None

    def compare(self) -> Comparison:
        pixels = self._read()
        return compare_masks(pixels[0], pixels[1] if self.num_models > 1 else None, self._reader.classes)

    def score(self, model: int, inside_N: NDArray[np.bool_]) -> Estimate:
        return mean_iou(self._read()[model].of(inside_N))

    def _read(self) -> list[Pixels]:
        """Pixels of each model. Images without a usable label are left out."""
        if self._pixels is None:
            found = self._reader.read(len(self.images))
            self.num_left_out += len(self.images) - len(found)
            self.images = [image for image in self.images if image["image_id"] in found]
            if not self.images:
                raise CallError("no mask of the labelled test images can be read; see the log")
            counts = np.stack([found[image["image_id"]] for image in self.images])
            self._pixels = [Pixels(*(counts[:, model, row] for row in range(3))) for model in range(self.num_models)]
        return self._pixels


def read_answers(workspace: Workspace, engine: QueryEngine, task: str, models: Sequence[str]) -> Answers:
    """What models answered to the labelled images of the test split, from the tables.

    Images that all of them answered. One about which a model failed counts as answered wrong; one that could not be
    fetched or decoded is left out, for that says nothing about a model.

    Args:
        workspace: its configuration, and access to mask files.
        engine: SQL over the warehouse.
        task: of classification or segmentation.
        models: values of the column ``model``.
    """
    config = workspace.config.task(task)
    of_masks = config.kind == "segmentation"
    answer = "count(*)" if of_masks else "any_value(coalesce(classes, [label]))"
    joins, columns = [], []
    for place, model in enumerate(models):
        mine = f"task = {quoted(task)} AND model = {quoted(model)}"
        joins.append(
            f"""
            LEFT JOIN (
                SELECT image_id, {answer} AS answer FROM ({_newest(config.kind, mine)}) GROUP BY image_id
            ) AS a{place} USING (image_id)
            LEFT JOIN (SELECT * FROM latest_outcomes WHERE {mine}) AS o{place} USING (image_id)"""
        )
        columns.append(f"a{place}.answer AS answer_{place}, o{place}.stage AS stage_{place}")
    seen = [
        f"coalesce({', '.join(f'o{place}.{name}' for place in range(len(models)))}) AS {name}"
        for name in ("width", "height", "format")
    ]
    rows = engine.sql(
        f"""
        SELECT t.image_id, t.uri, t.source, t.size, t.last_modified, t."group", t.metadata, t.label,
            md5(t.value) AS said, {"NULL" if of_masks else "t.value"} AS value, {", ".join((*columns, *seen))}
        FROM ({measured_sql(task, config)}) AS t {" ".join(joins)} ORDER BY t.image_id
        """
    ).to_pylist()
    images, num_missing, num_left_out = [], 0, 0
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        stages = [row[f"stage_{place}"] for place in range(len(models)) if row[f"answer_{place}"] is None]
        if None in stages:
            num_missing += 1
        elif any(stage != "infer" for stage in stages):
            num_left_out += 1
        else:
            images.append(row)
            failed = [row[f"answer_{place}"] is None for place in range(len(models))]
            digest.update(json.dumps([row["image_id"], row["label"], row["said"], failed]).encode() + b"\n")
    shared = (images, digest.hexdigest(), len(models), num_missing, num_left_out)
    if not of_masks:
        return LabelAnswers(*shared)
    return MaskAnswers(MaskReader(workspace, engine, task, models, [row["image_id"] for row in images]), *shared)


def _newest(kind: str, mine: str) -> str:
    """SQL: the rows of a model's newest answer to each image."""
    table = "segments" if kind == "segmentation" else "predictions"
    return f"""
        SELECT {table}.* FROM {table} JOIN (
            SELECT run_id AS run, finished_at FROM runs WHERE status = 'finished'
        ) USING (run)
        WHERE {mine} QUALIFY rank() OVER (PARTITION BY image_id ORDER BY finished_at DESC, run) = 1"""


def _columns(images: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What images can be cut by: the value of each image, by name."""
    folders = [PurePosixPath(image["uri"]).parent.parts for image in images]
    shared = 0
    while all(len(parts) > shared + 1 for parts in folders) and len({parts[shared] for parts in folders}) == 1:
        shared += 1
    found: dict[str, list[Any]] = {
        "folder": ["/".join(parts[shared:]) for parts in folders],
        **{name: [image[name] for image in images] for name in (*SLICED_BY[1:], "group")},
        "last_modified": [image["last_modified"] and f"{image['last_modified']:%Y-%m}" for image in images],
    }
    metadata = [dict(image["metadata"] or []) for image in images]
    for key in sorted({key for each in metadata for key in each}):
        found[f"metadata.{key}" if key in found else key] = [each.get(key) for each in metadata]
    return found


class MaskReader:
    """Compares masks with labels pixel by pixel, at each image's own size, as training does.

    Args:
        workspace: its configuration, and access to mask files.
        engine: SQL over the warehouse.
        task: of segmentation.
        models: values of the column ``model``, M of them.
        image_ids: which images.
    """

    def __init__(
        self, workspace: Workspace, engine: QueryEngine, task: str, models: Sequence[str], image_ids: Sequence[str]
    ) -> None:
        classes = workspace.config.task(task).classes
        if classes is None:
            raise CallError(
                f"tasks.{task} needs classes in winnow.toml: the names of the values in its masks, from 0 on"
            )
        self.classes = classes
        self._config = workspace.config.task(task)
        self._download = workspace.stores.download
        self._engine = engine
        self._task = task
        self._models = models
        self._wanted = set(image_ids)

    def read(self, total: int) -> dict[str, NDArray[np.int64]]:
        """Right, labelled and answered pixels of each class, int64 (M, 3, C), by image; not of unusable labels."""
        found: dict[str, NDArray[np.int64]] = {}
        with Progress("compare masks", total) as progress, ThreadPoolExecutor(_NUM_THREADS) as threads:
            for batch in self._engine.reader(self._sql(), batch_rows=_BATCH_IMAGES):
                rows = [row for row in batch.to_pylist() if row["image_id"] in self._wanted]
                for row, counts in zip(rows, threads.map(self._one, rows), strict=True):
                    if counts is not None:
                        found[row["image_id"]] = counts
                progress.update(len(found))
        return found

    def _sql(self) -> str:
        joins, columns = [], []
        for place, model in enumerate(self._models):
            mine = f"task = {quoted(self._task)} AND model = {quoted(model)}"
            joins.append(
                f"""
                LEFT JOIN (
                    SELECT image_id, list({{'label': label, 'rle': rle}} ORDER BY label) AS found
                    FROM ({_newest("segmentation", mine)}) GROUP BY image_id
                ) AS s{place} USING (image_id)"""
            )
            columns.append(f"s{place}.found AS found_{place}")
        return f"""
            SELECT t.image_id, t.uri, t.value, o.width, o.height, {", ".join(columns)}
            FROM ({measured_sql(self._task, self._config)}) AS t {" ".join(joins)}
            LEFT JOIN (
                SELECT image_id, any_value(width) AS width, any_value(height) AS height FROM latest_outcomes
                WHERE width IS NOT NULL GROUP BY image_id
            ) AS o USING (image_id)"""

    def _one(self, row: Mapping[str, Any]) -> NDArray[np.int64] | None:
        try:
            truth_HW = read_label(
                row["value"], self.classes, width=row["width"], height=row["height"], read=self._read_file
            )
        except (MaskError, StorageError) as error:
            logger.warning("%s is left out: %s", row["uri"], error.message)
            return None
        if (truth_HW == unlabelled(truth_HW)).all():
            return None
        return np.stack([self._count(truth_HW, row[f"found_{place}"]) for place in range(len(self._models))])

    def _read_file(self, uri: str) -> bytes:
        return self._download(uri)

    def _count(self, truth_HW: LabelMap, segments: Sequence[Mapping[str, Any]] | None) -> NDArray[np.int64]:
        """Right, labelled and answered pixels of each class; an answer that is no class of the task is ``other``."""
        num, other = len(self.classes), len(self.classes)
        answer_HW = np.full(truth_HW.shape, other, dtype=np.uint32)
        if segments:
            names = (*self.classes, *sorted({each["label"] for each in segments} - set(self.classes)))
            found = label_map([(each["label"], each["rle"]) for each in segments], names)
            found_HW = resize_to_source(found, truth_HW.shape[1], truth_HW.shape[0])
            answer_HW = np.minimum(found_HW.astype(np.uint32), other)
        total_CC = confusion(truth_HW, answer_HW, num + 1, void=unlabelled(truth_HW))
        return np.stack([np.diag(total_CC)[:num], total_CC.sum(axis=1)[:num], total_CC.sum(axis=0)[:num]])
