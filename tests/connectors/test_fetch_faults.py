"""What becomes of storage faults, over a plain web server and over an S3 endpoint that both really misbehave."""

from __future__ import annotations

import asyncio
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faulty_http import Fault, FaultyHttp
from winnow.config import StorageConfig
from winnow.errors import FAILURE_KINDS, FetchError, StorageError
from winnow_connectors.object_store import ObjectStores

BODY = bytes(range(256)) * 400
SILENCE_S, RETRY_S = 0.3, 1.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHttp]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2secret")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    with FaultyHttp() as server:
        yield server


class Place:
    """One server under one of its two faces."""

    def __init__(self, server: FaultyHttp, face: str, base_dir: Path) -> None:
        self.server, self.base_dir = server, base_dir
        self.stores = self.open(RETRY_S)
        # The control character sends the key down the path of our own signed requests.
        self.target, self.uri = {
            "http": ("/bucket/a%20b.jpg?size=1", f"{server.url}/bucket/a%20b.jpg?size=1"),
            "s3": ("/bucket/a%20b.jpg", "s3://bucket/a b.jpg"),
            "s3-odd-key": ("/bucket/a%09b.jpg", "s3://bucket/a\tb.jpg"),
        }[face]

    def open(self, retry_s: float) -> ObjectStores:
        """Stores with another patience."""
        config = StorageConfig(endpoint=self.server.url, region="us-east-1")
        return ObjectStores({"s3://": config}, self.base_dir, fetch_timeout_s=SILENCE_S, retry_timeout_s=retry_s)

    def put(self, body: bytes = BODY, *, faults: list[Fault] | None = None, **options: object) -> str:
        """Serve it; the version that a listing would have recorded."""
        etag = self.server.put(self.target, body, faults=faults or [], **options)  # type: ignore[arg-type]
        return (etag or "").strip('"') or "unversioned"

    def read(self, version: str, *, max_bytes: int = 10**6, size: int | None = None) -> bytes:
        return asyncio.run(self.stores.read(self.uri, version=version, max_bytes=max_bytes, size=size))

    def failure(self, version: str, *, max_bytes: int = 10**6, size: int | None = None) -> FetchError:
        with pytest.raises(FetchError) as caught:
            self.read(version, max_bytes=max_bytes, size=size)
        error = caught.value
        assert error.kind in FAILURE_KINDS
        assert self.uri in error.message
        assert "hunter2secret" not in str(error) + repr(error)
        assert pickle.loads(pickle.dumps(error)).args == error.args
        return error

    @property
    def hits(self) -> int:
        return self.server.hits[self.target]


@pytest.fixture(params=["http", "s3", "s3-odd-key"])
def place(server: FaultyHttp, request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(server, request.param, tmp_path)


def test_a_healthy_object_is_read_whole(place: Place) -> None:
    version = place.put()
    assert place.read(version) == BODY
    assert place.hits == 1


@pytest.mark.parametrize("faults", [[503], [500, 503, 429], ["reset"], ["stall"], ["truncate"], ["stall_head"]])
def test_faults_that_pass_are_retried(place: Place, faults: list[Fault]) -> None:
    version = place.put(faults=faults)
    place.stores = place.open(retry_s=30.0)
    assert place.read(version) == BODY
    assert place.hits == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (401, "forbidden"),
        (403, "forbidden"),
        ("ExpiredToken", "forbidden"),
        (404, "missing"),
        (410, "missing"),
        (412, "changed"),
        (400, "unavailable"),
    ],
)
def test_refusals_are_final(place: Place, fault: Fault, kind: str) -> None:
    version = place.put(faults=[fault] * 9)
    assert place.failure(version).kind == kind
    assert place.hits == 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (503, "unavailable"),
        (429, "unavailable"),
        ("reset", "unavailable"),
        ("stall", "stalled"),
        ("stall_head", "stalled"),
        ("truncate", "incomplete"),
    ],
)
def test_lasting_faults_end_in_bounded_time(place: Place, fault: Fault, kind: str) -> None:
    version = place.put(faults=[fault] * 999)
    begin = time.monotonic()
    assert place.failure(version).kind == kind
    assert time.monotonic() - begin < RETRY_S + 3 * SILENCE_S + 2
    assert place.hits > 1


