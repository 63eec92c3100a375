"""``winnow augment``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_jobs.augment import AugmentResult


@click.command(
    epilog="""\b
Examples:
  winnow augment mild --to ./augmented --where "split = 'train'"
  winnow augment strong --to s3://photos/augmented --copies 3 --format jpeg
  winnow augment mild --to ./augmented --dry-run     # how many images would be copied
"""
)
@click.argument("policy")
@click.option("--to", required=True, help="Folder or prefix (s3://bucket/prefix) for the copies.")
@click.option("--copies", "num_copies", type=int, default=1, show_default=True, help="Copies of each image.")
@click.option("--where", help="SQL condition over current_images: only images that meet it.")
@click.option("--limit", type=int, help="At most this many images.")
@click.option(
    "--format",
    type=click.Choice(["png", "jpeg"]),
    default="png",
    show_default=True,
    help="png keeps every pixel; jpeg (quality 95) is several times smaller and faster.",
)
@click.option(
    "--retry-failures",
    is_flag=False,
    flag_value="storage",
    type=click.Choice(["storage", "all"]),
    help="Try failed images again: those that may succeed another time (storage, the default), or all.",
)
@click.option("--dry-run", is_flag=True, help="Say how many images would be copied; write nothing.")
@click.option("--num-cpus", type=click.IntRange(min=1), help="CPUs of the Ray started on this machine; all by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    call: Call,
    policy: str,
    to: str,
    num_copies: int,
    where: str | None,
    limit: int | None,
    format: str,
    retry_failures: str | None,
    dry_run: bool,
    num_cpus: int | None,
    as_json: bool,
) -> None:
    """Write augmented copies of images by a policy of winnow.toml, as images with split and labels of their originals.

    Copies are made of current images only; never of other copies, and never of images in the audit reserve. Running it
    again copies only what is new; after a crash it continues where it was.
    """
    call.workspace.num_cpus = num_cpus
    result = call.workspace.augment(
        policy,
        to,
        num_copies=num_copies,
        where=where,
        limit=limit,
        format=format,
        retry_failures=retry_failures,
        dry_run=dry_run,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_result(result)


def print_result(result: AugmentResult) -> None:
    """Say what an augment call did."""
    from winnow_jobs.cli.output import print_lines, work_lines

    if result.status == "dry run":
        lines = [f"{result.num_asked:,} images would be copied by {result.policy} to {result.destination}"]
        lines += [result.verdict] if result.verdict else []
    elif result.run_id is None:
        lines = [f"{result.status}: every image asked has its copies by {result.policy} in {result.destination}"]
    else:
        lines = [
            f"run {result.run_id} {result.status}: {result.num_copies:,} copies by {result.policy} "
            f"in {result.destination}",
            *work_lines(result),
        ]
    print_lines(lines)
