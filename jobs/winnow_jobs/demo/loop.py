"""The whole loop on rendered surfaces: from a bucket and 60 labels to a better model and answers that need no person.

Every step is one verb of ``Workspace``, told as the command of the same name. The truth about the surfaces stays with
who answers in Label Studio (``annotator``): Winnow gets pictures, 60 labels to begin with, and a labelled test set.
"""

from __future__ import annotations

import csv
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import click

from winnow.config import Kind
from winnow.errors import CallError
from winnow.evaluation import MEASURES
from winnow_connectors.label_studio import LabelStudio
from winnow_jobs import services
from winnow_jobs.cluster import ray_cluster
from winnow_jobs.daemons import ServiceStatus
from winnow_jobs.demo.annotator import answer_all, wait_for_person
from winnow_jobs.demo.surfaces import (
    CLASSES,
    MASK_CLASSES,
    SIDE,
    Surface,
    describe,
    mask_of,
    mask_to_png,
    number_of,
    render,
)
from winnow_jobs.demo.tour import Act, Step, Tour
from winnow_jobs.progress import Progress
from winnow_jobs.report import FILE_NAME
from winnow_jobs.review import known_projects
from winnow_jobs.workspace import Workspace

BUCKET = "surfaces"
FLAW, WHERE, ALIKE = "flaw", "where", "alike"
"""Tasks: what is wrong with a surface, where it is, and which surfaces look alike."""

PATTERN = "{material}/{camera}/*"

