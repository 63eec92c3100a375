"""S3 requests signed here, for what obstore cannot express.

obstore refuses keys with control characters and with empty, ``.`` or ``..`` segments, drops a trailing ``/``, and one
such key makes its whole listing fail. Real buckets hold them, so listing and the reading of such keys are done with
ListObjectsV2 and GetObject directly.

Source of the signature: AWS Signature Version 4, "Create a signed AWS API request"
(https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

from winnow import uris
from winnow_connectors.credentials import S3Access
from winnow_connectors.objects import CHUNK, Chunks, ObjectInfo, Patience
from winnow_connectors.web import HttpClient, HttpFault, list_error

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_UNRESERVED = "-_.~"


class SignedS3:
    """List and read with every key that S3 allows."""

    def __init__(self, access: S3Access, patience: Patience, *, num_connections: int) -> None:
        domain = "amazonaws.com.cn" if access.region.startswith("cn-") else "amazonaws.com"
        self._endpoint = access.endpoint or f"https://s3.{access.region}.{domain}"
        self._access = access
        self._client = HttpClient(patience, num_connections=num_connections, redirect=False)

    def read(self, uri: str, *, version: str, max_bytes: int) -> bytes:
        """The whole object. Raises FetchError."""
        _, bucket, key = uris.split(uri)
        url = self._url(bucket, key)
        return self._client.read(
            uri, url, lambda: self._sign("GET", bucket, key, {}), version=version, max_bytes=max_bytes
        )

    def stat(self, uri: str) -> ObjectInfo:
        """What the headers of one object tell. Raises FetchError."""
        _, bucket, key = uris.split(uri)
        return self._client.stat(uri, self._url(bucket, key), lambda method: self._sign(method, bucket, key, {}))

    def list(self, bucket: str, prefix: str) -> Chunks:
        """All objects whose key begins with ``prefix``, a page at a time. Raises StorageError.

        ``ObjectInfo.key`` is the rest of the key after the prefix.
        """
        query = {"list-type": "2", "max-keys": str(CHUNK), "encoding-type": "url", "prefix": prefix}
        while True:
            try:
                page = self._client.retrying(partial(self._page, bucket, query))
            except HttpFault as fault:
                raise list_error(f"s3://{bucket}/{prefix}", fault) from None
            encoded = (_text(page, "EncodingType") or "").lower() == "url"
            infos = [_info(bucket, prefix, element, encoded) for element in page if _name(element) == "Contents"]
            if infos:
                yield infos
            token = _text(page, "NextContinuationToken")
            if _text(page, "IsTruncated") != "true" or token is None:
                return
            query = {**query, "continuation-token": token}

    def _page(self, bucket: str, query: Mapping[str, str]) -> ElementTree.Element:
        url = f"{self._url(bucket, '')}?{_query(query)}"
        with self._client.open("GET", url, self._sign("GET", bucket, "", query)) as response:
            body = response.read()
        try:
            return ElementTree.fromstring(body)
        except ElementTree.ParseError:
            raise HttpFault("unavailable", "the answer is no S3 listing; check the endpoint", passing=False) from None

    def _url(self, bucket: str, key: str) -> str:
        # urllib3 resolves `.` and `..` segments; S3 does not. Escaped they arrive, and S3 decodes before it verifies.
        segments = (
            "%2E" * len(part) if part in (".", "..") else quote(part, safe=_UNRESERVED) for part in key.split("/")
        )
        return f"{self._endpoint}/{bucket}/{'/'.join(segments)}" if key else f"{self._endpoint}/{bucket}"

    def _sign(self, method: str, bucket: str, key: str, query: Mapping[str, str]) -> dict[str, str]:
        """Headers that authorise one request without a body."""
        if self._access.anonymous or self._access.provider is None:
            return {}
        keys = self._access.provider()
        now = datetime.now(UTC)
        time, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
        parts = urlsplit(self._endpoint)
        path = f"{parts.path}/{bucket}" + (f"/{key}" if key else "")
        headers = {"host": parts.netloc, "x-amz-content-sha256": _EMPTY_SHA256, "x-amz-date": time}
        if keys["token"]:
            headers["x-amz-security-token"] = keys["token"]
        names = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        request = "\n".join([method, quote(path, safe="/" + _UNRESERVED), _query(query), lines, names, _EMPTY_SHA256])
        scope = f"{day}/{self._access.region}/s3/aws4_request"
        to_sign = f"AWS4-HMAC-SHA256\n{time}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        secret = ("AWS4" + keys["secret_access_key"]).encode()
        for part in (day, self._access.region, "s3", "aws4_request", to_sign):
            secret = hmac.digest(secret, part.encode(), "sha256")
        del headers["host"]  # urllib3 sends the same
        headers["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={keys['access_key_id']}/{scope}, "
            f"SignedHeaders={names}, Signature={secret.hex()}"
        )
        return headers


def _query(query: Mapping[str, str]) -> str:
    return "&".join(f"{quote(k, safe=_UNRESERVED)}={quote(v, safe=_UNRESERVED)}" for k, v in sorted(query.items()))


def _name(element: ElementTree.Element) -> str:
    """The tag without its namespace: servers differ in whether they send one."""
    return element.tag.rpartition("}")[2]


def _text(parent: ElementTree.Element, name: str) -> str | None:
    return next((child.text for child in parent if _name(child) == name), None)


def _info(bucket: str, prefix: str, element: ElementTree.Element, encoded: bool) -> ObjectInfo:
    found = {_name(child): child.text for child in element}
    key, size, modified = found.get("Key") or "", found.get("Size"), found.get("LastModified")
    if encoded:
        key = unquote(key.replace("+", " "))
    return ObjectInfo(
        uri=f"s3://{bucket}/{key}",
        key=key.removeprefix(prefix),
        size=int(size) if size is not None else None,
        etag=found.get("ETag"),
        last_modified=datetime.fromisoformat(modified) if modified else None,
    )
