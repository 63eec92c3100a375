"""``winnow select``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_jobs.selection import SelectResult


@click.command(
    epilog="""\b
Examples:
  winnow select --budget 500
  winnow select --budget 500 --task objects --policy mixed --dry-run
  winnow select --budget 150 --audit-share 1              # an audit alone, for winnow accept
  winnow select --budget 100 --json | jq .reasons
  winnow query "SELECT rank, reason, score, uri FROM queue_waiting WHERE NOT audit ORDER BY round, rank LIMIT 20"
"""
)
@click.option("--budget", type=int, required=True, help="How many images people can look at, audit images included.")
@click.option("--task", help="The classification or segmentation task; the only one of winnow.toml by default.")
@click.option("--policy", help="A [policies.NAME] section of winnow.toml; the one of [select] by default.")
@click.option("--audit-share", type=float, help="Share of the budget from the audit reserve; 1 for an audit alone.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides what is random, and between equals.")
@click.option("--dry-run", is_flag=True, help="Choose, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    call: Call,
    budget: int,
    task: str | None,
    policy: str | None,
    audit_share: float | None,
    seed: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Choose the images that people should see next, the most useful first, and queue them for review.

    A policy mixes reasons to ask: uncertainty, diversity, class balance, chance. It chooses from the train split, never
    an image that is labelled or was in the queue before, and of near-duplicates one. A share of the budget comes from
    the audit reserve, to be labelled blind. Each call is a round of its own in the table `queue`; the view
    queue_waiting shows what nobody has answered yet.
    """
    result = call.workspace.select(
        budget, task=task, policy=policy, audit_share=audit_share, seed=seed, dry_run=dry_run
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_result(result)


def print_result(result: SelectResult) -> None:
    """Counts for people, and what to ask next."""
    if result.status == "nothing to do":
        click.echo(f"nothing to do: {result.verdict}")
        return
    lines = [("chosen", result.num_chosen)]
    lines += [(f"  by {name}", count) for name, count in result.reasons.items()]
    lines += [("  for the audit", result.num_audit)]
    width = max(len(name) for name, _ in lines)
    digits = max(len(f"{count:,}") for _, count in lines)
    for name, count in lines:
        click.echo(f"{name:{width}}  {count:>{digits},}")
    where = "dry run, nothing is written" if result.run_id is None else f"run {result.run_id}, round {result.round}"
    click.echo(f"{where}: {result.verdict}; {result.seconds['total']:,.1f} s")
    if result.run_id is not None:
        click.echo(
            'next: winnow query "SELECT rank, reason, score, uri FROM queue_waiting ORDER BY round, rank LIMIT 20"'
        )
