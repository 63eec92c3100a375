"""``winnow duplicates``: images that show the same, and how far each image lies from all others.

Read what is known of the images, compare all vectors (see ``comparison``), form groups, publish once. Copies of one
picture (same bytes, or same pixels) are found by their hashes, and only one of them is compared.

A run that was cut short is simply done again: the same call joins it and publishes under its id. When nothing was
added or removed since the last run with the same options, nothing is compared and no Ray is started.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow import __version__
from winnow.errors import CallError, StorageError
from winnow.perceptual_hash import hamming
from winnow.similarity import BLOCK_ROWS, Floats, Integers, NearRule, components
from winnow_connectors.ledger import Plan, Run, digest_of, new_run_id
from winnow_jobs.comparison import blocks_of, held
from winnow_jobs.progress import Progress
from winnow_jobs.spec import answerer, views_of
from winnow_jobs.vectors import Ids, Vectors, as_ids, embedding_task, positions, quoted, select_ids

if TYPE_CHECKING:
    from winnow_connectors.query import QueryEngine
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

KINDS = ("bytes", "pixels", "near")
"""Relations of two images, the closest first."""

FRAGMENT_ROWS = 250_000
"""Rows per written file, at most."""

_MAX_ATTEMPTS = 20
_MAX_K = 100
_TRAIN, _VAL, _TEST = range(3)


@dataclass(frozen=True)
class DuplicatesCall:
    """What decides the answer, beside the images. Part of the plan.

    Attributes:
        task, model: whose vectors are compared.
        k: which neighbour the outlier score looks at.
        rule: when two pictures are near-duplicates.
    """

    task: str
    model: str
    k: int
    rule: NearRule

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "rule": NearRule(**data["rule"])})

    @property
    def digest(self) -> str:
        return digest_of({"job": "duplicates", **asdict(self)})


@dataclass(frozen=True)
class DuplicatesResult:
    """What a comparison found.

    Attributes:
        status: ``finished`` or ``nothing to do``.
        run_id: of the run; of the last one when there was nothing to do; None when there never was one.
        task, model: whose vectors were compared.
        num_images: compared.
        num_groups: of two or more images that show the same.
        num_members: images in them by kind, their representatives not counted.
        num_leaks: groups whose images lie in different splits.
        num_quarantined: images that must not be trained on, because a group holds them and an image of a later split.
        largest: images in the largest group.
        seconds: by stage.
        verdict: the outcome in one sentence.
    """

    status: str
    run_id: str | None
    task: str
    model: str
    num_images: int = 0
    num_groups: int = 0
    num_members: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    num_leaks: int = 0
    num_quarantined: int = 0
    largest: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""


def duplicates(
    workspace: Workspace, *, task: str | None = None, threshold: float | None = None, k: int = 5
) -> DuplicatesResult:
    """Find groups of duplicates and measure outliers among all current images with a vector, but augmented copies.

    Args:
        workspace: configuration and warehouse.
        task: embedding task; the only one of the configuration by default.
        threshold: cosine from which on vectors alone make near-duplicates; that of ``NearRule`` by default.
        k: which neighbour the outlier score looks at.

    Raises:
        CallError: no such task, an option out of range, or no vectors yet.
        OpenRunError: another comparison of the task is open with other options.
        JobError: a worker failed for good.
    """
    rule = NearRule() if threshold is None else NearRule(threshold=threshold)
    if not 0.0 < rule.threshold <= 1.0:
        raise CallError(f"--threshold {threshold} is not valid; give a cosine above 0 and at most 1, such as 0.94")
    if not 1 <= k <= _MAX_K:
        raise CallError(f"--k {k} is not valid; give a number from 1 to {_MAX_K}")
    name = embedding_task(workspace.config, task)
    workspace.warehouse.check()
    model = workspace.task_model(name)
    return carry_out(workspace, DuplicatesCall(name, answerer(model, views_of(workspace.config, name, model)), k, rule))


def resume(workspace: Workspace, run: Run) -> DuplicatesResult:
    """Finish an open comparison with the options that it was started with."""
    return carry_out(workspace, DuplicatesCall.from_dict(run.plan.config))


def carry_out(workspace: Workspace, call: DuplicatesCall) -> DuplicatesResult:
    """Look, claim, compare, publish. Raises what ``duplicates`` raises."""
    started = time.monotonic()
    ledger = workspace.warehouse.ledger
    work = f"duplicates-{call.task}"
    for _ in range(_MAX_ATTEMPTS):
        # In this order: no comparison is open and none is published unseen between the number and the look.
        numbers = ledger.next_numbers([work])
        run = ledger.join([work], call.digest)
        engine = workspace.query_engine()
        images = _Images.read(engine, call)
        is_own = run is None
        if run is None:
            if last := _last_result(engine, call, images):
                return last
            plan = Plan(
                run_id=new_run_id("duplicates"),
                job="duplicates",
                claims=numbers,
                digest=call.digest,
                config=asdict(call),
                num_planned=0,
                started_at=datetime.now(UTC).isoformat(),
                code_version=__version__,
            )
            run = ledger.begin(plan)
            if run is None:
                continue  # another run claimed the same number; look again
        try:
            result = _compare_and_publish(workspace, run, call, images, started)
        except KeyboardInterrupt:
            if is_own:  # or else the next call with other options would be refused; nothing of this run is of use
                ledger.abandon(run, "stopped with Ctrl-C")
            raise
        if result is not None:
            return result
    raise CallError(f"other comparisons were faster {_MAX_ATTEMPTS} times; run the command again when they are done")


@dataclass(frozen=True)
class _Images:
    """What is known of the images to compare, sorted by image_id. 0 stands for an unknown hash.

    Attributes:
        ids_N: image ids.
        sides_N: ``_TRAIN``, ``_VAL`` or ``_TEST``; the audit reserve counts as test.
        areas_N: width × height.
        seen_N: when each was seen, microseconds.
        sizes_N: bytes of the file.
        bytes_N, pixels_N: 64 bits of a hash of the file, and of its pixels.
        phashes_N: perceptual hashes.
        has_phash_N: where they are known.
    """

    ids_N: Ids
    sides_N: NDArray[np.int8]
    areas_N: Integers
    seen_N: Integers
    sizes_N: Integers
    bytes_N: NDArray[np.uint64]
    pixels_N: NDArray[np.uint64]
    phashes_N: NDArray[np.uint64]
    has_phash_N: NDArray[np.bool_]

    @classmethod
    def read(cls, engine: QueryEngine, call: DuplicatesCall) -> Self:
        """Current images that the model has answered; no augmented copies: these are near-duplicates on purpose."""
        reader = engine.reader(
            f"""
            SELECT image_id,
                CASE WHEN i.audit OR i.split = 'test' THEN {_TEST} WHEN i.split = 'val' THEN {_VAL} ELSE {_TRAIN} END,
                coalesce(o.width::BIGINT * o.height, 0), epoch_us(i.seen_at), coalesce(o.num_bytes, 0),
                if(o.sha256 IS NULL, 0::UBIGINT, hash(o.sha256)),
                if(o.pixel_hash IS NULL, 0::UBIGINT, hash(o.pixel_hash)),
                coalesce(('0x' || o.phash)::UBIGINT, 0), o.phash IS NOT NULL
            FROM current_images AS i JOIN latest_outcomes AS o USING (image_id)
            WHERE o.task = {quoted(call.task)} AND o.model = {quoted(call.model)} AND o.status = 'answered'
                AND i.parent IS NULL
            ORDER BY image_id
            """
        )
        kinds = (np.int8, np.int64, np.int64, np.int64, np.uint64, np.uint64, np.uint64, np.bool_)
        parts: list[list[NDArray[Any]]] = [[] for _ in range(1 + len(kinds))]
        for batch in reader:
            parts[0].append(as_ids(batch.column(0)))
            for part, column, kind in zip(parts[1:], batch.columns[1:], kinds, strict=True):
                part.append(column.to_numpy(zero_copy_only=False).astype(kind))
        empty = [np.zeros(0, "S32"), *(np.zeros(0, kind) for kind in kinds)]
        return cls(*(np.concatenate([none, *part]) for none, part in zip(empty, parts, strict=True)))

    def same_pictures(self) -> Integers:
        """For each image the first one with the same bytes or the same pixels, int64 (N,)."""
        links = [_equal_neighbours(hashes) for hashes in (self.bytes_N, self.pixels_N)]
        us, vs = (np.concatenate(part) for part in zip(*links, strict=True))
        return components(len(self.ids_N), us, vs)


def _equal_neighbours(hashes_N: NDArray[np.uint64]) -> tuple[Integers, Integers]:
    """Pairs of indices that chain all images of the same hash."""
    order = np.argsort(hashes_N, kind="stable")
    same = np.flatnonzero((hashes_N[order][1:] == hashes_N[order][:-1]) & (hashes_N[order][1:] != 0))
    return order[same], order[same + 1]


def _last_result(engine: QueryEngine, call: DuplicatesCall, images: _Images) -> DuplicatesResult | None:
    """What the last run found, if it was asked the same about the same images; or that there is nothing to compare.

    Raises:
        CallError: no image has a vector.
    """
    if not len(images.ids_N):
        raise CallError(
            f"task {call.task!r} has no vectors by {call.model} yet; run `winnow predict --task {call.task}` first"
        )
    if len(images.ids_N) == 1:
        verdict = "one image has no others to be compared with"
        return DuplicatesResult("nothing to do", None, call.task, call.model, num_images=1, verdict=verdict)
    rows = engine.sql(
        f"""
        SELECT run_id, digest, map_entries(counts) AS counts FROM runs
        WHERE job = 'duplicates' AND status = 'finished' AND list_contains(tasks, {quoted(call.task)})
        ORDER BY finished_at DESC LIMIT 1
        """
    ).to_pylist()
    if not rows or rows[0]["digest"] != call.digest:
        return None
    run_id = rows[0]["run_id"]
    compared = select_ids(engine, f"SELECT image_id FROM neighbours WHERE run = {quoted(run_id)}")
    if not np.array_equal(compared, images.ids_N):
        return None
    counts = {entry["key"]: entry["value"] for entry in rows[0]["counts"]}
    result = _result_of(call, run_id, counts)
    return replace(result, status="nothing to do", verdict=f"nothing new since run {run_id}: {result.verdict}")


def _compare_and_publish(
    workspace: Workspace, run: Run, call: DuplicatesCall, images: _Images, started: float
) -> DuplicatesResult | None:
    """Compare, write, decide, commit. None when the run was abandoned meanwhile: then all is looked at anew."""
    seconds = {"reading": time.monotonic() - started}
    same_N = images.same_pictures()
    is_first_N = same_N == np.arange(len(same_N))
    num_pictures = int(is_first_N.sum())
    num_blocks = -(-num_pictures // BLOCK_ROWS)
    vectors = Vectors.open(workspace.warehouse.tables, call.task, call.model)
    before = time.monotonic()
    blocks = blocks_of(_batches(vectors, images.ids_N, is_first_N), images.phashes_N)
    with (
        Progress("compare pairs of blocks", num_blocks * (num_blocks + 1) // 2) as progress,
        held(blocks, num_pictures, num_cpus=workspace.num_cpus) as comparison,
    ):
        nearest, near_N = comparison.compare(len(same_N), call.k, call.rule, progress.update)
        groups = _group(images, near_N[same_N])
        similarity_G = np.ones(len(groups.members_G), dtype=np.float32)
        members_G, others_G = same_N[groups.members_G], same_N[groups.representatives_G]
        apart = np.flatnonzero(members_G != others_G)
        similarity_G[apart] = comparison.cosines(members_G[apart], others_G[apart], len(same_N))
    seconds["comparing"] = time.monotonic() - before
    before = time.monotonic()
    fragments = [run.stage("duplicates", rows) for rows in _duplicate_rows(run, call, images, groups, similarity_G)]
    scores_NK, nearest_NK = nearest.best()
    del nearest
    fragments += [
        run.stage("neighbours", rows)
        for rows in _neighbour_rows(run, call, images, same_N, scores_NK, nearest_NK, num_pictures)
    ]
    seconds["writing"] = time.monotonic() - before
    seconds["total"] = time.monotonic() - started
    seconds = {name: round(value, 3) for name, value in seconds.items()}
    result = _result_of(call, run.run_id, {"images": len(same_N), "pictures": num_pictures, **groups.counts()})
    summary = {
        "tasks": [call.task],
        "counts": {"images": len(same_N), "pictures": num_pictures, **groups.counts()},
        "seconds": seconds,
        "images_per_s": round(len(same_N) / max(seconds["comparing"], 1e-3), 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "verdict": result.verdict,
    }
    run.decide("finished", fragments, summary)
    outcome = run.close()
    if outcome["status"] != "finished":
        return None
    decided = outcome["summary"]  # perhaps by another driver of the same run
    logger.info("run %s: %s in %.1f s", run.run_id, decided["verdict"], decided["seconds"]["total"])
    return replace(_result_of(call, run.run_id, decided["counts"]), seconds=decided["seconds"])


def _batches(vectors: Vectors, ids_N: Ids, wanted_N: NDArray[np.bool_]) -> Iterator[tuple[Integers, Floats]]:
    """Indices and vectors of the wanted images, each once.

    Raises:
        StorageError: one has no vector.
    """
    wanted_N = wanted_N.copy()
    for image_ids, vectors_ND in vectors.stream():
        indices = positions(ids_N, image_ids)
        rows = np.flatnonzero((indices >= 0) & wanted_N[indices])
        wanted_N[indices[rows]] = False
        if rows.size:
            yield indices[rows], vectors_ND[rows]
    if wanted_N.any():
        missing = ids_N[np.flatnonzero(wanted_N)[0]].decode()
        raise StorageError(
            f"{int(wanted_N.sum()):,} images that {vectors.model} has answered, such as {missing}, have no vector in "
            "table 'embeddings'; was the warehouse cleaned by hand?"
        )


# -------------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class _Groups:
    """Groups of two or more images. Legend: G members of all groups together, ordered by group.

    Attributes:
        members_G: indices of the images.
        representatives_G: index of the representative of each member's group.
        sizes_G: images in the group.
        kinds_G: index in ``KINDS``: of the image and its representative; of that itself, the closest in its group.
        sides_G: as ``_Images.sides_N``.
    """

    members_G: Integers
    representatives_G: Integers
    sizes_G: Integers
    kinds_G: NDArray[np.int8]
    sides_G: NDArray[np.int8]

    def counts(self) -> dict[str, int]:
        """Numbers of groups and images."""
        is_first_G = self.members_G == self.representatives_G
        starts = np.flatnonzero(np.diff(self.representatives_G, prepend=-1))
        num_images = np.bincount(self.kinds_G[~is_first_G], minlength=len(KINDS))
        latest = np.maximum.reduceat(self.sides_G, starts) if starts.size else np.zeros(0, np.int8)
        earlier_G = self.sides_G < np.repeat(latest, self.sizes_G[starts])
        return {
            "groups": len(starts),
            **{kind: int(num) for kind, num in zip(KINDS, num_images, strict=True)},
            "leaks": int(np.logical_or.reduceat(earlier_G, starts).sum()) if starts.size else 0,
            "quarantined": int(earlier_G.sum()),
            "largest": int(self.sizes_G.max(initial=0)),
        }


def _group(images: _Images, labels_N: Integers) -> _Groups:
    """Groups of images with the same label.

    The representative has the most pixels; of several it was seen first; of those it is the largest file, as the one
    that was compressed least.
    """
    sizes_N = np.bincount(labels_N, minlength=len(labels_N))[labels_N]
    members = np.flatnonzero(sizes_N > 1)
    least_first = (members, -images.sizes_N[members], images.seen_N[members], -images.areas_N[members])
    order = np.lexsort((*least_first, labels_N[members]))
    members_G = members[order]
    starts = np.flatnonzero(np.diff(labels_N[members_G], prepend=-1))
    sizes_G = sizes_N[members_G]
    representatives_G = np.repeat(members_G[starts], sizes_G[starts])
    kinds_G = np.full(len(members_G), KINDS.index("near"), dtype=np.int8)
    for kind, hashes_N in (("pixels", images.pixels_N), ("bytes", images.bytes_N)):
        hashes_G = hashes_N[members_G]
        kinds_G[(hashes_G == hashes_N[representatives_G]) & (hashes_G != 0)] = KINDS.index(kind)
    if starts.size:
        kinds_G[starts] = len(KINDS)
        kinds_G[starts] = np.minimum.reduceat(kinds_G, starts)
    return _Groups(members_G, representatives_G, sizes_G, kinds_G, images.sides_N[members_G])


def _duplicate_rows(
    run: Run, call: DuplicatesCall, images: _Images, groups: _Groups, similarity_G: Floats
) -> Iterator[pa.Table]:
    bits_G = hamming(images.phashes_N[groups.members_G], images.phashes_N[groups.representatives_G])
    known_G = images.has_phash_N[groups.members_G] & images.has_phash_N[groups.representatives_G]
    for start in range(0, len(groups.members_G), FRAGMENT_ROWS):
        part = slice(start, start + FRAGMENT_ROWS)
        representatives = _names(images, groups.representatives_G[part])
        yield _keyed(
            run,
            call,
            {
                "image_id": _names(images, groups.members_G[part]),
                "group_id": representatives,
                "kind": pa.array(KINDS).take(pa.array(groups.kinds_G[part])),
                "representative": representatives,
                "similarity": pa.array(similarity_G[part].clip(-1.0, 1.0)),
                "hamming": pa.array(bits_G[part].astype(np.int32), mask=~known_G[part]),
                "num_images": pa.array(groups.sizes_G[part].astype(np.int32)),
            },
        )


def _neighbour_rows(
    run: Run,
    call: DuplicatesCall,
    images: _Images,
    same_N: Integers,
    scores_NK: Floats,
    nearest_NK: Integers,
    num_pictures: int,
) -> Iterator[pa.Table]:
    """Nearest image and outlier score of every image; a picture that is there several times is its own nearest."""
    num = len(same_N)
    depth = min(call.k, num_pictures - 1)
    copies = np.flatnonzero(same_N != np.arange(num))
    nearest_N, similarity_N = nearest_NK[same_N, 0], scores_NK[same_N, 0].clip(-1.0, 1.0)
    nearest_N[same_N[copies][::-1]] = copies[::-1]  # of each picture's first image: its second one
    nearest_N[copies] = same_N[copies]
    similarity_N[copies] = similarity_N[same_N[copies]] = 1.0
    outlier_N = (1.0 - scores_NK[same_N, depth - 1]).clip(0.0, 2.0) if depth else np.zeros(num, dtype=np.float32)
    for start in range(0, num, FRAGMENT_ROWS):
        part = slice(start, start + FRAGMENT_ROWS)
        length = len(same_N[part])
        yield _keyed(
            run,
            call,
            {
                "image_id": _names(images, np.arange(num)[part]),
                "nearest": _names(images, nearest_N[part]),
                "similarity": pa.array(similarity_N[part]),
                "k": pa.repeat(pa.scalar(depth, pa.int32()), length),
                "outlier_score": pa.array(outlier_N[part].astype(np.float32)),
            },
        )


def _names(images: _Images, indices: Integers) -> pa.Array:
    return pa.array(images.ids_N[indices].astype(str), type=pa.string())


def _keyed(run: Run, call: DuplicatesCall, columns: dict[str, pa.Array]) -> pa.Table:
    num = len(columns["image_id"])
    now = pa.scalar(datetime.now(UTC), type=pa.timestamp("us", tz="UTC"))
    keys = {"task": call.task, "model": call.model, "run": run.run_id}
    return pa.table(
        columns | {name: pa.repeat(pa.scalar(value), num) for name, value in keys.items()} | {"at": pa.repeat(now, num)}
    )


def _result_of(call: DuplicatesCall, run_id: str, counts: Mapping[str, int]) -> DuplicatesResult:
    parts = {
        "with the same bytes": counts["bytes"],
        "with the same pixels": counts["pixels"],
        "near-duplicates": counts["near"],
    }
    found = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
    verdict = f"{counts['groups']:,} groups among {counts['images']:,} images" + (f": {found}" if found else "")
    if counts["leaks"]:
        verdict += (
            f"; {counts['leaks']:,} groups lie across splits, {counts['quarantined']:,} of their images must not be "
            "trained on"
        )
    if counts["largest"] > max(100, counts["images"] // 10):
        verdict += (
            f"; the largest group holds {counts['largest']:,} images: unless they do show the same, raise --threshold"
        )
    return DuplicatesResult(
        status="finished",
        run_id=run_id,
        task=call.task,
        model=call.model,
        num_images=counts["images"],
        num_groups=counts["groups"],
        num_members={kind: counts[kind] for kind in KINDS},
        num_leaks=counts["leaks"],
        num_quarantined=counts["quarantined"],
        largest=counts["largest"],
        verdict=verdict,
    )
