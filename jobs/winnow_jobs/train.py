"""``winnow train TASK``: from the current labels to a model version.

Labels (``labelled``), claim, train, measure on val and test, publish. Two ways to train: a whole network on the cluster
(``training``), which goes on from its last checkpoint when it was cut short; or with ``--head`` a head on frozen
features (``heads``) in the calling process, which is simply done again. The labels are written down with the plan, so
the same call joins a run that was cut short, and makes the same version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from winnow import __version__
from winnow.errors import CallError, JobError, StoppedError, WinnowError
from winnow.models.cards import BASE, Card, Head, LabelsSnapshot, parse_version, version_name
from winnow.models.references import ResolvedModel, resolve_backbone
from winnow.splits import SPLITS
from winnow_connectors.ledger import Plan, Run, digest_of, new_run_id
from winnow_connectors.registry import train_work
from winnow_jobs.heads import MOST_FEATURES, HeadJob, learn_labels, learn_masks
from winnow_jobs.labelled import (
    LABELS,
    UNLABELLED,
    LabelledImages,
    from_parquet,
    labelled_images,
    to_parquet,
    unlabelled_images,
)
from winnow_jobs.measuring import left_out_sentences, to_safetensors
from winnow_jobs.training.spec import FineTuneSpec, WorkersDiedError, make_spec

if TYPE_CHECKING:
    from winnow.config import TaskConfig
    from winnow_connectors.registry import Version
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

TRAINER = 4
"""Raised when the same labels give another version than before."""

_READING = ("precision", "scaled_decoding", "max_bytes", "max_pixels")
"""Keys of ``[predict]`` that decide the features."""

_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class TrainResult:
    """What a train call did.

    Attributes:
        status: ``finished`` or ``nothing to do``.
        version: the model version made, or the one that these labels made before.
        run_id: that made it.
        parent: id of the model that it is built on.
        num_images: that could be used, by split.
        metrics: by split, as on the card.
        warnings: what is worth knowing before relying on it, one sentence each.
        seconds: by stage.
    """

    status: str
    version: str
    run_id: str
    parent: str
    num_images: Mapping[str, int]
    metrics: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


def train(
    workspace: Workspace,
    task: str,
    *,
    head: bool = False,
    start: str | None = None,
    seed: int = 0,
    limit_labels: int | None = None,
) -> TrainResult:
    """Learn from the current labels of a task, and publish a model version, which answers nothing yet.

    Args:
        workspace: configuration and warehouse.
        task: its name.
        head: fit a head on frozen features of the model of winnow.toml, in this process; else a whole network on the
            cluster, as the section ``[train]`` says.
        start: the version whose weights a whole network starts from, ``<task>@<n>`` or ``<task>@base``; the one in
            production by default.
        seed: of whatever is drawn.
        limit_labels: use at most this many labelled images of the train split, drawn by hash.

    Raises:
        CallError: no such task, no or too few labels, labels that are no class, a model without features.
        OpenRunError: a different training of the task is open.
        StoppedError: access or storage failed for too many images.
        JobError: the features are not finite, or the run was abandoned meanwhile.
    """
    config = workspace.config.task(task)
    if head and start is not None:
        raise CallError("--head always starts from the model of winnow.toml; leave out --head or --from")
    if config.kind == "embedding":
        raise CallError(f"{task} is an embedding, which has nothing to learn from labels")
    if limit_labels is not None and limit_labels < 2:
        raise CallError(f"--limit-labels {limit_labels} is not valid; give a number of at least 2")
    if head and config.multiple_choice:
        raise CallError(f"several classes an image are learned by the whole network only; leave out --head for {task}")
    if config.classes is None and config.kind == "segmentation":
        raise CallError(f"tasks.{task} needs classes in winnow.toml: the names of the values in its masks, from 0 on")
    workspace.warehouse.check()
    ledger, registry, work = workspace.warehouse.ledger, workspace.warehouse.registry, train_work(task)
    labels = labelled_images(workspace.query_engine(), task, config, limit=limit_labels, seed=seed)
    _check_enough(labels, task, config)
    made_of = {
        "task": task,
        "kind": config.kind,
        "classes": list(config.classes or ()),
        "seed": seed,
        "labels": labels.digest(),
        "reading": {name: getattr(workspace.config.predict, name) for name in _READING},
        "trainer": TRAINER,
    }
    plan: dict[str, Any]
    if head:
        model = resolve_backbone(config, base_dir=workspace.folder, fetch=workspace.stores.download)
        plan = {**made_of, "backbone": json.loads(model.to_json())}
        digest = digest_of({**plan, "backbone": {**plan["backbone"], "location": ""}})
    else:
        from winnow_jobs.predict import check_before_the_start

        model = starting_model(workspace, task, start)
        check_before_the_start(workspace, [model])
        spec = make_spec(workspace.config, task, model, seed)
        plan = {**made_of, "training": spec.to_dict()}
        digest = digest_of({**made_of, "training": spec.digest_source()})
    for _ in range(_MAX_ATTEMPTS):
        # In this order: a version that is published after the look is seen by the claim.
        numbers = ledger.next_numbers([work])
        made = registry.made_from(task, digest)
        if made is not None:
            return _result(made, "nothing to do", model.id, registry.card(made).metrics)
        run = ledger.join([work], digest)
        if run is not None:
            logger.info("run %s is open with the same labels; %s", run.run_id, "doing it again" if head else "going on")
            try:
                return work_off(workspace, run)
            except StoppedError as error:
                raise StoppedError(
                    f"{error}. Run {run.run_id} keeps the images that it began with: if some are gone for good, give "
                    f"it up with `winnow runs abandon {run.run_id}`, then train again"
                ) from None
        run_id = new_run_id("train")
        workspace.warehouse.store.put(f"runs/{run_id}/{LABELS}", labels.to_parquet())
        if head and config.kind == "classification":
            unlabelled = unlabelled_images(workspace.query_engine(), labels, MOST_FEATURES)
            workspace.warehouse.store.put(f"runs/{run_id}/{UNLABELLED}", to_parquet(unlabelled))
        run = ledger.begin(
            Plan(
                run_id=run_id,
                job="train",
                claims=numbers,
                digest=digest,
                config={**plan, "left_out": {"unsure": labels.num_unsure, "leaking": labels.num_leaking}},
                num_planned=0,
                started_at=datetime.now(UTC).isoformat(),
                code_version=__version__,
            )
        )
        if run is None:
            continue  # another training was faster; look again
        try:
            return work_off(workspace, run)
        except (KeyboardInterrupt, WinnowError) as error:
            if not head and isinstance(error, KeyboardInterrupt | WorkersDiedError):
                raise  # the same call goes on from the last checkpoint
            # Or else a training with one label more would be refused; nothing of this run is of use to it.
            ledger.abandon(run, str(error) or "stopped with Ctrl-C")
            raise
    raise JobError(f"other trainings were faster {_MAX_ATTEMPTS} times; run the command again")


def work_off(workspace: Workspace, run: Run) -> TrainResult:
    """Train what the plan of a run says, and publish it.

    Raises:
        CallError: another Winnow planned it, whose trainer would make something else of it.
        StoppedError, JobError: as ``train``.
    """
    started = time.monotonic()
    plan = run.plan.config
    if plan["trainer"] != TRAINER:
        raise CallError(
            f"run {run.run_id} was planned by Winnow {run.plan.code_version}, whose trainer was number "
            f"{plan['trainer']}; this one's is {TRAINER} and learns differently. Give it up with `winnow runs abandon "
            f"{run.run_id}`, then train again"
        )
    labels = LabelledImages.from_parquet(run.store.get(run.key(LABELS)))
    trained = _train_whole(workspace, run) if "training" in plan else _train_head(workspace, run, labels)
    model = trained.model
    number = dict(run.plan.claims)[train_work(plan["task"])]
    card = Card(
        task=plan["task"],
        version=version_name(plan["task"], number),
        kind=plan["kind"],
        architecture=model.architecture,
        head=trained.head,
        classes=tuple(plan["classes"]),
        view=model.view,
        mean=model.mean,
        std=model.std,
        temperature=trained.temperature,
        metrics=trained.metrics,
        labels=LabelsSnapshot(digest=plan["labels"], counts=trained.counts),
        parent=model.id,
        digest=run.plan.digest,
        seed=plan["seed"],
        created_at=datetime.now(UTC).isoformat(),
        winnow_version=__version__,
        sha256=hashlib.sha256(trained.weights).hexdigest(),
        run=run.run_id,
        multi_label=trained.multi_label,
    )
    warnings = (*_left_out(plan.get("left_out", {})), *trained.warnings)
    seconds = {**trained.seconds, "total": time.monotonic() - started}
    registry = workspace.warehouse.registry
    summary = {
        "tasks": [card.task],
        "counts": {f"images.{split}": count for split, count in trained.num_images.items()},
        "failures": dict(trained.failures),
        "seconds": seconds,
        "verdict": f"{card.version}: {_headline(trained.metrics)}",
    }
    if not registry.publish(run, card, trained.weights, summary):
        outcome = run.close()
        made = registry.made_from(card.task, run.plan.digest)
        if outcome["status"] != "finished" or made is None:
            raise JobError(f"run {run.run_id} was abandoned while it worked: {outcome['summary'].get('verdict')}")
        return _result(made, "finished", model.id, made.metrics)  # another driver of the same run was faster
    made = registry.version(card.version)
    return dataclasses.replace(
        _result(made, "finished", model.id, trained.metrics),
        num_images=dict(trained.num_images),
        warnings=warnings,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


@dataclass(frozen=True)
class _Trained:
    """What both ways of training end with.

    Attributes:
        model: that it started from.
        head: as on the card.
        weights: a safetensors file.
        temperature, metrics, counts: as on the card.
        num_images: that could be used, by split.
        failures: images left out, by kind of error.
        warnings: one sentence each.
        seconds: by stage.
        multi_label: as on the card.
    """

    model: ResolvedModel
    head: Head
    weights: bytes
    temperature: float
    metrics: dict[str, Any]
    counts: dict[str, dict[str, int]]
    num_images: Mapping[str, int]
    failures: Mapping[str, int]
    warnings: list[str]
    seconds: Mapping[str, float]
    multi_label: bool = False


def _train_head(workspace: Workspace, run: Run, labels: LabelledImages) -> _Trained:
    plan = run.plan.config
    backbone = ResolvedModel.from_json(json.dumps(plan["backbone"]))
    is_dense = plan["kind"] == "segmentation"
    learn = learn_masks if is_dense else learn_labels
    job = HeadJob(
        workspace,
        plan["task"],
        plan["kind"],
        tuple(plan["classes"]),
        plan["seed"],
        backbone,
        labels,
        workspace.config.predict.model_copy(update=plan["reading"]),
        [] if is_dense else from_parquet(run.store.get(run.key(UNLABELLED))).to_pylist(),
    )
    learned = learn(job)
    return _Trained(
        model=backbone,
        head=learned.head_name,
        weights=to_safetensors(job.state | {f"head.{key}": value for key, value in learned.head.state_dict().items()}),
        temperature=learned.temperature,
        metrics=learned.metrics,
        counts=learned.counts,
        num_images=job.num_images,
        failures=job.failures,
        warnings=job.warnings(),
        seconds=job.seconds,
    )


def _train_whole(workspace: Workspace, run: Run) -> _Trained:
    from winnow_jobs.training.driver import fine_tune

    spec = FineTuneSpec.from_dict(run.plan.config["training"])
    tuned = fine_tune(workspace, run, spec)
    return _Trained(
        model=spec.start,
        head=spec.start.head or ("pyramid" if spec.is_dense else "linear"),
        weights=tuned.weights,
        temperature=tuned.temperature,
        metrics=tuned.metrics,
        counts=tuned.counts,
        num_images=tuned.num_images,
        failures=tuned.failures,
        warnings=[*tuned.warnings, *left_out_sentences(tuned.failures, tuned.examples)],
        seconds=tuned.seconds,
        multi_label=spec.target == "classes",
    )


def starting_model(workspace: Workspace, task: str, version: str | None = None) -> ResolvedModel:
    """What a whole network starts from: a version, or the model of winnow.toml, with its head if it knows the classes.

    Args:
        workspace: where.
        task: its name.
        version: ``<task>@<n>`` or ``<task>@base``; the one in production by default.

    Raises:
        CallError: no such version, or a model that cannot be trained.
    """
    config = workspace.config.task(task)
    chosen = version or workspace.warehouse.registry.production(task)
    if parse_version(chosen)[1] is not None:
        return workspace.task_model(task, chosen)
    backbone = resolve_backbone(config, base_dir=workspace.folder, fetch=workspace.stores.download)
    if config.kind == "classification":
        try:
            return workspace.task_model(task, f"{task}@{BASE}")
        except CallError as error:  # other classes than the task's: a starting point, no answer
            logger.debug("starting from the backbone alone: %s", error)
    return backbone


def _result(made: Version, status: str, parent: str, metrics: Mapping[str, Any]) -> TrainResult:
    num_images = {split: int(metrics[split]["n"]) for split in SPLITS if "n" in metrics.get(split, {})}
    return TrainResult(status, made.name, made.run, parent, num_images, metrics)


def _headline(metrics: Mapping[str, Any]) -> str:
    test = metrics["test"]
    for key, name in (("accuracy", "accuracy"), ("exact_match", "exact match"), ("mean_iou", "mean IoU")):
        if key in test:
            return f"{name} {test[key]:.3f} on {test['n']:,} images of the test split"
    return "measured on no image of the test split"


def _check_enough(labels: LabelledImages, task: str, config: TaskConfig) -> None:
    """Something to learn from.

    Raises:
        CallError: there is not.
    """
    of_train = labels.of("train")
    if not of_train.num_rows:
        counted = ", ".join(f"{labels.of(split).num_rows:,} {split}" for split in SPLITS)
        raise CallError(f"no image of the train split has a label for {task} (labels: {counted}); label some")
    if config.kind == "classification" and not config.multiple_choice:
        found = sorted(set(of_train["label"].to_pylist()))
        if len(found) < 2:
            raise CallError(
                f"all {of_train.num_rows:,} labels of {task} in the train split are {found[0]!r}; a classifier needs "
                "at least two classes: label others"
            )


def _left_out(counts: Mapping[str, int]) -> list[str]:
    said = []
    if counts.get("unsure"):
        said.append(f"{counts['unsure']:,} labels say neither class nor mask and were left out")
    if counts.get("leaking"):
        said.append(
            f"{counts['leaking']:,} labelled images were left out: near-duplicates of theirs lie in a split that "
            "measures"
        )
    return said
