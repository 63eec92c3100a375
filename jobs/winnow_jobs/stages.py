"""The three stages of predict, as plain callables on Arrow tables: fetch and decode, infer, write.

Ray runs them (see ``pipeline``), but nothing here knows Ray. One row per image flows from stage to stage; pixels
travel as uint8 in fixed-size lists and end at the model. A failed image is a row like any other, with null pixels
replaced by zeros and its ``error`` set.

Columns between the stages::

    position   int64        place in the plan
    asked      int64        bit i is set when the i-th task (by name) asks this image
    image_id   string
    stage, error, message   set when the image failed
    sha256, num_bytes, format, width, height, pixel_hash, phash     what is known of the source
    fetch_s, decode_s       seconds: waiting for storage; CPU of decoding
    pixels_<i>              uint8[H·W·3], one per distinct view; dropped by infer
    answer_<task>           one value of ``winnow.answers``, null when failed; added by infer
    infer_s, infer_cpu_s    seconds of the image's share of its batch; added by infer
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from winnow.answers import (
    ANSWER_TABLES,
    ANSWER_TYPES,
    classification_answers,
    embedding_answers,
    rows_of,
    segmentation_answers,
)
from winnow.batches import Fragment, Marker, Ranges, add_up, to_ranges
from winnow.decoders import Decoded, DecoderPool
from winnow.errors import FAILURE_KINDS, FetchError, ImageError, InferenceError, StoppedError
from winnow.images import View
from winnow_connectors.ledger import Run
from winnow_connectors.object_store import ObjectStores
from winnow_jobs.spec import PredictSpec, ReadSpec

if TYPE_CHECKING:
    from winnow.augment import Policy
    from winnow.models.predictors import Predictor

Report = Callable[..., str | None]
"""Told what was done since the last call, as ``pipeline.Tally`` names it; answers the reason to stop, if any."""

_META: tuple[tuple[str, pa.DataType], ...] = (
    ("position", pa.int64()),
    ("asked", pa.int64()),
    ("image_id", pa.string()),
    ("stage", pa.string()),
    ("error", pa.string()),
    ("message", pa.string()),
    ("sha256", pa.string()),
    ("num_bytes", pa.int64()),
    ("format", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("pixel_hash", pa.string()),
    ("phash", pa.string()),
    ("fetch_s", pa.float64()),
    ("decode_s", pa.float64()),
)


_SOURCE = ("sha256", "num_bytes", "format", "width", "height", "pixel_hash", "phash")
"""Columns of ``outcomes`` that describe the source."""


@dataclass(frozen=True)
class Answered:
    """One image after fetching and decoding: values of columns, and its views unless it failed."""

    row: Mapping[str, Any]
    views: tuple[NDArray[np.uint8], ...] | None


class FetchDecode:
    """Reads and decodes the images of plan chunks, many at a time, into tables of ``spec.batch_size`` rows.

    Args:
        spec: how images are read.
        run: the open run, for its plan.
        stores: access to the images.
        report: told about every table; a returned reason stops the run.
        num_decoders: decoder processes.
    """

    def __init__(self, spec: ReadSpec, run: Run, stores: ObjectStores, report: Report, *, num_decoders: int) -> None:
        self._spec = spec
        self._run = run
        self._stores = stores
        self._report = report
        self._decoders = DecoderPool(
            num_decoders,
            limits=spec.limits(),
            views=spec.views(),
            scaled=spec.scaled_decoding,
            fingerprints=spec.fingerprints,
        )
        # Shared by the chunks that are under way at once.
        self._slots = asyncio.Semaphore(spec.fetch_concurrency)
        self._budget = _ByteBudget(spec.max_bytes_in_flight)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="winnow-fetch", daemon=True).start()

    def __call__(self, chunks: pa.Table) -> Iterator[pa.Table]:
        for chunk in chunks.to_pylist():
            ranges = tuple((start, stop) for start, stop in zip(chunk["starts"], chunk["stops"], strict=True))
            rows = read_plan_chunk(self._run, chunk["chunk"], ranges)
            yield from self._tables(rows)

    def _tables(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[pa.Table]:
        done: queue.SimpleQueue[Answered | BaseException | None] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._answer_all(rows, done), self._loop)
        work.add_done_callback(lambda future: done.put(_exception_of(future)))
        try:
            batch: list[Answered] = []
            while (answered := done.get()) is not None:
                if isinstance(answered, BaseException):
                    raise answered
                batch.append(answered)
                if len(batch) >= self._spec.batch_size:
                    yield self._table(batch)
                    batch = []
            if batch:
                yield self._table(batch)
        finally:
            work.cancel()

    async def _answer_all(self, rows: Sequence[Mapping[str, Any]], done: queue.SimpleQueue[Any]) -> None:
        async def one(row: Mapping[str, Any]) -> None:
            size = row["size"] if row["size"] is not None else 1_000_000
            async with self._slots:
                held = await self._budget.take(size)
                try:
                    done.put(await self._answer(row))
                finally:
                    await self._budget.give(held)

        async with asyncio.TaskGroup() as group:
            for row in rows:
                group.create_task(one(row))

    async def _answer(self, row: Mapping[str, Any]) -> Answered:
        meta, data = await self._fetch(row)
        return Answered(meta, None) if data is None else await self._decode(meta, data)

    async def _fetch(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None]:
        """What is known of the image now, and its bytes unless that is a failure."""
        meta: dict[str, Any] = {name: row[name] for name in ("position", "asked", "image_id")}
        started = time.perf_counter()
        try:
            data = await self._stores.read(
                row["uri"], version=row["version"], max_bytes=self._spec.max_bytes, size=row["size"]
            )
        except FetchError as error:
            return meta | {"fetch_s": time.perf_counter() - started} | failure_of(error), None
        return meta | {"fetch_s": time.perf_counter() - started, "num_bytes": len(data)}, data

    async def _decode(self, meta: Mapping[str, Any], data: bytes) -> Answered:
        meta = dict(meta)
        decoded: Decoded = await asyncio.wrap_future(self._decoders.submit(data))
        meta |= {"sha256": decoded.sha256, "decode_s": decoded.decode_s}
        if decoded.image is None:
            assert decoded.error is not None
            return Answered(meta | failure_of(decoded.error), None)
        image = decoded.image
        meta |= {name: getattr(image, name) for name in ("format", "width", "height", "pixel_hash", "phash")}
        return Answered(meta, image.views)

    def _table(self, batch: Sequence[Answered]) -> pa.Table:
        table = self._read_table(batch)
        for index, view in enumerate(self._spec.views()):
            table = table.append_column(f"pixels_{index}", _pixel_column(batch, index, view))
        return table

    def _read_table(self, batch: Sequence[Answered]) -> pa.Table:
        """What is known of the images, without their pixels; the board is told."""
        columns: dict[str, pa.Array] = {
            name: pa.array([answered.row.get(name) for answered in batch], type=kind) for name, kind in _META
        }
        errors = [answered.row["error"] for answered in batch if answered.row.get("error")]
        reason = self._report(
            read=len(batch), failed=len(errors), systemic=sum(FAILURE_KINDS[kind].systemic for kind in errors)
        )
        if reason:
            raise StoppedError(reason)
        return pa.table(columns)


class Infer:
    """Answers every task for tables of decoded images; holds all the models of the run.

    Args:
        spec: what the run does.
        stores: access to checkpoints given by URL.
        report: told how many images were answered.
        device: ``cpu`` or ``cuda``.
        num_threads: threads that compute, on a CPU.
    """

    def __init__(
        self, spec: PredictSpec, stores: ObjectStores, report: Report, *, device: str, num_threads: int
    ) -> None:
        self._spec = spec
        self._report = report
        # Each thread computes images of its own and has torch to itself. Threads that share every layer wait for each
        # other at its end, and waste what they wait where other processes want the cores too: docs/benchmarks.md.
        self._num_threads = num_threads if device == "cpu" else 1
        self._threads = ThreadPoolExecutor(self._num_threads, initializer=one_torch_thread)

        def load_models() -> list[Predictor]:
            from winnow.models.loading import load_all  # here, because it brings torch, which no other stage needs

            models = {name: task.model for name, task in spec.tasks.items()}
            return load_all(models, device=device, precision=spec.precision, fetch=stores.download)

        self._predictors = self._threads.submit(load_models).result()

    def __call__(self, table: pa.Table) -> pa.Table:
        started, cpu_started = time.perf_counter(), time.process_time()
        readable = np.array(pc.is_null(table["error"]))
        masks = table["asked"].to_numpy()
        asked = {name: readable & (masks >> bit & 1).astype(bool) for bit, name in enumerate(self._spec.tasks)}
        images = [_images_NHWC(table, index, view) for index, view in enumerate(self._spec.views())]
        sizes = list(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
        image_ids = table["image_id"].to_pylist()
        answers: dict[str, pa.Array] = {}
        for predictor in self._predictors:
            rows = np.flatnonzero(np.logical_or.reduce([asked[name] for name in predictor.models]))
            view = self._spec.tasks[next(iter(predictor.models))].view_index
            found = self._answers(predictor, images[view], image_ids, sizes, rows)
            where = np.full(table.num_rows, -1, dtype=np.int64)
            where[rows] = np.arange(len(rows))
            for name in predictor.models:
                answers[f"answer_{name}"] = found[name].take(pa.array(where, mask=~asked[name]))
        elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        result = table.drop_columns([name for name in table.column_names if name.startswith("pixels_")])
        for column, values in answers.items():
            result = result.append_column(column, values)
        share = readable / max(1, readable.sum())
        result = result.append_column("infer_s", pa.array(share * elapsed))
        result = result.append_column("infer_cpu_s", pa.array(share * cpu))
        self._report(answered=table.num_rows)
        return result

    def _answers(
        self,
        predictor: Predictor,
        images_NHWC: NDArray[np.uint8],
        image_ids: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        rows: NDArray[np.int64],
    ) -> dict[str, pa.Array]:
        """Answers of all models of a predictor for some rows of a table, by task."""

        def answer(part: NDArray[np.int64]) -> dict[str, pa.Array]:
            shown, pixels_NHWC = [sizes[row] for row in part], images_NHWC[part]
            found: dict[str, Any] = {}
            for views, names in self._by_views(predictor):
                if views is None:
                    answers = predictor.predict(pixels_NHWC, shown)
                    found |= {name: answers[name] for name in names}
                else:
                    policy, num_views = views
                    ids = [image_ids[row] for row in part]
                    found |= predictor.predict_views(names, policy, num_views, pixels_NHWC, ids, shown)
            return {name: self._to_arrow(name, values, shown) for name, values in found.items()}

        if not len(rows):
            return {name: pa.array([], type=ANSWER_TYPES[self._spec.tasks[name].kind]) for name in predictor.models}
        parts = list(self._threads.map(answer, np.array_split(rows, min(self._num_threads, len(rows)))))
        return {name: pa.concat_arrays([part[name] for part in parts]) for name in predictor.models}

    def _by_views(self, predictor: Predictor) -> list[tuple[tuple[Policy, int] | None, list[str]]]:
        """Tasks of a predictor by the augmented views that they are answered with; those without first."""
        groups: dict[str, tuple[tuple[Policy, int] | None, list[str]]] = {}
        for name in predictor.models:
            task = self._spec.tasks[name]
            views = (task.policy, task.num_views) if task.policy is not None else None
            key = f"{task.policy.digest} {task.num_views}" if task.policy is not None else ""
            groups.setdefault(key, (views, []))[1].append(name)
        return [groups[key] for key in sorted(groups)]

    def _to_arrow(self, name: str, found: Any, sizes: Sequence[tuple[int, int]]) -> pa.Array:
        task = self._spec.tasks[name]
        if task.kind == "segmentation":
            return segmentation_answers(found, task.model.classes, sizes)
        if task.kind == "embedding":
            return embedding_answers(found)
        probabilities_NC, disagreement_N = (found, None) if task.policy is None else found
        return classification_answers(
            probabilities_NC,
            task.model.classes,
            store_probabilities=task.store_probabilities,
            disagreement_N=disagreement_N,
            multi_label=task.model.multi_label,
        )


def one_torch_thread() -> None:
    """Let torch compute in the calling thread alone."""
    import torch

    torch.set_num_threads(1)


class BatchWriter:
    """Writes the rows of a batch to every table of the run, then its marker."""

    seconds: Mapping[str, str]
    """Column of the seconds spent, by stage."""

    def __init__(self, spec: ReadSpec, run: Run, report: Report, *, attempt: str, generation: int) -> None:
        self._spec = spec
        self._run = run
        self._report = report
        self._attempt = attempt
        self._generation = generation

    def write(self, table: pa.Table) -> Marker:
        """Write one batch; its rows count once the marker is recorded."""
        started = time.perf_counter()
        now = datetime.now(UTC)
        fragments, counts = [], []
        for bit, name in enumerate(self._spec.model_ids):
            asked = table.filter(pa.array((table["asked"].to_numpy() >> bit & 1).astype(bool)))
            if not asked.num_rows:
                continue
            outcomes = self._outcomes(asked, name, now)
            fragments.append(self._run.stage("outcomes", outcomes))
            answered = asked.filter(pc.is_valid(asked[f"answer_{name}"]))
            if answered.num_rows:
                fragments += self._stage_answers(answered, name, now)
            failed = outcomes.filter(pc.equal(outcomes["status"], "failed"))
            counts.append({f"answered.{name}": answered.num_rows, f"failed.{name}": failed.num_rows})
            counts.append(
                {f"error.{entry['values']}": entry["counts"] for entry in failed["error"].value_counts().to_pylist()}
            )
        total = add_up(counts)
        seconds = {stage: float(pc.sum(table[column]).as_py() or 0.0) for stage, column in self.seconds.items()}
        seconds["writing"] = time.perf_counter() - started
        systemic = sum(
            int(value)
            for key, value in total.items()
            if key.startswith("error.") and FAILURE_KINDS[key.removeprefix("error.")].systemic
        )
        marker = Marker(
            ranges=to_ranges(table["position"].to_numpy()),
            fragments=tuple(fragments),
            attempt=self._attempt,
            generation=self._generation,
            counts={key: int(value) for key, value in total.items()},
            num_systemic=systemic,
            seconds=seconds,
        )
        self._run.mark(marker)
        reason = self._report(written=table.num_rows, counts=marker.counts, seconds=marker.seconds)
        if reason:
            raise StoppedError(reason)
        return marker

    def _stage_answers(self, table: pa.Table, task: str, now: datetime) -> list[Fragment]:
        """Write the answers of a task, none of them null."""
        raise NotImplementedError

    def _outcomes(self, table: pa.Table, task: str, now: datetime) -> pa.Table:
        unanswered = pc.is_null(table[f"answer_{task}"])
        unread = pc.is_valid(table["error"])
        # Read well but without a finite answer: the model's fault, for this task only.
        refused = pc.and_(unanswered, pc.invert(unread))
        error = InferenceError("not_finite", "the model answered NaN or infinity for this image; check its weights")

        def either(column: str, value: str) -> pa.ChunkedArray:
            return pc.if_else(refused, pa.scalar(value), table[column])

        kinds = either("error", error.kind)
        retryable = [None if kind is None else FAILURE_KINDS[kind].retryable for kind in kinds.to_pylist()]
        rows = pa.table(
            {
                "status": pc.if_else(unanswered, pa.scalar("failed"), pa.scalar("answered")),
                "stage": either("stage", error.stage),
                "error": kinds,
                "message": either("message", error.message),
                "retryable": pa.array(retryable, type=pa.bool_()),
                **{name: table[name] for name in _SOURCE},
            }
        )
        return self._keyed(rows, table["image_id"], task, now)

    def _keyed(self, rows: pa.Table, image_ids: pa.ChunkedArray, task: str, now: datetime) -> pa.Table:
        num = rows.num_rows
        keys = {
            "image_id": image_ids,
            "task": pa.repeat(pa.scalar(task), num),
            "model": pa.repeat(pa.scalar(self._spec.model_ids[task]), num),
            "run": pa.repeat(pa.scalar(self._run.run_id), num),
            "at": pa.repeat(pa.scalar(now, type=pa.timestamp("us", tz="UTC")), num),
        }
        for name, values in keys.items():
            rows = rows.append_column(name, values)
        return rows


class AnswerWriter(BatchWriter):
    """Writes outcomes and what the models answered."""

    seconds = {  # noqa: RUF012  never changed
        "fetching": "fetch_s",
        "decoding": "decode_s",
        "inference": "infer_s",
        "inference_cpu": "infer_cpu_s",
    }

    def __init__(self, spec: PredictSpec, run: Run, report: Report, *, attempt: str, generation: int) -> None:
        super().__init__(spec, run, report, attempt=attempt, generation=generation)
        self._kinds = {name: task.kind for name, task in spec.tasks.items()}

    def _stage_answers(self, table: pa.Table, task: str, now: datetime) -> list[Fragment]:
        kind = self._kinds[task]
        rows, images = rows_of(kind, pa.concat_arrays(table[f"answer_{task}"].chunks))
        rows = self._keyed(rows, table["image_id"].take(pa.array(images)), task, now)
        return [self._run.stage(ANSWER_TABLES[kind], rows)]


def read_plan_chunk(run: Run, chunk: int, ranges: Ranges) -> list[dict[str, Any]]:
    """Rows of one chunk of the plan that lie in the ranges, as dicts with their ``position``."""
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(run.store.get(run.key(f"plan/{chunk:06d}.parquet"))))
    first = table["position"][0].as_py()
    return [row for start, stop in ranges for row in table.slice(start - first, stop - start).to_pylist()]


def _exception_of(future: Future[None]) -> BaseException | None:
    """What ended the work early, if anything: the end mark of the queue."""
    error = None if future.cancelled() else future.exception()
    while isinstance(error, BaseExceptionGroup):  # of the task group, which says nothing itself
        error = error.exceptions[0]
    return error


def failure_of(error: ImageError) -> dict[str, Any]:
    """The columns that say why an image failed."""
    return {"stage": error.stage, "error": error.kind, "message": error.message}


def _view_shape(view: View) -> tuple[int, int]:
    if view.size is None:
        raise ValueError(f"{view} does not give pixels of one fixed size")
    return view.size


def _pixel_column(batch: Sequence[Answered], index: int, view: View) -> pa.FixedSizeListArray:
    height, width = _view_shape(view)
    pixels_NHWC = np.zeros((len(batch), height, width, 3), dtype=np.uint8)
    for row, answered in enumerate(batch):
        if answered.views is not None:
            pixels_NHWC[row] = answered.views[index]
    return pa.FixedSizeListArray.from_arrays(pa.array(pixels_NHWC.reshape(-1)), height * width * 3)


def _images_NHWC(table: pa.Table, index: int, view: View) -> NDArray[np.uint8]:
    """Pixels of a view as one uint8 array (N, H, W, 3)."""
    height, width = _view_shape(view)
    column = table[f"pixels_{index}"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    flat: NDArray[np.uint8] = column.flatten().to_numpy()
    return flat.reshape(-1, height, width, 3)


class _ByteBudget:
    """Bounds the bytes of images in flight. One image larger than the whole budget passes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = asyncio.Condition()

    async def take(self, size: int) -> int:
        size = min(size, self._limit)
        async with self._changed:
            await self._changed.wait_for(lambda: self._used + size <= self._limit)
            self._used += size
        return size

    async def give(self, size: int) -> None:
        async with self._changed:
            self._used -= size
            self._changed.notify_all()
