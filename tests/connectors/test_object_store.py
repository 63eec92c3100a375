"""One behaviour for every place that a warehouse can live in, and what is special about each."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from winnow import uris
from winnow.config import StorageConfig
from winnow.errors import CallError, FetchError, StorageError
from winnow_connectors.object_store import NotFoundError, ObjectInfo, ObjectStore, ObjectStores

ODD_KEYS = [
    "photo with spaces.jpg",
    " lead and trail .jpg ",
    "café.jpg",  # NFC
    "cafe\u0301.jpg",  # NFD
    "画像 😀.jpg",
    "50%20off.jpg",
    "%2e%2e%2fetc.jpg",
    "100%.jpg",
    "a#b.jpg",
    "a?b=c&d.jpg",
    "a+b.jpg",
    "new\nline.jpg",
    "tab\tand\x7f.jpg",
    "carriage\r.jpg",
    'quote\'s "x".jpg',
    "<a>&amp;.jpg",
    "-rf.jpg",
    "=cmd.jpg",
    ".DS_Store",
    "folder/.hidden/x.jpg",
    "/".join(["k" * 99] * 9),
]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place, as a canonical URI."""
    if request.param == "local":
        return uris.from_path(tmp_path / "a place #1")
    server = request.getfixturevalue("s3_env")
    return f"s3://{server.make_bucket('objects')}/a place #1"


@pytest.fixture
def stores(root: str, request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStores:
    if root.startswith("file:"):
        return ObjectStores({}, tmp_path)
    server = request.getfixturevalue("s3_env")
    config = StorageConfig(endpoint=server.endpoint, region="us-east-1")
    return ObjectStores({"s3://": config}, tmp_path, fetch_timeout_s=30.0, retry_timeout_s=30.0)


@pytest.fixture
def store(stores: ObjectStores, root: str) -> ObjectStore:
    return stores.at(root)


def read(stores: ObjectStores, uri: str, version: str = "unversioned", max_bytes: int = 10**6) -> bytes:
    return asyncio.run(stores.read(uri, version=version, max_bytes=max_bytes))


def everything(stores: ObjectStores, uri: str) -> dict[str, ObjectInfo]:
    infos = [info for chunk in stores.list(uri) for info in chunk]
    found = {info.key: info for info in infos}
    assert len(found) == len(infos)
    return found


class TestKeysAndValues:
    def test_put_get_replace_delete(self, store: ObjectStore) -> None:
        assert not store.exists("a/b.json")
        with pytest.raises(NotFoundError, match=r"a/b\.json"):
            store.get("a/b.json")
        store.put("a/b.json", b"one")
        store.put("a/b.json", b"two")
        assert store.exists("a/b.json")
        assert store.get("a/b.json") == b"two"
        store.delete("a/b.json")
        store.delete("a/b.json")
        assert not store.exists("a/b.json")

    def test_a_folder_is_no_value(self, store: ObjectStore) -> None:
        store.put("a/b.json", b"x")
        assert not store.exists("a")
        assert not store.exists("a/b.json/c")

    def test_list_gives_keys_that_get_takes(self, store: ObjectStore) -> None:
        values = {f"runs/1/markers/{number:03}.json": b"x" * number for number in range(25)}
        for key, value in {**values, "runs/10/plan.json": b"{}", "top.json": b"top"}.items():
            store.put(key, value)
        for prefix in ("runs/1", "runs/1/", "runs/1/markers/"):
            assert {info.key: info.size for info in store.list(prefix)} == {k: len(v) for k, v in values.items()}
        assert len(list(store.list())) == 27
        assert list(store.list("nothing/here")) == []
        assert all(store.get(info.key) == values[info.key] for info in store.list("runs/1"))

    def test_create_writes_once(self, store: ObjectStore) -> None:
        assert store.create("claims/1.json", b"first") is True
        assert store.create("claims/1.json", b"second") is False
        assert store.get("claims/1.json") == b"first"

    def test_of_eight_creators_one_wins(self, store: ObjectStore) -> None:
        with ThreadPoolExecutor(8) as threads:
            for turn in range(2):
                won = list(threads.map(lambda n, key=f"race/{turn}": store.create(key, b"%d" % n), range(8)))
                assert sum(won) == 1
                assert store.get(f"race/{turn}") == b"%d" % won.index(True)

    def test_of_eight_creators_with_the_same_bytes_one_wins(self, store: ObjectStore) -> None:
        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(lambda _: store.create("race/same", b"same"), range(8))) == 1

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/./b"])
    def test_keys_that_are_no_names_are_refused(self, store: ObjectStore, key: str) -> None:
        with pytest.raises(ValueError, match="no name"):
            store.put(key, b"x")

    def test_pickled_stores_work(self, store: ObjectStore) -> None:
        store.put("a", b"x")
        again = pickle.loads(pickle.dumps(store))
        assert again.get("a") == b"x"
        assert again.uri == store.uri

    def test_large_values(self, store: ObjectStore) -> None:
        data = os.urandom(12_000_000)
        store.put("large", data)
        assert store.get("large") == data
        assert store.create("large-once", data)
        assert store.get("large-once") == data

    def test_delta_tables_live_in_the_same_place(self, store: ObjectStore) -> None:
        uri, options = store.delta_uri("tables/t"), store.delta_options()
        for number in range(2):
            write_deltalake(uri, pa.table({"n": [number]}), mode="append", storage_options=options)
        assert sorted(DeltaTable(uri, storage_options=options).to_pyarrow_table()["n"].to_pylist()) == [0, 1]
        assert any(info.key.startswith("tables/t/_delta_log/") for info in store.list("tables"))


