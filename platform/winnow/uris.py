"""URIs: one spelling per object, and the ids made from them.

One rule, so that every name comes back as it was:

- ``file:``, ``http:`` and ``https:`` are URLs. Their path is percent-encoded, and what follows ``%`` is decoded on the
  way back. ``/data/50% off#1.jpg`` is ``file:///data/50%25%20off%231.jpg``. A ``file:`` path is absolute, without
  ``.``, ``..`` and ``//``, and encodes the bytes of the name, so names that are not UTF-8 survive too.
- Every other scheme (``s3``, ``gs``, ``az``, …) is ``scheme://bucket/key`` with the key **verbatim**, character for
  character, as the clouds' own tools write it: ``#``, ``?``, ``%20``, ``+``, spaces, newlines, ``//`` and ``..`` are
  just parts of the key. Nothing is decoded, and unicode is never normalised (NFC and NFD are two objects).

``canonical`` is idempotent. URIs that hold a password or a signature are refused: a stored URI never opens anything.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import quote, quote_from_bytes, unquote, unquote_to_bytes, urlsplit

from winnow.errors import CallError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
_URLS = ("http", "https")
_BUCKETS = ("s3", "gs", "az")
_QUERIES_GRANT = ("http", "https", "az", "abfs", "abfss", "adl", "wasb", "wasbs")
"""Schemes in which a ``?`` begins a query that may hold a signature."""

_SIGNATURES = {"x-amz-signature", "x-amz-credential", "x-amz-security-token", "x-goog-signature", "x-goog-credential"}
_SIGNATURES |= {"awsaccesskeyid", "googleaccessid"}
_SECRETS = {"signature", "sig", "key-pair-id", "jwt", "api_key", "apikey", "api-key", *_SIGNATURES}
_SECRETS |= {"token", "access_token", "auth_token", "id_token", "refresh_token", "sas_token"}
_SECRETS |= {"password", "passwd", "pwd", "secret", "client_secret"}
_SECRET_QUERY = re.compile(
    rf"(?i)(?<=[?&;])({'|'.join(sorted(map(re.escape, _SECRETS), key=len, reverse=True))})=[^&;\s\"'<>#]*"
)
_USERINFO = re.compile(r"(?i)\b((?:https?://(?=[^/\s@]*@)|[a-z][a-z0-9+.-]*://(?=[^/\s@:]*:[^/\s@]*@)))[^/\s@]*@")


def canonical(source: str, base: Path | None = None) -> str:
    """The one spelling of a URI or local path.

    Args:
        source: a URI, or a local path (``~/`` is the home folder).
        base: folder at which relative paths start; the working directory without it.

    Raises:
        CallError: empty, malformed, or holding a password or signature.
    """
    if not source or "\0" in source:
        raise CallError(f"{source!r} is no URI and no path; give a folder, a file or a URI such as s3://bucket/folder")
    found = _SCHEME.match(source)
    if found is None:
        path = str(Path(source).expanduser()) if source == "~" or source.startswith("~/") else source
        return from_path(Path(base, path) if base is not None else path)
    scheme = _ALIASES.get(found[1].lower(), found[1].lower())
    rest = source[found.end() :]
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise CallError(f"{source!r} names no local file; write file:///absolute/path")
        return from_path(os.fsdecode(unquote_to_bytes("/" + path)))
    _refuse_secrets(scheme, source, rest)
    if scheme in _URLS:
        return _canonical_url(scheme, source, rest)
    authority, _, key = rest.partition("/")
    try:
        source.encode()
    except UnicodeEncodeError:
        raise CallError(f"{redact(ascii(source))} is not valid unicode; keys in object storage are UTF-8") from None
    if not authority and (not key or scheme in _BUCKETS):
        raise CallError(f"{redact(source)!r} names no bucket; write {scheme}://bucket/folder")
    return f"{scheme}://{authority}/{key}" if key else f"{scheme}://{authority}"


def _canonical_url(scheme: str, source: str, rest: str) -> str:
    """http(s): host in lower case, default port and fragment dropped, illegal characters encoded, escapes kept."""
    legal = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", rest)
    legal = quote(legal, safe="%/:?#[]@!$&'()*+,;=~")
    try:
        parts = urlsplit(f"{scheme}://{legal}")
        port = parts.port
        host = (unquote(parts.hostname or "")).encode("idna").decode("ascii").lower() if parts.hostname else ""
    except (ValueError, UnicodeError) as error:
        raise CallError(f"{redact(source)!r} is no valid URL: {error}") from None
    if not host:
        raise CallError(f"{redact(source)!r} names no server; write {scheme}://server/path")
    if ":" in host:
        host = f"[{host}]"
    if port is not None and port != {"http": 80, "https": 443}[scheme]:
        host = f"{host}:{port}"
    return f"{scheme}://{host}{parts.path or '/'}" + (f"?{parts.query}" if parts.query else "")


def _refuse_secrets(scheme: str, source: str, rest: str) -> None:
    authority = re.split(r"[/?#]" if scheme in _URLS else "/", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    if at and (":" in user or scheme in _URLS):
        raise CallError(
            f"{redact(source)!r} holds a password; give it by environment or cloud profile, and the URI without it"
        )
    pairs = re.split("[&;]", rest.partition("?")[2])
    names = {unquote(pair.partition("=")[0]).lower() for pair in pairs if "=" in pair}
    secret = sorted(names & (_SECRETS if scheme in _QUERIES_GRANT else _SIGNATURES))
    if secret:
        raise CallError(
            f"{redact(source.partition('?')[0])!r} is signed (it holds {', '.join(secret)}), "
            "and signatures are not stored; give the plain URI, and credentials by environment or cloud profile"
        )


def from_path(path: str | Path) -> str:
    """The ``file:`` URI of a local path, made absolute; links are not resolved."""
    # Path.absolute keeps `..`, and Path.resolve follows links.
    return "file://" + quote_from_bytes(os.fsencode(os.path.abspath(path)), safe="/")  # noqa: PTH100


def scheme_of(uri: str) -> str:
    """The scheme of a canonical URI, such as ``s3``."""
    return uri.partition("://")[0]


def split(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket (or host) and key of a canonical URI.

    The key is verbatim for object stores; for ``file:`` it is the decoded absolute path, for http(s) path and query as
    they are sent.
    """
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return scheme, "", os.fsdecode(unquote_to_bytes(rest))
    authority, _, key = rest.partition("/")
    return scheme, authority, key


