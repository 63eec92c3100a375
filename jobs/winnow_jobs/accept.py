"""``winnow accept``: the answers that need no person, with a bound on their error rate.

The bound rests on the blind audit alone: on the images of the audit reserve in the order of their hashes, up to the
first that nobody has answered yet. Which images these are, no answer decides. A look at their labels is a run, and is
paid for (``winnow.risk``); the same labels, model and options are looked at once. What it says besides its claims
(``winnow.audit``) is written down with it, and is read from there: nobody looks at labels without paying.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from winnow.audit import AuditStatistics
from winnow.errors import CallError
from winnow.risk import Claim, largest_claim, least_sample, share_of_look
from winnow.splits import audit_positions
from winnow_connectors.ledger import digest_of
from winnow_connectors.object_store import NotFoundError
from winnow_jobs.push import SHOWING
from winnow_jobs.review import MAX_ATTEMPTS, begin_anew, publish
from winnow_jobs.selection import answerer_of
from winnow_jobs.vectors import quoted

if TYPE_CHECKING:
    from winnow_connectors.query import QueryEngine
    from winnow_jobs.workspace import Workspace

ALL = "*"
"""Name of the claim about all classes together."""

_STATISTICS, _IMAGES = "audit.json", "audit_images.json"
"""Files of a look, beside its plan: what it says, and the ids of the images that it saw."""


@dataclass(frozen=True)
class AcceptResult:
    """What may go unseen.

    Attributes:
        status: ``finished``; ``nothing to do`` when this was looked at before; ``refused`` when no claim is possible.
        task, model: whose answers.
        run_id: of the look; None when no label was looked at.
        look: its number; None likewise.
        claims: by class, or ``*`` for all classes together.
        num_audited: images of the complete prefix.
        num_wrong: of those, answers that are wrong; None when no label was looked at.
        num_accepted: images without a person's label that are accepted now.
        num_left: images without a person's label that are not.
        num_needed: further audit labels that a claim could need; 0 with a claim.
        audit: accuracy, drift, and error against coverage; None when no label was looked at.
        verdict: the outcome in one sentence.
    """

    status: str
    task: str
    model: str
    run_id: str | None = None
    look: int | None = None
    claims: Mapping[str, Claim] = field(default_factory=dict)
    num_audited: int = 0
    num_wrong: int | None = None
    num_accepted: int = 0
    num_left: int = 0
    num_needed: int = 0
    audit: AuditStatistics | None = None
    verdict: str = ""


def accept(
    workspace: Workspace, task: str, *, max_error: float, confidence: float = 0.95, per_class: bool = False
) -> AcceptResult:
    """Accept the largest set of answers whose error rate is at most ``max_error``.

    Args:
        workspace: configuration and warehouse.
        task: a classification task.
        max_error: highest error rate of what is accepted.
        confidence: probability, over all looks at the task together, with which every claim holds.
        per_class: a claim for each class on its own; they share what may go wrong.

    Raises:
        CallError: no such task, a number out of range, or no answers yet.
    """
    config = workspace.config.task(task)
    if config.kind != "classification":
        raise CallError(f"{task} is a {config.kind} task; only answers of classification tasks can be accepted")
    if config.multiple_choice:
        raise CallError(
            f"images of {task} may have several classes; only answers of one class an image can be accepted"
        )
    for name, value in (("--max-error", max_error), ("--confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise CallError(f"{name} {value:g} is not valid; give a number between 0 and 1, such as 0.02 or 0.95")
    workspace.warehouse.check()
    model = answerer_of(workspace, task)
    for _ in range(MAX_ATTEMPTS):
        started = time.monotonic()
        numbers = begin_anew(workspace, f"accept-{task}")
        engine = workspace.query_engine()
        audit = Audit.read(engine, task, model)
        call = {
            "task": task,
            "model": model,
            "max_error": max_error,
            "confidence": confidence,
            "per_class": per_class,
            "audit": audit.snapshot,
        }
        looks = _looks(engine, task)
        known = next((run for run in looks if run["digest"] == digest_of({"job": "accept", **call})), None)
        look = len(looks) + 1 if known is None else dict(known["counts"])["look"]
        names = audit.classes if per_class else (ALL,)
        delta = share_of_look(1.0 - confidence, look) / max(1, len(names))
        least = least_sample(max_error, delta)
        largest = max((int(audit.of(name).sum()) for name in names), default=0)
        num_images = _count_unseen(engine, task, model)
        if largest < least:
            return AcceptResult(
                "refused",
                task,
                model,
                num_audited=len(audit.wrong_N),
                num_left=num_images,
                num_needed=least - largest,
                verdict=f"the audit is too small: {largest:,} images answered blind, {least - largest:,} more could be "
                "enough if the model is right about all of them; `winnow select`, then `winnow review push`",
            )
        claims = {}
        for name in names:
            inside_N = audit.of(name)
            claim = largest_claim(audit.confidence_N[inside_N], audit.wrong_N[inside_N], max_error, delta)
            if claim is not None:
                claims[name] = claim
        rows = _accepted(engine, task, model, claims, audit.snapshot)
        num_wrong = int(audit.wrong_N.sum())
        needed = (
            0 if claims else max(0, least_sample(max_error, share_of_look(1.0 - confidence, look + 1), 3) - largest)
        )
        result = AcceptResult(
            "finished",
            task,
            model,
            look=look,
            claims=claims,
            num_audited=len(audit.wrong_N),
            num_wrong=num_wrong,
            num_accepted=len(rows),
            num_left=num_images - len(rows),
            num_needed=needed,
            verdict=_verdict(claims, len(rows), num_images, max_error, confidence, num_wrong, len(audit.wrong_N)),
        )
        if known is not None:
            statistics = statistics_of(workspace, known["run_id"])
            return replace(result, status="nothing to do", run_id=known["run_id"], audit=statistics)
        statistics = audit.statistics([_images_of(workspace, each["run_id"]) for each in looks])
        run_id = publish(
            workspace,
            "accept",
            numbers,
            call,
            {"accepted": rows},
            {
                "tasks": [task],
                "counts": {"look": look, "accepted": len(rows), "left": result.num_left, "audited": result.num_audited},
                "seconds": {"total": round(time.monotonic() - started, 3)},
                "verdict": result.verdict,
            },
            files={_STATISTICS: statistics.to_json().encode(), _IMAGES: json.dumps(audit.ids_N.tolist()).encode()},
        )
        if run_id is not None:
            return replace(result, run_id=run_id, audit=statistics)
    raise CallError(f"other calls were faster {MAX_ATTEMPTS} times; run the command again when they are done")


def _verdict(
    claims: Mapping[str, Claim],
    num_accepted: int,
    num_images: int,
    max_error: float,
    confidence: float,
    num_wrong: int,
    num_audited: int,
) -> str:
    seen = f"{num_wrong:,} of {num_audited:,} audit images were answered wrong"
    if not claims:
        return f"no set of answers can be promised to be wrong at most {max_error:.1%} of the time; {seen}"
    return (
        f"{num_accepted:,} of {num_images:,} images need no person: wrong at most {max_error:.1%} of the time, at a "
        f"confidence of {confidence:.1%} over all looks; {seen}"
    )


@dataclass(frozen=True)
class Audit:
    """The complete prefix of the audit, N images in the order of their hashes.

    Attributes:
        ids_N: image ids.
        confidence_N: of the model's answer, float32.
        wrong_N: what a person said is something else; so is an image that was skipped or cannot be shown.
        label_N: the model's answers.
        snapshot: digest of images, answers and labels.
    """

    ids_N: NDArray[np.object_]
    confidence_N: NDArray[np.float32]
    wrong_N: NDArray[np.bool_]
    label_N: NDArray[np.object_]
    snapshot: str

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that the model answered."""
        return tuple(sorted(set(self.label_N.tolist())))

    def of(self, name: str) -> NDArray[np.bool_]:
        """The images that a claim is about, bool (N,)."""
        return np.full(len(self.label_N), True) if name == ALL else np.asarray(self.label_N == name)

    def statistics(self, looks: Sequence[frozenset[str]]) -> AuditStatistics:
        """What a look says besides its claims.

        Args:
            looks: images that each look before saw, the oldest first. Drift is against the last that had not seen all.
        """
        seen = [np.array([each in images for each in self.ids_N], dtype=np.bool_) for images in looks if images]
        before = next((seen_N for seen_N in reversed(seen) if not seen_N.all()), seen[-1] if seen else None)
        return AuditStatistics.of(self.confidence_N, self.wrong_N, before)

    @classmethod
    def read(cls, engine: QueryEngine, task: str, model: str) -> Self:
        """From the tables: originals of the reserve that the model answered, up to the first that waits."""
        rows = engine.sql(
            f"""
            WITH skipped AS (
                SELECT DISTINCT image_id FROM annotations
                WHERE task = {quoted(task)} AND audit AND event = 'skipped'
            ),
            said AS (SELECT image_id, label FROM current_labels WHERE task = {quoted(task)} AND audit),
            hidden AS (
                SELECT DISTINCT image_id FROM failures
                WHERE task = {quoted(task)} AND model = {quoted(SHOWING)} AND NOT retryable
            )
            SELECT i.image_id, i."group", p.label, p.confidence, s.label AS said,
                s.image_id IS NOT NULL AS answered, k.image_id IS NOT NULL OR h.image_id IS NOT NULL AS given_up
            FROM current_images AS i JOIN ({newest_answers(task, model)}) AS p USING (image_id)
                LEFT JOIN said AS s USING (image_id) LEFT JOIN skipped AS k USING (image_id)
                LEFT JOIN hidden AS h USING (image_id)
            WHERE i.audit AND i.parent IS NULL
            """
        ).to_pylist()
        places = audit_positions(row["group"] for row in rows)
        ordered = [row for _, _, row in sorted(zip(places, (row["image_id"] for row in rows), rows, strict=True))]
        prefix = list(itertools.takewhile(lambda row: row["answered"] or row["given_up"], ordered))
        told = [[row["image_id"], row["label"], row["confidence"], row["said"], row["answered"]] for row in prefix]
        return cls(
            ids_N=np.array([row["image_id"] for row in prefix], dtype=object),
            confidence_N=np.array([row["confidence"] for row in prefix], dtype=np.float32),
            wrong_N=np.array([row["label"] != row["said"] for row in prefix], dtype=np.bool_),
            label_N=np.array([row["label"] for row in prefix], dtype=object),
            snapshot=hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest(),
        )


