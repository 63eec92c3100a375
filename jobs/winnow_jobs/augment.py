"""``winnow augment``: augmented copies of images, written to storage once each and known as images with their parent.

Planned, claimed, worked off and published as predict does it: an original is a question, its copies are the answer.
Copies have names that only the original, the policy and the copy's number decide, and are created, never replaced: what
is killed and done again, or done twice at once, gives the same objects and the same rows.

The task is ``augment:<policy>``; the model is a digest of all that decides which objects there will be.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from winnow import uris
from winnow.augment import Policy, copy_name
from winnow.batches import Fragment, num_positions
from winnow.errors import AugmentError, CallError, FetchError, ImageError, MaskError, StorageError
from winnow.images import View
from winnow.mask_files import read_label, write_png
from winnow.masks import LabelMap
from winnow.schemas import TABLES
from winnow_connectors.ledger import Run, digest_of
from winnow_connectors.object_store import ObjectStores
from winnow_jobs.cluster import check_all_nodes_see, is_local, ray_cluster
from winnow_jobs.predict import Asked, begin, pending_sql, work_off
from winnow_jobs.resources import plan_copies
from winnow_jobs.spec import ReadSpec, reading
from winnow_jobs.stages import Answered, BatchWriter, FetchDecode, Report, failure_of, one_torch_thread
from winnow_jobs.verdict import Capacity

if TYPE_CHECKING:
    from winnow_jobs.predict import Execute
    from winnow_jobs.resources import Node
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

FORMATS = {"png": "png", "jpeg": "jpg"}
"""What copies are written as, and how their names end."""

MAX_COPIES = 1000
_JPEG_QUALITY = 95
_PNG_LEVEL = 3  # less than half the time of 6, which is Pillow's, for a fifth more bytes

_ORIGINALS = "parent IS NULL AND NOT audit"
_COLUMNS = ("split", '"group"', "metadata")
_LABEL = pa.struct([("task", pa.string()), ("label", pa.string()), ("value", pa.string())])
_PLANNED = (
    pa.field("split", pa.string()),
    pa.field("group", pa.string()),
    pa.field("metadata", TABLES["images"].field("metadata").type),
    pa.field("labels", pa.list_(_LABEL)),
)
_LABELS_OF = """
SELECT p.*, l.labels FROM ({pending}) AS p LEFT JOIN (
    SELECT image_id, list(struct_pack(task := task, label := label, value := value) ORDER BY task) AS labels
    FROM current_labels WHERE label IS NOT NULL OR value IS NOT NULL GROUP BY image_id
) AS l USING (image_id)
"""
_TASKS_OF_PIXELS = """
SELECT DISTINCT task FROM ({pending}) JOIN (SELECT image_id, task FROM current_labels WHERE value IS NOT NULL)
USING (image_id) ORDER BY task
"""

_IMAGE_COLUMNS = ("image_id", "uri", "version", "size", "last_modified", "split", "group", "parent", "metadata")
COPY = pa.struct(
    [*(TABLES["images"].field(name).with_nullable(True) for name in _IMAGE_COLUMNS), ("labels", pa.list_(_LABEL))]
)
"""One copy, on its way from being stored to the tables."""


@dataclass(frozen=True, kw_only=True)
class AugmentSpec(ReadSpec):
    """What is written where.

    Attributes:
        policy: how copies are made.
        num_copies: of each image; copy n is the policy's view n.
        destination: canonical URI of a folder or prefix.
        format: ``png`` or ``jpeg``.
        classes: of the tasks whose labels of pixels move along.
    """

    policy: Policy
    num_copies: int
    destination: str
    format: str
    classes: Mapping[str, tuple[str, ...]]

    @property
    def task(self) -> str:
        return f"augment:{self.policy.name}"

    @property
    def model(self) -> str:
        decides = {name: getattr(self, name) for name in ("num_copies", "destination", "format")}
        return digest_of(decides | {"policy": self.policy.to_dict()})[:16]

    @property
    def model_ids(self) -> Mapping[str, str]:
        return {self.task: self.model}

    def views(self) -> tuple[View, ...]:
        return (View(),)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "policy": self.policy.to_dict(), "classes": dict(self.classes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        classes = {name: tuple(names) for name, names in data["classes"].items()}
        return cls(**{**data, "policy": Policy.from_dict(data["policy"]), "classes": classes})

    def digest(self) -> str:
        """Two calls with the same digest may share one run."""
        return digest_of({"model": self.model, "limits": [self.max_bytes, self.max_pixels], "asked": self.asked})


@dataclass(frozen=True)
class AugmentResult:
    """What an augment call did.

    Attributes:
        status: ``finished``, ``nothing to do`` or ``dry run``.
        run_id: of the run, None when there was none.
        policy: its name.
        destination: where the copies are.
        num_asked: originals.
        num_answered, num_failed: they add up to ``num_asked``.
        num_copies: copies of those answered.
        failures: count by kind of error.
        seconds: by stage.
        images_per_s: originals, while the workers were at work.
        verdict: what bounds the run and what to change.
    """

    status: str
    run_id: str | None
    policy: str
    destination: str
    num_asked: int = 0
    num_answered: int = 0
    num_failed: int = 0
    num_copies: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    images_per_s: float | None = None
    verdict: str = ""


def augment(
    workspace: Workspace,
    policy_name: str,
    to: str,
    asked: Asked,
    *,
    num_copies: int = 1,
    format: str = "png",
    dry_run: bool = False,
) -> AugmentResult:
    """Write copies of all current originals that have none yet of this kind; never of copies or of audit images.

    Args:
        workspace: where.
        policy_name: of an ``[augmentations.NAME]`` section.
        to: folder or prefix for the copies.
        asked: what narrows the originals.
        num_copies: of each.
        format: ``png`` or ``jpeg``.
        dry_run: only count.

    Raises:
        CallError: no such policy, a faulty one, or a destination that cannot be written to.
        OpenRunError: a run of the same policy is open with other options.
        StoppedError: access or storage failed for too many images; the run stays open.
    """
    started = time.monotonic()
    if not 1 <= num_copies <= MAX_COPIES:
        raise CallError(f"--copies {num_copies} is not valid; give a number from 1 to {MAX_COPIES:,}")
    if format not in FORMATS:
        raise CallError(f"--format {format!r} is unknown; choose {' or '.join(FORMATS)}")
    config = workspace.config
    policy = Policy.from_config(policy_name, config.augmentation(policy_name))
    workspace.warehouse.check()
    destination = _destination(workspace, to)
    spec = AugmentSpec(
        policy=policy,
        num_copies=num_copies,
        destination=destination,
        format=format,
        classes={},
        batch_size=16,
        chunk_rows=0,
        fragment_rows=0,
        asked=dataclasses.asdict(asked),
        **reading(config.predict),
    )
    works = [f"augment-{policy.name}-{spec.model}"]
    ledger = workspace.warehouse.ledger
    nothing = AugmentResult("nothing to do", None, policy.name, destination)
    while True:
        run = ledger.join(works, spec.digest())
        if run is not None:
            logger.info("run %s is open with the same options; joining it", run.run_id)
            if dry_run:
                missing = num_positions(run.select().missing)
                text = f"would continue run {run.run_id}"
                return dataclasses.replace(
                    nothing, status="dry run", run_id=run.run_id, num_asked=missing, verdict=text
                )
            break
        claims = ledger.next_numbers(works)
        engine = workspace.query_engine()
        pending = pending_sql(spec, columns=_COLUMNS, only=_ORIGINALS)
        num_images = engine.sql(f"SELECT count(*) AS n FROM ({pending})")["n"][0].as_py()
        tasks = engine.sql(_TASKS_OF_PIXELS.format(pending=pending))["task"].to_pylist()
        classes = _classes_of(workspace, tasks)
        if classes:
            policy.check_masks()
        if not num_images or dry_run:
            return dataclasses.replace(nothing, status="dry run", num_asked=num_images) if dry_run else nothing
        _check_before_the_start(workspace, spec)
        spec = dataclasses.replace(
            spec,
            classes=classes,
            chunk_rows=max(16, min(1024, num_images // 256)),
            fragment_rows=max(64, min(4096, num_images // 64)),
        )
        with_labels = _LABELS_OF.format(pending=pending)
        run = begin(workspace, "augment", spec, spec.digest(), claims, engine, with_labels, _PLANNED)
        if run is not None:
            break
    return _carry_on(workspace, run, planning_s=time.monotonic() - started)


def resume(workspace: Workspace, run: Run) -> AugmentResult:
    """Finish an open run with the options that it was started with. Raises what ``augment`` raises."""
    return _carry_on(workspace, run)


def _carry_on(workspace: Workspace, run: Run, *, planning_s: float = 0.0) -> AugmentResult:
    spec = AugmentSpec.from_dict(run.plan.config["spec"])
    decided, seconds = work_off(workspace, run, AugmentWork(spec), planning_s=planning_s)
    return AugmentResult(
        status="finished",
        run_id=run.run_id,
        policy=spec.policy.name,
        destination=spec.destination,
        num_asked=decided["num_asked"],
        num_answered=decided["num_answered"],
        num_failed=decided["num_failed"],
        num_copies=decided["num_answered"] * spec.num_copies,
        failures=decided["failures"],
        seconds=seconds,
        images_per_s=decided["images_per_s"],
        verdict=decided["verdict"],
    )


def _destination(workspace: Workspace, to: str) -> str:
    """Canonical, and as ingest calls the same place.

    Raises:
        CallError: it cannot be written to, or is the warehouse.
    """
    uri = uris.canonical(to)
    name = uri.rstrip("/") if uris.split(uri)[2].strip("/") else uri
    workspace.stores.at(name)
    warehouse = workspace.warehouse.store.uri
    if uris.is_under(name, warehouse) or uris.is_under(warehouse, name):
        raise CallError(f"{uris.redact(name)} and the warehouse {warehouse} must not lie in each other; choose another")
    return name


def _classes_of(workspace: Workspace, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Classes of the configured tasks of whose pixels there are labels."""
    found = {}
    for name in tasks:
        task = workspace.config.tasks.get(name)
        if task is None or task.kind != "segmentation":
            logger.warning("labels of task %s are not copied: winnow.toml has no segmentation task of that name", name)
        else:
            found[name] = task.classes or workspace.task_model(name).classes
    return found


