"""Model versions and production: whole or not at all, whatever is killed, tampered with or done at once."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest

from model_versions import begin, make_card, make_version
from mortal_stores import Clock, Killed, open_ledger
from winnow.errors import CallError, JobError
from winnow_connectors.object_store import ObjectStores
from winnow_connectors.registry import Move, Registry
from winnow_connectors.warehouse import Warehouse

TASK = "garment"


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    made = Warehouse(tmp_path.as_uri(), ObjectStores({}, tmp_path))
    made.create()
    return made


def make(warehouse: Warehouse, num_versions: int = 1) -> None:
    for number in range(1, num_versions + 1):
        assert make_version(warehouse.registry, warehouse.ledger, TASK) == f"{TASK}@{number}"


def mortal(folder: Path, clock: Clock) -> Registry:
    """The registry of a process that dies at one of its storage operations."""
    ledger = open_ledger(folder, clock)
    return Registry(ledger._store, ledger._tables, ledger)


# ------------------------------------------------------------------------------------------------------------- versions


def test_a_version_is_listed_with_its_card_and_weights(warehouse: Warehouse) -> None:
    registry = warehouse.registry
    assert registry.versions() == []
    make(warehouse, 2)
    make_version(registry, warehouse.ledger, "other", b"other weights")
    assert [version.name for version in registry.versions()] == ["garment@2", "garment@1", "other@1"]
    assert [version.name for version in registry.versions("other")] == ["other@1"]
    version = registry.version("garment@2")
    assert registry.weights(version) == b"weights"
    assert registry.card(version).version == "garment@2"
    assert version.metrics["test"]["accuracy"] == 0.75
    assert not version.production
    assert registry.weights_uri(version) == f"{warehouse.uri}/{version.location}/weights.safetensors"
    assert registry.made_from(TASK, "digest 1") == registry.version("garment@1")
    assert registry.made_from(TASK, "digest 3") is None


def test_an_abandoned_training_leaves_a_gap_and_no_version(warehouse: Warehouse) -> None:
    run = begin(warehouse.ledger, TASK)
    assert warehouse.registry.versions(TASK) == []
    warehouse.ledger.abandon(run, "test")
    assert not warehouse.registry.publish(run, make_card(TASK, 1, b"w"), b"w", {})
    assert warehouse.registry.versions(TASK) == []
    assert list(warehouse.store.list("models/")) == []
    assert make_version(warehouse.registry, warehouse.ledger, TASK) == "garment@2"


def test_two_drivers_of_one_training_make_one_version(warehouse: Warehouse) -> None:
    run = begin(warehouse.ledger, TASK)
    first = warehouse.registry.publish(run, make_card(TASK, 1, b"one"), b"one", {})
    second = warehouse.registry.publish(run, make_card(TASK, 1, b"two"), b"two", {})
    assert (first, second) == (True, False)
    (version,) = warehouse.registry.versions(TASK)
    assert warehouse.registry.weights(version) == b"one"
    assert len(list(warehouse.store.list("models/"))) == 2


@pytest.mark.parametrize("after", [False, True])
def test_a_training_killed_at_any_operation_leaves_one_whole_version_when_done_again(
    warehouse: Warehouse, tmp_path: Path, after: bool
) -> None:
    for number, dies_at in enumerate(itertools.count(1), start=1):
        run = begin(warehouse.ledger, TASK)
        clock = Clock(dies_at, after=after)
        registry = mortal(tmp_path, clock)
        killed_run = registry._ledger.load(run.run_id) if dies_at > 1 else registry._ledger.at(run.plan)
        card = make_card(TASK, number, b"weights")
        try:
            registry.publish(killed_run, card, b"weights", {})
        except Killed:
            pass
        else:
            break
        left = warehouse.ledger.open_run(f"train-{TASK}")
        if left is not None:
            assert warehouse.registry.publish(left, card, b"weights", {})
        versions = warehouse.registry.versions(TASK)
        assert [version.number for version in versions] == list(range(number, 0, -1))
        assert warehouse.registry.weights(versions[0]) == b"weights"
    assert number > 6


@pytest.mark.parametrize("name", ["weights.safetensors", "card.json"])
def test_files_that_are_not_as_they_were_are_refused(warehouse: Warehouse, name: str) -> None:
    make(warehouse)
    registry = warehouse.registry
    version = registry.version("garment@1")
    read = registry.card if name == "card.json" else registry.weights
    key = f"{version.location}/{name}"
    whole = warehouse.store.get(key)
    for tampered in (whole[:-1], b"", whole + b" ", whole.replace(b"e", b"f", 1)):
        warehouse.store.put(key, tampered)
        with pytest.raises(JobError, match=rf"garment@1 cannot be used: {key} is damaged or was changed"):
            read(version)
        with pytest.raises(JobError, match="garment@1 cannot be used"):
            registry.promote("garment@1")
    warehouse.store.delete(key)
    with pytest.raises(JobError, match=f"garment@1 cannot be used: {key} is gone"):
        read(version)
    assert registry.production(TASK) == "garment@base"


def test_unknown_versions_are_refused_with_those_there_are(warehouse: Warehouse) -> None:
    with pytest.raises(CallError, match=r"garment@1 does not exist; versions of garment: none; `winnow train"):
        warehouse.registry.version("garment@1")
    make(warehouse, 2)
    with pytest.raises(CallError, match=r"garment@3 does not exist; versions of garment: garment@2, garment@1"):
        warehouse.registry.promote("garment@3")
    with pytest.raises(CallError, match="write TASK@NUMBER"):
        warehouse.registry.promote("garment")
    with pytest.raises(CallError, match="winnow models rollback garment --to base"):
        warehouse.registry.promote("garment@base")


# ----------------------------------------------------------------------------------------------------------- production


def test_promotions_and_rollbacks_form_one_line(warehouse: Warehouse) -> None:
    make(warehouse, 3)
    registry = warehouse.registry

    def production() -> str:
        assert [v.name for v in registry.versions(TASK) if v.production] == (
            [] if registry.production(TASK) == "garment@base" else [registry.production(TASK)]
        )
        return registry.production(TASK).removeprefix("garment@")

    assert production() == "base"
    with pytest.raises(CallError, match=r"nothing to roll back: garment is answered by the model of winnow\.toml"):
        registry.roll_back(TASK)
    for name in ("1", "3", "2"):
        registry.promote(f"garment@{name}")
        assert production() == name
    again = registry.promote("garment@2")
    assert again == Move(TASK, "garment@2", "garment@2", None)
    assert registry.roll_back(TASK).before == "garment@2"
    assert production() == "3"
    assert registry.roll_back(TASK).production == "garment@1"
    assert registry.roll_back(TASK).production == "garment@base"
    with pytest.raises(CallError, match="nothing to roll back"):
        registry.roll_back(TASK)
    registry.promote("garment@3")
    assert registry.roll_back(TASK, "2").production == "garment@2"
    assert registry.roll_back(TASK, "base").production == "garment@base"
    assert registry.roll_back(TASK, "garment@base").run_id is None
    with pytest.raises(CallError, match="is a version of other, not of garment"):
        registry.roll_back(TASK, "other@1")
    with pytest.raises(CallError, match="garment@9 does not exist"):
        registry.roll_back(TASK, "9")
    assert [row["event"] for row in registry.history(TASK)].count("promoted") == 4
    assert registry.production("other") == "other@base"


def test_a_promotion_says_what_it_rests_on_and_passes_nobody_over(warehouse: Warehouse) -> None:
    make(warehouse, 2)
    registry = warehouse.registry
    moved = registry.promote("garment@1", detail={"n": 7}, expected="garment@base", why="it is better")
    assert (moved.before, moved.why) == ("garment@base", "it is better")
    assert json.loads(registry.history(TASK)[0]["detail"]) == {"before": "garment@base", "n": 7}
    with pytest.raises(CallError, match="garment@1 went into production meanwhile, but garment@2 was compared with"):
        registry.promote("garment@2", expected="garment@base")
    assert registry.production(TASK) == "garment@1"


def test_a_clock_that_runs_behind_does_not_turn_the_order_around(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime, timedelta, tzinfo

    import winnow_connectors.registry as module

    make(warehouse, 2)
    warehouse.registry.promote("garment@1")

    class Behind(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Behind:
            late = datetime.now(tz) - timedelta(hours=1)
            return cls.fromisoformat(late.isoformat())

    monkeypatch.setattr(module, "datetime", Behind)
    warehouse.registry.promote("garment@2")
    assert warehouse.registry.production(TASK) == "garment@2"


@pytest.mark.parametrize("after", [False, True])
def test_a_promotion_killed_at_any_operation_is_finished_or_was_never_begun(
    warehouse: Warehouse, tmp_path: Path, after: bool
) -> None:
    make(warehouse, 2)
    names = itertools.cycle(["garment@1", "garment@2"])
    before = "garment@base"
    seen = set()
    for dies_at in itertools.count(1):
        name = next(names)
        registry = mortal(tmp_path, Clock(dies_at, after=after))
        try:
            registry.promote(name)
        except Killed:
            pass
        else:
            break
        found = warehouse.registry.production(TASK)
        assert found in (before, name)
        assert warehouse.ledger.open_runs() == []
        seen.add(found == name)
        before = warehouse.registry.promote(name).production
        assert warehouse.registry.production(TASK) == name
    assert seen == {True, False}
    # A straight line: every move says what was before, and that it was.
    history = warehouse.registry.history(TASK)
    for earlier, later in itertools.pairwise(history):
        assert earlier["at"] < later["at"]
        assert f'"before": "{earlier["version"]}"' in later["detail"]


def test_promotions_at_once_happen_one_after_the_other(warehouse: Warehouse, tmp_path: Path) -> None:
    make(warehouse, 4)
    failed: list[BaseException] = []

    def promote(name: str) -> None:
        try:
            other = Warehouse(tmp_path.as_uri(), ObjectStores({}, tmp_path))
            other.registry.promote(name)
        except BaseException as error:  # noqa: BLE001  shown by the test's thread
            failed.append(error)

    threads = [threading.Thread(target=promote, args=(f"garment@{number}",)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed, failed
    history = warehouse.registry.history(TASK)
    assert sorted(row["version"] for row in history) == [f"garment@{number}" for number in range(1, 5)]
    for earlier, later in itertools.pairwise(history):
        assert earlier["at"] < later["at"]
        assert f'"before": "{earlier["version"]}"' in later["detail"]
    assert warehouse.registry.production(TASK) == history[-1]["version"]


@pytest.fixture
def s3_warehouse(s3_env: object, s3_server: object) -> Warehouse:
    from winnow.config import StorageConfig

    bucket = s3_server.make_bucket("registry")  # type: ignore[attr-defined]
    config = StorageConfig(endpoint=s3_server.endpoint, region="us-east-1")  # type: ignore[attr-defined]
    made = Warehouse(f"s3://{bucket}/w", ObjectStores({"s3://": config}, Path()))
    made.create()
    return made


@pytest.mark.s3
def test_the_same_on_s3(s3_warehouse: Warehouse) -> None:
    make(s3_warehouse, 2)
    s3_warehouse.registry.promote("garment@2")
    version = s3_warehouse.registry.version("garment@2")
    assert version.production
    assert s3_warehouse.registry.weights(version) == b"weights"
    assert s3_warehouse.stores.download(s3_warehouse.registry.weights_uri(version)) == b"weights"
    assert s3_warehouse.registry.roll_back(TASK).production == "garment@base"
