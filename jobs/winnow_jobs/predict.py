"""``winnow predict``: answer every pending image exactly once, and publish all answers at once.

Plan (which images), claim (one open run per task and model), work (see ``pipeline``), select, publish, verdict.
Ray is started only when there is something to ask.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from winnow import __version__, uris
from winnow.batches import Ranges, Selection, num_positions
from winnow.errors import CallError, JobError, StoppedError
from winnow.models.cards import parse_version
from winnow.models.loading import obtain_weights
from winnow.models.references import ResolvedModel
from winnow_connectors.ledger import Plan, Run, digest_of, new_run_id, totals
from winnow_connectors.query import QueryEngine
from winnow_jobs.cluster import check_all_nodes_see, is_local, ray_cluster
from winnow_jobs.progress import Progress
from winnow_jobs.resources import Node, plan_batch_size, plan_fragment_rows, plan_resources
from winnow_jobs.spec import PredictSpec, ReadSpec, make_spec, views_of
from winnow_jobs.verdict import Capacity, Verdict, judge

if TYPE_CHECKING:
    from winnow_jobs.pipeline import Tally
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

_MIN_IMAGES_TO_STOP = 200
_MAX_ROUNDS = 20
_PLAN_SCHEMA = pa.schema(
    [
        pa.field("position", pa.int64()),
        pa.field("asked", pa.int64()),
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("version", pa.string()),
        pa.field("size", pa.int64()),
    ]
)
"""What every plan says of an image; further columns may follow."""


class Work(Protocol):
    """What a job that asks images does in its own way; planning, looping and publishing are the same for all."""

    @property
    def spec(self) -> ReadSpec:
        """What is asked, and how images are read."""

    @property
    def compute(self) -> str:
        """The stage after decoding, as the verdict calls it."""

    def start(self, workspace: Workspace, run: Run, nodes: Sequence[Node]) -> tuple[Capacity, Execute]:
        """Plan for the cluster: workers of each stage, and what asks the missing positions once."""


class Execute(Protocol):
    """What asks positions of a plan once."""

    def __call__(self, missing: Ranges, *, generation: int, on_progress: Callable[[Tally], None]) -> Tally:
        """See ``pipeline.work_through``."""


@dataclass(frozen=True)
class Asked:
    """What narrows a plan.

    Attributes:
        where: SQL condition over ``current_images``.
        limit: at most this many images, in image_id order.
        new: only images that no model of the task has answered.
        retry_failures: ask failed images again: ``storage`` (those that may succeed another time) or ``all``.
    """

    where: str | None = None
    limit: int | None = None
    new: bool = False
    retry_failures: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise CallError(f"--limit {self.limit} is not valid; give a number of at least 1")
        if self.retry_failures not in (None, "storage", "all"):
            raise CallError(f"--retry-failures {self.retry_failures!r} is unknown; choose storage or all")
        if self.new and self.retry_failures:
            raise CallError("--new and --retry-failures exclude each other; choose one")


@dataclass(frozen=True)
class PredictResult:
    """What a predict call did.

    Attributes:
        status: ``finished``, ``nothing to do`` or ``dry run``.
        run_id: of the run, None when there was none.
        models: model version by task.
        num_asked: answers asked: images × tasks.
        num_answered, num_failed: they add up to ``num_asked``.
        failures: count by kind of error.
        seconds: by stage.
        images_per_s: while the workers were at work.
        verdict: what bounds the run and what to change.
    """

    status: str
    run_id: str | None
    models: Mapping[str, str]
    num_asked: int = 0
    num_answered: int = 0
    num_failed: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    images_per_s: float | None = None
    verdict: str = ""


def predict(
    workspace: Workspace,
    tasks: Sequence[str] | None,
    asked: Asked,
    *,
    versions: Sequence[str] = (),
    dry_run: bool = False,
) -> PredictResult:
    """Answer all pending images of the tasks (all configured tasks when None).

    Each by its version in production, or by the one of its ``versions``.

    Raises:
        CallError: no such task or model, a faulty condition.
        OpenRunError: a different run is open on the same task and model.
        StoppedError: access or storage failed for too many images; the run stays open.
    """
    started = time.monotonic()
    config = workspace.config
    names = list(tasks or config.tasks)
    if not names:
        raise CallError("no task is configured; add a [tasks.NAME] section to winnow.toml")
    chosen = {name: config.task(name) for name in sorted(set(names))}
    workspace.warehouse.check()
    named = versions_by_task(versions, chosen)
    models = {name: workspace.task_model(name, named.get(name)) for name in chosen}
    spec = make_spec(
        config.predict,
        {name: (task.kind, models[name], task.store_probabilities) for name, task in chosen.items()},
        batch_size=config.predict.batch_size,
        chunk_rows=0,
        fragment_rows=config.predict.fragment_rows,
        asked=dataclasses.asdict(asked),
        augmented={name: views for name, model in models.items() if (views := views_of(config, name, model))},
    )
    ids = dict(spec.model_ids)
    works = [work_name(name, model) for name, model in ids.items()]
    digest = digest_of(spec.answers_digest_source())
    ledger = workspace.warehouse.ledger
    while True:
        run = ledger.join(works, digest)
        if run is not None:
            logger.info("run %s is open with the same options; joining it", run.run_id)
            if dry_run:
                missing = num_positions(run.select().missing)
                return PredictResult(
                    "dry run", run.run_id, ids, num_asked=missing, verdict=f"would continue run {run.run_id}"
                )
            break
        claims = ledger.next_numbers(works)
        engine = workspace.query_engine()
        pending = pending_sql(spec)
        num_images, *num_asked = engine.sql(_count_sql(pending, len(models))).to_pylist()[0].values()
        if not num_images or dry_run:
            status = "dry run" if dry_run else "nothing to do"
            return PredictResult(status, None, ids, num_asked=sum(int(num or 0) for num in num_asked))
        check_before_the_start(workspace, models.values())
        spec = dataclasses.replace(
            spec,
            chunk_rows=max(256, min(8192, int(num_images) // 256)),
            fragment_rows=plan_fragment_rows(config.predict, int(num_images)),
        )
        run = begin(workspace, "predict", spec, digest, claims, engine, pending)
        if run is not None:
            break
    return _carry_on(workspace, run, models, planning_s=time.monotonic() - started)


def resume(workspace: Workspace, run: Run) -> PredictResult:
    """Finish an open run with the options that it was started with. Raises what ``predict`` raises."""
    return _carry_on(workspace, run)


def _carry_on(
    workspace: Workspace, run: Run, models: Mapping[str, ResolvedModel] | None = None, *, planning_s: float = 0.0
) -> PredictResult:
    spec = PredictSpec.from_dict(run.plan.config["spec"])
    if models is not None:  # the same as the plan's, but their files may lie elsewhere by now
        tasks = {name: dataclasses.replace(task, model=models[name]) for name, task in spec.tasks.items()}
        spec = dataclasses.replace(spec, tasks=tasks)
    decided, seconds = work_off(workspace, run, PredictWork(spec), planning_s=planning_s)
    return PredictResult(
        status="finished",
        run_id=run.run_id,
        models=dict(spec.model_ids),
        num_asked=decided["num_asked"],
        num_answered=decided["num_answered"],
        num_failed=decided["num_failed"],
        failures=decided["failures"],
        seconds=seconds,
        images_per_s=decided["images_per_s"],
        verdict=decided["verdict"],
    )


class PredictWork:
    """Fetch, decode and infer."""

    compute = "inference"

    def __init__(self, spec: PredictSpec) -> None:
        self.spec = spec

    def start(self, workspace: Workspace, run: Run, nodes: Sequence[Node]) -> tuple[Capacity, Execute]:
        from winnow_jobs.pipeline import execute

        config = workspace.config.predict
        resources = plan_resources(nodes, config)
        pixel_bytes = max(3 * math.prod(view.size) if view.size else 1 for view in self.spec.views())
        batch_size = plan_batch_size(config, device=resources.device, pixel_bytes=pixel_bytes)
        spec = dataclasses.replace(self.spec, batch_size=batch_size)
        capacity = Capacity(
            num_fetch_slots=resources.num_decode * spec.fetch_concurrency,
            num_decoders=resources.num_decode * resources.num_decoders,
            num_infer=resources.num_infer,
            num_cpus=resources.total_cpus,
            device=resources.device,
        )
        return capacity, partial(execute, spec, workspace.warehouse, run.plan, resources=resources)


def check_before_the_start(workspace: Workspace, models: Iterable[ResolvedModel]) -> None:
    """What would fail in the workers, found while nothing is begun.

    Raises:
        CallError: the cluster cannot be joined, or its nodes do not share the folder of the warehouse.
        JobError: published weights cannot be had.
    """
    if is_local():
        for model in models:
            if model.source != "checkpoint":  # whose file was just read
                obtain_weights(model, fetch=workspace.stores.download)
        return
    with ray_cluster() as nodes:
        if workspace.warehouse.uri.startswith("file:"):
            check_all_nodes_see(Path(uris.local_path(workspace.warehouse.uri)), nodes)


def versions_by_task(versions: Sequence[str], tasks: Iterable[str]) -> dict[str, str]:
    """Model versions by the task that they answer.

    Raises:
        CallError: one is no version's name, is of another task, or a task has two.
    """
    known = sorted(tasks)
    named: dict[str, str] = {}
    for version in versions:
        task, _ = parse_version(version)
        if task not in known:
            raise CallError(f"--model {version}: {task!r} is not among the tasks asked: {', '.join(known)}")
        if named.setdefault(task, version) != version:
            raise CallError(f"--model names two versions of {task}: {named[task]} and {version}; choose one")
    return named


def work_name(task: str, model: str) -> str:
    """What two runs must not do at once: one task with one model version."""
    return f"predict-{task}-{hashlib.blake2b(model.encode(), digest_size=6).hexdigest()}"


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def pending_sql(spec: ReadSpec, *, columns: Sequence[str] = (), only: str = "") -> str:
    """Images with the tasks that ask them: ``asked`` has bit i set for the i-th task.

    Args:
        spec: what is asked.
        columns: further columns of ``current_images``.
        only: a condition beside the caller's.
    """
    where, limit = spec.asked["where"], spec.asked["limit"]
    bits = []
    for bit, (name, model) in enumerate(spec.model_ids.items()):
        same = f"o.image_id = i.image_id AND o.task = {_quote(name)}"
        mine = f"{same} AND o.model = {_quote(model)}"
        if spec.asked["retry_failures"]:
            kinds = "" if spec.asked["retry_failures"] == "all" else " AND o.retryable"
            test = f"EXISTS (FROM latest_outcomes o WHERE {mine} AND o.status = 'failed'{kinds})"
        else:
            test = f"NOT EXISTS (FROM outcomes o WHERE {same if spec.asked['new'] else mine})"
        bits.append(f"CASE WHEN {test} THEN {1 << bit} ELSE 0 END")
    conditions = [f"({condition}\n)" for condition in (where, only) if condition]
    condition = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    images = f"SELECT {', '.join(('image_id', 'uri', 'version', 'size', *columns))} FROM current_images {condition}"
    asked = f"SELECT {' + '.join(bits)} AS asked, i.* FROM ({images}) i"
    tail = f" ORDER BY image_id LIMIT {limit}" if limit else ""
    return f"SELECT * FROM ({asked}) WHERE asked > 0{tail}"


def _count_sql(pending: str, num_tasks: int) -> str:
    sums = "".join(f", sum(asked // {1 << bit} % 2)::BIGINT AS task_{bit}" for bit in range(num_tasks))
    return f"SELECT count(*) AS images{sums} FROM ({pending})"


def begin(
    workspace: Workspace,
    job: str,
    spec: ReadSpec,
    digest: str,
    claims: tuple[tuple[str, int], ...],
    engine: QueryEngine,
    pending: str,
    further: Sequence[pa.Field] = (),
) -> Run | None:
    """Write the plan and claim it. None when another run was faster.

    Args:
        workspace: where.
        job: as the run is called.
        spec: what it does.
        digest: of the call.
        claims: of the works.
        engine: to ask for the images.
        pending: the images asked, as ``pending_sql`` gives them.
        further: columns of ``pending`` that the plan has beside ``_PLAN_SCHEMA``.
    """
    run_id = new_run_id(job)
    store = workspace.warehouse.store
    schema = pa.schema([*_PLAN_SCHEMA, *further])
    num_planned = 0
    num_asked = dict.fromkeys(spec.model_ids, 0)
    reader = engine.reader(f"{pending} ORDER BY image_id" if not spec.asked["limit"] else pending)
    for chunk, table in enumerate(_chunks(reader, spec.chunk_rows)):
        positions = pa.array(range(num_planned, num_planned + table.num_rows), type=pa.int64())
        table = table.append_column("position", positions).select(schema.names).cast(schema)
        masks = table["asked"].to_numpy()
        for bit, name in enumerate(spec.model_ids):
            num_asked[name] += int((masks >> bit & 1).sum())
        sink = io.BytesIO()
        pq.write_table(table, sink)
        store.put(f"runs/{run_id}/plan/{chunk:06d}.parquet", sink.getvalue())
        num_planned += table.num_rows
    plan = Plan(
        run_id=run_id,
        job=job,
        claims=claims,
        digest=digest,
        config={"spec": spec.to_dict(), "num_asked": num_asked},
        num_planned=num_planned,
        started_at=datetime.now(UTC).isoformat(),
        code_version=__version__,
    )
    run = workspace.warehouse.ledger.begin(plan)
    logger.info("run %s: planned %s images", run_id, f"{num_planned:,}")
    return run


def _chunks(reader: pa.RecordBatchReader, num_rows: int) -> Iterator[pa.Table]:
    """The reader's rows in tables of exactly ``num_rows``, the last one shorter."""
    held: list[pa.RecordBatch] = []
    num_held = 0
    for batch in reader:
        while num_held + batch.num_rows >= num_rows:
            cut = num_rows - num_held
            yield pa.Table.from_batches([*held, batch.slice(0, cut)])
            batch, held, num_held = batch.slice(cut), [], 0
        if batch.num_rows:
            held.append(batch)
            num_held += batch.num_rows
    if held:
        yield pa.Table.from_batches(held)