def test_an_object_that_is_gone(place: Place) -> None:
    assert place.failure("abc").kind == "missing"


def test_a_server_that_is_down(server: FaultyHttp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        stores = ObjectStores(
            {"s3://": StorageConfig(endpoint=url)}, tmp_path, fetch_timeout_s=SILENCE_S, retry_timeout_s=0.5
        )
        for uri in (f"{url}/a.jpg", "s3://bucket/a.jpg", "s3://bucket/\t.jpg"):
            with pytest.raises(FetchError) as caught:
                asyncio.run(stores.read(uri, version="v", max_bytes=10))
            assert caught.value.kind == "unavailable"
        with pytest.raises(StorageError, match="endpoint"):
            list(stores.list("s3://bucket/"))


@pytest.mark.parametrize("honours_if_match", [True, False])
def test_a_changed_object_is_never_taken_for_the_old_one(place: Place, honours_if_match: bool) -> None:
    old = place.put()
    place.put(BODY[::-1], honours_if_match=honours_if_match)
    assert place.failure(old).kind == "changed"
    assert place.hits == 1


def test_an_object_without_an_etag_is_told_apart_by_size_and_time(place: Place) -> None:
    place.put(etag=None)
    version = asyncio.run(place.stores.stat(place.uri)).version
    assert version.startswith(f"{len(BODY)}-")
    assert place.read(version) == BODY
    place.put(BODY + b"x", etag=None)
    assert place.failure(version).kind == "changed"
    assert place.read("unversioned") == BODY + b"x"
    assert place.failure("unversioned", size=len(BODY)).kind == "changed"


def test_weak_etags_are_compared_and_not_sent(place: Place) -> None:
    place.put(etag='W/"abc"')
    assert place.read("W/abc") == BODY
    assert place.failure("W/abd").kind == "changed"


def test_oversize_is_refused_before_the_body(place: Place) -> None:
    version = place.put()
    assert place.failure(version, max_bytes=len(BODY) - 1).kind == "too_many_bytes"
    assert place.hits == 1
    assert place.failure(version, max_bytes=len(BODY) - 1, size=len(BODY)).kind == "too_many_bytes"
    assert place.hits == 1, "a known size spares the request"
    assert place.read(version, max_bytes=len(BODY)) == BODY


def test_zero_bytes_are_empty(place: Place) -> None:
    assert place.failure(place.put(b"")).kind == "empty"


def test_an_expired_deadline_does_not_retry_for_ever_when_retries_are_off(server: FaultyHttp, tmp_path: Path) -> None:
    server.put("/x.jpg", BODY, faults=[503] * 9)
    stores = ObjectStores({}, tmp_path, retry_timeout_s=0.0)
    with pytest.raises(FetchError, match="503"):
        asyncio.run(stores.read(f"{server.url}/x.jpg", version="unversioned", max_bytes=10**6))
    assert server.hits["/x.jpg"] == 1


class TestWeb:
    """What only a plain web server does."""

    @pytest.fixture
    def read(self, server: FaultyHttp, tmp_path: Path) -> Callable[..., bytes]:
        stores = ObjectStores({}, tmp_path, fetch_timeout_s=SILENCE_S, retry_timeout_s=RETRY_S)

        def read(target: str, version: str = "unversioned", max_bytes: int = 10**6) -> bytes:
            return asyncio.run(stores.read(stores.canonical(server.url + target), version=version, max_bytes=max_bytes))

        return read

    def test_redirects_are_followed(self, server: FaultyHttp, read: Callable[..., bytes]) -> None:
        etag = server.put("/there.jpg", BODY)
        server.put("/here.jpg", b"wrong", faults=["redirect:/there.jpg"])
        assert etag is not None
        assert read("/here.jpg", etag.strip('"')) == BODY

    def test_redirects_in_a_circle_end(self, server: FaultyHttp, read: Callable[..., bytes]) -> None:
        server.put("/loop.jpg", BODY, faults=["redirect:/loop.jpg"] * 99)
        with pytest.raises(FetchError, match="redirects") as caught:
            read("/loop.jpg")
        assert caught.value.kind == "unavailable"
        assert server.hits["/loop.jpg"] < 10

    @pytest.mark.parametrize(
        ("written", "sent"),
        [
            ("/a b.jpg", "/a%20b.jpg"),
            ("/a%20b.jpg", "/a%20b.jpg"),
            ("/a+b&c.jpg?w=1&name=a%2Fb", "/a+b&c.jpg?w=1&name=a%2Fb"),
            ("/画.jpg", "/%E7%94%BB.jpg"),
            ("/a#b", "/a"),
            ("/a%23b", "/a%23b"),
            ("/d//e.jpg", "/d//e.jpg"),
            ("/100%.jpg", "/100%25.jpg"),
        ],
    )
    def test_odd_urls_arrive(self, server: FaultyHttp, read: Callable[..., bytes], written: str, sent: str) -> None:
        server.put(sent, BODY)
        assert read(written) == BODY

    def test_chunked_bodies(self, server: FaultyHttp, read: Callable[..., bytes]) -> None:
        server.put("/c.jpg", BODY, chunked=True)
        assert read("/c.jpg") == BODY
        with pytest.raises(FetchError) as caught:
            read("/c.jpg", max_bytes=1000)
        assert caught.value.kind == "too_many_bytes"
        server.put("/c.jpg", BODY, chunked=True, faults=["truncate"] * 9)
        with pytest.raises(FetchError) as caught:
            read("/c.jpg")
        assert caught.value.kind == "incomplete"
        server.put("/c.jpg", b"", chunked=True)
        with pytest.raises(FetchError) as caught:
            read("/c.jpg")
        assert caught.value.kind == "empty"

    def test_stat_and_list_give_the_one_object(self, server: FaultyHttp, tmp_path: Path) -> None:
        etag = server.put("/d/a%20b.jpg", BODY)
        stores = ObjectStores({}, tmp_path)
        (chunk,) = stores.list(f"{server.url}/d/a b.jpg")
        assert [(info.key, info.size, info.etag) for info in chunk] == [("a b.jpg", len(BODY), etag)]

    def test_stat_of_a_server_without_head(self, server: FaultyHttp, tmp_path: Path) -> None:
        server.put("/a.jpg", BODY, faults=[405])
        info = asyncio.run(ObjectStores({}, tmp_path).stat(f"{server.url}/a.jpg"))
        assert info.size == len(BODY)

    def test_dripping_bytes_are_bounded_as_a_whole(self, server: FaultyHttp, monkeypatch: pytest.MonkeyPatch) -> None:
        from winnow_connectors.objects import Patience
        from winnow_connectors.web import WebServers

        monkeypatch.setattr(Patience, "object_s", 0.5)
        server.put("/slow.jpg", BODY, faults=["trickle"] * 9)
        begin = time.monotonic()
        with pytest.raises(FetchError) as caught:
            WebServers(Patience(2.0, 2.0), num_connections=2).read(
                f"{server.url}/slow.jpg", version="unversioned", max_bytes=10**6
            )
        assert caught.value.kind == "stalled"
        assert time.monotonic() - begin < 3


class TestCreate:
    """Create-only writes when answers get lost."""

    @pytest.mark.parametrize("fault", ["lost", 503])
    def test_a_lost_answer_is_not_taken_for_another_winner(
        self, server: FaultyHttp, tmp_path: Path, fault: Fault
    ) -> None:
        server.put("/bucket/w/marker.json", b"", faults=[fault])
        store = Place(server, "s3", tmp_path).stores.at("s3://bucket/w")
        assert store.create("marker.json", b"mine") is True
        assert server.hits["/bucket/w/marker.json"] > 1
        assert store.create("marker.json", b"mine") is False, "the same bytes by another call are still another's"
        assert store.get("marker.json") == b"mine"

    def test_create_gives_up_in_bounded_time(self, server: FaultyHttp, tmp_path: Path) -> None:
        server.put("/bucket/w/marker.json", b"", faults=[503] * 999)
        store = Place(server, "s3", tmp_path).stores.at("s3://bucket/w")
        begin = time.monotonic()
        with pytest.raises(StorageError, match="503 SlowDown"):
            store.create("marker.json", b"mine")
        assert time.monotonic() - begin < 2 * RETRY_S + 2
