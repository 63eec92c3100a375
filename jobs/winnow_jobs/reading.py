"""Images read and decoded in this process, many at a time, in the order asked: for jobs over few enough images."""

from __future__ import annotations

import asyncio
import collections
import itertools
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from winnow.config import PredictConfig
from winnow.decoders import DecoderPool
from winnow.errors import FetchError, ImageError
from winnow.images import DecodeLimits, View
from winnow.uris import UNVERSIONED
from winnow_connectors.object_store import ObjectStores

T = TypeVar("T")

Row = Mapping[str, Any]
"""An image: ``uri``, ``version``, ``size`` in bytes, and whatever else its caller needs."""


@dataclass(frozen=True)
class Read:
    """One image, or why it could not be read.

    Attributes:
        row: as asked.
        views: one uint8 (H, W, 3) per view asked for; None when it failed.
        width, height: of the source, with the EXIF orientation applied; 0 when it failed.
        format: Pillow's name of the format found in the bytes; empty when it failed.
        error: why it failed.
    """

    row: Row
    views: tuple[NDArray[np.uint8], ...] | None = None
    width: int = 0
    height: int = 0
    format: str = ""
    error: ImageError | None = None


class ImageReader:
    """Reads and decodes images within the limits of ``[predict]``. A bad image is a result like any other.

    Args:
        stores: access to the images.
        config: limits, and how many requests may be in flight.
        views: what to make of each image.
        num_decoders: decoder processes.
    """

    def __init__(
        self, stores: ObjectStores, config: PredictConfig, views: Sequence[View], *, num_decoders: int
    ) -> None:
        self._stores = stores
        self._max_bytes = config.max_bytes
        self._window = max(2 * num_decoders, min(config.fetch_concurrency, 16 * num_decoders))
        limits = DecodeLimits(
            max_bytes=config.max_bytes, max_pixels=config.max_pixels, timeout_s=config.image_timeout_s
        )
        self._decoders = DecoderPool(num_decoders, limits=limits, views=views, scaled=config.scaled_decoding)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="winnow-read", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An error in the middle of the images leaves some under way.
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._decoders.close()

    def read(self, rows: Iterable[Row]) -> Iterator[Read]:
        """Every image of the rows, in their order, as they become ready."""
        return self._in_order(self._one(row) for row in rows)

    def fetch(self, uris: Iterable[str]) -> dict[str, bytes | FetchError]:
        """The bytes of other objects, such as masks, all at once, or why they cannot be read."""

        async def one(uri: str) -> bytes | FetchError:
            try:
                return await self._stores.read(
                    self._stores.canonical(uri), version=UNVERSIONED, max_bytes=self._max_bytes
                )
            except FetchError as error:
                return error

        async def every(names: list[str]) -> list[bytes | FetchError]:
            return await asyncio.gather(*map(one, names))

        names = list(dict.fromkeys(uris))
        return dict(zip(names, asyncio.run_coroutine_threadsafe(every(names), self._loop).result(), strict=True))

    async def _one(self, row: Row) -> Read:
        try:
            data = await self._stores.read(
                row["uri"], version=row["version"], max_bytes=self._max_bytes, size=row["size"]
            )
        except ImageError as error:
            return Read(row, error=error)
        decoded = await asyncio.wrap_future(self._decoders.submit(data))
        if decoded.image is None:
            return Read(row, error=decoded.error)
        image = decoded.image
        return Read(row, image.views, image.width, image.height, image.format)

    def _in_order(self, calls: Iterator[Coroutine[Any, Any, T]]) -> Iterator[T]:
        """Results in the order of the calls, of which a window is under way at a time."""
        under_way: collections.deque[Future[T]] = collections.deque()
        try:
            for call in itertools.islice(calls, self._window):
                under_way.append(asyncio.run_coroutine_threadsafe(call, self._loop))
            while under_way:
                yield under_way.popleft().result()
                for call in itertools.islice(calls, 1):
                    under_way.append(asyncio.run_coroutine_threadsafe(call, self._loop))
        finally:
            for future in under_way:
                future.cancel()


async def _cancel_others() -> None:
    """End all other tasks of the loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def in_batches(images: Iterable[Read], batch_size: int, on_error: Callable[[Read], None]) -> Iterator[list[Read]]:
    """Lists of ``batch_size`` images that could be read, the last one shorter; the others go to ``on_error``."""
    batch: list[Read] = []
    for image in images:
        if image.error is not None:
            on_error(image)
            continue
        batch.append(image)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