def newest_answers(task: str, model: str) -> str:
    """SQL: the model's newest answer to every image."""
    return f"""
        SELECT image_id, label, confidence
        FROM predictions JOIN (SELECT run_id AS run, finished_at FROM runs WHERE status = 'finished') USING (run)
        WHERE task = {quoted(task)} AND model = {quoted(model)}
        QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY finished_at DESC, run) = 1"""


def _unseen(task: str, model: str) -> str:
    """SQL: current originals outside the reserve without a person's label, with the model's answer."""
    return f"""
        FROM current_images AS i JOIN ({newest_answers(task, model)}) AS p USING (image_id)
        WHERE NOT i.audit AND i.parent IS NULL AND NOT EXISTS (
            FROM current_labels AS c WHERE c.image_id = i.image_id AND c.task = {quoted(task)} AND c.label IS NOT NULL
        )"""


def _count_unseen(engine: QueryEngine, task: str, model: str) -> int:
    return int(engine.sql(f"SELECT count(*) AS num {_unseen(task, model)}")["num"][0].as_py())


def _accepted(
    engine: QueryEngine, task: str, model: str, claims: Mapping[str, Claim], snapshot: str
) -> list[dict[str, Any]]:
    """Rows of ``accepted``."""
    if not claims:
        return []
    rows = engine.sql(f"SELECT image_id, p.label, p.confidence {_unseen(task, model)} ORDER BY image_id").to_pylist()
    now, found = datetime.now(UTC), []
    for row in rows:
        claim = claims.get(ALL) or claims.get(row["label"])
        if claim is not None and row["confidence"] >= np.float32(claim.threshold):
            found.append(
                {
                    "image_id": row["image_id"],
                    "task": task,
                    "model": model,
                    "label": row["label"],
                    "threshold": claim.threshold,
                    "bound": claim.bound,
                    "audit_snapshot": snapshot,
                    "at": now,
                }
            )
    return found


def _looks(engine: QueryEngine, task: str) -> list[dict[str, Any]]:
    """Every look at the audit labels of a task, of all versions."""
    rows: list[dict[str, Any]] = engine.sql(
        f"""
        SELECT run_id, digest, counts FROM runs
        WHERE job = 'accept' AND status = 'finished' AND list_contains(tasks, {quoted(task)}) ORDER BY finished_at
        """
    ).to_pylist()
    return rows


def statistics_of(workspace: Workspace, look: str) -> AuditStatistics | None:
    """What a look said besides its claims; None when it was not written down.

    Args:
        workspace: where.
        look: id of its run.
    """
    found = _file_of(workspace, look, _STATISTICS)
    return None if found is None else AuditStatistics.from_json(found)


def _images_of(workspace: Workspace, look: str) -> frozenset[str]:
    return frozenset(json.loads(_file_of(workspace, look, _IMAGES) or b"[]"))


def _file_of(workspace: Workspace, look: str, name: str) -> bytes | None:
    try:
        return workspace.warehouse.store.get(f"runs/{look}/{name}")
    except NotFoundError:
        return None
