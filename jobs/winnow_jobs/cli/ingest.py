"""``winnow ingest``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_jobs.ingest import IngestResult


@click.command(
    epilog="""\b
Examples:
  winnow ingest photographs/
  winnow ingest s3://bucket/photos/ --pattern '{split}/{label}/*'
  winnow ingest s3://bucket/a/ s3://bucket/b/ --exclude '*.json'
  winnow ingest list.csv                     # uri, and any of etag, size, label, mask, split, group, …
  winnow ingest --manifest s3://inventory/bucket/daily/2026-01-31T00-00Z/manifest.json
  winnow ingest urls.txt --stat              # http(s):// URIs, one per line; asks each server for size and version
"""
)
@click.argument("sources", nargs=-1, required=True, metavar="URI…")
@click.option(
    "--manifest", is_flag=True, help="Take every URI as a manifest, whatever its name, or a folder of manifests."
)
@click.option(
    "--pattern", help="What the path says: {label}, {split}, {group}, {anything else}; * one part, ** any number."
)
@click.option("--task", help="The task whose labels or masks come in; the only one of that kind by default.")
@click.option("--include", multiple=True, metavar="GLOB", help="Take only paths that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out paths that match; may be repeated.")
@click.option("--no-vanish", is_flag=True, help="Do not mark images that the sources no longer list as vanished.")
@click.option("--stat", is_flag=True, help="Ask storage for objects of a manifest that has no etag: one request each.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    call: Call,
    sources: tuple[str, ...],
    manifest: bool,
    pattern: str | None,
    task: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    no_vanish: bool,
    stat: bool,
    as_json: bool,
) -> None:
    """Make images known: local folders, s3://, gs://, az://, http(s)://, or manifests that list them.

    Only what is new, changed or gone since the last time is written; no image is opened. An image keeps the split and
    the side of the audit reserve that it got first. Files that end in .parquet, .pq, .csv, .csv.gz or .txt are
    manifests.
    """
    result = call.workspace.ingest(
        sources,
        manifest=manifest,
        pattern=pattern,
        task=task,
        include=include or None,
        exclude=exclude or None,
        vanish=not no_vanish,
        stat=stat,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_result(result)


def print_result(result: IngestResult) -> None:
    """Counts for people."""
    lines = [
        ("listed", f"{result.num_listed:,}"),
        ("added", f"{result.num_added:,}"),
        ("changed", f"{result.num_changed:,}"),
        ("vanished", f"{result.num_vanished:,}"),
        ("unchanged", f"{result.num_unchanged:,}"),
    ]
    if result.num_labels:
        lines.append(("labels imported", f"{result.num_labels:,}"))
    if result.num_masks:
        lines.append(("masks imported", f"{result.num_masks:,}"))
    if result.num_unmatched:
        lines.append(("path does not match", f"{result.num_unmatched:,}"))
    lines += [(f"skipped: {reason.replace('_', ' ')}", f"{count:,}") for reason, count in result.skipped.items()]
    width = max(len(name) for name, _ in lines)
    digits = max(len(value) for _, value in lines)
    for name, value in lines:
        click.echo(f"{name:{width}}  {value:>{digits}}")
    where = f"run {result.run_id}: " if result.run_id else ""
    click.echo(
        f"{where}{result.verdict}; {result.seconds.get('total', 0.0):,.1f} s, {result.images_per_s:,.0f} objects/s"
    )
