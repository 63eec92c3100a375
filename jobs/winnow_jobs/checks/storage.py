"""Checks of the warehouse, of every [storage.*] section, and of the local S3 server."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import urllib.error
import urllib.request
from pathlib import Path

from winnow import uris
from winnow.config import Config, StorageConfig
from winnow.errors import StorageError, WinnowError
from winnow_connectors.object_store import NotFoundError, ObjectStores
from winnow_jobs import services
from winnow_jobs.checks import Check, fail, ok, warn
from winnow_jobs.checks.machine import check_disk

_SILENCE_S = 3.0
_RETRY_S = 3.0


def check_warehouse(config: Config, base_dir: Path) -> Check:
    """Whether the warehouse can be written, and honours create-only writes; leaves nothing behind."""
    name = "warehouse"
    uri = uris.canonical(config.warehouse.uri, base_dir)
    local = Path(uris.local_path(uri)) if uris.scheme_of(uri) == "file" else None
    if local is not None and not local.exists():
        parent = next(folder for folder in local.parents if folder.exists())
        if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
            return warn(name, f"{local} does not exist yet", "winnow init")
        return fail(name, f"{local} does not exist and {parent} cannot be written", "mend warehouse.uri in winnow.toml")
    try:
        store = _stores(config, base_dir).at(uri)
        key, mine = f"doctor-{secrets.token_hex(8)}", secrets.token_bytes(16)
        if not store.create(key, mine):
            return fail(name, f"{uri} says that a name never used before exists", _NO_CONDITION)
        try:
            kept = not store.create(key, b"second") and store.get(key) == mine
        finally:
            with contextlib.suppress(StorageError):  # looked at below
                store.delete(key)
        if not kept:
            return fail(name, f"{uri} let a create-only write replace an object", _NO_CONDITION)
        if store.exists(key):
            return fail(name, f"{uri} does not delete: {key} is still there", "allow deletion under this prefix")
        try:
            store.get("warehouse.json")
        except NotFoundError:
            return warn(name, f"{uri} is writable and empty", "winnow init")
    except WinnowError as error:
        return fail(name, error.message, _how_to_mend(error))
    return ok(name, f"{uri}: read, write, delete and create-only writes work")


_NO_CONDITION = (
    "keep the warehouse on storage with conditional PUT (If-None-Match): a local disk, AWS S3, Google Cloud Storage, "
    "Azure, MinIO, SeaweedFS; without it two jobs could both win"
)


def check_warehouse_disk(config: Config, base_dir: Path) -> Check:
    """Free space under a warehouse that is a folder."""
    return check_disk("disk of warehouse", Path(uris.local_path(uris.canonical(config.warehouse.uri, base_dir))))


def check_section(prefix: str, config: Config, base_dir: Path) -> Check:
    """Whether what a [storage.*] section describes can be reached, as far as the section says."""
    name = f'storage "{prefix}"'
    section = config.storage[prefix]
    scheme, _, rest = prefix.partition("://")
    found: list[str] = []
    try:
        if scheme in ("s3", "s3a", "s3n"):
            found.append(_describe_keys(section, base_dir))
        if section.endpoint is not None:
            found.append(f"{section.endpoint} answers ({_status_of(section.endpoint)})")
        if rest and scheme not in ("http", "https"):
            next(iter(_stores(config, base_dir).list(prefix)), None)
            found.append("listing works")
        elif rest:
            found.append(f"answers ({_status_of(prefix)})")
        else:
            found.append("no bucket named, so none was listed")
    except WinnowError as error:
        return fail(name, error.message, _how_to_mend(error))
    except OSError as error:
        return fail(
            name,
            f"{uris.redact(section.endpoint or prefix)} does not answer ({getattr(error, 'reason', None) or error})",
            "start that server (`winnow services up` for the local one), or mend the endpoint in winnow.toml",
        )
    return ok(name, ", ".join(found))


def check_local_s3(config: Config | None, base_dir: Path) -> Check:
    """The local S3 server of this workspace, and whether winnow.toml counts on it."""
    name = "local s3"
    if not base_dir.is_dir():
        return ok(name, "never started")
    status = services.status(base_dir)
    needed = config is not None and any(
        section.endpoint is not None and section.endpoint.rstrip("/") == status.address
        for section in config.storage.values()
    )
    if status.running:
        return ok(name, f"{status.address}, process {status.pid}")
    if status.pid is not None:
        return fail(name, status.detail, "winnow services down && winnow services up")
    if needed:
        return fail(name, f"{status.detail}, and winnow.toml sends requests to {status.address}", "winnow services up")
    return ok(name, f"{status.detail}; not needed by winnow.toml")


def _stores(config: Config, base_dir: Path) -> ObjectStores:
    return ObjectStores(config.storage, base_dir, fetch_timeout_s=_SILENCE_S, retry_timeout_s=_RETRY_S)


def _describe_keys(section: StorageConfig, base_dir: Path) -> str:
    """Where the keys come from. Raises CallError when they are named and not there."""
    from winnow_connectors.credentials import resolve

    access = resolve(section, base_dir)
    if access.anonymous:
        return "unsigned"
    if access.provider is None:
        return "no keys in the environment or a profile: the machine's role is asked"
    return f"keys of profile {section.profile}" if section.profile else "keys found"


def _status_of(url: str) -> int:
    """Status code of a plain GET; any answer will do. Raises OSError when there is none."""
    try:
        with urllib.request.urlopen(url, timeout=_SILENCE_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP: {type(error).__name__}") from None


def _how_to_mend(error: WinnowError) -> str:
    if isinstance(error, StorageError):
        return "check the address, the bucket's name, and that the credentials may list, read, write and delete there"
    return "mend winnow.toml or the credentials as said"
