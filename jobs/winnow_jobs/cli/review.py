"""``winnow review``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_jobs.pull import PullResult
    from winnow_jobs.push import PushResult
    from winnow_jobs.review_status import ReviewStatus

_task_option = click.option("--task", help="Only this classification or segmentation task; all of them by default.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(
    epilog="""\b
Examples:
  winnow select --budget 500
  winnow review push
  winnow review pull
  winnow review status
"""
)
def command() -> None:
    """Ask people in Label Studio about the images of the queue, and bring their answers back.

    LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY name and open the server; `winnow services up` runs one.
    """


@command.command(epilog="Example: winnow review push --task garment --json")
@_task_option
@_json_option
@click.pass_obj
def push(call: Call, task: str | None, as_json: bool) -> None:
    """Send what waits in the queue, the most useful first, with the model's answers drawn in.

    Annotators see copies without metadata, under names that tell nothing. Images of the audit reserve go into a project
    of their own, without any answer. Sending again sends only what is missing.
    """
    results = call.workspace.push(task=task)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(result) for result in results]))
        return
    for result in results:
        _print_push(result)
    if call.workspace.config.review.serve_originals:
        click.echo(
            "note: serve_originals is on: annotators see the original files, with their names, folders and metadata "
            "such as place and camera"
        )
    if any(result.project or result.audit_project for result in results):
        click.echo("next: people answer in Label Studio; then winnow review pull")


@command.command(epilog="Example: winnow review pull && winnow review status")
@_task_option
@_json_option
@click.pass_obj
def pull(call: Call, task: str | None, as_json: bool) -> None:
    """Bring answers, corrections, deletions and skips into the table `labels`.

    Only what changed since the last pull is read. Images about which people disagree go back into the queue.
    """
    results = call.workspace.pull(task=task)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(result) for result in results]))
        return
    for result in results:
        _print_pull(result)
    click.echo("next: winnow review status")


@command.command(epilog="Example: winnow review status --json | jq '.[0].hours_left'")
@_task_option
@_json_option
@click.pass_obj
def status(call: Call, task: str | None, as_json: bool) -> None:
    """Show how far people are, how fast, and how far they agree, by the last pull."""
    found = call.workspace.review_status(task=task)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(each) for each in found]))
        return
    for number, each in enumerate(found):
        if number:
            click.echo()
        _print_status(each)


def _print_push(result: PushResult) -> None:
    if result.project is None and result.audit_project is None and not result.num_failed:
        click.echo(f"{result.task}: nothing waits in the queue; `winnow select --budget N` chooses images")
        return
    click.echo(
        f"{result.task}: {result.num_new:,} new, {result.num_updated:,} updated, {result.num_known:,} known in Label "
        f"Studio; {result.seconds['total']:,.1f} s"
    )
    for what, project in (("review", result.project), ("audit", result.audit_project)):
        if project is not None:
            shown = f" ({result.num_audit:,} blind)" if what == "audit" else ""
            click.echo(f"  {what:6} {result.server}/projects/{project}/data{shown}")
    if result.num_unanswered:
        click.echo(
            f"  note: {result.num_unanswered:,} images have no answer by {result.model} yet, so nothing is drawn in; "
            f"`winnow predict --task {result.task}`, then push again"
        )
    if result.num_failed:
        click.echo(
            f"  note: {result.num_failed:,} images cannot be shown; "
            f"winnow query \"SELECT uri, error, message FROM failures WHERE model = 'review'\""
        )


def _print_pull(result: PullResult) -> None:
    if result.status == "nothing to do":
        click.echo(f"{result.task}: nothing new")
        return
    click.echo(
        f"{result.task}: {result.num_created:,} new, {result.num_changed:,} changed, {result.num_deleted:,} deleted, "
        f"{result.num_skipped:,} skipped; {result.num_corrected:,} correct the model; "
        f"{result.seconds['total']:,.1f} s"
    )
    if result.num_unreadable:
        click.echo(f"  note: {result.num_unreadable:,} annotations cannot be read; their reason stands in labels.value")
    if result.num_ties:
        click.echo(f"  note: people disagree about {result.num_ties:,} images; `winnow review push` asks again")


def _print_status(status: ReviewStatus) -> None:
    unsent = f", {status.num_unsent:,} of them not sent yet" if status.num_unsent else ""
    click.echo(f"{status.task}: {status.num_done:,} done, {status.num_waiting:,} waiting{unsent}")
    lines = [
        ("corrected", f"{status.num_corrected:,}{_share(status.num_corrected, status.num_done)}"),
        ("unsure or not listed", f"{status.num_unsure:,}"),
        ("skipped", f"{status.num_skipped:,}"),
        ("ties", f"{status.num_ties:,}"),
    ]
    if status.answers_per_hour is not None and status.hours_left is not None:
        lines.append(("rate", f"{status.answers_per_hour:,.0f} answers an hour for one person"))
        lines.append(("time left", f"{_hours(status.hours_left)} for one person"))
    agreement = status.agreement
    if agreement.num_images:
        parts = [f"{agreement.num_images:,} images answered by several people"]
        if agreement.percent is not None:
            parts.append(f"{agreement.percent:.1%} agreement")
        if agreement.fleiss_kappa is not None:
            parts.append(f"Fleiss' kappa {agreement.fleiss_kappa:.2f}")
        lines.append(("agreement", ", ".join(parts)))
        lines += [("", f"Cohen's kappa {kappa:.2f}: {pair}") for pair, kappa in agreement.cohen_kappa.items()]
    for name, text in lines:
        click.echo(f"  {name:20}  {text}")
    for person in status.annotators:
        parts = [f"{person.num_answers:,} answers", f"{person.num_corrected:,} corrections"]
        if person.num_skipped:
            parts.append(f"{person.num_skipped:,} skipped")
        if person.median_seconds is not None:
            parts.append(f"{person.median_seconds:,.1f} s each (median)")
        if person.agreement is not None:
            parts.append(f"{person.agreement:.0%} with the majority")
        click.echo(f"  {person.name:20}  {', '.join(parts)}")


def _share(part: int, whole: int) -> str:
    return f" ({part / whole:.0%} of the answers)" if whole else ""


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.0f} minutes"
