from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow import uris
from winnow.errors import CallError

ODD_NAMES = [
    "photo with spaces.jpg",
    "café.jpg",  # NFC
    "cafe\u0301.jpg",  # NFD
    "画像 😀.jpg",
    "50%20off.jpg",
    "%2e%2e%2fetc.jpg",
    "100%.jpg",
    "a#b.jpg",
    "a?sig=b&c.jpg",
    "a+b.jpg",
    "new\nline.jpg",
    "tab\t.jpg",
    "\x7f\x01.jpg",
    " both ",
    "semi;colon&amp.jpg",
    "back\\slash.jpg",
    "user:pass@host.jpg",
    "-rf",
    "k" * 1000,
]
KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_local_names_come_back_as_they_were(name: str) -> None:
    path = f"/data/{name}"
    uri = uris.from_path(path)
    assert uri.isascii()
    assert " " not in uri
    assert uris.local_path(uri) == path
    assert uris.canonical(uri) == uri
    assert uris.canonical(path) == uri
    assert uris.name_of(uri) == name


def test_local_names_that_are_not_utf8_survive() -> None:
    name = os.fsdecode(b"/data/caf\xe9.jpg")
    uri = uris.from_path(name)
    assert uri == "file:///data/caf%E9.jpg"
    assert uris.local_path(uri) == name


@pytest.mark.parametrize("key", [*ODD_NAMES, "a//b.jpg", "/lead.jpg", "./x", "a/../b.jpg", "dir/", "//"])
def test_odd_keys_stay_verbatim(key: str) -> None:
    uri = uris.canonical(f"s3://bucket/{key}")
    assert uris.split(uri) == ("s3", "bucket", key)
    assert uris.canonical(uri) == uri


@given(KEYS)
def test_join_and_relative_are_inverse(key: str) -> None:
    for root in ("s3://bucket", "s3://bucket/some folder#1", "file:///data/50%25", "https://example.org/a"):
        uri = uris.join(root, key)
        assert uris.is_under(uri, root)
        assert uris.relative(uri, root) == key


@given(st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1))
def test_canonical_is_idempotent(name: str) -> None:
    for source in (f"s3://bucket/{name}", f"/data/{name}", f"file:///data/{name}", f"https://example.org/{name}"):
        try:
            once = uris.canonical(source)
        except CallError:  # the name happens to look like a signature
            continue
        assert uris.canonical(once) == once


def test_all_names_of_the_awkward_archive_survive(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "hostile" / "awkward_names.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) >= 10
    for name in names:
        assert Path(uris.local_path(uris.from_path(tmp_path / name))).is_file()


def test_relative_paths_start_at_base() -> None:
    base = Path("/work space")
    assert uris.canonical("photos/../images", base) == "file:///work%20space/images"
    assert uris.canonical("/abs", base) == "file:///abs"
    assert uris.canonical("~/x", base) == uris.from_path(Path.home() / "x")
    assert uris.canonical("./~/x", base) == "file:///work%20space/~/x"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("S3A://Bucket/Key", "s3://Bucket/Key"),
        ("gcs://b/k", "gs://b/k"),
        ("s3://bucket/", "s3://bucket"),
        ("file://localhost/a/./b/", "file:///a/b"),
        ("file:///a b", "file:///a%20b"),
        ("memory:///a/b", "memory:///a/b"),
        ("HTTP://Example.ORG:80/a b.jpg#top", "http://example.org/a%20b.jpg"),
        ("https://example.org", "https://example.org/"),
        ("https://example.org:8443/a%20b?size=large&x=1", "https://example.org:8443/a%20b?size=large&x=1"),
        ("https://example.org/100%.jpg", "https://example.org/100%25.jpg"),
        ("https://example.org/画.jpg", "https://example.org/%E7%94%BB.jpg"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x"),
        ("abfss://container@account.dfs.core.windows.net/k", "abfss://container@account.dfs.core.windows.net/k"),
    ],
)
def test_canonical_spelling(source: str, wanted: str) -> None:
    assert uris.canonical(source) == wanted
    assert uris.canonical(wanted) == wanted


@pytest.mark.parametrize("source", ["", "a\0b", "s3://", "s3:///key", "file://server/share", "http:///x", "http://[::"])
def test_malformed_sources_are_refused(source: str) -> None:
    with pytest.raises(CallError):
        uris.canonical(source)


SECRETS = [
    "https://user:hunter2@example.org/a.jpg",
    "https://hunter2@example.org/a.jpg",
    "ftp://user:hunter2@example.org/a.jpg",
    "s3://AKIA:hunter2@bucket/key",
    "https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4&X-Amz-Signature=hunter2",
    "https://example.org/k?a=1&x%2Damz%2Dsignature=hunter2",
    "https://acc.blob.core.windows.net/c/k?sv=2024&sig=hunter2",
    "az://container/k?sv=2024&sig=hunter2",
    "s3://bucket/k?X-Amz-Signature=hunter2",
    "https://example.org/k?token=hunter2",
    "https://storage.googleapis.com/b/k?GoogleAccessId=x&Signature=hunter2",
]


@pytest.mark.parametrize("source", SECRETS)
def test_uris_with_secrets_are_refused_without_repeating_them(source: str) -> None:
    with pytest.raises(CallError) as caught:
        uris.canonical(source)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("source", [source for source in SECRETS if "%2D" not in source])
def test_redact_masks_secrets_inside_messages(source: str) -> None:
    masked = uris.redact(f"cannot read {source} because")
    assert "hunter2" not in masked
    assert "***" in masked
    assert masked.endswith(" because")


def test_redact_leaves_harmless_text_alone() -> None:
    for text in ("s3://bucket/me@home:1.jpg", "file:///a:b@c.jpg", "https://example.org/a@b?page=2", "a?b=c"):
        assert uris.redact(text) == text


def test_a_prefix_ends_at_a_name() -> None:
    assert uris.is_under("s3://photos/a", "s3://photos")
    assert uris.is_under("s3://photos/a", "s3://")
    assert not uris.is_under("s3://photos-2023/a", "s3://photos")
    with pytest.raises(ValueError, match="does not lie under"):
        uris.relative("s3://photos-2023/a", "s3://photos")


def test_image_id_is_blake2b_of_uri_and_version() -> None:
    wanted = hashlib.blake2b(b"s3://b/k\x00abc", digest_size=16).hexdigest()
    assert uris.image_id("s3://b/k", "abc") == wanted
    assert len(wanted) == 32
    assert uris.image_id("s3://b/k", "abd") != wanted


@pytest.mark.parametrize(
    ("etag", "size", "mtime_ns", "version"),
    [
        ('"abc"', 5, 7, "abc"),
        ("abc", None, None, "abc"),
        ('W/"abc"', 5, 7, "W/abc"),
        (None, 5, 7, "5-7"),
        ('""', 0, 7, "0-7"),
        (None, 5, None, "unversioned"),
        (None, None, None, "unversioned"),
    ],
)
def test_version(etag: str | None, size: int | None, mtime_ns: int | None, version: str) -> None:
    assert uris.version_of(etag, size, mtime_ns) == version