def work_off(
    workspace: Workspace, run: Run, work: Work, *, planning_s: float = 0.0
) -> tuple[Mapping[str, Any], Mapping[str, float]]:
    """Ask what is still missing of an open run, then publish it.

    Returns:
        The summary that was decided, and seconds by stage.

    Raises:
        StoppedError: access or storage failed for too many images; the run stays open.
        JobError: the run was abandoned meanwhile, or a worker failed for good.
    """
    selection = run.select()
    effort = _Effort()
    if not selection.is_complete:
        selection, effort = _ask(workspace, run, work, selection)
    _stop_if_systemic(run, work.spec, selection)
    return _publish(run, work, selection, effort, planning_s)


@dataclass
class _Effort:
    """What this driver did for the run."""

    capacity: Capacity | None = None
    num_answered: int = 0
    peak_bytes: int = 0
    starting_s: float = 0.0
    working_s: float = 0.0


def _ask(workspace: Workspace, run: Run, work: Work, selection: Selection) -> tuple[Selection, _Effort]:
    """Run the pipeline until every planned image is in a selected batch."""
    started = time.monotonic()
    effort = _Effort()
    num_before = run.plan.num_planned - num_positions(selection.missing)
    with Progress(run.plan.job, run.plan.num_planned) as progress, ray_cluster(num_cpus=workspace.num_cpus) as nodes:
        effort.capacity, execute = work.start(workspace, run, nodes)
        first_answer: list[float] = []

        def on_progress(tally: Tally) -> None:
            if tally.answered and not first_answer:
                first_answer.append(time.monotonic())
            progress.update(min(run.plan.num_planned, num_before + tally.answered), tally.failed)

        for _ in range(_MAX_ROUNDS):
            generation = run.num_stops()
            try:
                tally = execute(selection.missing, generation=generation, on_progress=on_progress)
            except StoppedError as error:
                run.stop(generation, error.message)
                raise _stopped(run, error.message) from None
            effort.num_answered += tally.answered
            effort.peak_bytes = max(effort.peak_bytes, sum(tally.peak_bytes.values()))
            selection = run.select()
            num_before = run.plan.num_planned - num_positions(selection.missing)
            if selection.is_complete:
                break
            if run.outcome() is not None:
                break
            logger.info(
                "run %s: %d images still missing, asking them again", run.run_id, num_positions(selection.missing)
            )
        else:
            raise JobError(
                f"run {run.run_id}: {num_positions(selection.missing):,} images stay without an outcome after "
                f"{_MAX_ROUNDS} rounds; run the same command again, and report this with the log if it stays so"
            )
        ended = time.monotonic()
        begun = first_answer[0] if first_answer else ended
        effort.starting_s, effort.working_s = begun - started, ended - begun
    return selection, effort