def local_path(uri: str) -> str:
    """The path that a ``file:`` URI means.

    Raises:
        CallError: the URI is of another scheme.
    """
    scheme, _, path = split(uri)
    if scheme != "file":
        raise CallError(f"{redact(uri)!r} is no local file")
    return path


def join(uri: str, key: str) -> str:
    """The URI of ``key`` under a folder or prefix: what ``relative`` undoes. An empty key gives ``uri`` itself."""
    if not key:
        return uri
    scheme = scheme_of(uri)
    if scheme == "file":
        key = quote_from_bytes(os.fsencode(key), safe="/")
    elif scheme in _URLS:
        key = quote(key, safe="/")
    return f"{uri}{key}" if uri.endswith("/") else f"{uri}/{key}"


def is_under(uri: str, prefix: str) -> bool:
    """Whether ``uri`` is ``prefix`` or lies in it; ``s3://photos`` does not contain ``s3://photos-2023/a.jpg``."""
    return uri.startswith(prefix) and (prefix.endswith("/") or uri[len(prefix) : len(prefix) + 1] in ("", "/"))


def relative(uri: str, root: str) -> str:
    """The name of ``uri`` under ``root``, decoded; the last part of its name when both are the same.

    Raises:
        ValueError: ``uri`` does not lie under ``root``.
    """
    if uri == root:
        return name_of(uri)
    if not is_under(uri, root):
        raise ValueError(f"{redact(uri)!r} does not lie under {redact(root)!r}")
    rest = uri[len(root) :]
    return _decode(scheme_of(uri), rest if root.endswith("/") else rest[1:])


def parent(uri: str) -> str:
    """The folder that an object or folder lies in, without a slash at its end."""
    return uri.rstrip("/").rpartition("/")[0]


def name_of(uri: str) -> str:
    """The last part of the key, decoded: the file name."""
    scheme, _, rest = uri.partition("://")
    if scheme in _URLS:
        rest = rest.partition("?")[0]
    return _decode(scheme, rest.rstrip("/").rpartition("/")[2])


def _decode(scheme: str, text: str) -> str:
    if scheme == "file":
        return os.fsdecode(unquote_to_bytes(text))
    return unquote(text) if scheme in _URLS else text


def redact(text: str) -> str:
    """``text`` (a URI, or a message with URIs in it) with passwords, tokens and signatures replaced by ``***``."""
    return _SECRET_QUERY.sub(r"\1=***", _USERINFO.sub(r"\1***@", text))


def image_id(uri: str, version: str) -> str:
    """Identity of one version of one object: hex BLAKE2b-128 of ``uri`` + NUL + ``version`` (UTF-8), 32 characters."""
    return hashlib.blake2b(f"{uri}\0{version}".encode(), digest_size=16).hexdigest()


def version_of(etag: str | None, size: int | None, mtime_ns: int | None) -> str:
    """What tells one version of an object from the next.

    The ETag without its quotes (listings, headers and inventories quote it differently), else ``size-mtime_ns``, else
    ``unversioned``.
    """
    if etag:
        weak, bare = ("W/", etag[2:]) if etag.startswith("W/") else ("", etag)
        bare = bare.strip('"')
        if bare:
            return weak + bare
    if size is not None and mtime_ns is not None:
        return f"{size}-{mtime_ns}"
    return UNVERSIONED


UNVERSIONED = "unversioned"
"""Version of an object whose store tells neither ETag nor time of change."""
