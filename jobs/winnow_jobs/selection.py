"""``winnow select``: choose the images that people should see next, and publish them as a round of the queue.

Works over tables only. What is chosen is computed before anything is claimed, so a call that is stopped or killed
leaves nothing behind; claiming and publishing take a moment, and a call that dies within it is finished by the same
call. Another selection of the task that was faster makes this one look again: no image is chosen twice.

Legend: N candidates, sorted by image_id; C classes.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow import __version__
from winnow.config import Config
from winnow.errors import CallError
from winnow.selection import COLUMNS, SCORES, Balance, Choice, Ranking, Repeats, Spread, Strategy, choose
from winnow.similarity import NearRule
from winnow_connectors.ledger import Plan, Run, digest_of, new_run_id
from winnow_jobs.candidates import Covered, Images, Labels, Question
from winnow_jobs.spec import answerer, views_of
from winnow_jobs.vectors import Vectors

if TYPE_CHECKING:
    from winnow_connectors.query import QueryEngine
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

AUDIT = "audit"
"""Reason of the images that come from the audit reserve."""

MAX_BUDGET = 1_000_000

_MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class SelectCall:
    """What decides the choice, beside the tables. Part of the plan.

    Attributes:
        task, model: whose answers are looked at.
        kind: of the task.
        budget: images to choose.
        policy: its name.
        shares: of its strategies.
        audit_share: of the budget, from the audit reserve.
        seed: decides what is random, and between equals.
        embedding, embedding_model: whose vectors say what is alike; None without an embedding task.
        threshold: cosine from which on images are near-duplicates.
    """

    task: str
    model: str
    kind: str
    budget: int
    policy: str
    shares: Mapping[str, float]
    audit_share: float
    seed: int
    embedding: str | None
    embedding_model: str | None
    threshold: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**data)

    @property
    def digest(self) -> str:
        return digest_of({"job": "select", **asdict(self)})

    @property
    def question(self) -> Question:
        return Question(self.task, self.model, self.kind)

    @property
    def num_audit(self) -> int:
        return math.floor(self.budget * self.audit_share + 0.5)


@dataclass(frozen=True)
class SelectResult:
    """What was chosen.

    Attributes:
        status: ``finished``, ``dry run`` or ``nothing to do``.
        run_id: of the run; None when nothing was written.
        task, model: whose answers were looked at.
        policy: its name.
        round: number of the selection; None when nothing was written.
        num_chosen: images, the audit images included.
        num_audit: images of the audit reserve.
        reasons: images chosen by each strategy.
        num_candidates: images that could have been chosen by the policy.
        num_repeats: candidates passed over because they show what people know or what was chosen before them.
        seconds: by stage.
        verdict: the outcome in one sentence.
    """

    status: str
    run_id: str | None
    task: str
    model: str
    policy: str
    round: int | None = None
    num_chosen: int = 0
    num_audit: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    num_candidates: int = 0
    num_repeats: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""


def select(
    workspace: Workspace,
    budget: int,
    *,
    task: str | None = None,
    policy: str | None = None,
    audit_share: float | None = None,
    seed: int = 0,
    dry_run: bool = False,
) -> SelectResult:
    """Choose images for people and put them into the queue.

    Args:
        workspace: configuration and warehouse.
        budget: how many, audit images included.
        task: classification or segmentation task; the only one of the configuration by default.
        policy: name of a policy; that of ``[select]`` by default.
        audit_share: of the budget, from the audit reserve; that of ``[select]`` by default. With 1 there is
            an audit alone, also where the reserve is short.
        seed: another one chooses otherwise where the policy leaves it open.
        dry_run: choose, and write nothing.

    Raises:
        CallError: no such task or policy, an option out of range, no answers yet, or a strategy that the task's answers
            do not allow.
        OpenRunError: another selection of the task is open with other options.
    """
    if not 1 <= budget <= MAX_BUDGET:
        raise CallError(f"--budget {budget} is not valid; give a number of images from 1 to {MAX_BUDGET:,}")
    if seed < 0:
        raise CallError(f"--seed {seed} is not valid; give 0 or a positive number")
    if audit_share is not None and not 0.0 <= audit_share <= 1.0:
        raise CallError(f"--audit-share {audit_share:g} is not valid; give a number from 0 to 1")
    config = workspace.config
    name = reviewed_task(config, task)
    kind = config.tasks[name].kind
    chosen = policy or config.select.policy
    shares = config.policy(chosen, kind).shares()
    if kind == "segmentation" and "margin" in shares:
        raise CallError(
            f"policy {chosen!r} wants margin, which masks do not have; task {name!r} can be chosen from by entropy or "
            "least_confidence"
        )
    embedding = _embedding(config, chosen, shares)
    workspace.warehouse.check()
    call = SelectCall(
        task=name,
        model=answerer_of(workspace, name),
        kind=kind,
        budget=budget,
        policy=chosen,
        shares=shares,
        audit_share=config.select.audit_share if audit_share is None else audit_share,
        seed=seed,
        embedding=embedding,
        embedding_model=answerer_of(workspace, embedding) if embedding else None,
        threshold=config.select.near_duplicates,
    )
    return carry_out(workspace, call, dry_run=dry_run)


def resume(workspace: Workspace, run: Run) -> SelectResult:
    """Finish an open selection with the options that it was started with."""
    return carry_out(workspace, SelectCall.from_dict(run.plan.config))


def reviewed_task(config: Config, name: str | None) -> str:
    """The task of that name that people can answer; the only one of the configuration without a name.

    Raises:
        CallError: no such task, an embedding task, or more than one to choose from.
    """
    if name is not None:
        if config.task(name).kind == "embedding":
            raise CallError(f"task {name!r} is an embedding task; people are asked about classes and masks only")
        return name
    names = [each for each, task in config.tasks.items() if task.kind != "embedding"]
    if not names:
        raise CallError("no classification or segmentation task is configured; add one to winnow.toml")
    if len(names) > 1:
        raise CallError(f"there are several tasks that people can answer; choose one with --task: {', '.join(names)}")
    return names[0]


def _embedding(config: Config, policy: str, shares: Mapping[str, float]) -> str | None:
    """The embedding task to use; None when there is none and none is needed.

    Raises:
        CallError: diversity is wanted and there is no embedding task, or several to choose from.
    """
    if config.select.embedding is not None:
        return config.select.embedding
    if len(config.embedding_tasks) == 1 or "diversity" not in shares:
        return config.embedding_tasks[0] if len(config.embedding_tasks) == 1 else None
    if not config.embedding_tasks:
        raise CallError(
            f"policy {policy!r} wants diversity, which needs vectors, and no embedding task is configured; add one to "
            'winnow.toml, such as [tasks.alike] with kind = "embedding" and model = '
            '"torchvision/mobilenet_v2@IMAGENET1K_V1", and run `winnow predict`, or take diversity out of the policy'
        )
    names = ", ".join(config.embedding_tasks)
    raise CallError(f"there are several embedding tasks; name one as embedding in [select] of winnow.toml: {names}")


def answerer_of(workspace: Workspace, task: str) -> str:
    """Value of the column ``model`` in what answers a task now."""
    model = workspace.task_model(task)
    return answerer(model, views_of(workspace.config, task, model))


def carry_out(workspace: Workspace, call: SelectCall, *, dry_run: bool = False) -> SelectResult:
    """Choose, claim, publish. Raises what ``select`` raises."""
    started = time.monotonic()
    ledger = workspace.warehouse.ledger
    work = f"select-{call.task}"
    for _ in range(_MAX_ATTEMPTS):
        # In this order: no selection is open and none is published unseen between the number and the look.
        numbers = ledger.next_numbers([work])
        run = None if dry_run else ledger.join([work], call.digest)
        selected = _look_and_choose(workspace, call)
        if dry_run or (run is None and not selected.num_rows):
            seconds = {**selected.seconds, "total": round(time.monotonic() - started, 3)}
            return _result_of(call, "dry run" if dry_run else "nothing to do", None, selected.counts, seconds)
        is_own = run is None
        if run is None:
            plan = Plan(
                run_id=new_run_id("select"),
                job="select",
                claims=numbers,
                digest=call.digest,
                config=asdict(call),
                num_planned=0,
                started_at=datetime.now(UTC).isoformat(),
                code_version=__version__,
            )
            run = ledger.begin(plan)
            if run is None:
                continue  # another selection claimed the same number; look again
        try:
            result = _publish(run, call, selected, started)
        except KeyboardInterrupt:
            if is_own:  # or else the next call with other options would be refused; nothing of this run is of use
                ledger.abandon(run, "stopped with Ctrl-C")
            raise
        if result is not None:
            return result
    raise CallError(f"other selections were faster {_MAX_ATTEMPTS} times; run the command again when they are done")


# --------------------------------------------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class _Selected:
    """What one look at the tables chose.

    Attributes:
        ids: of the policy's choices, the most useful first.
        choices: as many.
        audit_ids: in the order in which people see them.
        counts: for ``SelectResult``, with ``round``.
        seconds: by stage.
    """

    ids: Sequence[str]
    choices: Sequence[Choice]
    audit_ids: Sequence[str]
    counts: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def num_rows(self) -> int:
        return len(self.ids) + len(self.audit_ids)


def _look_and_choose(workspace: Workspace, call: SelectCall) -> _Selected:
    seconds: dict[str, float] = {}
    engine = workspace.query_engine()
    with _timed(seconds, "reading"):
        _check_answers(engine, call)
        labels = Labels()
        columns = [COLUMNS[name] for name in call.shares if name in COLUMNS]
        references = call.question.references(engine, labels)
        candidates = call.question.candidates(engine, columns, labels)
        audit_ids = call.question.audit_images(engine)[: call.num_audit]
        next_round = call.question.next_round(engine)
    num = len(candidates.ids_N)
    logger.info(
        "task %s: %d candidates, %d images that people know, read in %.1f s",
        call.task, num, len(references.ids_N), seconds["reading"],
    )  # fmt: skip
    rng = np.random.default_rng(call.seed)
    audit_ids = [audit_ids[place] for place in rng.permutation(len(audit_ids))]
    ties_N = rng.permutation(num)
    with _timed(seconds, "vectors"):
        covered = _cover(workspace, call, candidates, references, ties_N)
    with _timed(seconds, "choosing"):
        num_wanted = call.budget - len(audit_ids) if call.audit_share < 1.0 else 0
        choices, num_passed = choose_among(
            candidates, references, covered, call.shares, num_wanted, ties_N=ties_N, num_classes=len(labels)
        )
    counts = {
        "round": next_round,
        "chosen": len(choices) + len(audit_ids),
        "audit": len(audit_ids),
        "candidates": num,
        "repeats": num_passed,
        "vectors": 0 if covered is None else len(covered.indices_M),
        **{name: sum(choice.strategy == name for choice in choices) for name in call.shares},
    }
    ids = [candidates.ids_N[choice.index].decode() for choice in choices]
    return _Selected(ids, choices, audit_ids, counts, seconds)


def choose_among(
    candidates: Images,
    references: Images,
    covered: Covered | None,
    shares: Mapping[str, float],
    num: int,
    *,
    ties_N: NDArray[np.int64],
    num_classes: int,
) -> tuple[list[Choice], int]:
    """Choose up to ``num`` candidates by a policy, and pass over what repeats a reference or an earlier choice.

    Args:
        candidates: with the numbers that the policy's strategies look at.
        references: what people know already.
        covered: the candidates' vectors; None without any, and then without diversity.
        shares: of the strategies.
        num: how many.
        ties_N: a random permutation, for chance and between equals.
        num_classes: C; classes are numbered from 0 on.

    Returns:
        The choices, the most useful first, and how many candidates were passed over.
    """
    taken_N = candidates.same_as(references)
    hashes = (candidates.bytes_N, candidates.pixels_N)
    repeats = Repeats(hashes)
    if covered is not None:
        taken_N[covered.indices_M[covered.coverage.near_M]] = True
        repeats = Repeats(hashes, covered.coverage, covered.rows_N)
    counts_C = np.bincount(references.classes_N[references.classes_N >= 0], minlength=num_classes)
    strategies: dict[str, Strategy] = {}
    for name in shares:
        if name in SCORES:
            strategies[name] = Ranking(SCORES[name](candidates.numbers[COLUMNS[name]]), ties_N)
        elif name == "random":
            strategies[name] = Ranking(np.zeros(len(ties_N)), ties_N)
        elif name == "class_balance":
            strategies[name] = Balance(candidates.classes_N, counts_C, ties_N)
        elif covered is not None:
            strategies[name] = Spread(covered.coverage, covered.indices_M)
    choices, num_repeats = choose(strategies, shares, num, taken_N, repeats)
    return choices, int(taken_N.sum()) + num_repeats


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    before = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - before, 3)


def _check_answers(engine: QueryEngine, call: SelectCall) -> None:
    """Refuse what the answers in the tables do not allow.

    Raises:
        CallError: the model has answered nothing yet, or not with augmented views where disagreement is wanted.
    """
    num_answers, num_with_views = call.question.count_answers(engine)
    if not num_answers:
        raise CallError(
            f"task {call.task!r} has no answers by {call.model} yet; run `winnow predict --task {call.task}` first"
        )
    if "disagreement" in call.shares and not num_with_views:
        raise CallError(
            f"policy {call.policy!r} wants disagreement, and {call.model} answered task {call.task!r} without "
            f"augmented views; set augmentation in [tasks.{call.task}] and predict, or take disagreement out of the "
            "policy"
        )


def _cover(
    workspace: Workspace, call: SelectCall, candidates: Images, references: Images, ties_N: NDArray[np.int64]
) -> Covered | None:
    """The candidates' vectors; None without any.

    Raises:
        CallError: diversity is wanted and there are no vectors.
    """
    if call.embedding is None or call.embedding_model is None:
        return None
    vectors = Vectors.open(workspace.warehouse.tables, call.embedding, call.embedding_model)
    if vectors.is_empty:
        if "diversity" in call.shares:
            raise CallError(
                f"policy {call.policy!r} wants diversity, and task {call.embedding!r} has no vectors by "
                f"{call.embedding_model} yet; run `winnow predict --task {call.embedding}`, or choose a policy without "
                "diversity with --policy"
            )
        logger.warning("task %s has no vectors yet: near-duplicates are not looked for", call.embedding)
        return None
    rule = NearRule(threshold=call.threshold)
    return Covered.read(vectors, candidates, references, rule=rule, num=call.budget, order_N=ties_N)


# ----------------------------------------------------------------------------------------------------------- publishing


def _publish(run: Run, call: SelectCall, selected: _Selected, started: float) -> SelectResult | None:
    """Write, decide, commit. None when the run was abandoned meanwhile: then all is looked at anew."""
    fragments = [run.stage("queue", _rows(run, call, selected))] if selected.num_rows else []
    seconds = {**selected.seconds, "total": round(time.monotonic() - started, 3)}
    result = _result_of(call, "finished", run.run_id, selected.counts, seconds)
    summary = {
        "tasks": [call.task],
        "counts": dict(selected.counts),
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "verdict": result.verdict,
    }
    run.decide("finished", fragments, summary)
    outcome = run.close()
    if outcome["status"] != "finished":
        return None
    decided = outcome["summary"]  # perhaps by another driver of the same run
    logger.info("run %s: %s in %.1f s", run.run_id, decided["verdict"], decided["seconds"]["total"])
    return _result_of(call, "finished", run.run_id, decided["counts"], decided["seconds"])


def _rows(run: Run, call: SelectCall, selected: _Selected) -> pa.Table:
    """The rows of the queue: the policy's by usefulness, and the audit images in their random order."""
    num_policy, num_audit = len(selected.ids), len(selected.audit_ids)
    scores = [None if choice.strategy == "random" else choice.score for choice in selected.choices]
    constant = {
        "task": pa.scalar(call.task),
        "round": pa.scalar(selected.counts["round"], pa.int32()),
        "model": pa.scalar(call.model),
        "policy": pa.scalar(call.policy),
        "run": pa.scalar(run.run_id),
        "at": pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC")),
    }
    return pa.table(
        {
            "image_id": pa.array([*selected.ids, *selected.audit_ids], pa.string()),
            "reason": pa.array([*(choice.strategy for choice in selected.choices), *[AUDIT] * num_audit], pa.string()),
            "score": pa.array([*scores, *[None] * num_audit], pa.float64()),
            "rank": pa.array([*range(1, num_policy + 1), *range(1, num_audit + 1)], pa.int64()),
            "audit": pa.array([False] * num_policy + [True] * num_audit),
        }
        | {name: pa.repeat(value, num_policy + num_audit) for name, value in constant.items()}
    )


