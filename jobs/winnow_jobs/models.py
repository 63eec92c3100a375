"""``winnow models``: which versions there are, and which of them answers."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from winnow.errors import CallError
from winnow.evaluation import MEASURES, Comparison
from winnow.models.cards import check_task, parse_version
from winnow_connectors.ledger import Run
from winnow_connectors.registry import Move, Registry
from winnow_jobs.evaluate import EvaluateResult, evaluate

if TYPE_CHECKING:
    from winnow.config import PromotionConfig
    from winnow_jobs.workspace import Workspace


def show_version(workspace: Workspace, name: str) -> dict[str, Any]:
    """Everything known of one version: its card, where it lies, what became of it.

    Raises:
        CallError: no such version.
        JobError: its card is gone or damaged.
    """
    workspace.warehouse.check()
    registry = workspace.warehouse.registry
    version = registry.version(name)
    card = dataclasses.asdict(registry.card(version))
    rows = [
        *registry.history(version.task),
        *({**row, "event": "measured"} for row in registry.measurements(version.task)),
    ]
    events = [
        {
            "event": row["event"],
            "at": row["at"].isoformat(),
            "run": row["run"],
            **_told(json.loads(row["detail"] or "{}")),
        }
        for row in sorted(rows, key=lambda row: row["at"])
        if row["version"] == name
    ]
    return {**card, "location": version.location, "production": version.production, "events": events}


def _told(detail: dict[str, Any]) -> dict[str, Any]:
    """What an event's detail says in short: what it was compared with, by how much it differs, and whether by force."""
    comparison = detail.pop("comparison", None) or {}
    kept = {key: detail[key] for key in ("against", "n", "difference", "force") if key in detail}
    return kept | ({"difference": comparison["difference"]} if comparison else {})


def promote(workspace: Workspace, name: str, *, force: bool = False) -> Move:
    """Let a model version answer its task from now on, if it is better than what does now.

    It is compared with what is in production (``winnow_jobs.evaluate``), unless the same was compared before, and the
    rule of ``winnow.evaluation.decide`` says whether that is enough.

    Args:
        workspace: configuration and warehouse.
        name: of the version.
        force: whatever the comparison says, and without one. The event records it, with the figures if there are any.

    Raises:
        CallError: no such version or task, it does not fit the task, nothing can be compared, or it is not good enough;
            the message has the figures.
        JobError: its files are gone or damaged, or the comparison failed.
    """
    workspace.warehouse.check()
    task = parse_version(name)[0]
    config = workspace.config.task(task)
    registry = workspace.warehouse.registry
    before = registry.production(task)
    if parse_version(name)[1] is None or name == before:
        return registry.promote(name)
    version = registry.version(name)
    check_task(registry.card(version), config)
    registry.weights(version)  # a damaged one is not worth a comparison
    rule = workspace.config.promotion
    if force:
        return registry.promote(name, detail={"force": True, **_last_figures(registry, task, name, before)})
    try:
        found = evaluate(workspace, task, candidate=name, against=before)
    except CallError as error:
        raise CallError(f"{name} is not promoted: {error.message}. --force promotes it all the same") from None
    if not found.decision.promote:
        raise CallError(_refusal(found, rule))
    figures = _figures(found.comparison, before, found.labels, found.run_id)
    return registry.promote(
        name,
        detail={**figures, **rule.model_dump()},
        expected=before,
        why="; ".join((*found.notes, *found.decision.reasons)),
    )


def _figures(comparison: Comparison, against: str, labels: str, run: str) -> dict[str, Any]:
    """What the event of a promotion tells of the comparison that it rests on."""
    difference = comparison.difference
    return {
        "against": against,
        "measure": comparison.measure,
        "n": comparison.n,
        "candidate": comparison.candidate.score.value,
        "baseline": comparison.baseline.score.value if comparison.baseline else None,
        "difference": dataclasses.asdict(difference) if difference else None,
        "labels": labels,
        "evaluation": run,
    }


def _last_figures(registry: Registry, task: str, name: str, before: str) -> dict[str, Any]:
    """Those of the newest comparison of two versions; nothing without one."""
    for row in reversed(registry.measurements(task)):
        detail = json.loads(row["detail"])
        if row["version"] == name and detail["against"] == before:
            return _figures(Comparison.from_dict(detail["comparison"]), before, detail["labels"], row["run"])
    return {}


def _refusal(found: EvaluateResult, rule: PromotionConfig) -> str:
    comparison, name = found.comparison, MEASURES[found.comparison.measure]
    assert comparison.baseline is not None
    assert comparison.difference is not None
    before, after, change = comparison.baseline.score, comparison.candidate.score, comparison.difference
    return "\n".join(
        [
            f"{found.candidate} is not promoted. Against {found.against}, on {comparison.n:,} test images:",
            f"  {name} {before.value:.4f} → {after.value:.4f}, difference {change.value:+.4f} "
            f"(95 % interval {change.low:+.4f} to {change.high:+.4f}), margin {rule.margin:g}",
            *(f"  - {reason}" for reason in found.decision.reasons),
            f"`winnow evaluate {found.task} --candidate {found.candidate}` shows all figures; --force promotes it all "
            "the same, and records that",
        ]
    )


def roll_back(workspace: Workspace, task: str, to: str | None = None) -> Move:
    """Let the version before answer again, or the one named: ``base``, a number or ``<task>@<n>``.

    Raises:
        CallError: no such version or task, or nothing to go back to.
        JobError: the files of that version are gone or damaged.
    """
    workspace.config.task(task)
    workspace.warehouse.check()
    return workspace.warehouse.registry.roll_back(task, to)


def resume(workspace: Workspace, run: Run) -> Move:
    """Finish a promotion or rollback that was cut short.

    Raises:
        CallError: it was abandoned meanwhile.
    """
    if workspace.warehouse.registry.finish_move(run) != "finished":
        raise CallError(f"run {run.run_id} is abandoned already; there is nothing to resume")
    row = run.plan.config
    return Move(row["task"], row["version"], row["detail"]["before"], run.run_id)
