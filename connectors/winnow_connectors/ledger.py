"""Runs: claimed, written batch by batch, published once.

Files of a run, all under the warehouse::

    claims/<work>/000001.json      create-only: run that holds plan 1 of this work
    runs/<run_id>/plan.json        what is asked, with the resolved configuration and its digest
    runs/<run_id>/plan.parquet     the images asked, in plan order (jobs that ask images)
    runs/<run_id>/markers/<hash>.json   create-only: one written batch
    runs/<run_id>/stops/0.json     create-only: access or storage failed for too many images
    runs/<run_id>/outcome.json     create-only: published (with the selection) or abandoned
    runs/<run_id>/closed.json      every commit of the outcome is done

A *work* is what two runs must not do at the same time, such as one task with one model version. Plan N of a work
must be closed before plan N+1 is claimed, so the images of N+1 are computed from tables that hold all of N.

Every step may be cut short by kill -9 and repeated by anyone: claims, markers and the outcome are create-only, and
each table's commit carries the run id, so it happens once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from winnow.batches import Fragment, Marker, Selection, add_up, select
from winnow.errors import CallError, OpenRunError
from winnow_connectors.object_store import NotFoundError, ObjectStore
from winnow_connectors.tables import Tables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run was started to do. Written before the run is claimed; never changed.

    Attributes:
        run_id: sortable by time, unique.
        job: ``predict``, ``ingest``, …
        claims: ``(work, number)`` pairs in sorted order; the run may work once it holds them all.
        digest: identifies the call: the same digest joins an open run, another one is refused.
        config: the resolved configuration that decides the answers; holds no secrets.
        num_planned: images asked.
        started_at: UTC, ISO 8601.
        code_version: version of winnow that made the plan.
        host: machine that made the plan.
    """

    run_id: str
    job: str
    claims: tuple[tuple[str, int], ...]
    digest: str
    config: Mapping[str, Any]
    num_planned: int
    started_at: str
    code_version: str
    host: str = field(default_factory=platform.node)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        values = json.loads(data)
        values["claims"] = tuple((work, number) for work, number in values["claims"])
        return cls(**values)