_CONFIG = """\
[warehouse]
uri = "./warehouse"

{storage}
[tasks.{flaw}]                    # what is wrong with a surface
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"
classes = {classes}
crop = 1.0

[tasks.{where}]                   # and where
kind = "segmentation"
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"
classes = {mask_classes}
size = {side}

[tasks.{alike}]                   # which surfaces look alike, for the diversity of what people see
kind = "embedding"
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"
crop = 1.0

[splits]
train = 0.64
val = 0.12
test = 0.24
audit = {audit}                    # the reserve, for the blind audit

[select]
near_duplicates = 0.98            # textures look more alike than photographs do
"""


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        first: images at the beginning.
        later: images that are added meanwhile.
        seed_labels: images of the train split whose classes are known at the beginning.
        seed_masks: of those, images whose masks are known too: painting takes longer than choosing.
        measure_masks: images of val and test, together, whose masks are known.
        budget: images that people see in each round of the classes.
        masks: images that people paint.
        audit: blind answers that ``accept`` rests on.
        audit_share: of all images that are kept back for that.
    """

    first: int = 1600
    later: int = 200
    seed_labels: int = 60
    seed_masks: int = 40
    measure_masks: int = 150
    budget: int = 200
    masks: int = 20
    audit: int = 150
    audit_share: float = 0.11


FOR_A_PERSON = Sizes(budget=60, masks=10)
"""Fewer questions, where a person answers them."""


class Loop:
    """The acts.

    Args:
        folder: the workspace; made when missing.
        human: wait for a person instead of answering.
        sizes: how much of everything; less by default where a person answers.
    """

    def __init__(self, folder: Path, *, human: bool = False, sizes: Sizes | None = None) -> None:
        self.folder = folder
        self.human = human
        self.sizes = sizes or (FOR_A_PERSON if human else Sizes())
        self.label_studio: ServiceStatus | None = None

    @cached_property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / "winnow.toml")

    @property
    def acts(self) -> list[Act]:
        """In their order; the services must be up."""
        sizes = self.sizes
        return [
            Act(
                f"{sizes.first:,} surfaces in a bucket",
                [partial(self._fill, "day-1", 0, sizes.first), partial(self._ingest, "day-1")],
            ),
            Act(f"{sizes.seed_labels} labels, and a test set", [self._write_labels, self._ingest_labels]),
            Act(
                "the first models",
                [partial(step, task) for task in (FLAW, WHERE) for step in (self._train, self._promote)],
            ),
            Act("every image answered: class, mask and vector in one pass", [self._predict]),
            Act(
                "people see what the models doubt",
                [partial(self._select, FLAW, 1), partial(self._select, WHERE, 1), *self._ask(FLAW, WHERE)],
            ),
            Act("what they said makes better models", [*self._learn(FLAW), *self._learn(WHERE)]),
            Act(
                "a second round",
                [self._predict_train, partial(self._select, FLAW, 2), *self._ask(FLAW), *self._learn(FLAW)],
            ),
            Act(
                f"{sizes.later:,} images were added meanwhile",
                [
                    partial(self._fill, "day-2", sizes.first, sizes.later),
                    partial(self._ingest, "day-2"),
                    self._predict_new,
                    self._predict,
                ],
            ),
            Act(f"{sizes.audit} blind answers", [self._select_audit, *self._ask(FLAW)]),
            Act("what needs no person, and what it all looks like", [self._accept, self._report]),
        ]

    def _learn(self, task: str) -> list[Step]:
        return [partial(self._train, task), partial(self._evaluate, task), partial(self._promote, task)]

    def _ask(self, *tasks: str) -> list[Step]:
        """Push, answer, pull."""
        return [
            *(partial(self._push, task) for task in tasks),
            *(partial(self._answer, task) for task in tasks),
            *(partial(self._pull, task) for task in tasks),
        ]

    @property
    def report(self) -> Path:
        return self.folder / FILE_NAME

    # -- before the acts -----------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Start or find the two servers of the workspace, and write its configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        bucket = services.up(self.folder, buckets=[BUCKET])
        click.echo(f"S3 server     {bucket.address} (SeaweedFS, this machine only)")
        if not services.has_label_studio(self.folder):
            click.echo("Label Studio  is installed into an environment of its own: about 1 GB, some minutes, once")
        self.label_studio = services.up_label_studio(self.folder, files=self.folder / "warehouse" / "review")
        click.echo(f"Label Studio  {self.label_studio.address} (this machine only)")
        self._use_label_studio(self.label_studio)
        config = self.folder / "winnow.toml"
        if not config.exists():
            config.write_text(
                _CONFIG.format(
                    storage=bucket.config_section,
                    flaw=FLAW,
                    where=WHERE,
                    alike=ALIKE,
                    classes=_toml(CLASSES),
                    mask_classes=_toml(MASK_CLASSES),
                    side=SIDE,
                    audit=self.sizes.audit_share,
                )
            )
        self.workspace.init()
        click.echo(f"workspace     {config}")

    def _use_label_studio(self, status: ServiceStatus) -> None:
        """What ``set -a; . label-studio.env`` does in a shell."""
        for line in status.credentials_file.read_text().splitlines():
            name, _, value = line.partition("=")
            if name.startswith("LABEL_STUDIO_") and name not in ("LABEL_STUDIO_USERNAME", "LABEL_STUDIO_PASSWORD"):
                os.environ[name] = "".join(shlex.split(value))

    # -- images and first labels ---------------------------------------------------------------------------------

    def _fill(self, name: str, start: int, number: int) -> Iterator[str]:
        """Render what the bucket does not have yet."""
        bucket = self.workspace.stores.at(f"s3://{BUCKET}/")
        present = {info.key for info in bucket.list(f"{name}/")}
        surfaces = [describe(place) for place in range(start, start + number)]
        missing = [surface for surface in surfaces if f"{name}/{surface.path}" not in present]
        _each(missing, lambda surface: bucket.put(f"{name}/{surface.path}", render(surface).to_jpeg()), "render")
        yield f"{number:,} rendered pictures in s3://{BUCKET}/{name}/: metal, concrete and paint under two cameras"

    def _ingest(self, name: str) -> Iterator[str]:
        source = f"s3://{BUCKET}/{name}/"
        yield f"$ winnow ingest {source} --pattern '{PATTERN}'"
        result = self.workspace.ingest([source], pattern=PATTERN)
        yield result.verdict
        (reserve,) = self.workspace.query("SELECT count(*) AS n FROM current_images WHERE audit")["n"].to_pylist()
        yield f"{reserve:,} images in all are kept back for the blind audit, by hash"

    def _write_labels(self) -> Iterator[str]:
        """What a team has when it begins: a few labels, and a test set that it trusts. None of the audit reserve."""
        path = self.folder / "labels.csv"
        rows = self.workspace.query(
            "SELECT uri, split FROM current_images WHERE NOT audit ORDER BY split, image_id"
        ).to_pylist()
        by_split = {split: [row["uri"] for row in rows if row["split"] == split] for split in ("train", "val", "test")}
        by_split["train"] = by_split["train"][: self.sizes.seed_labels]
        measured = sorted([*by_split["val"], *by_split["test"]], key=number_of)
        painted = {*by_split["train"][: self.sizes.seed_masks], *measured[: self.sizes.measure_masks]}
        bucket = self.workspace.stores.at(f"s3://{BUCKET}/")

        def put_mask(surface: Surface) -> None:
            bucket.put(_mask_key(surface), mask_to_png(mask_of(surface)))

        _each([describe(number_of(uri)) for uri in painted], put_mask, "masks")
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["uri", "label", "mask"])
            for uri in (uri for uris in by_split.values() for uri in uris):
                surface = describe(number_of(uri))
                mask = f"s3://{BUCKET}/{_mask_key(surface)}" if uri in painted else ""
                writer.writerow([uri, surface.label, mask])
        temporary.replace(path)
        counted = ", ".join(f"{len(uris):,} of {split}" for split, uris in by_split.items())
        yield f"{path.name}: classes of {counted}; masks of {len(painted):,}, because painting takes longer"

    def _ingest_labels(self) -> Iterator[str]:
        yield "$ winnow ingest labels.csv --stat"
        result = self.workspace.ingest([str(self.folder / "labels.csv")], stat=True)
        yield f"{result.num_labels:,} labels, {result.num_masks:,} masks"

    # -- models --------------------------------------------------------------------------------------------------

    def _train(self, task: str) -> Iterator[str]:
        yield f"$ winnow train {task} --head"
        result = self.workspace.train(task, head=True)
        test = result.metrics["test"]
        figure = f"accuracy {test['accuracy']:.3f}" if "accuracy" in test else f"mean IoU {test['mean_iou']:.3f}"
        yield f"{result.version}: {figure} on {test['n']:,} test images, from {result.num_images['train']:,} labels"

    def _evaluate(self, task: str) -> Iterator[str]:
        yield f"$ winnow evaluate {task}"
        result = self.workspace.evaluate(task)
        if (change := result.comparison.difference) is not None:
            name, interval = MEASURES[result.comparison.measure], f"{change.low:+.3f} to {change.high:+.3f}"
            yield f"{name} {change.value:+.3f} ({interval}) against {result.against}, on the same test images"
        for found in result.slices[:1]:
            yield f"worst slice: {found.column} {found.value}, {found.score:.3f} on {found.n:,} images"

    def _promote(self, task: str) -> Iterator[str]:
        version = self.workspace.models(task)[0].name
        yield f"$ winnow models promote {version}"
        try:
            move = self.workspace.promote(version)
        except CallError as error:
            yield f"refused: {error.message}"
            return
        yield f"{version} answers {task} from now on; before it was {move.before}"

    def _predict(self) -> Iterator[str]:
        yield "$ winnow predict"
        yield from self._asked()

    def _predict_train(self) -> Iterator[str]:
        where = "split = 'train' OR audit"
        yield f'$ winnow predict --task {FLAW} --where "{where}"'
        yield from self._asked([FLAW], where=where)

    def _predict_new(self) -> Iterator[str]:
        yield "$ winnow predict --new"
        yield from self._asked(new=True)

    def _asked(
        self, tasks: Sequence[str] | None = None, *, where: str | None = None, new: bool = False
    ) -> Iterator[str]:
        result = self.workspace.predict(tasks, where=where, new=new)
        if result.run_id is None:
            yield result.status
            return
        rate = f", {result.images_per_s:,.0f} images/s" if result.images_per_s else ""
        yield f"{result.num_answered:,} answers, {result.num_failed:,} failed{rate}: " + ", ".join(
            sorted(result.models.values())
        )

    # -- people --------------------------------------------------------------------------------------------------

    def _select(self, task: str, number: int) -> Iterator[str]:
        """The selection of that number; choosing again would choose others."""
        budget = self.sizes.budget if task == FLAW else self.sizes.masks
        audit = "" if task == FLAW else " --audit-share 0"
        yield f"$ winnow select --task {task} --budget {budget}{audit}"
        if self._num_selections(task) >= number:
            yield "chosen before"
            return
        result = self.workspace.select(budget, task=task, audit_share=None if task == FLAW else 0.0)
        reasons = [f"{count} by {name.replace('_', ' ')}" for name, count in result.reasons.items() if count]
        reasons += [f"{result.num_audit} for the blind audit"] if result.num_audit else []
        yield f"{result.num_chosen:,} chosen: {', '.join(reasons)}; {result.num_candidates:,} were possible"

    def _select_audit(self) -> Iterator[str]:
        (known,) = self.workspace.query(
            f"SELECT count(DISTINCT image_id) AS n FROM current_labels WHERE task = '{FLAW}' AND audit"
        )["n"].to_pylist()
        budget = self.sizes.audit - known
        yield f"$ winnow select --task {FLAW} --budget {budget} --audit-share 1"
        if self._num_selections(FLAW) >= 3:
            yield "chosen before"
            return
        result = self.workspace.select(budget, task=FLAW, audit_share=1.0)
        yield f"{result.num_audit:,} more beside the {known:,} answered blind before, in the order of their hashes"

    def _num_selections(self, task: str) -> int:
        (number,) = self.workspace.query(
            "SELECT count(*) AS n FROM runs WHERE job = 'select' AND status = 'finished' "
            f"AND list_contains(tasks, '{task}')"
        )["n"].to_pylist()
        return int(number)

    def _push(self, task: str) -> Iterator[str]:
        yield f"$ winnow review push --task {task}"
        for result in self.workspace.push(task=task):
            for what, project in (("review", result.project), ("audit, blind", result.audit_project)):
                if project is not None:
                    yield f"{result.task} {what}: {result.server}/projects/{project}/data"

    def _answer(self, task: str) -> Iterator[str]:
        server = LabelStudio.from_environment()
        projects = [found.project_id for found in known_projects(self.workspace.query_engine(), server.url, task)]
        if self.human:
            assert self.label_studio is not None
            yield f"waiting until you have answered everything of {task}; Ctrl-C stops, the same command goes on"
            yield from _log_in(self.label_studio)
            yield f"{wait_for_person(server, projects):,} tasks answered by you"
            return
        rows = self.workspace.query("SELECT image_id, uri FROM current_images").to_pylist()
        surfaces = {row["image_id"]: describe(number_of(row["uri"])) for row in rows}
        kind: Kind = self.workspace.config.tasks[task].kind
        count = 0
        with Progress("answers") as progress:

            def tell(done: int, total: int) -> None:
                progress.total = total
                progress.update(done)

            for project in projects:
                count += answer_all(server, project, kind, surfaces, on_answer=tell)
        what = "classes chosen" if kind == "classification" else "masks painted"
        yield f"{count:,} {what} in Label Studio by the simulated annotator"

    def _pull(self, task: str) -> Iterator[str]:
        yield f"$ winnow review pull --task {task}"
        for result in self.workspace.pull(task=task):
            corrected = f", {result.num_corrected:,} of them correct the model" if result.num_corrected else ""
            yield f"{result.num_created:,} answers{corrected}"

    def _accept(self) -> Iterator[str]:
        yield f"$ winnow accept {FLAW} --max-error 0.1"
        result = self.workspace.accept(FLAW, max_error=0.1)
        yield result.verdict
        if result.audit is not None:
            found = result.audit.accuracy
            interval = f"{found.low:.1%} to {found.high:.1%}"
            yield f"by the audit {found.value or 0.0:.1%} of all answers are right ({interval})"

    def _report(self) -> Iterator[str]:
        yield "$ winnow report"
        result = self.workspace.report()
        yield f"{result.path}: {result.num_images:,} images, {result.num_pictures:,} of them shown"

    # -- after the acts ------------------------------------------------------------------------------------------

    def curve(self) -> list[str]:
        """Accuracy on the test split by number of labels, of every version."""
        lines = []
        for version in reversed(self.workspace.models(FLAW)):
            accuracy, labels = version.metrics["test"]["accuracy"], version.metrics["train"]["n"]
            mark = "  in production" if version.production else ""
            lines.append(f"{version.name:8} {labels:>5,} labels  {'█' * round(40 * accuracy):40}  {accuracy:.3f}{mark}")
        return lines


def play(folder: Path, *, human: bool, first: int = 1, sizes: Sizes | None = None) -> None:
    """Play the loop, or what is left of it, and say how it ended.

    Args:
        folder: the workspace.
        human: wait for a person instead of answering.
        first: number of the first act.
        sizes: how much of everything; less by default where a person answers.
    """
    click.echo("Metal, concrete and paint: good, scratched, stained or cracked. They are drawn, so the truth is known.")
    if human:
        click.echo("You answer in Label Studio. Ctrl-C stops at any time, and the same command goes on.")
    else:
        click.echo("Who answers in Label Studio is simulated and makes no mistakes. DEMO_HUMAN=1 asks you instead.")
    loop = Loop(folder, human=human, sizes=sizes)
    loop.serve()
    tour = Tour(folder / ".winnow" / "demo.json")
    if tour.is_over(loop.acts):
        click.echo("nothing to do: every act was played before")
    else:
        with ray_cluster():  # one for all acts, or each job would start its own
            tour.play(loop.acts, first=first)
    _say_the_end(loop, tour)


def _say_the_end(loop: Loop, tour: Tour) -> None:
    assert loop.label_studio is not None
    click.secho("\nWhat was learned: accuracy on the test split", bold=True)
    for line in loop.curve():
        click.echo(f"  {line}")
    click.secho("\nWhere to look", bold=True)
    for line in (f"the report    {loop.report}", *_log_in(loop.label_studio)):
        click.echo(f"  {line}")
    click.echo(f"  workspace     {loop.folder}; `winnow services down` there ends both servers")
    click.secho(f"  the acts took {tour.seconds / 60:.1f} minutes", dim=True)


def _log_in(status: ServiceStatus) -> list[str]:
    return [
        f"Label Studio  {status.address}",
        f"log in as     {status.user}, with LABEL_STUDIO_PASSWORD of {status.credentials_file}",
    ]


def _mask_key(surface: Surface) -> str:
    return f"masks/{surface.number:05d}.png"


def _toml(names: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def _each(surfaces: Sequence[Surface], do: Callable[[Surface], None], what: str) -> None:
    """Do it for all surfaces, on all cores, with progress."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        with Progress(what, len(surfaces)) as progress:
            for done, _ in enumerate(pool.map(do, surfaces), start=1):
                progress.update(done)
    finally:
        pool.shutdown(cancel_futures=True)