def _result_of(
    call: SelectCall, status: str, run_id: str | None, counts: Mapping[str, int], seconds: Mapping[str, float]
) -> SelectResult:
    num_policy = counts["chosen"] - counts["audit"]
    verdict = f"{num_policy:,} of {counts['candidates']:,} candidates and {counts['audit']:,} of the audit reserve"
    if counts["repeats"]:
        verdict += f"; {counts['repeats']:,} passed over as repetitions"
    if "diversity" in call.shares and counts["vectors"] < counts["candidates"]:
        verdict += f"; only {counts['vectors']:,} candidates have a vector for diversity"
    if counts["chosen"] < call.budget:
        verdict += f"; {call.budget - counts['chosen']:,} fewer than the budget: there are no more"
    if counts["audit"] < call.num_audit:
        verdict += f"; the audit reserve has {call.num_audit - counts['audit']:,} images too few"
    return SelectResult(
        status=status,
        run_id=run_id,
        task=call.task,
        model=call.model,
        policy=call.policy,
        round=counts["round"] if status == "finished" else None,
        num_chosen=counts["chosen"],
        num_audit=counts["audit"],
        reasons={name: counts[name] for name in call.shares},
        num_candidates=counts["candidates"],
        num_repeats=counts["repeats"],
        seconds=seconds,
        verdict=verdict,
    )
