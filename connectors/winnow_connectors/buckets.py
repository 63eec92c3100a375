"""Buckets of S3, Google Cloud Storage and Azure through obstore.

Google and Azure take their credentials from the environment as obstore does; they are not exercised by the tests.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from winnow import uris
from winnow.config import StorageConfig
from winnow.errors import CallError, FetchError
from winnow_connectors.credentials import S3Access, resolve
from winnow_connectors.objects import (
    CHUNK,
    Chunks,
    NotFoundError,
    ObjectInfo,
    Patience,
    check_size,
    check_version,
    fetch_error,
    storage_error,
)
from winnow_connectors.signed_s3 import SignedS3
from winnow_connectors.web import HttpFault, if_match, kind_of_status, list_error

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

    BucketStore = S3Store | GCSStore | AzureStore

_ATTEMPT = "winnow-attempt"
"""Object metadata that tells who created the object, see ``Buckets.create``."""
_FAILURES = (BaseError, OSError, ValueError)
"""What obstore raises: its own classes, FileNotFoundError, ValueError."""


class Buckets:
    """All buckets of one scheme that are reached in one way.

    Raises:
        CallError: the settings do not fit the scheme, or name a profile that is not there.
    """

    def __init__(
        self, scheme: str, config: StorageConfig, base_dir: Path, patience: Patience, *, num_connections: int
    ) -> None:
        self._scheme, self._config, self._patience = scheme, config, patience
        self._access: S3Access | None = None
        self._signed: SignedS3 | None = None
        if scheme == "s3":
            self._access = resolve(config, base_dir)
            if self._access.anonymous or self._access.provider is not None:
                self._signed = SignedS3(self._access, patience, num_connections=num_connections)
        elif config.profile or config.credentials_file or config.region or (config.endpoint and scheme == "gs"):
            raise CallError(
                f"[storage] settings for {scheme}:// may be anonymous{' and endpoint' if scheme == 'az' else ''} only; "
                "credentials come from the environment"
            )
        self._stores: dict[str, BucketStore] = {}
        self._lock = threading.Lock()

    def read(self, uri: str, *, version: str, max_bytes: int) -> bytes:
        """The whole object."""
        _, bucket, key = uris.split(uri)
        if self._signed is not None and not _is_plain(key):
            return self._signed.read(uri, version=version, max_bytes=max_bytes)
        options: Any = {"if_match": condition["If-Match"]} if (condition := if_match(version)) else None
        try:
            result = obstore.get(self._store(bucket), key, options=options)
            check_version(_info(uri, "", result.meta), version)
            check_size(uri, result.meta["size"], max_bytes)
            data = bytes(result.bytes())
        except _FAILURES as error:
            raise _fetch_error(uri, error) from None
        if len(data) != result.meta["size"]:
            raise fetch_error("incomplete", uri, f"{len(data):,} of {result.meta['size']:,} bytes")
        return data

    def stat(self, uri: str) -> ObjectInfo:
        """What is known of one object."""
        _, bucket, key = uris.split(uri)
        if self._signed is not None and not _is_plain(key):
            return self._signed.stat(uri)
        try:
            return _info(uri, uris.name_of(uri), obstore.head(self._store(bucket), key))
        except _FAILURES as error:
            raise _fetch_error(uri, error) from None

    def list(self, uri: str) -> Chunks:
        """The object of that name, if there is one, and everything under it as a prefix.

        Raises:
            StorageError: there is no such bucket, access is refused, or storage keeps failing.
        """
        _, bucket, key = uris.split(uri)
        if key and not key.endswith("/"):
            try:
                yield [self.stat(uri)]
            except FetchError as error:
                if error.kind not in ("missing", "forbidden"):  # without the right to read, listing may still work
                    raise storage_error("list", uri, error.message) from None
        yield from self._list(bucket, f"{key}/" if key and not key.endswith("/") else key)

    def _list(self, bucket: str, prefix: str) -> Chunks:
        if self._signed is not None:
            yield from self._signed.list(bucket, prefix)
            return
        root = f"{self._scheme}://{bucket}/"
        try:
            for metas in obstore.list(self._store(bucket), prefix or None, chunk_size=CHUNK):
                yield [_info(root + meta["path"], meta["path"].removeprefix(prefix), meta) for meta in metas]
        except _FAILURES as error:
            raise list_error(root + prefix, _fault(error)) from None

    def get(self, uri: str) -> bytes:
        """The whole object."""
        _, bucket, key = uris.split(uri)
        try:
            return bytes(obstore.get(self._store(bucket), key).bytes())
        except FileNotFoundError:
            raise NotFoundError(f"{uri} does not exist") from None
        except _FAILURES as error:
            raise storage_error("read", uri, _words(_fault(error))) from None

    def put(self, uri: str, data: bytes) -> None:
        """Write or replace."""
        _, bucket, key = uris.split(uri)
        try:
            obstore.put(self._store(bucket), key, data)
        except _FAILURES as error:
            raise storage_error("write", uri, _words(_fault(error))) from None

    def create(self, uri: str, data: bytes) -> bool:
        """Conditional PUT (If-None-Match: *), right also when an answer gets lost.

        A repeated request is refused because of what its own first try wrote. So the object carries a mark of this
        call, and a refusal counts only if another's mark is found.
        """
        _, bucket, key = uris.split(uri)
        store, attempt = self._store(bucket), uuid.uuid4().hex
        deadline = time.monotonic() + self._patience.retry_s
        pause_s = 0.1
        while True:
            try:
                obstore.put(store, key, data, mode="create", use_multipart=False, attributes={_ATTEMPT: attempt})
                return True
            except AlreadyExistsError:
                creator = self._creator(uri, store, key)
                if creator is not None:
                    return creator == attempt
                # Nothing there: a conflict with a deletion under way, or a create that failed. Try again.
                fault = HttpFault("unavailable", "409 conflict", passing=True)
            except _FAILURES as error:
                fault = _fault(error)
            if not fault.passing or time.monotonic() + pause_s > deadline:
                raise storage_error("create", uri, _words(fault))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)

    def _creator(self, uri: str, store: BucketStore, key: str) -> str | None:
        """The mark of whoever created the object, "" without one; None when there is no object."""
        try:
            return str(obstore.get(store, key, options={"head": True}).attributes.get(_ATTEMPT, ""))
        except FileNotFoundError:
            return None
        except _FAILURES as error:
            raise storage_error("create", uri, _words(_fault(error))) from None

    def exists(self, uri: str) -> bool:
        """Whether there is such an object."""
        _, bucket, key = uris.split(uri)
        try:
            obstore.head(self._store(bucket), key)
        except FileNotFoundError:
            return False
        except _FAILURES as error:
            raise storage_error("look up", uri, _words(_fault(error))) from None
        return True

    def list_folder(self, uri: str) -> Iterator[ObjectInfo]:
        """All objects under ``uri`` + ``/``."""
        _, bucket, key = uris.split(uri)
        for infos in self._list(bucket, f"{key}/" if key else ""):
            yield from infos

    def delete(self, uri: str) -> None:
        """Remove it if it is there."""
        _, bucket, key = uris.split(uri)
        try:
            obstore.delete(self._store(bucket), key)
        except FileNotFoundError:
            return
        except _FAILURES as error:
            raise storage_error("delete", uri, _words(_fault(error))) from None

    def delta_options(self) -> dict[str, str]:
        """Storage options of the deltalake package; they hold keys: never log them."""
        if self._access is None:
            return {"skip_signature": "true"} if self._config.anonymous else {}
        access = self._access
        options = {"AWS_REGION": access.region, "aws_conditional_put": "etag"}
        if access.endpoint is not None:
            options["AWS_ENDPOINT_URL"] = access.endpoint
        if access.allow_http:
            options["AWS_ALLOW_HTTP"] = "true"
        if access.anonymous:
            options["AWS_SKIP_SIGNATURE"] = "true"
        elif access.provider is not None:
            keys = access.provider()
            options["AWS_ACCESS_KEY_ID"] = keys["access_key_id"]
            options["AWS_SECRET_ACCESS_KEY"] = keys["secret_access_key"]
            if keys["token"]:
                options["AWS_SESSION_TOKEN"] = keys["token"]
        return options

    def _store(self, bucket: str) -> BucketStore:
        with self._lock:
            if bucket not in self._stores:
                self._stores[bucket] = self._open(bucket)
            return self._stores[bucket]

    def _open(self, bucket: str) -> BucketStore:
        from obstore.store import AzureStore, GCSStore, S3Store

        patience = self._patience
        endpoint = self._config.endpoint
        client: Any = {
            "connect_timeout": timedelta(seconds=patience.silence_s),
            "read_timeout": timedelta(seconds=patience.silence_s),
            "timeout": timedelta(seconds=patience.object_s),
            "user_agent": "winnow",
        }
        # obstore stops at whichever comes first; the time is meant to.
        retry: Any = {
            "max_retries": 1000 if patience.retry_s else 0,
            "retry_timeout": timedelta(seconds=patience.retry_s),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2},
        }
        common: dict[str, Any] = {"client_options": client, "retry_config": retry}
        if self._config.anonymous:
            common["skip_signature"] = True
        if self._access is not None:
            access = self._access
            client["allow_http"] = access.allow_http
            if access.endpoint is not None:
                common["endpoint"] = access.endpoint
            if access.provider is not None:
                common["credential_provider"] = access.provider
            return S3Store(bucket, region=access.region, **common)
        if self._scheme == "gs":
            return GCSStore(bucket, **common)
        if endpoint is not None:
            common["endpoint"] = endpoint
            client["allow_http"] = endpoint.startswith("http://")
        return AzureStore(bucket, **common)


def _is_plain(key: str) -> bool:
    """Whether obstore can name the key."""
    return not re.search(r"[\x00-\x1f\x7f]", key) and not any(part in ("", ".", "..") for part in key.split("/"))


def _info(uri: str, key: str, meta: Any) -> ObjectInfo:
    return ObjectInfo(uri, key, meta["size"], meta["e_tag"], meta["last_modified"])


def _fetch_error(uri: str, error: Exception) -> FetchError:
    fault = _fault(error)
    return fetch_error(fault.kind, uri, fault.detail)


def _fault(error: Exception) -> HttpFault:
    """What an error of obstore means. It tells some things by its class and the others only in its text."""
    text = str(error)
    found = re.search(r"status code: (\d{3}) ?([A-Za-z ]*)", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if "169.254.169.254" in text:
        return HttpFault("forbidden", "no credentials were found", passing=False)
    if found:
        kind, passing = kind_of_status(int(found[1]), code[1] if code else "")
        detail = f"{found[1]} {code[1] if code else found[2].strip()}"
        if tries := re.search(r"after (\d+) retries", text):
            detail += f", after {tries[1]} retries"
        if int(found[1]) in (301, 307, 308):
            detail += "; the bucket may be in another region: set region"
        return HttpFault(kind, detail, passing=passing)
    if isinstance(error, FileNotFoundError):
        return HttpFault("missing", "404", passing=False)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return HttpFault("forbidden", "access refused", passing=False)
    if isinstance(error, PreconditionError | NotModifiedError):
        return HttpFault("changed", "412", passing=False)
    if "Connect" in text:
        return HttpFault("unavailable", "no connection to the server", passing=True)
    if "kind: Timeout" in text:
        return HttpFault("stalled", "silence", passing=True)
    if re.search(r"IncompleteBody|UnexpectedEof|IncompleteMessage|ConnectionReset", text):
        kind = "incomplete" if "kind: Body" in text else "unavailable"
        return HttpFault(kind, "the connection broke", passing=True)
    if "error sending request" in text:
        return HttpFault("unavailable", "the connection broke before an answer", passing=True)
    # Unknown: the first sentence, without what servers may quote and without obstore's own debugging.
    sentence = re.sub(r"<[^>]*>.*", "", text.partition("\n")[0])[:200]
    return HttpFault("unavailable", uris.redact(sentence), passing=False)


def _words(fault: HttpFault) -> str:
    hint = {
        "forbidden": "access is refused; check the credentials and their rights",
        "missing": "there is no such bucket; check its name and the endpoint",
        "unavailable": "storage kept failing; check the endpoint, or try again later",
    }.get(fault.kind, "storage broke off; try again later")
    return f"{hint} ({fault.detail})"
