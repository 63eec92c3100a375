"""``winnow runs``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
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
    """The story of one run: counts, failures with examples, seconds by stage, verdict, configuration."""
    from winnow_jobs.cli.output import print_lines
    from winnow_jobs.runs import show_run

    row = show_run(call.workspace, run_id)
    if as_json:
        click.echo(json.dumps(row, default=str))
    else:
        print_lines(story(row))


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


def story(row: Mapping[str, Any]) -> list[str]:
    """What ``show_run`` tells, for people."""
    lines = [
        f"run {row['run_id']}: {row['job']}, {row['status']}",
        f"started   {row['started_at']:%Y-%m-%d %H:%M:%S} UTC on {row['host']}, winnow {row['code_version']}",
    ]
    if finished := row.get("finished_at"):
        lines.append(f"finished  {finished:%Y-%m-%d %H:%M:%S} UTC")
    lines += [f"stopped   {reason}" for reason in row.get("stops", ())]
    totals = [f"{row[f'num_{name}']:,} {name}" for name in ("asked", "answered", "failed") if row.get(f"num_{name}")]
    lines += [", ".join(totals)] if totals else []
    by_task = {key: count for key, count in row["counts"].items() if not key.startswith("error.")}
    lines += _section("counts", [f"{key:24} {count:>12,}" for key, count in sorted(by_task.items())])
    failures = []
    for kind, count in sorted(row["failures"].items(), key=lambda item: (-item[1], item[0])):
        failures.append(f"{count:>9,}  {kind}")
        failures += [_example(example) for example in row.get("examples", ()) if example["error"] == kind]
    lines += _section("failures", failures)
    lines += _section("seconds", [f"{stage:24} {spent:>12,.2f}" for stage, spent in sorted(row["seconds"].items())])
    if row.get("peak_memory_bytes"):
        lines.append(f"peak memory of all workers: {row['peak_memory_bytes'] / 1e9:,.1f} GB")
    lines += _section("configuration", _settings("", json.loads(row["config"])))
    return [*lines, f"verdict: {row['verdict']}"] if row.get("verdict") else lines


def _example(failed: Mapping[str, Any]) -> str:
    where = f"{failed['uri'] or failed['image_id']} ({failed['task']}, {failed['stage']})"
    return f"{'':11}{where}: {failed['message']}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _settings(prefix: str, value: Any) -> list[str]:
    """What was set, one ``dotted.key value`` each; long lists are counted."""
    if isinstance(value, dict):
        return [line for key, entry in value.items() for line in _settings(f"{prefix}.{key}".lstrip("."), entry)]
    if value in (None, "", []):
        return []
    shown = f"{len(value):,} values" if isinstance(value, list) and len(value) > 8 else json.dumps(value)
    return [f"{prefix} {shown}"]
