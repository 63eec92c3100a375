"""Model versions: folders of weights and card in the warehouse, and which of them is in production.

A version ``<task>@<n>`` lies in ``models/<task>/<n>-<6 hex>/`` as ``weights.safetensors`` and ``card.json``. The
folder means nothing until a finished run names it in table ``models`` (event ``made``), with the hashes of both files:
no other folder is ever read, and no file without its hash is used.

Which version is in production is decided by rows too (events ``promoted`` and ``rolled_back``), one small run each.
Of each task one such run is open at a time, so that they form one line, each knowing all before it. All that such
a run will do stands in its plan: one that was cut short is finished by whoever looks next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from winnow import __version__, uris
from winnow.errors import CallError, JobError
from winnow.models.cards import BASE, Card, parse_version
from winnow.schemas import TABLES
from winnow_connectors.ledger import Ledger, Plan, Run, digest_of, new_run_id
from winnow_connectors.object_store import NotFoundError, ObjectStore
from winnow_connectors.query import QueryEngine
from winnow_connectors.tables import Tables

logger = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
CARD = "card.json"

_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class Version:
    """One row ``made``, and what became of it.

    Attributes:
        name: ``<task>@<n>``.
        task: what it answers.
        location: folder, relative to the warehouse.
        sha256: of the weights, hex.
        metrics: as on the card.
        detail: ``card_sha256``, ``digest`` and what else the run that made it knew.
        run: that made it.
        at: when, UTC.
        production: it answers its task now.
    """

    name: str
    task: str
    location: str
    sha256: str
    metrics: Mapping[str, Any]
    detail: Mapping[str, Any]
    run: str
    at: datetime
    production: bool

    @property
    def number(self) -> int:
        return parse_version(self.name)[1] or 0


@dataclass(frozen=True)
class Move:
    """What a promotion or rollback did. ``run_id`` is None when there was nothing to do; ``why`` may be empty."""

    task: str
    production: str
    before: str
    run_id: str | None
    why: str = ""


class Registry:
    """The model versions of a warehouse.

    Args:
        store: the warehouse.
        tables: of the warehouse.
        ledger: of the warehouse.
    """

    def __init__(self, store: ObjectStore, tables: Tables, ledger: Ledger) -> None:
        self._store = store
        self._tables = tables
        self._ledger = ledger

    # ----------------------------------------------------------------------------------------------------- versions

    def versions(self, task: str | None = None) -> list[Version]:
        """All versions, by task, the newest first."""
        self._settle(task)
        where = "" if task is None else f"WHERE task = {_quote(task)}"
        rows = self._rows(f"FROM model_versions {where}")
        found = [
            Version(
                name=row["version"],
                task=row["task"],
                location=row["location"],
                sha256=row["sha256"],
                metrics=json.loads(row["metrics"] or "{}"),
                detail=json.loads(row["detail"] or "{}"),
                run=row["run"],
                at=row["at"],
                production=row["production"],
            )
            for row in rows
        ]
        return sorted(found, key=lambda version: (version.task, -version.number))

    def version(self, name: str) -> Version:
        """The version of that name.

        Raises:
            CallError: there is none; the message lists those of its task.
        """
        task, number = parse_version(name)
        if number is None:
            raise CallError(f"{name} is the model that winnow.toml names, not a version of the registry")
        versions = self.versions(task)
        for version in versions:
            if version.name == name:
                return version
        known = ", ".join(version.name for version in versions) or f"none; `winnow train {task} --head` makes one"
        raise CallError(f"model version {name} does not exist; versions of {task}: {known}")

    def made_from(self, task: str, digest: str) -> Version | None:
        """The version that was made from exactly this (see ``Card.digest``), the newest if there are several."""
        return next((version for version in self.versions(task) if version.detail.get("digest") == digest), None)

    def card(self, version: Version) -> Card:
        """The card, as it was when the version was made.

        Raises:
            JobError: it is gone or damaged.
        """
        data = self._file(version, CARD, str(version.detail.get("card_sha256", "")))
        card = Card.from_json(data, version.name)
        if (card.version, card.sha256) != (version.name, version.sha256):
            raise JobError(f"the card of {version.name} is that of {card.version}; restore {CARD}, or train again")
        return card

    def weights(self, version: Version) -> bytes:
        """The weights file, as it was when the version was made.

        Raises:
            JobError: it is gone or damaged.
        """
        return self._file(version, WEIGHTS, version.sha256)

    def weights_uri(self, version: Version) -> str:
        """Where the weights file lies."""
        return uris.join(self._store.uri, f"{version.location}/{WEIGHTS}")

    def publish(self, run: Run, card: Card, weights: bytes, summary: Mapping[str, Any]) -> bool:
        """Make a version: write its files into a folder of their own, then publish the row that names them.

        Args:
            run: the open run whose claim gave the version its number.
            card: of the version, with the hash of the weights.
            weights: a safetensors file.
            summary: columns of the row in ``runs``.

        Returns:
            False when the run was decided before, here or elsewhere: nothing of this call is left then.
        """
        location = f"models/{card.task}/{parse_version(card.version)[1]}-{secrets.token_hex(3)}"
        data = card.to_json()
        row = {
            "task": card.task,
            "version": card.version,
            "event": "made",
            "location": location,
            "sha256": card.sha256,
            "metrics": json.dumps(card.metrics),
            "detail": json.dumps({"card_sha256": _sha256(data), "digest": card.digest, "parent": card.parent}),
            "at": datetime.fromisoformat(card.created_at),
            "run": run.run_id,
        }
        if _sha256(weights) != card.sha256:
            raise ValueError("the card has another hash than the weights")
        for name, content in ((WEIGHTS, weights), (CARD, data)):
            if not self._store.create(f"{location}/{name}", content):
                raise JobError(f"{location}/{name} exists already; run the same command again")
        is_mine = run.decide("finished", [run.stage("models", _models_rows([row]))], summary)
        if not is_mine:  # what was decided names another folder, or none
            for name in (WEIGHTS, CARD):
                self._store.delete(f"{location}/{name}")
        run.close()
        return is_mine

    def _file(self, version: Version, name: str, sha256: str) -> bytes:
        key = f"{version.location}/{name}"
        try:
            data = self._store.get(key)
        except NotFoundError:
            raise JobError(
                f"{version.name} cannot be used: {key} is gone from the warehouse; restore it, choose another version, "
                "or train again"
            ) from None
        found = _sha256(data)
        if found != sha256:
            raise JobError(
                f"{version.name} cannot be used: {key} is damaged or was changed: {len(data):,} bytes with SHA-256 "
                f"{found[:12]}…, not {sha256[:12]}… as when it was made; restore it, or choose another version"
            )
        return data

    # --------------------------------------------------------------------------------------------------- production

    def production(self, task: str) -> str:
        """The version that answers a task: ``<task>@<n>``, or ``<task>@base`` as long as nothing was promoted."""
        self._settle(task)
        rows = self._rows(f"FROM production WHERE task = {_quote(task)}")
        return str(rows[0]["version"]) if rows else f"{task}@{BASE}"

    def history(self, task: str) -> list[dict[str, Any]]:
        """Promotions and rollbacks, oldest first: version, event, detail, run, at."""
        self._settle(task)
        return self._history(task)

    def measurements(self, task: str) -> list[dict[str, Any]]:
        """Comparisons of versions with others, oldest first: version, detail, run, at."""
        return self._rows(
            "SELECT version, detail, run, \"at\" FROM models WHERE event = 'measured' "
            f"AND run IN (SELECT run_id FROM runs WHERE status = 'finished') AND task = {_quote(task)} ORDER BY \"at\""
        )

    def promote(
        self, name: str, *, detail: Mapping[str, Any] | None = None, expected: str | None = None, why: str = ""
    ) -> Move:
        """Put a version into production. Whether it is good enough, the caller has found out.

        Args:
            name: of the version.
            detail: what the event shall say beside what was in production before.
            expected: what must be in production now.
            why: for whoever reads the result.

        Raises:
            CallError: no such version, or another one than expected is in production.
            JobError: its files are damaged.
        """
        task, number = parse_version(name)
        if number is None:
            raise CallError(f"{name} is no version to promote; `winnow models rollback {task} --to {BASE}` goes back")
        version = self.version(name)
        self.card(version)
        self.weights(version)
        return self._move("promote", task, name, dict(detail or {}), expected, why)

    def roll_back(self, task: str, to: str | None = None) -> Move:
        """Put the version before the one in production back, or the one named.

        Args:
            task: of winnow.toml.
            to: a version, its number, or ``base``; the version before by default.

        Raises:
            CallError: there is nothing to go back to, or no such version.
            JobError: the version's files are damaged.
        """
        return self._move("rollback", task, None if to is None else to if "@" in to else f"{task}@{to}", {})

    def _move(
        self,
        job: str,
        task: str,
        name: str | None,
        detail: dict[str, Any],
        expected: str | None = None,
        why: str = "",
    ) -> Move:
        """Claim the next place in the line, finish who stands before, decide."""
        if name is not None and parse_version(name)[0] != task:
            raise CallError(f"{name} is a version of {parse_version(name)[0]}, not of {task}")
        work = alias_work(task)
        for _ in range(_MAX_ATTEMPTS):
            # In this order: what is read below holds all that was decided before the claim.
            numbers = self._ledger.next_numbers([work])
            self._settle(task)
            history = self._history(task)
            line = _line(task, history)
            before = line[-1]
            if name is None and len(line) == 1:
                raise CallError(
                    f"there is nothing to roll back: {task} is answered by the model of winnow.toml ({before})"
                )
            target = line[-2] if name is None else name
            if target == before:
                return Move(task, target, before, None)
            if expected not in (None, before):
                raise CallError(
                    f"{before} went into production meanwhile, but {target} was compared with {expected}; run the "
                    "command again"
                )
            if job == "rollback" and parse_version(target)[1] is not None:
                version = self.version(target)
                self.card(version)
                self.weights(version)
            # A clock that lags behind another machine's must not turn the order around.
            after = history[-1]["at"] + timedelta(microseconds=1) if history else datetime.min.replace(tzinfo=UTC)
            row = {
                "task": task,
                "version": target,
                "event": "promoted" if job == "promote" else "rolled_back",
                "detail": {"before": before, **detail},
                "at": max(datetime.now(UTC), after).isoformat(),
            }
            plan = Plan(
                run_id=new_run_id(job),
                job=job,
                claims=numbers,
                digest=digest_of(row),
                config=row,
                num_planned=0,
                started_at=datetime.now(UTC).isoformat(),
                code_version=__version__,
            )
            run = self._ledger.begin(plan)
            if run is None:
                continue  # another one took the place; look again
            if self.finish_move(run) == "finished":
                return Move(task, target, before, run.run_id, why)
            raise JobError(f"run {run.run_id} was abandoned before {target} was in production; run the command again")
        raise JobError(f"others were faster {_MAX_ATTEMPTS} times; run the command again")

    def finish_move(self, run: Run) -> str:
        """Do what the plan of a promotion or rollback says, whoever began it. Returns its status."""
        if run.outcome() is None:
            row = dict(run.plan.config)
            values = {
                **row,
                "detail": json.dumps(row["detail"]),
                "at": datetime.fromisoformat(row["at"]),
                "run": run.run_id,
            }
            summary = {
                "tasks": [row["task"]],
                "verdict": f"{row['version']} is in production; before, it was {row['detail']['before']}",
            }
            run.decide("finished", [run.stage("models", _models_rows([values]))], summary)
        return str(run.close()["status"])

    # ------------------------------------------------------------------------------------------------------ reading

    def _settle(self, task: str | None) -> None:
        """Carry out what was decided or planned for a task (all tasks when None) but not finished."""
        for work in [alias_work(task), train_work(task)] if task is not None else self._works():
            run = self._ledger.open_run(work)
            if run is not None and run.plan.job in ("promote", "rollback"):
                logger.info("run %s was cut short; finishing it", run.run_id)
                self.finish_move(run)

    def _works(self) -> list[str]:
        works = {info.key.split("/")[1] for info in self._store.list("claims/")}
        return sorted(work for work in works if work.startswith((alias_work(""), train_work(""))))

    def _history(self, task: str) -> list[dict[str, Any]]:
        return self._rows(
            "SELECT version, event, detail, run, \"at\" FROM models WHERE event IN ('promoted', 'rolled_back') "
            "AND run IN (SELECT run_id FROM runs WHERE status = 'finished') "
            f'AND task = {_quote(task)} ORDER BY "at"'
        )

    def _rows(self, statement: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = QueryEngine(self._tables).sql(statement).to_pylist()
        return rows


def train_work(task: str) -> str:
    """What two trainings must not do at once; its claims number the versions."""
    return f"train-{task}"


def alias_work(task: str) -> str:
    """What two promotions or rollbacks must not do at once."""
    return f"alias-{task}"


def _models_rows(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of table ``models``."""
    return pa.Table.from_pylist(rows, schema=TABLES["models"])


def _line(task: str, history: list[dict[str, Any]]) -> list[str]:
    """What rolling back goes through, the model of winnow.toml first, production last.

    A promotion adds a version; a rollback takes away what lies above the one it went back to.
    """
    line = [f"{task}@{BASE}"]
    for row in history:
        if row["event"] == "rolled_back" and row["version"] in line:
            while line[-1] != row["version"]:
                line.pop()
        else:
            line.append(row["version"])
    return line


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
