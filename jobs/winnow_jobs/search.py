"""``winnow search``: the images most like one image, exact over all vectors of a model.

The vectors are streamed and multiplied block by block; memory holds one block and the ids of the current images.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow import uris
from winnow.decoders import DecoderPool
from winnow.errors import CallError, FetchError
from winnow.images import DecodeLimits, View
from winnow.similarity import Nearest
from winnow_jobs.spec import answerer, views_of
from winnow_jobs.vectors import Ids, Vectors, embedding_task, positions, quoted, select_ids

if TYPE_CHECKING:
    from winnow.augment import Policy
    from winnow.models.references import ResolvedModel
    from winnow_connectors.query import QueryEngine
    from winnow_jobs.workspace import Workspace

SCHEMA = pa.schema(
    [
        pa.field("rank", pa.int32()),
        pa.field("similarity", pa.float32()),
        pa.field("uri", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("split", pa.string()),
    ]
)
"""Columns of a result; similarity is the cosine, 1 for the same picture."""

_IMAGE_ID = re.compile(r"[0-9a-f]{32}")
_IMAGE_COLUMNS = "image_id, uri, split, version, size"
_THUMBNAIL = View(resize=384)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        query: canonical URI of the image that was asked for.
        image_id: of that image, if it is known.
        task, model: whose vectors were compared.
        num_compared: vectors that were compared.
        seconds: that it took, loading a model included.
        rows: the images found, best first, in the columns of ``SCHEMA``.
    """

    query: str
    image_id: str | None
    task: str
    model: str
    num_compared: int
    seconds: float
    rows: pa.Table


def search(
    workspace: Workspace, image: str, *, k: int = 10, task: str | None = None, where: str | None = None
) -> SearchResult:
    """The k images most like an image; the image itself is left out.

    Args:
        workspace: configuration and warehouse.
        image: an image_id, a URI or a local path; need not be known.
        k: how many, at most.
        task: embedding task; the only one of the configuration by default.
        where: SQL condition over ``current_images``: only images that meet it.

    Raises:
        CallError: no such image or task, a faulty condition, no vectors yet, or an image that cannot be read.
    """
    if k < 1:
        raise CallError(f"-k {k} is not valid; give a number of at least 1")
    started = time.monotonic()
    task = embedding_task(workspace.config, task)
    workspace.warehouse.check()
    model = workspace.task_model(task)
    views = views_of(workspace.config, task, model)
    model_id = answerer(model, views)
    engine = workspace.query_engine()
    known = _known_image(engine, image)
    vectors = Vectors.open(workspace.warehouse.tables, task, model_id)
    if vectors.is_empty:
        raise CallError(f"task {task!r} has no vectors by {model_id} yet; run `winnow predict --task {task}` first")
    query = vectors.of_image(known["image_id"]) if known else None
    uri = known["uri"] if known else uris.canonical(image)
    condition = f" WHERE ({where}\n)" if where else ""
    ids = select_ids(engine, f"SELECT image_id FROM current_images{condition}")
    if query is None:
        query = embed(workspace, model, views, _read(workspace, uri, known), uri)
    nearest, num_compared = _nearest(vectors, query, ids, k, known["image_id"] if known else None)
    scores, found = (array[0][: min(k, num_compared)] for array in nearest.best())
    rows = _result(engine, [image_id.decode() for image_id in ids[found]], scores)
    return SearchResult(
        query=uri,
        image_id=known["image_id"] if known else None,
        task=task,
        model=model_id,
        num_compared=num_compared,
        seconds=round(time.monotonic() - started, 3),
        rows=rows,
    )


def embed(
    workspace: Workspace, model: ResolvedModel, views: tuple[Policy, int] | None, data: bytes, name: str
) -> NDArray[np.float32]:
    """The vector (D,) that ``winnow predict`` would give an image.

    Args:
        workspace: for the settings of ``[predict]``.
        model: of an embedding task.
        views: whose mean is the answer, if any.
        data: the image's bytes.
        name: of the image, for messages.

    Raises:
        CallError: the bytes are no image that can be decoded, or the model has no finite answer.
    """
    from winnow.models.loading import load

    with _decoder(workspace, model.view) as decoder:
        decoded = decoder.submit(data).result()
    if decoded.image is None:
        raise CallError(f"{name} cannot be searched for: {decoded.error}")
    predictor = load(model, precision=workspace.config.predict.precision, fetch=workspace.stores.download)
    pixels_NHWC = decoded.image.views[0][None]
    if views is None:
        (answers,) = predictor.predict(pixels_NHWC).values()
    else:
        (answers,) = predictor.predict_views([model.id], *views, pixels_NHWC, [name]).values()
    vector: NDArray[np.float32] = answers[0]
    if not np.isfinite(vector).all():
        raise CallError(f"{model.id} answered NaN or infinity for {name}; check its weights")
    return vector


