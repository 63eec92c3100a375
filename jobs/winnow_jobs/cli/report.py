"""``winnow report``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from winnow_jobs.cli.main import Call


@click.command(
    epilog="""\b
Examples:
  winnow report
  winnow report --task garment --to garment.html
  winnow report --no-images --to numbers.html
  winnow report --json | jq -r .path
"""
)
@click.option("--task", "tasks", multiple=True, help="Only this task; may be given again. All but embeddings without.")
@click.option("--to", type=click.Path(path_type=Path), help="The file; report.html beside winnow.toml by default.")
@click.option("--no-images", is_flag=True, help="Leave thumbnails and overlays out.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@click.pass_obj
def command(call: Call, tasks: tuple[str, ...], to: Path | None, no_images: bool, as_json: bool) -> None:
    """Write what the tables say as one HTML file, which needs no network and runs no script.

    For each task: how good the answers are, by the labels of the test split and by the last look of `winnow accept`;
    where the model errs; the images that it is most and least sure of; versions, people, failures and runs. Images are
    thumbnails without metadata and without names. A file that is there is replaced.
    """
    result = call.workspace.report(tasks, to=to, images=not no_images)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
        return
    about = ", ".join(result.tasks) or "no task"
    click.echo(
        f"{result.path}: {result.num_bytes / 1e6:.1f} MB about {result.num_images:,} images ({about}) with "
        f"{result.num_pictures:,} thumbnails, in {result.seconds:.1f} s"
    )
    if result.num_unreadable:
        click.echo(f"{result.num_unreadable:,} images could not be read to be shown; the page says why")
