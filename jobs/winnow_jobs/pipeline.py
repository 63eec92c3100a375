"""The stages of predict on Ray Data: one readable chain. And what every job that asks images shares with it.

That is how workers report, how a failing storage stops the run, and how batches are written.
"""

from __future__ import annotations

import logging
import math
import re
import resource
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, Datasink
from ray.exceptions import RayError

from winnow.batches import Ranges, add_up, deal_out, num_positions
from winnow.errors import JobError, StoppedError
from winnow_connectors.ledger import Plan
from winnow_connectors.object_store import ObjectStores
from winnow_connectors.warehouse import Warehouse
from winnow_jobs.augment import AugmentSpec, CopyWriter, MakeCopies
from winnow_jobs.cluster import quieten_ray
from winnow_jobs.metrics import RunMetrics
from winnow_jobs.resources import ResourcePlan
from winnow_jobs.spec import PredictSpec, ReadSpec
from winnow_jobs.stages import AnswerWriter, BatchWriter, FetchDecode, Infer

logger = logging.getLogger(__name__)

_CALLS_PER_READER = 2
"""Pieces at a time per reading actor: while the last images of one are awaited, the next one is under way."""

_LEAST_PIECE = 16
"""Images that are worth a call."""

_MIN_READ_TO_STOP = 200
_POLL_S = 0.5


@dataclass
class Tally:
    """What the workers have reported so far in this execution; ``counts`` and ``seconds`` as markers have them."""

    read: int = 0
    failed: int = 0
    systemic: int = 0
    answered: int = 0
    written: int = 0
    counts: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stop_reason: str | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)


class Board:
    """Where all workers report, so that progress is live and a failing storage stops the run early."""

    def __init__(self, max_failure_share: float) -> None:
        self._max_failure_share = max_failure_share
        self._tally = Tally()

    def report(self, worker: str, peak_bytes: int, counts: dict[str, int | Mapping[str, float]]) -> str | None:
        tally = self._tally
        for name, value in counts.items():
            so_far = getattr(tally, name)
            setattr(tally, name, add_up([so_far, value]) if isinstance(value, Mapping) else so_far + value)
        tally.peak_bytes[worker] = max(peak_bytes, tally.peak_bytes.get(worker, 0))
        share = tally.systemic / max(1, tally.read)
        if tally.stop_reason is None and tally.read >= _MIN_READ_TO_STOP and share > self._max_failure_share:
            tally.stop_reason = (
                f"{tally.systemic:,} of the first {tally.read:,} images ({share:.0%}) could not be read for reasons of "
                f"access or storage, more than max_failure_share = {self._max_failure_share:g}"
            )
        return tally.stop_reason

    def tally(self) -> Tally:
        return self._tally


