"""``winnow jobs list|status|logs|stop``."""

from __future__ import annotations

import json

import click

from winnow_jobs.cli.submit import address_option

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(
    epilog="""\b
Examples:
  winnow jobs list --address http://head:8265
  winnow jobs logs winnow-predict-20260131-094512-1f0c9a --follow
  winnow jobs stop winnow-predict-20260131-094512-1f0c9a
"""
)
def command() -> None:
    """The jobs that `winnow submit` sent to a cluster: list them, follow or stop one."""


@command.command(name="list", epilog="Example: winnow jobs list --address http://head:8265 --json")
@address_option
@_json_option
def list_(address: str | None, as_json: bool) -> None:
    """All submitted jobs of a cluster, the newest first."""
    import pyarrow as pa

    from winnow_jobs.cli.output import print_table
    from winnow_jobs.cli.submit import describe
    from winnow_jobs.submit import Cluster

    jobs = [describe(job) for job in Cluster(address).jobs()]
    if as_json:
        click.echo(json.dumps(jobs))
    elif not jobs:
        click.echo("no job was submitted by winnow")
    else:
        print_table(pa.table({name: [job[name] for job in jobs] for name in ("job_id", "status", "exit_code")}))


@command.command(epilog="Example: winnow jobs status winnow-predict-20260131-094512-1f0c9a")
@click.argument("job_id")
@address_option
@_json_option
def status(job_id: str, address: str | None, as_json: bool) -> None:
    """What became of one job."""
    from winnow_jobs.cli.submit import describe
    from winnow_jobs.submit import Cluster

    job = describe(Cluster(address).job(job_id))
    if as_json:
        click.echo(json.dumps(job))
        return
    for name, value in job.items():
        if value not in (None, ""):
            click.echo(f"{name:10} {value}")


@command.command(epilog="Example: winnow jobs logs winnow-predict-20260131-094512-1f0c9a --follow")
@click.argument("job_id")
@click.option("--follow", "follows", is_flag=True, help="Go on until the job ends, and exit with its exit code.")
@address_option
@_json_option
def logs(job_id: str, follows: bool, address: str | None, as_json: bool) -> None:
    """What a job wrote: progress, result and verdict, as `winnow` writes them here."""
    from winnow_jobs.cli.submit import follow
    from winnow_jobs.submit import Cluster

    cluster = Cluster(address)
    if follows:
        follow(cluster, job_id, as_json=as_json)
        return
    lines = list(cluster.logs(job_id))
    click.echo(json.dumps({"job_id": job_id, "lines": lines}) if as_json else "\n".join(lines))


@command.command(epilog="Example: winnow jobs stop winnow-predict-20260131-094512-1f0c9a")
@click.argument("job_id")
@address_option
@_json_option
def stop(job_id: str, address: str | None, as_json: bool) -> None:
    """End a job; nothing half-done is visible, and the same command continues it."""
    from winnow_jobs.submit import Cluster

    stopped = Cluster(address).stop(job_id)
    if as_json:
        click.echo(json.dumps({"job_id": job_id, "stopped": stopped}))
    else:
        click.echo(f"job {job_id} {'is asked to stop' if stopped else 'had ended before'}")
