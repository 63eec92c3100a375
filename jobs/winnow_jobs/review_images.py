"""How annotators get to see images: as copies that tell nothing, under addresses that their Label Studio can open.

Copies lie under ``review/copies/`` of the warehouse, one per image, made when they are first needed.
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from winnow import uris
from winnow.errors import CallError, ImageError
from winnow.images import View
from winnow.review_copies import from_pixels
from winnow_connectors.label_studio import LabelStudio, S3Storage
from winnow_jobs.reading import ImageReader, Read

if TYPE_CHECKING:
    from winnow_connectors.object_store import ObjectStores
    from winnow_jobs.workspace import Workspace

COPIES = "review/copies"
"""Where copies lie in the warehouse."""

DOCUMENT_ROOT = "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT"
"""Environment variable of Label Studio: it shows files of the folders below this one."""

_IN_FLIGHT = 32
"""Pixels of so many images wait in memory to become copies."""


@dataclass(frozen=True)
class Shown:
    """An image as annotators see it.

    Attributes:
        uri: of the copy, or of the original.
        width, height: of the image as shown, in pixels.
    """

    uri: str
    width: int
    height: int


@dataclass
class Prepared:
    """Images that can be shown, and those that cannot.

    Attributes:
        shown: by image_id.
        failed: why, by image_id.
        num_copied: copies that were made now.
    """

    shown: dict[str, Shown] = field(default_factory=dict)
    failed: dict[str, ImageError] = field(default_factory=dict)
    num_copied: int = 0


class Addresses:
    """Addresses of objects for Label Studio, and the storages that its projects need to open them.

    Args:
        stores: access to the objects.
        root: the folder that Label Studio has as ``LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT``; None if unknown.
    """

    def __init__(self, stores: ObjectStores, root: str | None) -> None:
        self._stores = stores
        self._root = None if root is None else stores.canonical(root).rstrip("/")
        self._needed: dict[tuple[str, ...], None] = {}

    def of(self, uri: str, folder: str) -> str:
        """The address of an object, once its storage is connected.

        Args:
            uri: of the object.
            folder: URI of the folder or prefix that is to be connected for it.

        Raises:
            CallError: Label Studio cannot show objects from there.
        """
        scheme, bucket, key = uris.split(uri)
        if scheme in ("http", "https"):
            return uri
        if scheme == "s3":
            self._needed["s3", folder] = None
            return f"s3://{bucket}/{key}"
        if scheme != "file":
            raise CallError(
                f"Label Studio cannot be given access to {uris.redact(folder)} by Winnow; "
                "keep the warehouse in s3://, or in a folder that Label Studio sees"
            )
        if self._root is None:
            raise CallError(
                f"the images to be shown are files, and {DOCUMENT_ROOT} is not set: set it, here and for Label Studio, "
                f"to {uris.local_path(uris.parent(folder))}, or let `winnow services up` start one that has it"
            )
        if not uris.is_under(folder, self._root) or folder == self._root:
            raise CallError(
                f"Label Studio shows only files in folders below {DOCUMENT_ROOT}={uris.local_path(self._root)}, "
                f"and the images to be shown are in {uris.local_path(folder)}; start Label Studio with "
                f"{DOCUMENT_ROOT}={uris.local_path(uris.parent(folder))} and set it here too"
            )
        self._needed["file", folder] = None
        return f"/data/local-files/?d={quote(uris.relative(uri, self._root))}"

    def connect(self, server: LabelStudio, project_id: int) -> None:
        """Let a project show everything whose address was asked for."""
        for scheme, folder in self._needed:
            if scheme == "file":
                server.connect_local(project_id, uris.local_path(folder))
                continue
            _, bucket, prefix = uris.split(folder)
            access = self._stores.s3_access(folder)
            keys = access.provider() if access.provider is not None else {}
            server.connect_s3(
                project_id,
                S3Storage(
                    bucket=bucket,
                    prefix=prefix,
                    endpoint=access.endpoint,
                    region=access.region,
                    access_key=keys.get("access_key_id"),
                    secret_key=keys.get("secret_access_key"),
                    session_token=keys.get("token"),
                ),
            )


class ReviewImages:
    """Makes images visible to the annotators of one Label Studio.

    Args:
        workspace: configuration and warehouse.

    Raises:
        CallError: Label Studio cannot show files from where the copies lie.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._store = workspace.warehouse.store
        self._folder = uris.join(self._store.uri, COPIES)
        self._originals = workspace.config.review.serve_originals
        self.addresses = Addresses(workspace.stores, os.environ.get(DOCUMENT_ROOT, "").strip() or None)
        if not self._originals:
            self.addresses.of(f"{self._folder}/x", self._folder)

    def address(self, shown: Shown) -> str:
        """For Label Studio. Raises CallError for an original that it cannot show."""
        return self.addresses.of(shown.uri, _folder_of(shown.uri) if self._originals else self._folder)

    def prepare(
        self, rows: Sequence[Mapping[str, Any]], on_progress: Callable[[int, int], None] = lambda done, failed: None
    ) -> Prepared:
        """Make sure that every image can be shown.

        Args:
            rows: ``image_id``, ``uri``, ``version``, ``size``, and ``width`` and ``height`` as far as they are known.
            on_progress: told how many images are ready, and how many failed.
        """
        found = Prepared()
        there = {} if self._originals else self._copies()
        missing = []
        for row in rows:
            image_id = row["image_id"]
            uri = row["uri"] if self._originals else there.get(image_id)
            if uri is None or not row["width"]:
                missing.append(row)
            else:
                found.shown[image_id] = Shown(uri, row["width"], row["height"])
        for image_id, result in self._make(missing):
            if isinstance(result, ImageError):
                found.failed[image_id] = result
            else:
                found.shown[image_id] = result
                found.num_copied += not self._originals
            on_progress(len(found.shown), len(found.failed))
        return found

    def _copies(self) -> dict[str, str]:
        """URI of every copy by image_id."""
        return {
            info.key.rsplit("/", 1)[1].split(".")[0]: uris.join(self._store.uri, info.key)
            for info in self._store.list(f"{COPIES}/")
        }

    def _make(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Shown | ImageError]]:
        """Read images and write their copies."""
        if not rows:
            return
        num_threads = max(1, len(os.sched_getaffinity(0)))
        config = self._workspace.config.predict.model_copy(update={"scaled_decoding": False})
        waiting: collections.deque[Future[tuple[str, Shown | ImageError]]] = collections.deque()
        with (
            ThreadPoolExecutor(num_threads) as threads,
            ImageReader(self._workspace.stores, config, [View()], num_decoders=num_threads) as reader,
        ):
            images = reader.read(rows)
            for image in itertools.islice(images, _IN_FLIGHT):
                waiting.append(threads.submit(self._copy, image))
            while waiting:
                yield waiting.popleft().result()
                for image in itertools.islice(images, 1):
                    waiting.append(threads.submit(self._copy, image))

    def _copy(self, image: Read) -> tuple[str, Shown | ImageError]:
        image_id = image.row["image_id"]
        if image.views is None:
            assert image.error is not None
            return image_id, image.error
        if self._originals:
            return image_id, Shown(image.row["uri"], image.width, image.height)
        copy = from_pixels(image.views[0], image_id, source_format=image.format)
        self._store.create(f"{COPIES}/{copy.name}", copy.data)
        return image_id, Shown(f"{self._folder}/{copy.name}", image.width, image.height)


def _folder_of(uri: str) -> str:
    """What is to be connected for an original: its bucket, or the folder that it lies in."""
    scheme, bucket, _ = uris.split(uri)
    return f"s3://{bucket}/" if scheme == "s3" else uris.parent(uri)
