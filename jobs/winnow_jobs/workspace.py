"""A folder with a ``winnow.toml``: the verbs of the command line as Python functions.

::

    from winnow_jobs import Workspace

    ws = Workspace("winnow.toml")
    ws.ingest(["s3://photos/2026/"])
    ws.predict()
    ws.query("SELECT label, count(*) FROM predictions GROUP BY 1").to_pandas()
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from winnow.config import Config, TaskConfig, load_config
from winnow.errors import CallError
from winnow_connectors.object_store import ObjectStores
from winnow_connectors.warehouse import Warehouse

if TYPE_CHECKING:
    from winnow.models.references import ResolvedModel
    from winnow_connectors.query import QueryEngine
    from winnow_connectors.registry import Move, Version
    from winnow_jobs.accept import AcceptResult
    from winnow_jobs.augment import AugmentResult
    from winnow_jobs.duplicates import DuplicatesResult
    from winnow_jobs.evaluate import EvaluateResult
    from winnow_jobs.export_masks import MasksResult
    from winnow_jobs.ingest import IngestResult
    from winnow_jobs.predict import PredictResult
    from winnow_jobs.pull import PullResult
    from winnow_jobs.push import PushResult
    from winnow_jobs.report import ReportResult
    from winnow_jobs.review_status import ReviewStatus
    from winnow_jobs.search import SearchResult
    from winnow_jobs.selection import SelectResult
    from winnow_jobs.train import TrainResult


class Workspace:
    """Configuration and warehouse of one project.

    Args:
        config_path: the ``winnow.toml``; relative paths inside it start at its folder.
        num_cpus: CPUs of a Ray cluster started by a job; all of the machine's when None.

    Raises:
        ConfigError: the configuration is missing or faulty.
    """

    def __init__(self, config_path: str | Path = "winnow.toml", *, num_cpus: int | None = None) -> None:
        self.config_path = Path(config_path).absolute()
        self.folder = self.config_path.parent
        self.config: Config = load_config(self.config_path)
        self.num_cpus = num_cpus

    def __repr__(self) -> str:
        return f"Workspace({str(self.config_path)!r})"

    @cached_property
    def stores(self) -> ObjectStores:
        """Access to images and warehouse."""
        predict = self.config.predict
        return ObjectStores(
            self.config.storage,
            self.folder,
            fetch_timeout_s=predict.fetch_timeout_s,
            retry_timeout_s=predict.retry_timeout_s,
            max_concurrency=max(64, predict.fetch_concurrency),
        )

    @cached_property
    def warehouse(self) -> Warehouse:
        """Tables and runs."""
        uri = self.config.warehouse.uri
        return Warehouse(uri if "://" in uri else (self.folder / uri).as_uri(), self.stores)

    @property
    def cache_folder(self) -> Path:
        """Local files that can be made again at any time."""
        return self.folder / ".winnow"

    def resolve_model(self, task: TaskConfig) -> ResolvedModel:
        """The exact model version that a task's reference means now."""
        from winnow.models.references import resolve_cached

        return resolve_cached(
            task,
            cache_dir=self.cache_folder / "models",
            base_dir=self.folder,
            fetch=self.stores.download,
            version=self.stores.version,
        )

    def task_model(self, name: str, version: str | None = None) -> ResolvedModel:
        """What answers a task now.

        Args:
            name: of the task.
            version: ``<task>@<n>`` or ``<task>@base``; the one in production by default.

        Raises:
            CallError: no such task or version, or the version does not fit the task as winnow.toml has it.
            JobError: the version's card is damaged.
        """
        from winnow.models.cards import check_task, parse_version
        from winnow.models.references import resolve_card

        task = self.config.task(name)
        registry = self.warehouse.registry
        chosen = version or registry.production(name)
        of, number = parse_version(chosen)
        if of != name:
            raise CallError(f"{chosen} is a version of {of}, not of {name}")
        if number is None:
            return self.resolve_model(task)
        found = registry.version(chosen)
        card = registry.card(found)
        check_task(card, task)
        return resolve_card(card, registry.weights_uri(found))

    def init(self) -> bool:
        """Create the warehouse. False when it was there already."""
        return self.warehouse.create()

    def ingest(self, sources: Sequence[str], **options: Any) -> IngestResult:
        """Make the objects under the sources known; see ``winnow_jobs.ingest.ingest`` for the options."""
        from winnow_jobs.ingest import ingest

        return ingest(self, sources, **options)

    def predict(
        self,
        tasks: Sequence[str] | None = None,
        *,
        models: Sequence[str] = (),
        where: str | None = None,
        limit: int | None = None,
        new: bool = False,
        retry_failures: str | None = None,
        dry_run: bool = False,
    ) -> PredictResult:
        """Answer every pending image exactly once; see ``winnow_jobs.predict``.

        Each task is answered by its version in production, or by the one named in ``models`` (``garment@2``).
        """
        from winnow_jobs.predict import Asked, predict

        asked = Asked(where=where, limit=limit, new=new, retry_failures=retry_failures)
        return predict(self, tasks, asked, versions=models, dry_run=dry_run)

    def augment(
        self,
        policy: str,
        to: str,
        *,
        num_copies: int = 1,
        where: str | None = None,
        limit: int | None = None,
        format: str = "png",
        retry_failures: str | None = None,
        dry_run: bool = False,
    ) -> AugmentResult:
        """Write augmented copies of images, as images with their parent; see ``winnow_jobs.augment``."""
        from winnow_jobs.augment import augment
        from winnow_jobs.predict import Asked

        asked = Asked(where=where, limit=limit, retry_failures=retry_failures)
        return augment(self, policy, to, asked, num_copies=num_copies, format=format, dry_run=dry_run)

    def train(self, task: str, *, head: bool = False, seed: int = 0, limit_labels: int | None = None) -> TrainResult:
        """Make a model version from the current labels of a task; see ``winnow_jobs.train.train``."""
        from winnow_jobs.train import train

        return train(self, task, head=head, seed=seed, limit_labels=limit_labels)

    def evaluate(
        self, task: str, *, candidate: str | None = None, against: str | None = None, by: Sequence[str] = ()
    ) -> EvaluateResult:
        """Compare two model versions on the labelled test images; see ``winnow_jobs.evaluate.evaluate``."""
        from winnow_jobs.evaluate import evaluate

        return evaluate(self, task, candidate=candidate, against=against, by=by)

    def models(self, task: str | None = None) -> list[Version]:
        """All model versions, by task, the newest first.

        Raises:
            CallError: no such task.
        """
        if task is not None:
            self.config.task(task)
        self.warehouse.check()
        return self.warehouse.registry.versions(task)

    def promote(self, version: str, *, force: bool = False) -> Move:
        """Let a model version answer its task from now on, if it is good enough; see ``winnow_jobs.models.promote``."""
        from winnow_jobs.models import promote

        return promote(self, version, force=force)

    def rollback(self, task: str, to: str | None = None) -> Move:
        """Let the version before answer again, or the one named; see ``Registry.roll_back``."""
        from winnow_jobs.models import roll_back

        return roll_back(self, task, to)

    def search(self, image: str, **options: Any) -> SearchResult:
        """The images most like an image_id, URI or file; see ``winnow_jobs.search.search`` for the options."""
        from winnow_jobs.search import search

        return search(self, image, **options)

    def duplicates(self, **options: Any) -> DuplicatesResult:
        """Find duplicates and outliers; see ``winnow_jobs.duplicates.duplicates`` for the options."""
        from winnow_jobs.duplicates import duplicates

        return duplicates(self, **options)

    def select(self, budget: int, **options: Any) -> SelectResult:
        """Choose images for people and queue them; see ``winnow_jobs.selection.select`` for the options."""
        from winnow_jobs.selection import select

        return select(self, budget, **options)

    def push(self, *, task: str | None = None) -> list[PushResult]:
        """Bring what waits in the queue to Label Studio; see ``winnow_jobs.push.push``."""
        from winnow_jobs.push import push

        return push(self, task=task)

    def pull(self, *, task: str | None = None) -> list[PullResult]:
        """Bring people's answers into the table ``labels``; see ``winnow_jobs.pull.pull``."""
        from winnow_jobs.pull import pull

        return pull(self, task=task)

    def review_status(self, *, task: str | None = None) -> list[ReviewStatus]:
        """How far people are, by the last pull; see ``winnow_jobs.review_status.review_status``."""
        from winnow_jobs.review_status import review_status

        return review_status(self, task=task)

    def accept(self, task: str, *, max_error: float, confidence: float = 0.95, per_class: bool = False) -> AcceptResult:
        """Accept the answers that need no person; see ``winnow_jobs.accept.accept``."""
        from winnow_jobs.accept import accept

        return accept(self, task, max_error=max_error, confidence=confidence, per_class=per_class)

    def report(self, tasks: Sequence[str] = (), **options: Any) -> ReportResult:
        """Write what the tables say as one HTML file; see ``winnow_jobs.report.report`` for the options."""
        from winnow_jobs.report import report

        return report(self, tasks, **options)

    def resume(
        self, run_id: str
    ) -> PredictResult | AugmentResult | IngestResult | DuplicatesResult | SelectResult | TrainResult | Move:
        """Finish an open run with the options that it was started with."""
        from winnow_jobs.runs import resume

        return resume(self, run_id)

    def abandon(self, run_id: str) -> str:
        """Give an open run up. Returns its final status: ``abandoned``, or ``finished`` when it was published first."""
        from winnow_jobs.runs import abandon

        return abandon(self, run_id)

    def runs(self) -> pa.Table:
        """All runs, newest first: those in the table ``runs`` and the open ones."""
        from winnow_jobs.runs import list_runs

        return list_runs(self)

    def query_engine(self) -> QueryEngine:
        """SQL over one snapshot of the tables."""
        from winnow_connectors.query import QueryEngine

        self.warehouse.check()
        return QueryEngine(self.warehouse.tables)

    def query(self, statement: str) -> pa.Table:
        """Rows of a read-only SQL statement over tables and views.

        Raises:
            QueryError: the statement is wrong; the message has the engine's words and the columns there are.
        """
        return self.query_engine().sql(statement)

    def query_reader(self, statement: str) -> pa.RecordBatchReader:
        """As ``query``, streaming."""
        return self.query_engine().reader(statement)

    def export_results(self, to: str, **options: Any) -> Any:
        """Write the view ``results`` to files; see ``winnow_jobs.export.export_results`` for the options."""
        from winnow_jobs.export import export_results

        return export_results(self.query_engine(), to, stores=self.stores, **options)

    def export_masks(self, task: str, to: str, **options: Any) -> MasksResult:
        """Write the masks of a segmentation task; see ``winnow_jobs.export_masks.export_masks`` for the options."""
        from winnow_jobs.export_masks import export_masks

        return export_masks(self, task, to, **options)
