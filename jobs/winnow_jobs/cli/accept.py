"""``winnow accept``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow.audit import AuditStatistics
    from winnow_jobs.accept import AcceptResult


@click.command(
    epilog="""\b
Examples:
  winnow accept garment --max-error 0.02
  winnow accept garment --max-error 0.05 --confidence 0.9 --per-class --json | jq .num_accepted
  winnow query "SELECT source, count(*) FROM results WHERE task = 'garment' GROUP BY 1"
"""
)
@click.argument("task")
@click.option("--max-error", type=float, required=True, help="Highest share of wrong answers among those accepted.")
@click.option(
    "--confidence",
    type=float,
    default=0.95,
    show_default=True,
    help="Probability with which every claim about the task holds, over all looks together.",
)
@click.option("--per-class", is_flag=True, help="A claim for each class on its own; they share what may go wrong.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(call: Call, task: str, max_error: float, confidence: float, per_class: bool, as_json: bool) -> None:
    """Accept the largest set of answers whose error rate is at most what you ask for.

    The promise rests on the blind audit: on the images of the audit reserve, in the order of their hashes, up to the
    first that nobody has answered. Skips count as errors. Each look at new labels is paid for, so look when there are
    more of them; the same labels are looked at once. What is accepted stands in the view results as `accepted`, until
    the next look.
    """
    result = call.workspace.accept(task, max_error=max_error, confidence=confidence, per_class=per_class)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_result(result)


def print_result(result: AcceptResult) -> None:
    """The claims, and what they leave to people."""
    if result.status == "refused":
        click.echo(f"refused: {result.verdict}")
        return
    done = "" if result.run_id is None else f" (run {result.run_id}, look {result.look})"
    if result.status == "nothing to do":
        click.echo(f"nothing to do: the same labels were looked at before{done}")
    for name, claim in result.claims.items():
        what = "all classes" if name == "*" else name
        click.echo(
            f"{what}: confidence from {claim.threshold:.3f} on; {claim.num_wrong:,} wrong of {claim.num_audited:,} "
            f"audited, error rate at most {claim.bound:.2%}"
        )
    click.echo(f"{result.task} by {result.model}: {result.verdict}{done if result.status == 'finished' else ''}")
    if result.audit is not None:
        click.echo("\n".join(audit_lines(result.audit)))
    if result.claims:
        click.echo(f"{result.num_left:,} images are left to people; see the view results")
    elif result.num_needed:
        click.echo(f"{result.num_needed:,} more audit labels could be enough for a claim, if few answers are wrong")


def audit_lines(audit: AuditStatistics) -> list[str]:
    """Accuracy and drift, a sentence each."""
    found, drift = audit.accuracy, audit.drift
    lines = [
        f"accuracy without people: {found.value or 0.0:.1%} ({found.num_hits:,} of {found.num:,} audit images), "
        f"95% interval {found.low:.1%} to {found.high:.1%}"
    ]
    if drift is None:
        return [*lines, "drift: nothing to compare with yet"]
    if not drift.new.num or not drift.before.num:
        return [*lines, "drift: no audit image is new since the look before"]
    compared = (
        f"{drift.new.value or 0.0:.1%} of {drift.new.num:,} new audit images right, {drift.before.value or 0.0:.1%} of "
        f"the {drift.before.num:,} before (p = {drift.p_value:.2g})"
    )
    return [*lines, f"drift: {'ALARM, more than chance explains' if drift.alarm else 'none seen'}: {compared}"]
