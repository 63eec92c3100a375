"""``winnow review status``: how far people are, how fast, and how far they agree; from the tables alone."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from winnow.agreement import cohen_kappa, fleiss_kappa, majority, mask_agreement, percent_agreement
from winnow.schemas import TABLES
from winnow_jobs.review import FINISHED, Rows, reviewed_tasks
from winnow_jobs.vectors import quoted
from winnow_jobs.votes import is_mask, label_maps, vote

if TYPE_CHECKING:
    from winnow_connectors.query import QueryEngine, TableSource
    from winnow_jobs.workspace import Workspace


class Preview:
    """The tables as they will be when some rows are committed.

    Args:
        tables: as they are.
        rows: to come, by table, without the column ``run``.
    """

    _RUN = "to come"

    def __init__(self, tables: TableSource, rows: Rows) -> None:
        now = datetime.now(UTC)
        run = {"run_id": self._RUN, "job": "pull", "status": "finished", "started_at": now, "finished_at": now}
        constant = {"config": "{}", "digest": "", "code_version": ""}
        self._tables = tables
        self._rows = {name: [dict(row, run=self._RUN) for row in found] for name, found in rows.items()}
        self._rows["runs"] = [run | constant]

    def dataset(self, name: str) -> ds.Dataset:
        """One consistent snapshot of a table, with the rows to come."""
        known, rows = self._tables.dataset(name), self._rows.get(name)
        if not rows:
            return known
        schema = TABLES[name]
        table = pa.Table.from_pylist([dict.fromkeys(schema.names) | row for row in rows], schema=schema)
        return ds.dataset([known, ds.dataset(table)])


_MAX_MASKS = 500
"""Images, the last ones, whose masks are compared: each takes some milliseconds."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Annotator:
    """One person's answers to a task.

    Attributes:
        name: mail address.
        num_answers: answers that count now, skips included.
        num_skipped: of those, skips.
        num_corrected: of those, answers that differ from the model's.
        median_seconds: spent on an answer; None if unknown.
        agreement: share of the images that others answered too on which this person said what most did; None without.
    """

    name: str
    num_answers: int
    num_skipped: int
    num_corrected: int
    median_seconds: float | None
    agreement: float | None


@dataclass(frozen=True)
class Agreement:
    """How far people agree who answered the same images.

    Attributes:
        num_images: that at least two people answered.
        percent: share of pairs of people who said the same, from 0 to 1; of masks their mean IoU.
        fleiss_kappa: beyond chance; None for masks, and where chance alone would make as much.
        cohen_kappa: the same of every two people who answered at least two of the same images.
    """

    num_images: int
    percent: float | None = None
    fleiss_kappa: float | None = None
    cohen_kappa: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReviewStatus:
    """How far people are with one task, by the last pull.

    Attributes:
        task: its name.
        num_waiting: images that nobody has answered yet.
        num_unsent: of those, images that are not in Label Studio yet.
        num_done: images of the queue that somebody answered.
        num_skipped: images that somebody skipped and nobody answered.
        num_corrected: images answered otherwise than the model did.
        num_unsure: images answered with "unsure" or "not listed".
        num_ties: images about which people disagree.
        answers_per_hour: by the time that people spent on their answers, as Label Studio measures it; None if unknown.
        hours_left: at this rate, for one person; None if unknown.
        agreement: of people who answered the same images.
        annotators: by number of answers.
    """

    task: str
    num_waiting: int
    num_unsent: int
    num_done: int
    num_skipped: int
    num_corrected: int
    num_unsure: int
    num_ties: int
    answers_per_hour: float | None
    hours_left: float | None
    agreement: Agreement
    annotators: tuple[Annotator, ...]


def review_status(workspace: Workspace, *, task: str | None = None) -> list[ReviewStatus]:
    """How far people are; asks no server.

    Args:
        workspace: configuration and warehouse.
        task: only this one; by default every task that people can answer.

    Raises:
        CallError: no such task.
    """
    names = reviewed_tasks(workspace, task)
    engine = workspace.query_engine()
    return [status_of(engine, name) for name in names]


