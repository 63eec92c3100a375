"""A warehouse: the folder or bucket prefix that holds tables, runs and models."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime

from winnow.errors import CallError, StorageError
from winnow.schemas import FORMAT_VERSION
from winnow_connectors.ledger import Ledger
from winnow_connectors.object_store import NotFoundError, ObjectStores
from winnow_connectors.registry import Registry
from winnow_connectors.tables import Tables


class Warehouse:
    """Access to one warehouse. Picklable: Ray workers hold one.

    Args:
        uri: folder or object-store prefix.
        stores: how to reach it.
    """

    def __init__(self, uri: str, stores: ObjectStores) -> None:
        self.uri = uri
        self.stores = stores
        self.store = stores.at(uri)
        self.tables = Tables(self.store)
        self.ledger = Ledger(self.store, self.tables)
        self.registry = Registry(self.store, self.tables, self.ledger)

    def __reduce__(self) -> tuple[type[Warehouse], tuple[str, ObjectStores]]:
        return Warehouse, (self.uri, self.stores)

    def create(self) -> bool:
        """Create the warehouse with empty tables. False when it was there already; repeating mends a half-made one."""
        stamp = {"format": FORMAT_VERSION, "created_at": datetime.now(UTC).isoformat()}
        if self._format() is None:
            self.tables.create()
            return self.store.create("warehouse.json", json.dumps(stamp).encode())
        self.check()
        return False

    @property
    def identity(self) -> str:
        """Hex digits that tell this warehouse from others, wherever it is moved: of the moment of its creation."""
        return hashlib.blake2b(self.store.get("warehouse.json"), digest_size=6).hexdigest()

    def check(self) -> None:
        """Make sure that the warehouse exists in a format that this version reads.

        Raises:
            CallError: it does not exist.
            StorageError: its format is another one.
        """
        found = self._format()
        if found is None:
            raise CallError(f"there is no warehouse at {self.uri}; run `winnow init` to create it")
        if found != FORMAT_VERSION:
            raise StorageError(
                f"the warehouse at {self.uri} has format {found}; this version of winnow reads "
                f"format {FORMAT_VERSION}: install a matching version"
            )

    def _format(self) -> int | None:
        try:
            stamp = json.loads(self.store.get("warehouse.json"))
        except NotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise StorageError(f"warehouse.json at {self.uri} is damaged: {error}") from None
        return int(stamp["format"])