def _check_before_the_start(workspace: Workspace, spec: AugmentSpec) -> None:
    """What would fail in the workers, found while nothing is begun; leaves the policy beside the copies.

    Raises:
        CallError: the cluster cannot be joined, or its nodes do not share a folder.
        StorageError: the destination cannot be written to.
    """
    note = {"policy": spec.policy.to_dict(), "copies": "PARENT-POLICY-NUMBER; see parent in the table images"}
    key = f".winnow/{spec.policy.name}-{spec.policy.digest}.json"
    workspace.stores.at(spec.destination).create(key, json.dumps(note, indent=1).encode())
    folders = [uri for uri in (workspace.warehouse.store.uri, spec.destination) if uri.startswith("file:")]
    if is_local():
        return
    with ray_cluster() as nodes:
        for folder in folders:
            check_all_nodes_see(Path(uris.local_path(folder)), nodes)


class AugmentWork:
    """Fetch, decode, transform, encode and store, all in one stage: full-size pixels never travel."""

    compute = "transforming"

    def __init__(self, spec: AugmentSpec) -> None:
        self.spec = spec

    def start(self, workspace: Workspace, run: Run, nodes: Sequence[Node]) -> tuple[Capacity, Execute]:
        from winnow_jobs.pipeline import execute_copies

        resources = plan_copies(nodes, workspace.config.predict)
        capacity = Capacity(
            num_fetch_slots=resources.num_decode * self.spec.fetch_concurrency,
            num_decoders=resources.num_decode * resources.num_decoders,
            num_infer=resources.num_decode,
            num_cpus=resources.total_cpus,
            device="cpu",
        )
        return capacity, partial(execute_copies, self.spec, workspace.warehouse, run.plan, resources=resources)


