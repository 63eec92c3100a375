"""``winnow predict``."""

from __future__ import annotations

import dataclasses
import json

import click

from winnow_jobs.cli.main import Call


@click.command(
    epilog="""\b
Examples:
  winnow predict                                     # all tasks, all pending images
  winnow predict --task objects --limit 1000
  winnow predict --model garment@2                   # this version, whichever is in production
  winnow predict --where "split = 'test' AND metadata['camera'] = 'north'"
  winnow predict --dry-run                           # how many would be asked
  winnow predict --retry-failures                    # what storage failed to give last time
"""
)
@click.option("--task", "tasks", multiple=True, help="A task of winnow.toml; may be repeated. All tasks by default.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="VERSION",
    help="A model version, TASK@NUMBER or TASK@base (that of winnow.toml), instead of the one in production.",
)
@click.option("--where", help="SQL condition over current_images: only images that meet it.")
@click.option("--limit", type=int, help="At most this many images.")
@click.option("--new", is_flag=True, help="Only images that no model version of the task has answered.")
@click.option(
    "--retry-failures",
    is_flag=False,
    flag_value="storage",
    type=click.Choice(["storage", "all"]),
    help="Ask failed images again: those that may succeed another time (storage, the default), or all.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be asked; write nothing.")
@click.option("--num-cpus", type=click.IntRange(min=1), help="CPUs of the Ray started on this machine; all by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    call: Call,
    tasks: tuple[str, ...],
    models: tuple[str, ...],
    where: str | None,
    limit: int | None,
    new: bool,
    retry_failures: str | None,
    dry_run: bool,
    num_cpus: int | None,
    as_json: bool,
) -> None:
    """Answer every pending image exactly once, or list it in `failures` with the reason why not.

    Running it again asks only what is new; after a crash it continues where it was. Exit code 0 when every image asked
    has an outcome, 1 when the job failed, 2 when the call was wrong.
    """
    from winnow_jobs.cli.output import print_predict

    call.workspace.num_cpus = num_cpus
    result = call.workspace.predict(
        list(tasks) or None,
        models=models,
        where=where,
        limit=limit,
        new=new,
        retry_failures=retry_failures,
        dry_run=dry_run,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_predict(result)
