"""Signed requests to a local S3 server, for what obstore does not do: create a bucket, ask whether it is up."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import urllib.error
import urllib.request
from urllib.parse import urlsplit

_TIMEOUT_S = 3.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


def http_request(method: str, url: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status code and body, whatever they are. Raises OSError when nobody answers."""
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with _OPENER.open(request, timeout=_TIMEOUT_S) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")


def sign(method: str, endpoint: str, path: str, region: str, keys: tuple[str, str]) -> dict[str, str]:
    """Headers of a request without query and body: AWS Signature Version 4.

    Source: Amazon S3 API Reference, "Signature Calculations for the Authorization Header".
    """
    access_key, secret_key = keys
    host = urlsplit(endpoint).netloc
    moment = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{moment[:8]}/{region}/s3/aws4_request"
    payload = hashlib.sha256(b"").hexdigest()
    signed = "host;x-amz-content-sha256;x-amz-date"
    canonical = (
        f"{method}\n{path}\n\nhost:{host}\nx-amz-content-sha256:{payload}\nx-amz-date:{moment}\n\n{signed}\n{payload}"
    )
    to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    return {
        "x-amz-content-sha256": payload,
        "x-amz-date": moment,
        "Authorization": (
            f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={signed}, Signature={signature}"
        ),
    }