# ------------------------------------------------------------------------------------------------------------- workers


class MakeCopies(FetchDecode):
    """Reads originals and writes their copies; one row per original comes out, with its copies as answer.

    Args:
        spec: what the run does.
        run: the open run, for its plan.
        stores: access to originals and destination.
        report: told about every table.
        num_decoders: decoder processes.
    """

    _spec: AugmentSpec

    def __init__(self, spec: AugmentSpec, run: Run, stores: ObjectStores, report: Report, *, num_decoders: int) -> None:
        super().__init__(spec, run, stores, report, num_decoders=num_decoders)
        self._place = stores.at(spec.destination)
        # One thread transforms (torch's generator is one per process) while the other encodes or stores, and a
        # decoder is at work on the next image: no more than these hold all of an image's pixels.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="winnow-copies", initializer=one_torch_thread)
        self._whole = asyncio.Semaphore(num_decoders + 2)

    async def _answer(self, row: Mapping[str, Any]) -> Answered:
        meta, data = await self._fetch(row)
        if data is None:
            return Answered(meta, None)
        async with self._whole:
            decoded = await self._decode(meta, data)
            if decoded.views is None:
                return decoded
            work = _Timed()
            try:
                copies = await self._copies(row, decoded.views[0], work)
            except ImageError as error:
                return Answered({**decoded.row, **work.columns, **failure_of(error)}, None)
            return Answered({**decoded.row, **work.columns, "copies": copies}, None)

    async def _copies(self, row: Mapping[str, Any], image_HWC: NDArray[np.uint8], work: _Timed) -> list[dict[str, Any]]:
        masks = await self._masks(row, image_HWC.shape[1], image_HWC.shape[0])
        loop = asyncio.get_running_loop()
        copies = []
        for number in range(1, self._spec.num_copies + 1):
            make = partial(self._make, row, image_HWC, masks, number, work)
            uri, labels = await loop.run_in_executor(self._threads, make)
            try:
                info = await self._stores.stat(uri)
            except FetchError as error:
                raise StorageError(f"a copy that was just written cannot be looked up: {error}") from None
            copies.append(
                {
                    "image_id": uris.image_id(uri, info.version),
                    "uri": uri,
                    "version": info.version,
                    "size": info.size,
                    "last_modified": info.last_modified,
                    "split": row["split"],
                    "group": row["group"],
                    "parent": row["image_id"],
                    "metadata": _metadata(row["metadata"], self._spec.policy, number),
                    "labels": labels,
                }
            )
        return copies

    async def _masks(self, row: Mapping[str, Any], width: int, height: int) -> dict[str, LabelMap]:
        """Label maps of the image, by task.

        Raises:
            AugmentError: one is malformed or does not fit the image.
            FetchError: one cannot be read.
        """
        found = {}
        for label in row["labels"] or ():
            task, value = label["task"], label["value"]
            if value is None or task not in self._spec.classes:
                continue
            files: dict[str, bytes] = {}
            for uri in _mask_uris(value):
                files[uri] = await self._stores.read(
                    self._stores.canonical(uri), version=uris.UNVERSIONED, max_bytes=self._spec.max_bytes
                )
            try:
                found[task] = read_label(
                    value, self._spec.classes[task], width=width, height=height, read=files.__getitem__
                )
            except MaskError as error:
                raise AugmentError("bad_mask", f"the label of task {task} cannot be moved along: {error}") from None
        return found

    def _make(
        self,
        row: Mapping[str, Any],
        image_HWC: NDArray[np.uint8],
        masks: Mapping[str, LabelMap],
        number: int,
        work: _Timed,
    ) -> tuple[str, list[dict[str, Any]]]:
        """Write one copy and its masks; its URI and its labels."""
        spec, parent = self._spec, row["image_id"]
        copy_HWC: NDArray[np.uint8] | None = None
        moved: dict[str, LabelMap] = {}
        files: dict[str, bytes] = {}
        with work.computing():
            for task, mask_HW in masks.items():
                copy_HWC, moved_HW = spec.policy.apply(image_HWC, image_id=parent, view=number, mask_HW=mask_HW)
                assert moved_HW is not None
                moved[task] = moved_HW
            if copy_HWC is None:
                copy_HWC, _ = spec.policy.apply(image_HWC, image_id=parent, view=number)
            # Masks first: where a copy is, its masks are. Their folder is hidden: ingest takes them for no images.
            for task, moved_HW in moved.items():
                key = f".masks/{task}/{copy_name(parent, spec.policy, number, 'png')}"
                files[key] = write_png(moved_HW, spec.classes[task])
            key = copy_name(parent, spec.policy, number, FORMATS[spec.format])
            files[key] = encode(copy_HWC, spec.format)
        with work.storing():
            for name, data in files.items():
                self._place.create(name, data)
        labels = []
        for label in row["labels"] or ():
            task = label["task"]
            if label["value"] is None:
                labels.append({"task": task, "label": label["label"], "value": None})
            elif task in moved:
                mask = uris.join(spec.destination, f".masks/{task}/{copy_name(parent, spec.policy, number, 'png')}")
                labels.append({"task": task, "label": label["label"], "value": json.dumps({"mask": mask})})
        return uris.join(spec.destination, key), labels

    def _table(self, batch: Sequence[Answered]) -> pa.Table:
        table = self._read_table(batch)
        for name in ("transform_s", "transform_cpu_s", "store_s"):
            table = table.append_column(name, pa.array([found.row.get(name, 0.0) for found in batch], pa.float64()))
        answers = pa.array([found.row.get("copies") for found in batch], pa.list_(COPY))
        self._report(answered=len(batch))
        return table.append_column(f"answer_{self._spec.task}", answers)


