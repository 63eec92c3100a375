"""The warehouse of a process that dies at an exact storage operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from winnow_connectors.ledger import Ledger
from winnow_connectors.object_store import ObjectStore, ObjectStores
from winnow_connectors.tables import Tables


class Killed(BaseException):
    """kill -9 at an exact operation: no handler of the code under test may catch it."""


class Clock:
    """Counts storage operations and dies at the n-th: before it is carried out, or right after."""

    def __init__(self, dies_at: int | None = None, *, after: bool = False) -> None:
        self.count = 0
        self._dies_at = dies_at
        self._after = after

    def step(self, operation: Callable[[], Any]) -> Any:
        self.count += 1
        if self.count == self._dies_at and not self._after:
            raise Killed
        result = operation()
        if self.count == self._dies_at:
            raise Killed
        return result


class MortalStore(ObjectStore):
    """The real store of a process that may die at any operation."""

    def __init__(self, store: ObjectStore, clock: Clock) -> None:
        super().__init__(store._stores, store.uri)
        self._clock = clock

    def put(self, key: str, data: bytes) -> None:
        self._clock.step(lambda: ObjectStore.put(self, key, data))

    def create(self, key: str, data: bytes) -> bool:
        created: bool = self._clock.step(lambda: ObjectStore.create(self, key, data))
        return created

    def get(self, key: str) -> bytes:
        data: bytes = self._clock.step(lambda: ObjectStore.get(self, key))
        return data


class MortalTables(Tables):
    """The real tables of a process that may also die before or after a commit."""

    def __init__(self, store: MortalStore) -> None:
        super().__init__(store)
        self._clock = store._clock

    def commit(self, name: str, fragments: Any, *, app_id: str) -> bool:
        committed: bool = self._clock.step(lambda: Tables.commit(self, name, fragments, app_id=app_id))
        return committed


def open_ledger(folder: Path, clock: Clock | None = None) -> Ledger:
    store = ObjectStores({}, folder).at(folder.as_uri())
    if clock is None:
        return Ledger(store, Tables(store))
    mortal = MortalStore(store, clock)
    return Ledger(mortal, MortalTables(mortal))