def draw_sheet(workspace: Workspace, result: SearchResult, path: Path, *, overwrite: bool = False) -> None:
    """Write a contact sheet: the image asked for, then what was found, with rank and similarity.

    Raises:
        CallError: the file exists and ``overwrite`` is not set.
    """
    from winnow.drawing import Tile, draw_contact_sheet
    from winnow_jobs.writers import atomic_file

    rows = result.rows.to_pylist()
    shown = [(result.query, result.image_id or "", "asked for")]
    shown += [(row["uri"], row["image_id"], f"{row['rank']}  {row['similarity']:.3f}") for row in rows]
    images = _images_of(workspace.query_engine(), [image_id for _, image_id, _ in shown])
    tiles = []
    with atomic_file(path, overwrite=overwrite) as file:
        with _decoder(workspace, _THUMBNAIL) as decoder:
            for uri, image_id, title in shown:
                name = uri.rsplit("/", 1)[-1]
                try:
                    decoded = decoder.submit(_read(workspace, uri, images.get(image_id))).result()
                except CallError as error:
                    tiles.append(Tile(None, title, name, reason=str(error)))
                    continue
                pixels = decoded.image.views[0] if decoded.image else None
                tiles.append(Tile(pixels, title, name, reason=str(decoded.error or "")))
        draw_contact_sheet(tiles).save(file, "PNG")


def _known_image(engine: QueryEngine, image: str) -> dict[str, Any] | None:
    """The current image of that image_id or URI, or None when it may be a file that is not known."""
    if _IMAGE_ID.fullmatch(image):
        if found := _images_of(engine, [image]):
            return found[image]
        raise CallError(f"image_id {image} is not among the current images; give its URI, or look in `images` for it")
    uri = uris.canonical(image)
    rows = engine.sql(f"SELECT {_IMAGE_COLUMNS} FROM current_images WHERE uri = {quoted(uri)}").to_pylist()
    return rows[0] if rows else None


def _images_of(engine: QueryEngine, image_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is known of current images, by image_id."""
    listed = ", ".join(map(quoted, image_ids)) or "''"
    rows = engine.sql(f"SELECT {_IMAGE_COLUMNS} FROM current_images WHERE image_id IN ({listed})").to_pylist()
    return {row["image_id"]: row for row in rows}


def _nearest(
    vectors: Vectors, query_D: NDArray[np.float32], ids: Ids, k: int, exclude: str | None
) -> tuple[Nearest, int]:
    """The nearest of the images with these ids, and how many of them have a vector."""
    nearest, num_compared = Nearest(1, k), 0
    left_out = positions(ids, np.array([exclude or ""], dtype=ids.dtype))[0]
    for image_ids, vectors_ND in vectors.stream():
        indices = positions(ids, image_ids)
        kept = (indices >= 0) & (indices != left_out)
        num_compared += int(kept.sum())
        nearest.update(np.where(kept, vectors_ND @ query_D, -np.inf).astype(np.float32)[None], indices)
    return nearest, num_compared


def _result(engine: QueryEngine, image_ids: Sequence[str], scores: NDArray[np.float32]) -> pa.Table:
    images = _images_of(engine, image_ids)
    rows = [
        {**images[image_id], "rank": rank, "similarity": min(float(score), 1.0)}  # rounding errors go beyond 1
        for rank, (image_id, score) in enumerate(zip(image_ids, scores, strict=True), start=1)
        if image_id in images  # an ingest may just have found that one is gone
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _read(workspace: Workspace, uri: str, image: Mapping[str, Any] | None) -> bytes:
    """The bytes of an image; of a known one, checked to be the version that is known.

    Raises:
        CallError: it cannot be read.
    """
    version, size = (image["version"], image["size"]) if image else (uris.UNVERSIONED, None)
    max_bytes = workspace.config.predict.max_bytes
    try:
        return asyncio.run(workspace.stores.read(uri, version=version, max_bytes=max_bytes, size=size))
    except FetchError as error:
        if image is None and error.kind == "missing":
            raise CallError(f"{uris.redact(uri)} is no known image, and no such file or object exists") from None
        raise CallError(error.message) from None


def _decoder(workspace: Workspace, view: View) -> DecoderPool:
    settings = workspace.config.predict
    limits = DecodeLimits(
        max_bytes=settings.max_bytes, max_pixels=settings.max_pixels, timeout_s=settings.image_timeout_s
    )
    return DecoderPool(1, limits=limits, views=(view,), scaled=settings.scaled_decoding)