class _Timed:
    """Seconds spent on one image in threads."""

    def __init__(self) -> None:
        self.columns = {"transform_s": 0.0, "transform_cpu_s": 0.0, "store_s": 0.0}

    def computing(self) -> _Clock:
        return _Clock(self.columns, "transform_s", "transform_cpu_s")

    def storing(self) -> _Clock:
        return _Clock(self.columns, "store_s", None)


class _Clock:
    """Adds the wall and CPU time of a block, in its thread, to columns."""

    def __init__(self, columns: dict[str, float], wall: str, cpu: str | None) -> None:
        self._columns, self._wall, self._cpu = columns, wall, cpu

    def __enter__(self) -> None:
        self._started = time.perf_counter(), time.thread_time()

    def __exit__(self, *exc: object) -> None:
        self._columns[self._wall] += time.perf_counter() - self._started[0]
        if self._cpu is not None:
            self._columns[self._cpu] += time.thread_time() - self._started[1]


class CopyWriter(BatchWriter):
    """Writes outcomes, the copies as images, and their labels."""

    seconds = {  # noqa: RUF012  never changed
        "fetching": "fetch_s",
        "decoding": "decode_s",
        "transforming": "transform_s",
        "transforming_cpu": "transform_cpu_s",
        "storing": "store_s",
    }

    _spec: AugmentSpec

    def _stage_answers(self, table: pa.Table, task: str, now: datetime) -> list[Fragment]:
        answers = pa.concat_arrays(table[f"answer_{task}"].chunks)
        copies = pa.Table.from_struct_array(answers.flatten())
        stamp = {
            "seen_at": pa.scalar(now, TABLES["images"].field("seen_at").type),
            "event": pa.scalar("added"),
            "source": pa.scalar(self._spec.destination),
            "audit": pa.scalar(False),
            "run": pa.scalar(self._run.run_id),
        }
        images = copies.drop_columns(["labels"])
        fragments = [self._run.stage("images", _stamped(images, stamp))]
        lists = pa.concat_arrays(copies["labels"].chunks)
        labels = pa.Table.from_struct_array(lists.flatten())
        if labels.num_rows:
            images_of = pc.list_parent_indices(lists)
            labels = labels.append_column("image_id", copies["image_id"].take(images_of))
            stamp = {
                "event": pa.scalar("imported"),
                "origin": pa.scalar("imported"),
                "audit": pa.scalar(False),
                "updated_at": pa.scalar(now, TABLES["labels"].field("updated_at").type),
                "run": pa.scalar(self._run.run_id),
            }
            fragments.append(self._run.stage("labels", _stamped(labels, stamp)))
        return fragments