def new_run_id(job: str) -> str:
    """Such as ``20260131-094512-predict-1f0c9a``: sortable by time, unique."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{job}-{secrets.token_hex(3)}"


def digest_of(config: Mapping[str, Any]) -> str:
    """Hex digest of a JSON-able mapping, independent of key order."""
    return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16).hexdigest()


class Run:
    """One run in the warehouse, from its plan to its closing."""

    def __init__(self, store: ObjectStore, tables: Tables, plan: Plan) -> None:
        self.store = store
        self.tables = tables
        self.plan = plan

    @property
    def run_id(self) -> str:
        return self.plan.run_id

    def key(self, name: str) -> str:
        """Key of a file of this run in the warehouse."""
        return f"runs/{self.run_id}/{name}"

    def stage(self, table: str, rows: pa.Table) -> Fragment:
        """Write rows for a table; they count once a marker or the outcome names the fragment."""
        return self.tables.write(table, rows, folder=self.run_id)

    def mark(self, marker: Marker) -> bool:
        """Record a written batch. False when the same batch was recorded before: then these fragments never count."""
        return self.store.create(self.key(f"markers/{marker.name}.json"), json.dumps(marker.to_dict()).encode())

    def markers(self) -> Iterator[Marker]:
        """All recorded batches, also those that a selection would leave out."""
        for info in self.store.list(self.key("markers/")):
            yield Marker.from_dict(json.loads(self.store.get(info.key)))

    def num_stops(self) -> int:
        return sum(1 for _ in self.store.list(self.key("stops/")))

    def stop_reasons(self) -> list[str]:
        """Why the run was stopped, in the order of its stops."""
        keys = [info.key for info in self.store.list(self.key("stops/"))]
        in_order = sorted(keys, key=lambda key: int(key.rpartition("/")[2].removesuffix(".json")))
        return [json.loads(self.store.get(key))["reason"] for key in in_order]

    def stop(self, generation: int, reason: str) -> None:
        """Record that access or storage failed for too many images.

        Batches of that generation which hold such failures no longer count.
        """
        self.store.create(self.key(f"stops/{generation}.json"), json.dumps({"reason": reason}).encode())

    def select(self) -> Selection:
        """The one selection: used to resume and to publish."""
        return select(self.markers(), num_planned=self.plan.num_planned, num_stops=self.num_stops())

    def outcome(self) -> dict[str, Any] | None:
        """What was decided: ``{"status": "finished" | "abandoned", …}``, or None while the run is open."""
        try:
            decided: dict[str, Any] = json.loads(self.store.get(self.key("outcome.json")))
        except NotFoundError:
            return None
        return decided

    @property
    def is_closed(self) -> bool:
        return self.store.exists(self.key("closed.json"))

    def decide(self, status: str, fragments: Sequence[Fragment], summary: Mapping[str, Any]) -> bool:
        """Decide how the run ends, once: create-only. False when it was decided before (perhaps otherwise).

        Args:
            status: ``finished`` or ``abandoned``.
            fragments: the files to publish.
            summary: the columns of the row in ``runs`` beyond those that the plan knows.

        Raises:
            StorageError: a fragment's file is missing or has another size; nothing is decided then.
        """
        self.tables.check_files(fragments)
        outcome = {
            "status": status,
            "finished_at": datetime.now(UTC).isoformat(),
            "fragments": [asdict(fragment) for fragment in fragments],
            "summary": dict(summary),
        }
        return self.store.create(self.key("outcome.json"), json.dumps(outcome).encode())

    def close(self) -> dict[str, Any]:
        """Carry out what was decided: one commit per table, then the row in ``runs``. Safe to repeat.

        Returns:
            The outcome.
        """
        outcome = self.outcome()
        if outcome is None:
            raise RuntimeError(f"run {self.run_id} is not decided yet")
        if self.is_closed:
            return outcome
        by_table: dict[str, list[Fragment]] = {}
        for entry in outcome["fragments"]:
            fragment = Fragment(**entry)
            by_table.setdefault(fragment.table, []).append(fragment)
        for table in sorted(by_table):
            self.tables.commit(table, by_table[table], app_id=self.run_id)
        if not self.tables.is_committed("runs", self.run_id):
            row = self.stage("runs", self._ledger_row(outcome))
            self.tables.commit("runs", [row], app_id=self.run_id)
        self.store.create(self.key("closed.json"), b"{}")
        return outcome

    def _ledger_row(self, outcome: Mapping[str, Any]) -> pa.Table:
        plan, summary = self.plan, outcome["summary"]
        row = {
            "run_id": plan.run_id,
            "job": plan.job,
            "status": outcome["status"],
            "started_at": datetime.fromisoformat(plan.started_at),
            "finished_at": datetime.fromisoformat(outcome["finished_at"]),
            "config": json.dumps(plan.config, sort_keys=True),
            "digest": plan.digest,
            "code_version": plan.code_version,
            "host": plan.host,
            **summary,
        }
        for name in ("counts", "failures", "seconds"):
            row[name] = list(row.get(name, {}).items())
        from winnow.schemas import TABLES

        schema = TABLES["runs"]
        return pa.Table.from_pylist([row], schema=pa.schema([schema.field(name) for name in row]))


class Ledger:
    """All runs of a warehouse."""

    def __init__(self, store: ObjectStore, tables: Tables) -> None:
        self._store = store
        self._tables = tables

    def at(self, plan: Plan) -> Run:
        """The run of a plan that is known already: workers get the plan instead of reading it."""
        return Run(self._store, self._tables, plan)

    def load(self, run_id: str) -> Run:
        """The run of that id.

        Raises:
            CallError: no such run.
        """
        try:
            plan = Plan.from_json(self._store.get(f"runs/{run_id}/plan.json"))
        except NotFoundError:
            raise CallError(f"run {run_id!r} is unknown; `winnow runs` lists them") from None
        return Run(self._store, self._tables, plan)

    def last_claim(self, work: str) -> tuple[int, str] | None:
        """Number and run id of the newest claim of a work, or None when it was never claimed."""
        keys = [info.key for info in self._store.list(f"claims/{work}/")]
        if not keys:
            return None
        newest = max(keys)
        claim = json.loads(self._store.get(newest))
        return int(newest.rsplit("/", 1)[1].removesuffix(".json")), claim["run_id"]

    def open_runs(self) -> list[Run]:
        """Runs that hold a claim and are not closed, oldest first."""
        works = {info.key.split("/")[1] for info in self._store.list("claims/")}
        runs = {run.run_id: run for work in works if (run := self.open_run(work)) is not None}
        return [runs[run_id] for run_id in sorted(runs)]

    def open_run(self, work: str) -> Run | None:
        """The run that holds the newest claim of a work, when it is not closed.

        A run that is decided but not closed (its driver died while publishing) is closed here first.
        """
        claim = self.last_claim(work)
        if claim is None:
            return None
        run = self.load(claim[1])
        if run.is_closed:
            return None
        if run.outcome() is not None:
            logger.info("run %s was decided but not closed; closing it", run.run_id)
            run.close()
            return None
        return run

    def join(self, works: Sequence[str], digest: str) -> Run | None:
        """The open run of these works with that digest, its claims completed; None when all works are free.

        Raises:
            OpenRunError: a different run is open on one of the works.
        """
        open_runs = {run.run_id: run for work in works if (run := self.open_run(work)) is not None}
        for run in open_runs.values():
            if run.plan.digest == digest and self.claim(run):
                return run
            if run.outcome() is None:
                raise OpenRunError(
                    f"run {run.run_id} ({run.plan.job}, started {run.plan.started_at[:16]} on {run.plan.host}) "
                    "is open on the same work with other options; finish it with "
                    f"`winnow runs resume {run.run_id}` or give it up with `winnow runs abandon {run.run_id}`"
                )
        return None

    def next_numbers(self, works: Sequence[str]) -> tuple[tuple[str, int], ...]:
        """The claims that a new run of these works needs. Read them before computing what is pending."""
        numbers = []
        for work in sorted(works):
            claim = self.last_claim(work)
            numbers.append((work, claim[0] + 1 if claim else 1))
        return tuple(numbers)

    def begin(self, plan: Plan) -> Run | None:
        """Write the plan and claim its works. None when another run claimed one of them first: look again."""
        run = Run(self._store, self._tables, plan)
        self._store.put(run.key("plan.json"), plan.to_json())
        return run if self.claim(run) else None

    def claim(self, run: Run) -> bool:
        """Hold all claims of a run, those it has already included.

        A run that cannot get them all never did any work; it is abandoned, so that its other works are free.
        """
        for work, number in run.plan.claims:
            key = f"claims/{work}/{number:06d}.json"
            if self._store.create(key, json.dumps({"run_id": run.run_id}).encode()):
                continue
            if json.loads(self._store.get(key))["run_id"] != run.run_id:
                logger.info("run %s lost %s to another run", run.run_id, work)
                self.abandon(run, "another run claimed the same work first")
                return False
        # The attributes tell a log of JSON lines which run the lines after this one belong to.
        logger.info("run %s has the work to itself", run.run_id, extra={"run_id": run.run_id, "job": run.plan.job})
        return True

    def abandon(self, run: Run, reason: str) -> dict[str, Any]:
        """Give a run up, unless it was published first: the outcome says which."""
        run.decide("abandoned", (), {"verdict": f"abandoned: {reason}"})
        return run.close()


def totals(selection: Selection) -> tuple[dict[str, int], dict[str, float]]:
    """Counts and seconds of the selected batches, added up."""
    counts = add_up([marker.counts for marker in selection.markers])
    seconds = add_up([marker.seconds for marker in selection.markers])
    return {key: int(value) for key, value in counts.items()}, seconds
