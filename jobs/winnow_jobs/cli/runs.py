"""``winnow runs``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from winnow_jobs.cli.main import Call

_SHOWN = ["run_id", "status", "num_asked", "num_failed"]
"""Columns for people: whole run ids on 80 columns; `show` and --json have the rest."""


@click.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  winnow runs
  winnow runs show 20260131-094512-predict-1f0c9a
  winnow runs resume 20260131-094512-predict-1f0c9a
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List all runs, newest first; or show, resume or abandon one."""
    if ctx.invoked_subcommand is None:
        from winnow_jobs.cli.output import print_table

        runs = ctx.obj.workspace.runs()
        print_table(runs if as_json else runs.select(_SHOWN), "json" if as_json else "table")


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@command.command(epilog="Example: winnow runs show 20260131-094512-predict-1f0c9a")
@click.argument("run_id")
@_json_option
@click.pass_obj
def show(call: Call, run_id: str, as_json: bool) -> None:
    """Everything known of one run: counts, failures, seconds by stage, verdict."""
    from winnow_jobs.runs import show_run

    row = show_run(call.workspace, run_id)
    if as_json:
        click.echo(json.dumps(row, default=str))
        return
    for name, value in row.items():
        if value not in (None, {}, []):
            click.echo(f"{name:18} {_plain(value)}")


@command.command(epilog="Example: winnow runs resume 20260131-094512-predict-1f0c9a")
@click.argument("run_id")
@_json_option
@click.pass_obj
def resume(call: Call, run_id: str, as_json: bool) -> None:
    """Finish an open run with the options it was started with."""
    from winnow_connectors.registry import Move
    from winnow_jobs.augment import AugmentResult
    from winnow_jobs.cli import augment, duplicates, ingest, models, output, selection, train
    from winnow_jobs.duplicates import DuplicatesResult
    from winnow_jobs.ingest import IngestResult
    from winnow_jobs.selection import SelectResult
    from winnow_jobs.train import TrainResult

    result = call.workspace.resume(run_id)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    elif isinstance(result, IngestResult):
        ingest.print_result(result)
    elif isinstance(result, AugmentResult):
        augment.print_result(result)
    elif isinstance(result, DuplicatesResult):
        duplicates.print_result(result)
    elif isinstance(result, SelectResult):
        selection.print_result(result)
    elif isinstance(result, Move):
        models.print_move(result)
    elif isinstance(result, TrainResult):
        train.print_result(result)
    else:
        output.print_predict(result)


@command.command(epilog="Example: winnow runs abandon 20260131-094512-predict-1f0c9a")
@click.argument("run_id")
@_json_option
@click.pass_obj
def abandon(call: Call, run_id: str, as_json: bool) -> None:
    """Give an open run up: what it wrote will never count, and its images are pending again."""
    status = call.workspace.abandon(run_id)
    if as_json:
        click.echo(json.dumps({"run_id": run_id, "status": status}))
    elif status == "abandoned":
        click.echo(f"run {run_id} is abandoned; its images are pending again")
    else:
        click.echo(f"run {run_id} was published before it could be abandoned: it is {status}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in sorted(value.items()))
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
