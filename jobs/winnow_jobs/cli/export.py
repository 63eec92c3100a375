"""``winnow export``."""

from __future__ import annotations

import click

from winnow_jobs.cli.main import Call


@click.group(epilog="Example: winnow export results --to results.parquet")
def command() -> None:
    """Write what is current to files, for engines that see no views."""


@command.command(
    epilog="""\b
Examples:
  winnow export results --to results.parquet
  winnow export results --to s3://bucket/exports/results.csv --format csv
  winnow export results --to results.json --format coco --overwrite
"""
)
@click.option("--to", required=True, help="The file: a path, or s3://bucket/name (gs://, az://).")
@click.option(
    "--format",
    type=click.Choice(["parquet", "csv", "coco"]),
    default="parquet",
    show_default=True,
    help="Parquet, CSV, or COCO JSON (images, categories, annotations without boxes).",
)
@click.option("--overwrite", is_flag=True, help="Replace a file of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@click.pass_obj
def results(call: Call, to: str, format: str, overwrite: bool, as_json: bool) -> None:
    """The view `results`: one row per image and task, with the source of its label.

    The file appears when it is complete, or not at all.
    """
    from winnow_jobs.cli.output import print_export

    written = call.workspace.export_results(to, format=format, overwrite=overwrite)
    print_export(written, "json" if as_json else "table")