def _stamped(rows: pa.Table, values: Mapping[str, pa.Scalar]) -> pa.Table:
    for name, value in values.items():
        rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
    return rows


def _metadata(own: Sequence[tuple[str, str]] | None, policy: Policy, number: int) -> list[tuple[str, str]]:
    """The original's, and how the copy was made."""
    lineage = {
        "augmentation": policy.name,
        "augmentation_transforms": policy.transforms_json,
        "augmentation_seed": str(policy.seed),
        "augmentation_copy": str(number),
    }
    return list({**dict(own or ()), **lineage}.items())


def _mask_uris(value: str) -> list[str]:
    """The file that a label of pixels lies in, if it does."""
    try:
        content = json.loads(value)
    except ValueError:
        return []  # read_label says what is wrong
    mask = content.get("mask") if isinstance(content, dict) else None
    return [mask] if isinstance(mask, str) and mask else []


def encode(image_HWC: NDArray[np.uint8], format: str) -> bytes:
    """An image file of uint8 RGB pixels, the same bytes each time; JPEG with quality 95 and full colour resolution.

    Raises:
        AugmentError: the format cannot hold so large an image.
    """
    options: dict[str, Any] = {"quality": _JPEG_QUALITY, "subsampling": 0} if format == "jpeg" else {}
    if format == "png":
        options["compress_level"] = _PNG_LEVEL
    sink = io.BytesIO()
    try:
        Image.fromarray(image_HWC).save(sink, format.upper(), **options)
    except (OSError, ValueError) as error:
        size = f"{image_HWC.shape[1]} x {image_HWC.shape[0]}"
        raise AugmentError("not_augmented", f"a copy of {size} pixels cannot be written as {format}: {error}") from None
    return sink.getvalue()