def _stop_if_systemic(run: Run, spec: ReadSpec, selection: Selection) -> None:
    """The same rule as while working, over the whole run, before anything is published."""
    num_images = sum(marker.num_images for marker in selection.markers)
    num_systemic = sum(marker.num_systemic for marker in selection.markers)
    if num_images >= _MIN_IMAGES_TO_STOP and num_systemic > spec.max_failure_share * num_images * len(spec.model_ids):
        reason = (
            f"{num_systemic:,} of {num_images:,} images could not be read for reasons of access or storage, "
            f"more than max_failure_share = {spec.max_failure_share:g}"
        )
        run.stop(run.num_stops(), reason)
        raise _stopped(run, reason)


def _stopped(run: Run, reason: str) -> StoppedError:
    return StoppedError(
        f"stopped, nothing was published: {reason}. Check credentials and storage (`winnow doctor`), then run the "
        f"same command: run {run.run_id} keeps the batches without such failures and asks the rest again; or give it "
        f"up with `winnow runs abandon {run.run_id}`"
    )


def _publish(
    run: Run, work: Work, selection: Selection, effort: _Effort, planning_s: float
) -> tuple[Mapping[str, Any], Mapping[str, float]]:
    publishing = time.monotonic()
    counts, seconds = totals(selection)
    tasks = sorted(work.spec.model_ids)
    if run.outcome() is None:
        _check_conservation(run, tasks, selection, counts)
        seconds |= {"planning": planning_s, "starting": effort.starting_s, "working": effort.working_s}
        verdict = _verdict(effort, work.compute, selection, seconds)
        num_answered = sum(counts.get(f"answered.{name}", 0) for name in tasks)
        num_failed = sum(counts.get(f"failed.{name}", 0) for name in tasks)
        summary: dict[str, Any] = {
            "tasks": tasks,
            "num_asked": num_answered + num_failed,
            "num_answered": num_answered,
            "num_failed": num_failed,
            "counts": counts,
            "failures": {
                key.removeprefix("error."): value for key, value in counts.items() if key.startswith("error.")
            },
            "seconds": seconds,
            "images_per_s": verdict.images_per_s if verdict else None,
            "peak_memory_bytes": effort.peak_bytes or None,
            "bound_by": verdict.bound_by if verdict else None,
            "ceiling_share": verdict.ceiling_share if verdict else None,
            "verdict": verdict.text if verdict else "published the work of an earlier, interrupted execution",
        }
        fragments = [fragment for marker in selection.markers for fragment in marker.fragments]
        run.decide("finished", fragments, summary)
    outcome = run.close()
    if outcome["status"] != "finished":
        raise JobError(f"run {run.run_id} was abandoned while it worked: {outcome['summary'].get('verdict')}")
    decided: dict[str, Any] = outcome["summary"]
    return decided, {**decided["seconds"], "publishing": time.monotonic() - publishing}


def _check_conservation(run: Run, tasks: Sequence[str], selection: Selection, counts: Mapping[str, int]) -> None:
    """Images asked = rows in outcomes, per task; the files say the same."""
    for name in tasks:
        asked = run.plan.config["num_asked"][name]
        found = counts.get(f"answered.{name}", 0) + counts.get(f"failed.{name}", 0)
        if found != asked:
            raise JobError(
                f"run {run.run_id}, task {name}: {asked:,} images asked but {found:,} outcomes; nothing was published"
            )
    rows = sum(f.num_rows for m in selection.markers for f in m.fragments if f.table == "outcomes")
    if rows != sum(run.plan.config["num_asked"].values()):
        raise JobError(
            f"run {run.run_id}: outcome files hold {rows:,} rows instead of one per question; nothing was published"
        )


def _verdict(effort: _Effort, compute: str, selection: Selection, seconds: Mapping[str, float]) -> Verdict | None:
    if effort.capacity is None:
        return None
    num_images = sum(marker.num_images for marker in selection.markers)
    return judge(
        num_images=num_images,
        num_here=effort.num_answered,
        seconds=seconds,
        capacity=effort.capacity,
        compute=compute,
    )