def status_of(engine: QueryEngine, task: str) -> ReviewStatus:
    """How far people are with a task, in these tables."""
    of_task = f"task = {quoted(task)}"
    (waiting,) = engine.sql(
        f"""
        WITH {FINISHED},
        last AS (
            SELECT image_id, max(round) AS round FROM queue_waiting WHERE {of_task} AND current GROUP BY image_id
        )
        SELECT count(*) AS num_waiting, count(*) FILTER (NOT EXISTS (
            FROM (pushes SEMI JOIN finished USING (run)) AS p
            WHERE p.{of_task} AND p.image_id = last.image_id AND p.round = last.round
        )) AS num_unsent FROM last
        """
    ).to_pylist()
    rows = engine.sql(
        f"""
        SELECT image_id, annotation_id, annotator, event, label, value, seconds, changed_by_person, updated_at
        FROM annotations WHERE {of_task} AND event != 'deleted' ORDER BY updated_at
        """
    ).to_pylist()
    by_image: dict[str, dict[str, Row]] = defaultdict(dict)
    skipped = set()
    for row in rows:
        if row["event"] == "skipped":
            skipped.add(row["image_id"])
        else:
            by_image[row["image_id"]][row["annotator"] or str(row["annotation_id"])] = row
    said = {image_id: majority([vote(row) for row in people.values()]) for image_id, people in by_image.items()}
    spent = [row["seconds"] for row in rows if row["seconds"]]
    rate = 3600.0 * len(spent) / sum(spent) if spent else None
    last = {image_id: max(people.values(), key=lambda row: row["updated_at"]) for image_id, people in by_image.items()}
    return ReviewStatus(
        task=task,
        num_waiting=waiting["num_waiting"],
        num_unsent=waiting["num_unsent"],
        num_done=len(by_image),
        num_skipped=len(skipped - set(by_image)),
        num_corrected=sum(bool(row["changed_by_person"]) for row in last.values()),
        num_unsure=sum(row["label"] is None and not is_mask(row) for row in last.values()),
        num_ties=sum(answer is None for answer in said.values()),
        answers_per_hour=rate,
        hours_left=None if rate is None else waiting["num_waiting"] / rate,
        agreement=_agreement(by_image),
        annotators=_annotators(rows, by_image, said),
    )


def _agreement(by_image: Mapping[str, Mapping[str, Row]]) -> Agreement:
    several = {image_id: people for image_id, people in by_image.items() if len(people) > 1}
    if not several:
        return Agreement(0)
    masks = {
        image_id: list(people.values())
        for image_id, people in several.items()
        if all(is_mask(row) for row in people.values())
    }
    if masks:
        found = [iou for key in list(masks)[-_MAX_MASKS:] if (iou := _masks_of(masks[key])) is not None]
        return Agreement(len(several), float(np.mean(found)) if found else None)
    votes = {image_id: {who: vote(row) for who, row in people.items()} for image_id, people in several.items()}
    answers = {
        answer: number for number, answer in enumerate(sorted({a for given in votes.values() for a in given.values()}))
    }
    counts_NC = np.zeros((len(votes), len(answers)), dtype=np.int64)
    for number, given in enumerate(votes.values()):
        for answer in given.values():
            counts_NC[number, answers[answer]] += 1
    people = sorted({who for given in votes.values() for who in given})
    kappas = {}
    for one, other in itertools.combinations(people, 2):
        both = [given for given in votes.values() if one in given and other in given]
        kappa = cohen_kappa([given[one] for given in both], [given[other] for given in both])
        if len(both) > 1 and kappa is not None:
            kappas[f"{one} · {other}"] = kappa
    return Agreement(len(several), percent_agreement(counts_NC), fleiss_kappa(counts_NC), kappas)


def _masks_of(rows: Sequence[Row]) -> float | None:
    _, maps = label_maps(rows, ())
    return mask_agreement(maps)


def _annotators(
    rows: Sequence[Row], by_image: Mapping[str, Mapping[str, Row]], said: Mapping[str, str | None]
) -> tuple[Annotator, ...]:
    of: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of[row["annotator"] or "unknown"].append(row)
    found = []
    for name, own in of.items():
        shared = [image_id for image_id, people in by_image.items() if name in people and len(people) > 1]
        agreeing = sum(vote(by_image[image_id][name]) == said[image_id] for image_id in shared)
        spent = [row["seconds"] for row in own if row["seconds"]]
        found.append(
            Annotator(
                name=name,
                num_answers=len(own),
                num_skipped=sum(row["event"] == "skipped" for row in own),
                num_corrected=sum(bool(row["changed_by_person"]) for row in own),
                median_seconds=statistics.median(spent) if spent else None,
                agreement=agreeing / len(shared) if shared else None,
            )
        )
    return tuple(sorted(found, key=lambda each: (-each.num_answers, each.name)))
