"""A task whose audit people answer by hand, over tables made by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

import workspaces as ws
from delta_tables import HandMade, at
from winnow.splits import audit_positions
from winnow_jobs import Workspace
from winnow_jobs.selection import answerer_of

TASK = ws.TASK
NUM_AUDIT, NUM_OTHERS = 300, 500


def image_id(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


class Audited:
    """Images 0 to 299 are the audit reserve in the order of their hashes, 300 to 799 are not.

    Every answer is ``cat`` below 0.7 and ``dog`` above; the confidence of number n is ``0.5 + (n % 50) / 100``.
    """

    def __init__(self, folder: Path) -> None:
        self.workspace = Workspace(ws.write_config(folder))
        self.workspace.init()
        self.tables = HandMade(folder / "warehouse" / "tables", exist=True)
        groups = [f"g{number}" for number in range(NUM_AUDIT)]
        order = np.argsort(audit_positions(groups))
        self.ids = [image_id(number) for number in range(NUM_AUDIT + NUM_OTHERS)]
        self.model = answerer_of(self.workspace, TASK)
        self.tables.add_rows(
            "images",
            (
                {"image_id": each, "audit": n < NUM_AUDIT, "group": groups[order[n]] if n < NUM_AUDIT else each}
                for n, each in enumerate(self.ids)
            ),
        )
        self.predict(self.model)

    def predict(self, model: str) -> None:
        self.tables.add_rows(
            "predictions",
            (
                {"image_id": each, "task": TASK, "model": model, "confidence": self.confidence(n)}
                | {"label": self.label(n)}
                for n, each in enumerate(self.ids)
            ),
        )

    @staticmethod
    def confidence(number: int) -> float:
        return 0.5 + (number % 50) / 100

    def label(self, number: int) -> str:
        return "dog" if self.confidence(number) >= 0.7 else "cat"

    def say(self, numbers: Any, *, wrong: Any = (), event: str = "created") -> None:
        """People answer audit images; ``wrong`` are those that the model got wrong."""
        self.tables.add_rows(
            "labels",
            (
                {"image_id": self.ids[n], "task": TASK, "audit": True, "event": event, "annotator": "ann"}
                | {"updated_at": at(n if event == "created" else 1000 + n)}
                | {"label": None if event == "skipped" else "eel" if n in wrong else self.label(n)}
                for n in numbers
            ),
        )

    def accept(self, **options: Any) -> Any:
        return self.workspace.accept(TASK, **{"max_error": 0.05, **options})

    def results(self) -> dict[str, int]:
        rows = self.workspace.query("SELECT source, count(*) AS n FROM results GROUP BY 1").to_pylist()
        return {row["source"]: row["n"] for row in rows}
