"""Folders, buckets and manifests as one stream of rows."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import S3Server
from faulty_http import FaultyHttp
from winnow import uris
from winnow.config import StorageConfig
from winnow.errors import CallError
from winnow_connectors.columns import as_map, as_text
from winnow_connectors.manifests import LISTING, Manifest
from winnow_connectors.object_store import ObjectStores
from winnow_connectors.sources import ask_versions, parse_source, read_source


@pytest.fixture
def stores(tmp_path: Path) -> ObjectStores:
    return ObjectStores({}, tmp_path, fetch_timeout_s=5.0, retry_timeout_s=2.0)


def rows_of(text: str, stores: ObjectStores, scratch: Path, *, manifest: bool = False) -> list[dict[str, Any]]:
    scratch.mkdir(exist_ok=True)
    found = []
    for listed in read_source(parse_source(text, manifest=manifest), stores, scratch):
        assert listed.rows.schema == LISTING
        listed.rows.validate(full=True)
        found += listed.rows.to_pylist()
    assert not list(scratch.iterdir())
    return found


def read(path: Path) -> list[dict[str, Any]]:
    manifest = Manifest(path, path.name, uris.from_path(path.parent))
    return [row for batch in manifest.batches() for row in batch.to_pylist()]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_csv_columns_have_their_meaning_and_the_rest_is_metadata(tmp_path: Path) -> None:
    path = write(
        tmp_path / "list.csv",
        "URI,ETag,size,Last-Modified,label,split,group,mask,camera,note\n"
        's3://b/a.jpg,"""abc""",12,2026-01-31T10:00:00.5Z,cat,train,g1,masks/a b.png,north,\n'
        '"s3://b/with, comma\nand newline.jpg",,,,,,,,,"null"\n'
        "s3://b/%20#?+ .jpg,W/x,3,2026-01-31 10:00:00,  ,,, ,NaN,x\n",
    )
    first, second, third = read(path)
    assert first == {
        "uri": "s3://b/a.jpg",
        "version": "abc",
        "size": 12,
        "last_modified": datetime(2026, 1, 31, 10, 0, 0, 500_000, tzinfo=UTC),
        "path": "a.jpg",
        "row": 1,
        "label": "cat",
        "split": "train",
        "group": "g1",
        "mask": (tmp_path / "masks" / "a b.png").as_uri(),
        "metadata": [("camera", "north")],
    }
    assert second["uri"] == "s3://b/with, comma\nand newline.jpg"
    assert (second["version"], second["size"], second["last_modified"], second["label"]) == (None, None, None, None)
    assert second["metadata"] == [("note", "null")]
    assert third["uri"] == "s3://b/%20#?+ .jpg"
    assert third["version"] == uris.version_of("W/x", None, None)
    assert third["last_modified"] == datetime(2026, 1, 31, 10, tzinfo=UTC)
    assert third["label"] is None
    assert third["metadata"] == [("camera", "NaN"), ("note", "x")]


def test_parquet_columns_of_any_type_are_read(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    table = pa.table(
        {
            "uri": pa.array(["s3://b/1", "s3://b/2"]).dictionary_encode(),
            "size": pa.array([1.0, None]),
            "last_modified": pa.array([datetime(2026, 1, 1), None], pa.timestamp("ns")),  # noqa: DTZ001  no zone: UTC
            "label": pa.array([3.0, None]),
            "flag": [True, None],
            "boxes": [[1, 2], None],
            "score": [0.5, 1.0],
            "nothing": pa.nulls(2),
        }
    )
    pq.write_table(table, path)
    first, second = read(path)
    assert (first["size"], first["label"], first["last_modified"]) == (1, "3", datetime(2026, 1, 1, tzinfo=UTC))
    assert first["metadata"] == [("flag", "true"), ("boxes", "[1, 2]"), ("score", "0.5")]
    assert second["metadata"] == [("score", "1")] or second["metadata"] == [("score", "1.0")]


def test_text_lists_one_uri_per_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffs3://b/a b.jpg\r\n\nhttps://h/x.jpg?size=1\n#1.jpg\n".encode())
    found = read(path)
    base = uris.from_path(tmp_path)
    assert [row["uri"] for row in found] == ["s3://b/a b.jpg", "https://h/x.jpg?size=1", f"{base}/%231.jpg"]
    assert [row["row"] for row in found] == [1, 3, 4]
    assert [row["path"] for row in found] == ["a b.jpg", "x.jpg", "#1.jpg"]


def test_relative_entries_start_at_the_manifests_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "list.csv", "uri\na b/50%.jpg\n../up.jpg\n/abs/x.jpg\n")
    base, parent = uris.from_path(tmp_path), uris.from_path(tmp_path.parent)
    found = read(path)
    assert [row["uri"] for row in found] == [f"{base}/a%20b/50%25.jpg", f"{parent}/up.jpg", "file:///abs/x.jpg"]
    assert [row["path"] for row in found][0::2] == ["a b/50%.jpg", "abs/x.jpg"]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_s3_inventory_columns_are_recognised(tmp_path: Path, suffix: str) -> None:
    keys = ["a b+c%.jpg", "new\nline.jpg", "old.jpg", "gone.jpg"]
    columns = {
        "bucket": ["b"] * 4,
        "key": keys,
        "size": [1, 2, 3, 4],
        "is_latest": [True, True, False, True],
        "is_delete_marker": [False, False, False, True],
        "e_tag": ["e1", "e2", "e3", "e4"],
        "last_modified_date": ["2026-01-31T09:45:12.000Z"] * 4,
    }
    path = tmp_path / f"inventory{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        # CSV inventories URL-encode keys, spaces as +.
        columns["key"] = ["a+b%2Bc%25.jpg", "new%0Aline.jpg", "old.jpg", "gone.jpg"]
        rows = zip(*columns.values(), strict=True)
        lines = [",".join(columns), *(",".join(f'"{value}"' for value in row) for row in rows)]
        data = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    found = read(path)
    assert [row["uri"] for row in found] == [f"s3://b/{key}" for key in keys[:2]]
    assert [(row["version"], row["size"], row["metadata"]) for row in found] == [("e1", 1, None), ("e2", 2, None)]


@pytest.mark.s3
def test_inventory_manifest_names_its_files(tmp_path: Path, s3_env: S3Server) -> None:
    bucket = s3_env.make_bucket("inventory")
    stores = ObjectStores({"s3://": StorageConfig(endpoint=s3_env.endpoint)}, tmp_path)
    place = stores.at(f"s3://{bucket}")
    place.put("data/1.csv.gz", gzip.compress(b'"photos","a+b.jpg","5","e1"\n"photos","c.jpg","6","e2"\n'))
    place.put("data/2.csv.gz", gzip.compress(b'"photos","d.jpg","7","e3"\n'))
    manifest = {
        "sourceBucket": "photos",
        "destinationBucket": f"arn:aws:s3:::{bucket}",
        "fileFormat": "CSV",
        "fileSchema": "Bucket, Key, Size, ETag",
        "files": [{"key": "data/1.csv.gz"}, {"key": "data/2.csv.gz"}],
    }
    place.put("day/manifest.json", json.dumps(manifest).encode())
    found = rows_of(f"s3://{bucket}/day/manifest.json", stores, tmp_path / "scratch", manifest=True)
    assert [row["uri"] for row in found] == ["s3://photos/a b.jpg", "s3://photos/c.jpg", "s3://photos/d.jpg"]
    assert [row["row"] for row in found] == [1, 2, 1]

    place.put("orc/manifest.json", json.dumps({**manifest, "fileFormat": "ORC"}).encode())
    with pytest.raises(CallError, match="inventories in ORC are not read"):
        rows_of(f"s3://{bucket}/orc/manifest.json", stores, tmp_path / "scratch", manifest=True)
    # A prefix of manifests; what else lies there is not read.
    place.put("lists/part-0.parquet", _parquet(["s3://photos/x.jpg"]))
    place.put("lists/part-1.parquet", _parquet(["y.jpg"]))
    place.put("lists/_SUCCESS", b"{}")
    found = rows_of(f"s3://{bucket}/lists", stores, tmp_path / "scratch", manifest=True)
    assert [row["uri"] for row in found] == ["s3://photos/x.jpg", f"s3://{bucket}/lists/y.jpg"]


def _parquet(values: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"uri": values}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "text", "messages"),
    [
        ("l.csv", "url,label\ns3://b/a,cat\n", ["l.csv has no column 'uri'", "its columns: 'url', 'label'"]),
        ("l.csv", "", ["l.csv is empty"]),
        ("l.csv", "uri,size\ns3://b/a,1\ns3://b/b,big\n", ["row 2: size 'big' is not a whole number of bytes"]),
        ("l.csv", "uri,last_modified\ns3://b/a,today\n", ["row 1: last_modified 'today' is not an ISO 8601 time"]),
        ("l.csv", "uri,last_modified\ns3://b/a,2026-13-31\n", ["last_modified", "2026-13-31"]),
        ("l.csv", "uri,label\ns3://b/a,x\ns3://b/b,x,y\n", ["row 2: 3 values for 2 columns"]),
        ("l.csv", "uri,label\ns3://b/a,x\n,y\n", ["row 2: no URI"]),
        ("l.csv", "bucket,key\nb,\n", ["row 1: no bucket or no key"]),
        ("l.csv", "uri,e_tag,ETag\ns3://b/a,1,2\n", ["'e_tag' and 'ETag' both mean 'etag'"]),
        ("l.csv", "uri,x,x\ns3://b/a,1,2\n", ["two columns have the same name"]),
        ("l.csv", "uri\nhttps://h/a?X-Amz-Signature=topsecret\n", ["row 1:", "is signed"]),
        ("l.csv", "uri\ns3://\n", ["row 1:", "names no bucket"]),
        ("l.parquet", "no parquet", ["l.parquet cannot be read as a manifest"]),
        ("l.csv.gz", "no gzip", ["l.csv.gz cannot be read as a manifest"]),
    ],
)
def test_malformed_manifest_is_refused_with_row_and_reason(
    tmp_path: Path, name: str, text: str, messages: list[str]
) -> None:
    with pytest.raises(CallError) as caught:
        read(write(tmp_path / name, text))
    for message in messages:
        assert message in str(caught.value)
    assert "topsecret" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_bytes(b"s3://b/a\ns3://b/\xff\n")
    with pytest.raises(CallError, match="line 2 is not UTF-8"):
        read(tmp_path / "l.txt")


def test_missing_sources_are_refused(tmp_path: Path, stores: ObjectStores) -> None:
    for name in ("nowhere", "nowhere.csv"):
        with pytest.raises(CallError, match="does not exist"):
            rows_of(str(tmp_path / name), stores, tmp_path / "scratch")
    (tmp_path / "empty").mkdir()
    assert rows_of(str(tmp_path / "empty"), stores, tmp_path / "scratch") == []
    with pytest.raises(CallError, match="holds no manifest"):
        rows_of(str(tmp_path / "empty"), stores, tmp_path / "scratch", manifest=True)


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(
        st.one_of(
            st.builds(
                "{}{}".format,
                st.sampled_from(
                    ["s3://b/", "S3://b/", "gs://b/", "az://b/", "/a/", "file:///a/", "https://h/", "x/", ""]
                ),
                st.text(st.sampled_from("ab/.?%#+ ~é\n2"), min_size=1, max_size=8),
            )
        ),
        min_size=1,
        max_size=6,
    )
)
def test_quick_spelling_is_the_canonical_one(texts: list[str]) -> None:
    texts = [text for text in texts if text.strip()]
    manifest = Manifest(Path("l.parquet"), "l.parquet", "file:///base")
    column = {"uri": pa.array(texts, pa.string())}
    rows = pa.array(range(len(texts)), pa.int64())
    try:
        expected = [uris.canonical(text, Path("/base")) for text in texts]
    except CallError:
        with pytest.raises(CallError):
            manifest._uris(column, rows, decode_keys=False)
        return
    found = manifest._uris(column, rows, decode_keys=False)
    assert found.to_pylist() == expected
    for uri, path in zip(expected, manifest._paths(found).to_pylist(), strict=True):
        if uri.startswith("file:///base/"):
            assert path == uris.relative(uri, "file:///base")
        elif uri.startswith(("s3://b/", "gs://b/")):
            assert path == uri[7:]


@settings(deadline=None)  # the machine may be busy
@given(
    st.integers(0, 5).flatmap(
        lambda num_rows: st.dictionaries(
            st.text(min_size=1, max_size=3),
            st.lists(st.none() | st.text(max_size=3), min_size=num_rows, max_size=num_rows),
            max_size=4,
        ).map(lambda columns: (num_rows, columns))
    )
)
def test_columns_become_maps_without_nulls(drawn: tuple[int, dict[str, list[str | None]]]) -> None:
    num_rows, columns = drawn
    found = as_map({name: pa.array(values, pa.string()) for name, values in columns.items()}, num_rows)
    found.validate(full=True)
    expected = [
        [(name, values[row]) for name, values in columns.items() if values[row] is not None] or None
        for row in range(num_rows)
    ]
    assert found.to_pylist() == expected


def test_text_of_numbers_is_what_people_write() -> None:
    assert as_text(pa.array([1.0, 2.0, None])).to_pylist() == ["1", "2", None]
    assert as_text(pa.array([1.5, 2.0])).to_pylist()[0] == "1.5"
    assert as_text(pa.array([float("nan"), 1e300])).to_pylist() == ["nan", "1e+300"]
    assert as_text(pa.array([{"a": 1}, None])).to_pylist() == ['{"a": 1}', None]


def test_awkward_names_survive_on_disk(tmp_path: Path, shared_data: Path, stores: ObjectStores) -> None:
    folder = tmp_path / "photos"
    with tarfile.open(shared_data / "hostile" / "awkward_names.tar") as archive:
        archive.extractall(folder, filter="data")
        names = sorted(member.name.removeprefix("./") for member in archive.getmembers() if member.isfile())
    odd = [os.fsencode("new\nline.jpg"), b"not-utf8-\xff.jpg", os.fsencode("a%2Fb?#+.jpg")]
    for name in odd:
        (folder / os.fsdecode(name)).touch()
    found = rows_of(str(folder), stores, tmp_path / "scratch")
    expected = sorted([*names, *(name.decode("utf-8", "replace") for name in odd)])
    assert sorted(row["path"] for row in found) == expected
    assert all(Path(uris.local_path(row["uri"])).is_file() for row in found)
    assert all(
        row["version"] == f"{row['size']}-{Path(uris.local_path(row['uri'])).stat().st_mtime_ns}" for row in found
    )


def test_local_files_of_a_manifest_get_their_version_from_disk(tmp_path: Path, stores: ObjectStores) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    path = write(tmp_path / "l.csv", "uri,size,etag\na.jpg,99,whatever\nmissing.jpg,,\ns3://b/x,5,e\n")
    (batch,) = Manifest(path, "l.csv", uris.from_path(tmp_path)).batches()
    rows, num_missing, num_unanswered = ask_versions(batch, stores, everywhere=False)
    assert (num_missing, num_unanswered) == (1, 0)
    assert [row["version"] for row in rows.to_pylist()] == [f"3-{(tmp_path / 'a.jpg').stat().st_mtime_ns}", "e"]
    assert [row["size"] for row in rows.to_pylist()] == [3, 5]


def test_web_servers_are_asked_only_on_request(tmp_path: Path, stores: ObjectStores) -> None:
    with FaultyHttp() as server:
        server.put("/a.jpg", b"abc")
        server.put("/b%20c.jpg?size=1", b"defgh")
        server.put("/forbidden.jpg", b"x", faults=[403] * 9)
        lines = [
            f"{server.url}{target}" for target in ("/a.jpg", "/b%20c.jpg?size=1", "/forbidden.jpg", "/missing.jpg")
        ]
        path = write(tmp_path / "l.txt", "\n".join(lines))
        (batch,) = Manifest(path, "l.txt", uris.from_path(tmp_path)).batches()
        assert ask_versions(batch, stores, everywhere=False) == (batch, 0, 0)
        assert not server.hits
        rows, num_missing, num_unanswered = ask_versions(batch, stores, everywhere=True)
        assert (num_missing, num_unanswered) == (1, 1)
        assert [row["size"] for row in rows.to_pylist()] == [3, 5, None]
        versions = [row["version"] for row in rows.to_pylist()]
        assert versions[0]
        assert versions[1]
        assert versions[2] is None
        (single,) = rows_of(lines[0], stores, tmp_path / "scratch")
        assert (single["uri"], single["path"], single["version"]) == (lines[0], "a.jpg", versions[0])


@pytest.mark.s3
def test_prefix_lists_its_objects_with_their_versions(tmp_path: Path, s3_env: S3Server) -> None:
    bucket = s3_env.make_bucket("listing")
    stores = ObjectStores({"s3://": StorageConfig(endpoint=s3_env.endpoint)}, tmp_path)
    place = stores.at(f"s3://{bucket}")
    for key in ("in/a b.jpg", "in/deep/%20#?+.jpg", "in-not/c.jpg"):
        place.put(key, key.encode())
    for text in (f"s3://{bucket}/in", f"s3://{bucket}/in/"):
        found = rows_of(text, stores, tmp_path / "scratch")
        assert sorted(row["path"] for row in found) == ["a b.jpg", "deep/%20#?+.jpg"]
        assert all(row["version"] and row["size"] and row["last_modified"] for row in found)
