"""``winnow duplicates``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_jobs.duplicates import DuplicatesResult


@click.command(
    epilog="""\b
Examples:
  winnow duplicates
  winnow duplicates --task alike --threshold 0.96
  winnow duplicates --json | jq .num_groups
  winnow query "SELECT group_id, uri, split, kind, similarity FROM duplicate_groups ORDER BY num_images DESC, group_id"
  winnow query "SELECT uri, outlier_score FROM outliers ORDER BY outlier_score DESC LIMIT 20"
"""
)
@click.option("--task", help="The embedding task whose vectors are compared; the only one of winnow.toml by default.")
@click.option(
    "--threshold",
    type=float,
    help="Cosine from which on vectors alone make near-duplicates; 0.94 by default, which suits MobileNetV2.",
)
@click.option("--k", "k", type=int, default=5, show_default=True, help="Outliers are far from their k-th neighbour.")
@click.option("--num-cpus", type=click.IntRange(min=1), help="CPUs of the Ray started on this machine; all by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(call: Call, task: str | None, threshold: float | None, k: int, num_cpus: int | None, as_json: bool) -> None:
    """Find images that show the same (same bytes, same pixels, near-duplicates), and images unlike all others.

    Compares all current images that the task's model has answered, each with each, and writes the tables `duplicates`
    and `neighbours`; the views duplicate_groups, outliers and quarantined show the last run. When nothing was added or
    removed since then, nothing is done.
    """
    call.workspace.num_cpus = num_cpus
    result = call.workspace.duplicates(task=task, threshold=threshold, k=k)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_result(result)


def print_result(result: DuplicatesResult) -> None:
    """Counts for people, and what to ask next."""
    lines = [
        ("images compared", result.num_images),
        ("groups", result.num_groups),
        ("same bytes", result.num_members["bytes"]),
        ("same pixels", result.num_members["pixels"]),
        ("near-duplicates", result.num_members["near"]),
        ("groups across splits", result.num_leaks),
        ("kept from training", result.num_quarantined),
    ]
    width = max(len(name) for name, _ in lines)
    digits = max(len(f"{count:,}") for _, count in lines)
    for name, count in lines:
        click.echo(f"{name:{width}}  {count:>{digits},}")
    took = f"; {result.seconds['total']:,.1f} s" if result.seconds else ""
    run = f"run {result.run_id}: " if result.status == "finished" else ""
    click.echo(f"{run}{result.verdict}{took}")
    if result.num_groups:
        click.echo('next: winnow query "SELECT group_id, uri, split, kind, similarity FROM duplicate_groups"')
    if result.run_id:
        click.echo('      winnow query "SELECT uri, outlier_score FROM outliers ORDER BY outlier_score DESC LIMIT 20"')
