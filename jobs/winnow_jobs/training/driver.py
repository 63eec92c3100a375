"""The driver: plans the workers, runs them, starts them again when they died, and shows how far they are."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from winnow.errors import JobError, WinnowError
from winnow_connectors.ledger import Run
from winnow_connectors.warehouse import Warehouse
from winnow_jobs.cluster import quieten_ray, ray_cluster
from winnow_jobs.labelled import LABELS, LabelledImages
from winnow_jobs.progress import Progress
from winnow_jobs.resources import WorkerPlan, plan_workers
from winnow_jobs.training.nowhere import nowhere
from winnow_jobs.training.spec import FineTuneSpec, WorkersDiedError
from winnow_jobs.training.worker import RESULT, train_worker

if TYPE_CHECKING:
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 4
"""How often workers may die before the driver gives up."""

_POLL_S = 0.5
_ABORT_S = 20.0
"""How long workers may take to end after Ctrl-C."""


@dataclass
class Tuned:
    """What came out of a training.

    Attributes:
        weights: a safetensors file.
        temperature: for the card.
        metrics: by split, and ``fit`` with the curve by epoch.
        counts: labels used, by split and class.
        num_images: that could be used, by split.
        failures: images left out, by kind of error.
        examples: some of them, in words.
        warnings: what is worth knowing, one sentence each.
        seconds: by stage.
    """

    weights: bytes
    temperature: float
    metrics: dict[str, Any]
    counts: dict[str, dict[str, int]]
    num_images: dict[str, int]
    failures: dict[str, int]
    examples: list[str]
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def fine_tune(workspace: Workspace, run: Run, spec: FineTuneSpec) -> Tuned:
    """Train what the plan of a run says, from its last checkpoint if there is one.

    Raises:
        StoppedError: too many images cannot be read.
        JobError: workers died again and again, the loss is not finite, or no image could be used.
        CallError: the cluster cannot be used.
    """
    started = time.monotonic()
    with ray_cluster(num_cpus=workspace.num_cpus) as nodes:
        result = _fit(workspace.warehouse, run, spec, plan_workers(nodes, spec.config))
    weights = run.store.get(run.key(RESULT))
    seconds = {**result.pop("seconds"), "total": time.monotonic() - started}
    return Tuned(weights=weights, seconds=seconds, **result)


def _fit(warehouse: Warehouse, run: Run, spec: FineTuneSpec, plan: WorkerPlan) -> dict[str, Any]:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    quieten_ray("ray.train", "ray.data")
    board: Any = ray.remote(num_cpus=0, max_restarts=-1)(TrainBoard).remote()
    rows = LabelledImages.from_parquet(run.store.get(run.key(LABELS))).rows
    config = {
        "spec": spec,
        "warehouse": warehouse,
        "plan": run.plan,
        "rows": ray.put(rows),
        "board": board,
        "workers": plan,
    }
    logger.info("run %s: training on %s", run.run_id, plan)
    reason = ""
    with _watch(board):
        for attempt in range(_MAX_ATTEMPTS):
            trainer = TorchTrainer(
                train_worker,  # type: ignore[arg-type]  # a returned value is new in Ray 2.59, its type is not
                train_loop_config=config,
                torch_config=TorchConfig(backend="nccl" if plan.gpus >= 1 else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=plan.num_workers,
                    use_gpu=plan.gpus > 0,
                    resources_per_worker={"CPU": plan.cpus} | ({"GPU": plan.gpus} if plan.gpus else {}),
                ),
                run_config=RunConfig(name=run.run_id, storage_path="/nowhere", storage_filesystem=nowhere()),
            )
            try:
                result: dict[str, Any] = _fit_beside(trainer.fit, board).return_value
            except TrainingFailedError as error:
                fault: WinnowError | None = ray.get(board.fault.remote(), timeout=60)
                if fault is not None:
                    raise fault from None
                reason = _last_line(error)
                logger.warning("workers died (attempt %d of %d): %s", attempt + 1, _MAX_ATTEMPTS, reason)
                continue
            return result
    raise WorkersDiedError(
        f"training workers died {_MAX_ATTEMPTS} times, the last time of: {reason}; the run stays open: mend "
        "the cause, then run the same command to go on from its last checkpoint"
    )


def _fit_beside(fit: Callable[[], Any], board: Any) -> Any:
    """What ``fit`` returns, in a thread of its own: in the main one Ray Train would take Ctrl-C for itself, for good.

    Raises:
        KeyboardInterrupt: Ctrl-C; the workers are told to end.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(fit())
        except BaseException as error:  # noqa: BLE001  handed over as it is
            future.set_exception(error)

    threading.Thread(target=run, name="winnow-fit", daemon=True).start()
    try:
        while not wait([future], timeout=_POLL_S).done:
            pass
    except KeyboardInterrupt:
        board.fail.remote(JobError("stopped with Ctrl-C"))
        wait([future], timeout=_ABORT_S)
        raise
    return future.result()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


class TrainBoard:
    """Where the first worker reports, so that progress is live; and where a worker says why it must not go on."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._fault: WinnowError | None = None

    def report(self, state: dict[str, Any]) -> None:
        self._state = state

    def state(self) -> dict[str, Any]:
        return self._state

    def fail(self, fault: WinnowError) -> None:
        self._fault = self._fault or fault

    def fault(self) -> WinnowError | None:
        return self._fault


class _watch:
    """Shows what the board says, twice a second, while the block runs."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._progress = Progress("train")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="winnow-progress", daemon=True)

    def __enter__(self) -> None:
        self._progress.__enter__()
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)
        self._progress.__exit__(None, None, None)

    def _run(self) -> None:
        import ray
        from ray.exceptions import RayError

        while not self._ended.wait(_POLL_S):
            try:
                state = ray.get(self._board.state.remote(), timeout=30)
            except RayError as error:
                logger.debug("no progress this time: %s", error)
                continue
            if state:
                self._progress.total = state["total"]
                self._progress.update(state["done"], state["failed"], state["note"])
