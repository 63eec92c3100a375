"""``winnow train TASK --head``: a head on the frozen features of the task's starting model.

Labels (``labelled``), claim, features (``features``), fit on the train split, measure on val and test, publish. All in
the calling process. The labels are written down with the plan, so a training that was cut short is simply done again:
the same call joins it, and makes the same version.
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
from winnow.errors import CallError, JobError, WinnowError
from winnow.models.cards import Card, LabelsSnapshot, version_name
from winnow.models.references import ResolvedModel, resolve_backbone
from winnow.splits import SPLITS
from winnow_connectors.ledger import Plan, Run, digest_of, new_run_id
from winnow_connectors.registry import train_work
from winnow_jobs.heads import HeadJob, learn_labels, learn_masks
from winnow_jobs.labelled import LabelledImages, labelled_images

if TYPE_CHECKING:
    from winnow.config import Kind
    from winnow_connectors.registry import Version
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

TRAINER = 2
"""Raised when the same labels give another version than before."""

_READING = ("precision", "scaled_decoding", "max_bytes", "max_pixels")
"""Keys of ``[predict]`` that decide the features."""

_LABELS = "labels.parquet"
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
    workspace: Workspace, task: str, *, head: bool, seed: int = 0, limit_labels: int | None = None
) -> TrainResult:
    """Fit a head on the current labels of a task, and publish it as a model version, which answers nothing yet.

    Args:
        workspace: configuration and warehouse.
        task: its name.
        head: only a head can be trained so far.
        seed: of whatever is drawn.
        limit_labels: use at most this many labelled images of the train split, drawn by hash.

    Raises:
        CallError: no such task, no or too few labels, labels that are no class, a model without features.
        OpenRunError: a different training of the task is open.
        StoppedError: access or storage failed for too many images.
        JobError: the features are not finite, or the run was abandoned meanwhile.
    """
    config = workspace.config.task(task)
    if not head:
        raise CallError(f"whole networks cannot be trained yet; `winnow train {task} --head` trains a head on {task}")
    if config.kind == "embedding":
        raise CallError(f"{task} is an embedding, which has nothing to learn from labels")
    if limit_labels is not None and limit_labels < 2:
        raise CallError(f"--limit-labels {limit_labels} is not valid; give a number of at least 2")
    if config.classes is None and config.kind == "segmentation":
        raise CallError(f"tasks.{task} needs classes in winnow.toml: the names of the values in its masks, from 0 on")
    workspace.warehouse.check()
    ledger, registry, work = workspace.warehouse.ledger, workspace.warehouse.registry, train_work(task)
    labels = labelled_images(workspace.query_engine(), task, config, limit=limit_labels, seed=seed)
    _check_enough(labels, task, config.kind)
    backbone = resolve_backbone(config, base_dir=workspace.folder, fetch=workspace.stores.download)
    plan = {
        "task": task,
        "kind": config.kind,
        "classes": list(config.classes or ()),
        "seed": seed,
        "labels": labels.digest(),
        "backbone": json.loads(backbone.to_json()),
        "reading": {name: getattr(workspace.config.predict, name) for name in _READING},
        "trainer": TRAINER,
    }
    digest = digest_of({**plan, "backbone": {**plan["backbone"], "location": ""}})
    for _ in range(_MAX_ATTEMPTS):
        # In this order: a version that is published after the look is seen by the claim.
        numbers = ledger.next_numbers([work])
        made = registry.made_from(task, digest)
        if made is not None:
            return _result(made, "nothing to do", backbone.id, registry.card(made).metrics)
        run = ledger.join([work], digest)
        if run is not None:
            logger.info("run %s is open with the same labels; doing it again", run.run_id)
            return work_off(workspace, run)
        run_id = new_run_id("train")
        workspace.warehouse.store.put(f"runs/{run_id}/{_LABELS}", labels.to_parquet())
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
            # Or else a training with one label more would be refused; nothing of this run is of use to it.
            ledger.abandon(run, str(error) or "stopped with Ctrl-C")
            raise
    raise JobError(f"other trainings were faster {_MAX_ATTEMPTS} times; run the command again")


def work_off(workspace: Workspace, run: Run) -> TrainResult:
    """Train what the plan of a run says, and publish it. Raises what ``train`` raises."""
    started = time.monotonic()
    plan = run.plan.config
    backbone = ResolvedModel.from_json(json.dumps(plan["backbone"]))
    labels = LabelledImages.from_parquet(run.store.get(run.key(_LABELS)))
    learn = learn_masks if plan["kind"] == "segmentation" else learn_labels
    job = HeadJob(
        workspace,
        plan["task"],
        plan["kind"],
        tuple(plan["classes"]),
        plan["seed"],
        backbone,
        labels,
        workspace.config.predict.model_copy(update=plan["reading"]),
    )
    learned = learn(job)
    warnings = (*_left_out(plan.get("left_out", {})), *job.warnings())
    weights = _to_safetensors(job.state | {f"head.{key}": value for key, value in learned.head.state_dict().items()})
    number = dict(run.plan.claims)[train_work(job.task)]
    card = Card(
        task=job.task,
        version=version_name(job.task, number),
        kind=job.kind,
        architecture=backbone.architecture,
        head=learned.head_name,
        classes=job.classes,
        view=backbone.view,
        mean=backbone.mean,
        std=backbone.std,
        temperature=learned.temperature,
        metrics=learned.metrics,
        labels=LabelsSnapshot(digest=plan["labels"], counts=learned.counts),
        parent=backbone.id,
        digest=run.plan.digest,
        seed=job.seed,
        created_at=datetime.now(UTC).isoformat(),
        winnow_version=__version__,
        sha256=hashlib.sha256(weights).hexdigest(),
        run=run.run_id,
    )
    seconds = {**job.seconds, "total": time.monotonic() - started}
    registry = workspace.warehouse.registry
    summary = {
        "tasks": [job.task],
        "counts": {f"images.{split}": count for split, count in job.num_images.items()},
        "failures": dict(job.failures),
        "seconds": seconds,
        "verdict": f"{card.version}: {_headline(learned.metrics)}",
    }
    if not registry.publish(run, card, weights, summary):
        outcome = run.close()
        made = registry.made_from(job.task, run.plan.digest)
        if outcome["status"] != "finished" or made is None:
            raise JobError(f"run {run.run_id} was abandoned while it worked: {outcome['summary'].get('verdict')}")
        return _result(made, "finished", backbone.id, made.metrics)  # another driver of the same run was faster
    made = registry.version(card.version)
    return dataclasses.replace(
        _result(made, "finished", backbone.id, learned.metrics),
        num_images=dict(job.num_images),
        warnings=warnings,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def _result(made: Version, status: str, parent: str, metrics: Mapping[str, Any]) -> TrainResult:
    num_images = {split: int(metrics[split]["n"]) for split in SPLITS if "n" in metrics.get(split, {})}
    return TrainResult(status, made.name, made.run, parent, num_images, metrics)


def _headline(metrics: Mapping[str, Any]) -> str:
    test = metrics["test"]
    for key, name in (("accuracy", "accuracy"), ("mean_iou", "mean IoU")):
        if key in test:
            return f"{name} {test[key]:.3f} on {test['n']:,} images of the test split"
    return "measured on no image of the test split"


def _check_enough(labels: LabelledImages, task: str, kind: Kind) -> None:
    """Something to learn from.

    Raises:
        CallError: there is not.
    """
    of_train = labels.of("train")
    if not of_train.num_rows:
        counted = ", ".join(f"{labels.of(split).num_rows:,} {split}" for split in SPLITS)
        raise CallError(f"no image of the train split has a label for {task} (labels: {counted}); label some")
    if kind == "classification":
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


def _to_safetensors(state: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    return save({key: tensor.contiguous() for key, tensor in sorted(state.items())})