class TestImages:
    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_odd_names_are_listed_and_read(self, stores: ObjectStores, root: str, key: str) -> None:
        if not root.startswith("file:"):
            put_signed(stores, uris.join(root, key), b"hello")
        else:
            stores.at(root).put(key, b"hello")
        found = everything(stores, root)
        assert list(found) == [key]
        info = found[key]
        assert info.uri == uris.join(root, key) == uris.canonical(info.uri)
        assert uris.relative(info.uri, root) == key
        assert read(stores, info.uri, info.version) == b"hello"
        assert asyncio.run(stores.stat(info.uri)).version == info.version
        assert list(everything(stores, info.uri)) == [key.rpartition("/")[2]]

    def test_awkward_archive(self, stores: ObjectStores, root: str, shared_data: Path, tmp_path: Path) -> None:
        with tarfile.open(shared_data / "hostile" / "awkward_names.tar") as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        files = {path.name: path.read_bytes() for path in (tmp_path / "unpacked").iterdir()}
        for name, data in files.items():
            stores.at(root).put(name, data)
        found = everything(stores, root)
        assert {key: info.size for key, info in found.items()} == {name: len(data) for name, data in files.items()}
        assert all(read(stores, info.uri, info.version) == files[key] for key, info in found.items())

    def test_listing_is_streamed_in_chunks(self, stores: ObjectStores, root: str) -> None:
        store = stores.at(root)
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda n: store.put(f"f{n % 7}/{n:05}.jpg", b"x"), range(2100)))
        chunks = list(stores.list(root))
        assert len(chunks) >= 3
        assert max(map(len, chunks)) <= 1000
        assert len({info.uri for chunk in chunks for info in chunk}) == 2100
        assert len(everything(stores, uris.join(root, "f3"))) == 300

    def test_a_replaced_object_has_another_version(self, stores: ObjectStores, root: str) -> None:
        store = stores.at(root)
        store.put("a.jpg", b"one")
        (old,) = everything(stores, root).values()
        store.put("a.jpg", b"two")
        (new,) = everything(stores, root).values()
        assert old.version != new.version
        assert read(stores, new.uri, new.version) == b"two"
        with pytest.raises(FetchError) as caught:
            read(stores, old.uri, old.version)
        assert caught.value.kind == "changed"

    def test_failures_have_kinds(self, stores: ObjectStores, root: str) -> None:
        store = stores.at(root)
        store.put("folder/zero.jpg", b"")
        store.put("big.jpg", b"x" * 1000)
        for name, limit, kind in [
            ("none.jpg", 10, "missing"),
            ("folder", 10, "missing"),
            ("folder/zero.jpg", 10, "empty"),
            ("big.jpg", 999, "too_many_bytes"),
        ]:
            with pytest.raises(FetchError) as caught:
                read(stores, uris.join(root, name), max_bytes=limit)
            assert caught.value.kind == kind, name
            assert uris.join(root, name) in caught.value.message
        assert "folder/zero.jpg" in everything(stores, root), "listings leave nothing out"

    def test_dozens_of_reads_in_flight(self, stores: ObjectStores, root: str) -> None:
        store = stores.at(root)
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda n: store.put(f"{n}.jpg", b"%d" % n * 100), range(200)))
        infos = everything(stores, root)

        async def all_of_them() -> list[bytes]:
            reads = [
                stores.read(infos[f"{n}.jpg"].uri, version=infos[f"{n}.jpg"].version, max_bytes=9999)
                for n in range(200)
            ]
            return await asyncio.gather(*reads)

        assert asyncio.run(all_of_them()) == [b"%d" % n * 100 for n in range(200)]


