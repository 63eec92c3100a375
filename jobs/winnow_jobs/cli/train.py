"""``winnow train``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_jobs.train import TrainResult


@click.command(
    epilog="""\b
Examples:
  winnow train garment --head                       # minutes on a CPU
  winnow train garment                              # the whole network, from what is in production
  winnow train garment --from garment@base --seed 1
  winnow train garment --json | jq .metrics.test.accuracy
"""
)
@click.argument("task")
@click.option(
    "--head", is_flag=True, help="Fit a head on frozen features of the model of winnow.toml, in this process."
)
@click.option(
    "--from",
    "start",
    metavar="VERSION",
    help="The version to start from, such as garment@2 or garment@base; the one in production by default.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of whatever is drawn.")
@click.option(
    "--limit-labels",
    type=click.IntRange(min=2),
    help="Learn from at most this many labelled images of the train split, drawn by hash.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    call: Call, task: str, head: bool, start: str | None, seed: int, limit_labels: int | None, as_json: bool
) -> None:
    """Make a model version of a task from its current labels.

    Trains the whole network on the cluster, as the section [train] of winnow.toml says, and goes on from its last
    checkpoint when it was cut short; with --head only a head on frozen features.

    The train split teaches, val chooses, test measures; images of the audit reserve are never used. The version answers
    nothing until it is promoted. The same labels and seed make no second version.
    """
    result = call.workspace.train(task, head=head, start=start, seed=seed, limit_labels=limit_labels)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_result(result)


def print_result(result: TrainResult) -> None:
    """What was made, how good it is, and what to do with it."""
    if result.status == "nothing to do":
        click.echo(f"nothing to do: {result.version} was made from the same labels, seed and model {result.parent}")
    else:
        click.echo(f"{result.version} is made from {result.parent}, run {result.run_id}")
    for split in ("val", "test"):
        click.echo(f"{split:5} {_figures(result.metrics.get(split, {}))}")
    if result.seconds:
        click.echo("seconds: " + ", ".join(f"{stage} {value:,.1f}" for stage, value in result.seconds.items()))
    for warning in result.warnings:
        click.echo(f"note: {warning}")
    click.echo(f"next: winnow models show {result.version}, then winnow models promote {result.version}")


def _figures(measured: dict[str, Any]) -> str:
    if not measured.get("n"):
        return "no image with a label"
    figures = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items() if isinstance(value, float)]
    return f"{measured['n']:,} images: {', '.join(figures)}"
