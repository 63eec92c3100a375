"""Model versions made by hand: a small network with random weights, published as the trainer does."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

from winnow.images import View
from winnow.models.cards import Card, LabelsSnapshot, version_name
from winnow_connectors.ledger import Ledger, Plan, Run, new_run_id
from winnow_connectors.registry import Registry, train_work

MEASURED: dict[str, Any] = {"val": {"n": 0}, "test": {"n": 4, "accuracy": 0.75}}


def make_card(task: str, number: int, weights: bytes, run_id: str = "r", **changes: Any) -> Card:
    values: dict[str, Any] = {
        "task": task,
        "version": version_name(task, number),
        "kind": "classification",
        "architecture": "timm/test_resnet",
        "head": "",
        "classes": ("ant", "bee", "cat", "dog", "eel"),
        "view": View(resize=168, crop=(160, 160), interpolation="bicubic"),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "temperature": 1.0,
        "metrics": MEASURED,
        "labels": LabelsSnapshot(digest="ab", counts={"train": {"ant": 2}}),
        "parent": "timm/test_resnet",
        "digest": f"digest {number}",
        "seed": 0,
        "created_at": datetime.now(UTC).isoformat(),
        "winnow_version": "0",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "run": run_id,
    }
    return Card(**{**values, **changes})


def begin(ledger: Ledger, task: str) -> Run:
    """An open training, which holds the next number."""
    run = ledger.begin(
        Plan(
            run_id=new_run_id("train"),
            job="train",
            claims=ledger.next_numbers([train_work(task)]),
            digest="d",
            config={},
            num_planned=0,
            started_at=datetime.now(UTC).isoformat(),
            code_version="0",
        )
    )
    assert run is not None
    return run


def make_version(registry: Registry, ledger: Ledger, task: str, weights: bytes = b"weights", **changes: Any) -> str:
    """Publish a version; its name."""
    run = begin(ledger, task)
    card = make_card(task, run.plan.claims[0][1], weights, run.run_id, **changes)
    assert registry.publish(run, card, weights, {"tasks": [task], "verdict": "made by hand"})
    return card.version
