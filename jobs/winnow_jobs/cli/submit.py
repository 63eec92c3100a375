"""``winnow submit``."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from winnow.errors import CallError
from winnow_jobs.cli.main import Call, cli

if TYPE_CHECKING:
    from winnow_jobs.submit import Cluster, SubmittedJob

_HERE = ("demo", "jobs", "services", "submit")
"""Commands of this machine alone."""

_PLACES = ("sources", "to", "image")
"""Parameters that name a file, folder or URL without being of click's type Path."""

_LOGGED = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<level>[A-Z]+) \S+:|winnow: |{"time": "\d{4}-')
"""How a line starts that a command writes to standard error."""

address_option = click.option(
    "--address",
    metavar="URL",
    help="The cluster, such as http://head:8265; RAY_API_SERVER_ADDRESS or RAY_ADDRESS by default.",
)


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
Examples:
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token
  winnow submit predict --task objects --address http://head:8265
  winnow submit ingest s3://photos/2026/ --address http://head:8265 --detach
  winnow submit predict --retries 3       # the cluster runs it again when its driver dies
  winnow submit predict --json | jq .result.num_failed
""",
)
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="JOB ARGUMENTS…")
@address_option
@click.option("--detach", is_flag=True, help="Print the job's id and return; this machine may go away.")
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How often the cluster runs the command again when its driver dies or the job fails.",
)
@click.option("--json", "as_json", is_flag=True, help="Print job and result as JSON; the log goes to standard error.")
@click.pass_obj
def command(
    call: Call, arguments: tuple[str, ...], address: str | None, detach: bool, retries: int, as_json: bool
) -> None:
    """Run any job on a Ray cluster: the same command line as here, after `submit`.

    This Winnow and winnow.toml go with it; secrets do not: the cluster has its own. The log is followed until the job
    ends, with its exit code. Ctrl-C ends the following only. The same command again continues a job that died.
    """
    from winnow_jobs.submit import Cluster

    sent = (*arguments, "--json") if as_json else arguments
    check_command(sent)
    cluster = Cluster(address)
    job_id = cluster.submit(
        sent, call.config_path, retries=retries, log_format=click.get_current_context().find_root().params["log_format"]
    )
    if detach:
        click.echo(json.dumps({"job_id": job_id}) if as_json else job_id)
        click.echo(f"winnow: follow it with `winnow jobs logs {job_id} --follow`", err=True)
        return
    click.echo(f"winnow: job {job_id} at {cluster.address}", err=True)
    follow(cluster, job_id, as_json=as_json)


def follow(cluster: Cluster, job_id: str, *, as_json: bool = False) -> None:
    """Show a job's log until it ends, and exit with its exit code.

    The cluster keeps one log; what goes to standard error here is told apart by its looks.
    """
    result: list[str] = []
    terminal = sys.stderr.isatty()

    def show(line: str) -> None:
        if logged := _LOGGED.match(line):
            passing = terminal and logged["level"] == "INFO"  # on a terminal, one line that the next one replaces
            text = f"\x1b[2K{line[logged.end() :].strip()[: shutil.get_terminal_size().columns - 1]}\r"
            click.echo(text if passing else line, err=True, nl=not passing)
            return
        if as_json:
            result[:] = [line]
        else:
            click.echo(line)

    try:
        job = cluster.follow(job_id, show)
    except KeyboardInterrupt:
        click.echo(
            f"\nwinnow: no longer following; the job goes on. `winnow jobs logs {job_id} --follow` follows it, "
            f"`winnow jobs stop {job_id}` ends it.",
            err=True,
        )
        sys.exit(130)
    if as_json:
        click.echo(json.dumps({**describe(job), "result": _result(result)}))
    if job.status == "STOPPED":
        click.echo(f"winnow: job {job_id} was stopped; the same command continues it", err=True)
        sys.exit(130)
    if job.status == "FAILED" and job.exit_code is None:
        click.echo(f"winnow: job {job_id} ended before its command did: {job.message}", err=True)
    elif job.exit_code is not None and not 0 <= job.exit_code <= 2:
        click.echo(f"winnow: the driver of job {job_id} died; the same command, or --retries N, continues it", err=True)
    sys.exit(exit_code(job))


def exit_code(job: SubmittedJob) -> int:
    """Of an ended job, as the same command would have had it here."""
    if job.status == "STOPPED":
        return 130
    return job.exit_code if job.exit_code is not None and 0 <= job.exit_code <= 255 else 1


def describe(job: SubmittedJob) -> dict[str, Any]:
    """A job for JSON."""
    import dataclasses

    return dataclasses.asdict(job)


def _result(lines: Sequence[str]) -> Any:
    """What the job printed as JSON: its last line; None when it printed none."""
    for line in lines:
        with contextlib.suppress(ValueError):
            return json.loads(line)
    return None


def check_command(arguments: Sequence[str]) -> None:
    """Find a wrong command line here, before anything is sent.

    Raises:
        UsageError: no such command, or wrong options.
        CallError: the command is for this machine alone, or names files that the cluster does not have.
    """
    job: click.Command = cli
    context = click.Context(cli, info_name="winnow")
    rest = list(arguments)
    while isinstance(job, click.Group) and rest and not rest[0].startswith("-"):
        name, found, rest = job.resolve_command(context, rest)
        if name in _HERE:
            raise CallError(f"`winnow {name}` is for this machine; submit a job, such as predict")
        assert found is not None
        context, job = click.Context(found, info_name=name, parent=context), found
    if job is cli or (isinstance(job, click.Group) and not job.invoke_without_command):
        raise click.UsageError(f"a job is missing: {shlex.join(('winnow', 'submit', *arguments))}", context)
    parsed = job.make_context(context.info_name, rest, parent=context.parent)
    for parameter in job.params:
        values = parsed.params.get(parameter.name or "")
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and (isinstance(value, Path) or parameter.name in _PLACES):
                _check_place(str(value), parameter)


def _check_place(value: str, parameter: click.Parameter) -> None:
    is_address = "://" in value or Path(value).is_absolute()
    if is_address or (parameter.name == "image" and not Path(value).exists()):
        return
    raise CallError(
        f"{parameter.opts[0]} {value}: a path of this machine, which the cluster does not see; give a URL such as "
        "s3://bucket/prefix, or an absolute path that all its nodes share"
    )