class Reporter:
    """A worker's line to the board; a board that is away never harms the work."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def __call__(self, **counts: int | Mapping[str, float]) -> str | None:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        worker = ray.get_runtime_context().get_worker_id()
        try:
            reason: str | None = ray.get(self._board.report.remote(worker, 1024 * (own + children), counts), timeout=30)
        except RayError as error:
            logger.warning("progress report lost: %s", error)
            return None
        return reason


class _FetchDecodeActor(FetchDecode):
    def __init__(self, spec: PredictSpec, warehouse: Warehouse, plan: Plan, board: Any, num_decoders: int) -> None:
        run = warehouse.ledger.at(plan)
        super().__init__(spec, run, warehouse.stores, Reporter(board), num_decoders=num_decoders)


class _MakeCopiesActor(MakeCopies):
    def __init__(self, spec: AugmentSpec, warehouse: Warehouse, plan: Plan, board: Any, num_decoders: int) -> None:
        run = warehouse.ledger.at(plan)
        super().__init__(spec, run, warehouse.stores, Reporter(board), num_decoders=num_decoders)


class _InferActor(Infer):
    def __init__(self, spec: PredictSpec, stores: ObjectStores, board: Any, device: str, num_threads: int) -> None:
        super().__init__(spec, stores, Reporter(board), device=device, num_threads=num_threads)


class _BatchSink(Datasink[None]):
    """Bundles small result tables into batches of ``fragment_rows`` and writes each with its marker."""

    def __init__(
        self,
        writer: type[BatchWriter],
        spec: ReadSpec,
        warehouse: Warehouse,
        plan: Plan,
        board: Any,
        *,
        attempt: str,
        generation: int,
    ) -> None:
        self._writer = writer
        self._spec = spec
        self._warehouse = warehouse
        self._plan = plan
        self._board = board
        self._attempt = attempt
        self._generation = generation

    @property
    def min_rows_per_write(self) -> int:
        return self._spec.fragment_rows

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        tables = [block for block in blocks if block.num_rows]
        if not tables:
            return
        run = self._warehouse.ledger.at(self._plan)
        report = Reporter(self._board)
        writer = self._writer(self._spec, run, report, attempt=self._attempt, generation=self._generation)
        writer.write(pa.concat_tables(tables))


def _readers(resources: ResourcePlan, num_pieces: int) -> ActorPoolStrategy:
    size = min(resources.num_decode, num_pieces)
    return ActorPoolStrategy(size=size, max_concurrent_calls_per_actor=_CALLS_PER_READER)


def execute(
    spec: PredictSpec,
    warehouse: Warehouse,
    plan: Plan,
    missing: Ranges,
    *,
    generation: int,
    resources: ResourcePlan,
    on_progress: Callable[[Tally], None],
) -> Tally:
    """Ask the missing positions of a plan once: fetch, decode, infer and write them. See ``work_through``."""

    def stages(pieces: ray.data.Dataset, num_pieces: int, board: Any) -> ray.data.Dataset:
        return pieces.map_batches(
            _FetchDecodeActor,
            fn_constructor_args=(spec, warehouse, plan, board, resources.num_decoders),
            batch_size=1,
            batch_format="pyarrow",
            compute=_readers(resources, num_pieces),
            num_cpus=resources.decode_cpus,
        ).map_batches(
            _InferActor,
            fn_constructor_args=(spec, warehouse.stores, board, resources.device, resources.num_threads),
            batch_size=spec.batch_size,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(size=min(resources.num_infer, num_pieces)),
            num_cpus=resources.infer_cpus,
            num_gpus=resources.infer_gpus,
        )

    logger.info("run %s: asking %s images on %s", plan.run_id, f"{num_positions(missing):,}", resources)
    return work_through(
        stages,
        AnswerWriter,
        spec,
        warehouse,
        plan,
        missing,
        generation=generation,
        num_workers=resources.num_decode,
        write_cpus=resources.write_cpus,
        on_progress=on_progress,
    )


def execute_copies(
    spec: AugmentSpec,
    warehouse: Warehouse,
    plan: Plan,
    missing: Ranges,
    *,
    generation: int,
    resources: ResourcePlan,
    on_progress: Callable[[Tally], None],
) -> Tally:
    """Make copies of the missing positions of a plan once, in one stage, and write them. See ``work_through``."""

    def stages(pieces: ray.data.Dataset, num_pieces: int, board: Any) -> ray.data.Dataset:
        return pieces.map_batches(
            _MakeCopiesActor,
            fn_constructor_args=(spec, warehouse, plan, board, resources.num_decoders),
            batch_size=1,
            batch_format="pyarrow",
            compute=_readers(resources, num_pieces),
            num_cpus=resources.decode_cpus,
        )

    logger.info("run %s: copying %s images on %s", plan.run_id, f"{num_positions(missing):,}", resources)
    return work_through(
        stages,
        CopyWriter,
        spec,
        warehouse,
        plan,
        missing,
        generation=generation,
        num_workers=resources.num_decode,
        write_cpus=resources.write_cpus,
        on_progress=on_progress,
    )


def work_through(
    stages: Callable[[ray.data.Dataset, int, Any], ray.data.Dataset],
    writer: type[BatchWriter],
    spec: ReadSpec,
    warehouse: Warehouse,
    plan: Plan,
    missing: Ranges,
    *,
    generation: int,
    num_workers: int,
    write_cpus: float,
    on_progress: Callable[[Tally], None],
) -> Tally:
    """Send the missing positions of a plan through the stages of a job, once, and write what comes out.

    Args:
        stages: from pieces of the plan (their dataset, their number, and the board to report to) to outcomes.
        writer: of the outcomes.
        spec: what the run does.
        warehouse: where to.
        plan: of the run.
        missing: what to ask.
        generation: number of stops of the run so far.
        num_workers: that take pieces.
        write_cpus: per writing task.
        on_progress: told the tally twice a second.

    Returns:
        What the workers reported. Batches that were written count even when this raises.

    Raises:
        StoppedError: storage or access failed for too many images.
        JobError: Ray gave up.
    """
    quieten_ray("ray.data")
    context = ray.data.DataContext.get_current()
    # Small blocks between the stages: they bound memory and let inference start early.
    context.target_max_block_size = 32 * 1024 * 1024
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote(spec.max_failure_share)
    # No smaller than what keeps as many requests in flight as a reader may have.
    least = max(_LEAST_PIECE, math.ceil(spec.fetch_concurrency / _CALLS_PER_READER))
    dealt = deal_out(missing, chunk=spec.chunk_rows, num_workers=num_workers, least=least)
    pieces = [_piece_row(ranges, spec.chunk_rows) for ranges in dealt]
    dataset = stages(ray.data.from_items(pieces, override_num_blocks=len(pieces)), len(pieces), board)
    sink = _BatchSink(writer, spec, warehouse, plan, board, attempt=secrets.token_hex(8), generation=generation)
    metrics = RunMetrics(plan.job, num_positions(missing))

    def watched(tally: Tally) -> None:
        metrics.update(tally)
        on_progress(tally)

    try:
        with _watch(board, watched):
            try:
                dataset.write_datasink(sink, ray_remote_args={"num_cpus": write_cpus})
            except RayError as error:
                tally = _tally(board)
                if tally.stop_reason:
                    raise StoppedError(tally.stop_reason) from None
                raise JobError(f"a worker failed for good: {root_cause(error)}") from error
        tally = _tally(board)
        metrics.update(tally)
        return tally
    finally:
        metrics.close()


def _piece_row(ranges: Ranges, chunk_rows: int) -> dict[str, Any]:
    return {
        "chunk": ranges[0][0] // chunk_rows,
        "starts": [start for start, _ in ranges],
        "stops": [stop for _, stop in ranges],
    }


def _tally(board: Any) -> Tally:
    tally: Tally = ray.get(board.tally.remote(), timeout=60)
    return tally


class _watch:
    """Hands the board's tally to a callback, twice a second, while the block runs."""

    def __init__(self, board: Any, on_progress: Callable[[Tally], None]) -> None:
        self._board = board
        self._on_progress = on_progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="winnow-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._ended.wait(_POLL_S):
            try:
                self._on_progress(_tally(self._board))
            except RayError as error:
                logger.debug("no progress this time: %s", error)


def root_cause(error: BaseException) -> str:
    """What a worker died of, on one line. Ray wraps it in errors whose text ends with the worker's traceback."""
    cause: BaseException = error
    while isinstance(inner := getattr(cause, "cause", None), BaseException):
        cause = inner
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    last = lines[-1] if lines else type(cause).__name__
    return re.sub(r"^winnow\.errors\.\w+: ", "", last)[:1000]