def put_signed(stores: ObjectStores, uri: str, body: bytes) -> None:
    """Write an object whose key obstore refuses: a presigned-style PUT made of the connector's own signature."""
    import hashlib

    import urllib3

    from winnow_connectors import signed_s3

    signed = stores._backend(uri)._signed  # type: ignore[attr-defined]
    _, bucket, key = uris.split(uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signed_s3, "_EMPTY_SHA256", hashlib.sha256(body).hexdigest())
        headers = signed._sign("PUT", bucket, key, {})
    with urllib3.PoolManager() as pool:
        answer = pool.request("PUT", signed._url(bucket, key), headers=headers, body=body)
    assert answer.status == 200, answer.data


@pytest.mark.s3
class TestS3:
    def test_folder_markers_and_odd_keys_do_not_end_a_listing(self, s3_env: Any, tmp_path: Path) -> None:
        bucket = s3_env.make_bucket("odd")
        stores = ObjectStores({"s3://": StorageConfig(endpoint=s3_env.endpoint)}, tmp_path)
        for key, body in [("photos/", b""), ("photos/a.jpg", b"a"), ("photos/\n.jpg", b"b"), ("z.jpg", b"z")]:
            put_signed(stores, f"s3://{bucket}/{key}", body)
        assert set(everything(stores, f"s3://{bucket}")) == {"photos/", "photos/a.jpg", "photos/\n.jpg", "z.jpg"}
        with pytest.raises(FetchError) as caught:
            read(stores, f"s3://{bucket}/photos/")
        assert caught.value.kind == "empty"

    def test_wrong_keys_are_forbidden_and_not_repeated(
        self, s3_env: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bucket = s3_env.make_bucket("forbidden")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        stores = ObjectStores({"s3://": StorageConfig(endpoint=s3_env.endpoint)}, tmp_path, retry_timeout_s=1.0)
        store = stores.at(f"s3://{bucket}")
        messages = []
        for call in (
            lambda: store.put("a", b"x"),
            lambda: store.create("a", b"x"),
            lambda: store.get("a"),
            lambda: store.exists("a"),
            lambda: list(store.list()),
            lambda: list(stores.list(f"s3://{bucket}/a")),
        ):
            with pytest.raises(StorageError, match="credentials") as caught:
                call()
            messages.append(str(caught.value))
        for uri in (f"s3://{bucket}/a", f"s3://{bucket}/\t"):
            with pytest.raises(FetchError) as refused:
                read(stores, uri)
            assert refused.value.kind == "forbidden"
            messages.append(str(refused.value))
        assert "hunter2" not in "".join(messages)
        assert s3_env.access_key not in "".join(messages)

    def test_a_bucket_that_does_not_exist(self, s3_env: Any, tmp_path: Path) -> None:
        stores = ObjectStores({"s3://": StorageConfig(endpoint=s3_env.endpoint)}, tmp_path, retry_timeout_s=1.0)
        with pytest.raises(StorageError, match="no such bucket"):
            list(stores.list("s3://there-is-no-such-bucket/x"))

    def test_keys_come_from_a_credentials_file(
        self, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        parser = configparser.RawConfigParser()
        parser.read_dict(
            {"lab": {"aws_access_key_id": s3_server.access_key, "aws_secret_access_key": s3_server.secret_key}}
        )
        with (tmp_path / "keys").open("w") as file:
            parser.write(file)
        config = StorageConfig(endpoint=s3_server.endpoint, profile="lab", credentials_file="keys")
        stores = ObjectStores({"s3://": config}, tmp_path)
        store = stores.at(f"s3://{s3_server.make_bucket('profile')}/w")
        store.put("a", b"x")
        assert [info.key for info in store.list()] == ["a"]
        write_deltalake(store.delta_uri("t"), pa.table({"n": [1]}), storage_options=store.delta_options())
        for thing in (stores, store, stores._backend(store.uri), stores._backend(store.uri)._store("b")):  # type: ignore[attr-defined]
            assert s3_server.secret_key not in repr(thing) + str(thing)
        assert s3_server.secret_key.encode() not in pickle.dumps(store)

    def test_no_secret_is_logged(self, s3_env: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        stores = ObjectStores({"s3://": StorageConfig(endpoint=s3_env.endpoint)}, tmp_path)
        bucket = s3_env.make_bucket("log")
        put_signed(stores, f"s3://{bucket}/\t.jpg", b"x")
        everything(stores, f"s3://{bucket}")
        read(stores, f"s3://{bucket}/\t.jpg")
        assert s3_env.secret_key not in caplog.text
        assert "Signature=" not in caplog.text

    def test_a_process_that_read_ends_cleanly(self, s3_env: Any, tmp_path: Path) -> None:
        bucket = s3_env.make_bucket("exit")
        code = f"""
import asyncio
from pathlib import Path
from winnow.config import StorageConfig
from winnow_connectors.object_store import ObjectStores
stores = ObjectStores({{"s3://": StorageConfig(endpoint={s3_env.endpoint!r})}}, Path("."))
stores.at("s3://{bucket}").put("a", b"hello")
print(asyncio.run(stores.read("s3://{bucket}/a", version="unversioned", max_bytes=9)))
"""
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, timeout=60, check=False, cwd=tmp_path
            )
            assert (done.returncode, done.stdout.strip()) == (0, b"b'hello'"), done.stderr


class TestLocal:
    @pytest.fixture
    def stores(self, tmp_path: Path) -> ObjectStores:
        return ObjectStores({}, tmp_path)

    def test_loops_and_pipes_do_not_hang(self, stores: ObjectStores, tmp_path: Path) -> None:
        photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
        (photos / "deep" / "er").mkdir(parents=True)
        elsewhere.mkdir()
        (photos / "a.jpg").write_bytes(b"a")
        (photos / "deep" / "b.jpg").write_bytes(b"b")
        (elsewhere / "c.jpg").write_bytes(b"c")
        (photos / "deep" / "up").symlink_to(photos)
        (photos / "self").symlink_to("self")
        (photos / "broken").symlink_to("nowhere")
        (photos / "out").symlink_to(elsewhere)
        (photos / "out again").symlink_to(elsewhere)
        (elsewhere / "back").symlink_to(photos)
        (elsewhere / "here").symlink_to(elsewhere)
        (photos / "link.jpg").symlink_to(elsewhere / "c.jpg")
        os.mkfifo(photos / "pipe.jpg")
        found = everything(stores, "photos")
        assert sorted(found) == ["a.jpg", "deep/b.jpg", "link.jpg", "out/c.jpg"]
        for name in ("pipe.jpg", "self", "broken", "deep"):
            with pytest.raises(FetchError) as caught:
                read(stores, uris.from_path(photos / name))
            assert caught.value.kind == "missing"

    def test_names_that_are_not_utf8(self, stores: ObjectStores, tmp_path: Path) -> None:
        (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
        (info,) = everything(stores, str(tmp_path)).values()
        assert info.key == "caf\N{REPLACEMENT CHARACTER}.jpg"
        assert read(stores, info.uri, info.version) == b"x"

    def test_version_is_size_and_time(self, stores: ObjectStores, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(b"xyz")
        os.utime(path, ns=(1, 1_700_000_000_123_456_789))
        (info,) = everything(stores, "a.jpg").values()
        assert info.version == "3-1700000000123456789"
        os.utime(path, ns=(1, 1_700_000_000_123_456_788))
        with pytest.raises(FetchError) as caught:
            read(stores, info.uri, info.version)
        assert caught.value.kind == "changed"

    def test_missing_and_unreadable_folders_are_errors_not_empty(
        self, stores: ObjectStores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(CallError, match="does not exist"):
            list(stores.list("nowhere"))
        (tmp_path / "photos" / "locked").mkdir(parents=True)
        (tmp_path / "photos" / "locked").chmod(0)
        if os.geteuid() == 0:  # no lock keeps root out: let the system call itself refuse
            real = os.scandir

            def refuse(path: str) -> Any:
                if path.endswith("locked"):
                    raise PermissionError(13, "Permission denied")
                return real(path)

            monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(StorageError, match="permissions"):
            list(stores.list("photos"))

    def test_killed_writers_leave_no_values(self, stores: ObjectStores, tmp_path: Path) -> None:
        store = stores.at("warehouse")
        writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(store,), daemon=True)
        writer.start()
        deadline = time.monotonic() + 60
        while sum(1 for _ in store.list()) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join(timeout=10)
        infos = list(store.list())
        assert len(infos) >= 20
        assert {info.size for info in infos} == {300_000}
        assert all(info.key.isdigit() for info in infos)

    def test_percent_signs_that_delta_cannot_stand_are_refused(self, stores: ObjectStores) -> None:
        with pytest.raises(CallError, match="percent"):
            stores.at("50%20off").delta_uri("t")
        assert stores.at("50% off").delta_uri("t").endswith("/50%25%20off/t")


def _write_for_ever(store: ObjectStore) -> None:
    for number in range(100_000):
        (store.create if number % 2 else store.put)(str(number), bytes(300_000))


class TestOtherSchemes:
    @pytest.fixture
    def memory(self) -> Iterator[str]:
        import fsspec

        system = fsspec.filesystem("memory")
        for name, data in [("a b.jpg", b"a"), ("deep/#1.jpg", b"bc"), ("deep/zero", b"")]:
            system.pipe(f"/photos/{name}", data)
        yield "memory://photos"
        system.rm("/photos", recursive=True)

    def test_memory_is_listed_and_read(self, memory: str, tmp_path: Path) -> None:
        stores = ObjectStores({}, tmp_path)
        found = everything(stores, memory)
        assert {key: info.size for key, info in found.items()} == {"a b.jpg": 1, "deep/#1.jpg": 2, "deep/zero": 0}
        info = found["deep/#1.jpg"]
        assert info.uri == "memory://photos/deep/#1.jpg"
        assert read(stores, info.uri, info.version) == b"bc"
        assert list(everything(stores, info.uri)) == ["#1.jpg"]
        for key, limit, version, kind in [
            ("deep/#1.jpg", 1, "unversioned", "too_many_bytes"),
            ("deep/zero", 9, "unversioned", "empty"),
            ("none", 9, "unversioned", "missing"),
            ("deep", 9, "unversioned", "missing"),
            ("a b.jpg", 9, "other", "changed"),
        ]:
            with pytest.raises(FetchError) as caught:
                read(stores, uris.join(memory, key), version, limit)
            assert caught.value.kind == kind, key
        with pytest.raises(CallError, match="does not exist"):
            everything(stores, "memory://nowhere")

    @pytest.mark.parametrize("uri", ["memory://w", "https://example.org/w", "ftp://host/w"])
    def test_a_warehouse_needs_storage_that_can_create(self, uri: str, tmp_path: Path) -> None:
        with pytest.raises(CallError, match="cannot be written"):
            ObjectStores({}, tmp_path).at(uri)

    def test_unknown_schemes(self, tmp_path: Path) -> None:
        with pytest.raises(CallError, match="known schemes"):
            list(ObjectStores({}, tmp_path).list("nonsense://a/b"))

    def test_folders_on_web_servers(self, tmp_path: Path) -> None:
        with pytest.raises(CallError, match="manifest"):
            list(ObjectStores({}, tmp_path).list("https://example.org/photos/"))


class TestSettings:
    def test_the_longest_matching_section_wins(self, tmp_path: Path) -> None:
        stores = ObjectStores(
            {
                "s3://": StorageConfig(endpoint="http://127.0.0.1:1", anonymous=True),
                "S3A://photos": StorageConfig(endpoint="http://127.0.0.1:2/", anonymous=True),
                "s3://photos/raw/": StorageConfig(endpoint="https://127.0.0.1:3", anonymous=True),
            },
            tmp_path,
        )
        for uri, endpoint in [
            ("s3://other", "http://127.0.0.1:1"),
            ("s3://photos-2023/x", "http://127.0.0.1:1"),
            ("s3://photos", "http://127.0.0.1:2"),
            ("s3://photos/rawest", "http://127.0.0.1:2"),
            ("s3://photos/raw/x", "https://127.0.0.1:3"),
        ]:
            options = stores.at(uri).delta_options()
            assert options["AWS_ENDPOINT_URL"] == endpoint, uri
            assert options["AWS_SKIP_SIGNATURE"] == "true"
            assert options["aws_conditional_put"] == "etag"
            assert options.get("AWS_ALLOW_HTTP") == ("true" if endpoint.startswith("http://") else None)

    @pytest.fixture
    def aws(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """AWS's two files, made from nothing, and an environment without keys."""
        for name in list(os.environ):
            if name.startswith("AWS_"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        (tmp_path / "config").write_text("[profile lab]\nregion = eu-north-1\n[profile sso]\nsso_session = corp\n")
        (tmp_path / "credentials").write_text(
            "[default]\naws_access_key_id = D\naws_secret_access_key = ds\n"
            "[lab]\naws_access_key_id = L\naws_secret_access_key = l%s=/+\naws_session_token = t\n"
            "[half]\naws_access_key_id = H\n"
        )
        return tmp_path

    def options(self, folder: Path, **config: Any) -> dict[str, str]:
        return ObjectStores({"s3://": StorageConfig(**config)}, folder).at("s3://b").delta_options()

    def test_the_profile_default_is_used_without_any_settings(self, aws: Path) -> None:
        assert self.options(aws)["AWS_ACCESS_KEY_ID"] == "D"

    def test_a_named_profile_brings_region_and_token(self, aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "E")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "es")
        assert self.options(aws)["AWS_ACCESS_KEY_ID"] == "E", "the environment comes before the default profile"
        options = self.options(aws, profile="lab")
        assert (options["AWS_ACCESS_KEY_ID"], options["AWS_SECRET_ACCESS_KEY"]) == ("L", "l%s=/+")
        assert (options["AWS_SESSION_TOKEN"], options["AWS_REGION"]) == ("t", "eu-north-1")
        assert self.options(aws, profile="lab", region="us-west-2")["AWS_REGION"] == "us-west-2"

    def test_renewed_keys_are_seen(self, aws: Path) -> None:
        store = ObjectStores({"s3://": StorageConfig(profile="lab")}, aws).at("s3://b")
        store.delta_options()
        text = (aws / "credentials").read_text()
        (aws / "credentials").write_text(text.replace("= L", "= L2"))
        assert store.delta_options()["AWS_ACCESS_KEY_ID"] == "L2"

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"profile": "none"}, "profiles there: default, lab, half"),
            ({"profile": "half"}, "aws_secret_access_key"),
            ({"credentials_file": "nowhere"}, "does not exist"),
            ({"credentials_file": "broken"}, "INI"),
        ],
    )
    def test_faults_are_told_without_the_file_s_content(self, aws: Path, config: dict[str, str], words: str) -> None:
        (aws / "broken").write_text("hunter2\n[x\nhunter2")
        with pytest.raises(CallError, match=words) as caught:
            self.options(aws, **config)
        assert "hunter2" not in str(caught.value)

    def test_a_profile_that_signs_in_needs_boto3(self, aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "botocore", None)  # as if it were not installed
        monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
        with pytest.raises(CallError, match=r"pip install 'winnow-vision\[aws\]'"):
            self.options(aws, profile="sso")

    def test_a_profile_with_a_process_goes_through_boto3(self, aws: Path) -> None:
        pytest.importorskip("boto3", reason="the extra `aws` is not installed")
        answer = '{"Version": 1, "AccessKeyId": "P", "SecretAccessKey": "ps", "SessionToken": "pt"}'
        (aws / "keys.json").write_text(answer)
        (aws / "config").write_text(f"[profile tool]\ncredential_process = cat {aws / 'keys.json'}\n")
        options = self.options(aws, profile="tool")
        assert (options["AWS_ACCESS_KEY_ID"], options["AWS_SESSION_TOKEN"]) == ("P", "pt")

    def test_settings_that_do_not_fit_the_scheme(self, tmp_path: Path) -> None:
        with pytest.raises(CallError, match="gs://"):
            ObjectStores({"gs://": StorageConfig(profile="x")}, tmp_path).at("gs://b")

    def test_a_relative_base_dir_is_fixed_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        stores = ObjectStores({}, Path())
        with contextlib.chdir("/"):
            assert stores.at("w").uri == uris.from_path(tmp_path / "w")
