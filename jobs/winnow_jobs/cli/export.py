"""``winnow export``."""

from __future__ import annotations

import click

from winnow_jobs.cli.main import Call


@click.group(epilog="Example: winnow export results --to results.parquet")
def command() -> None:
    """Write what is current to files, for engines that see no views, and masks for people."""


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
    help="Parquet, CSV, or COCO JSON (images, categories, annotations; of segments with their masks).",
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


@command.command(
    epilog="""\b
Examples:
  winnow export masks --task parts --to masks/
  winnow export masks --task parts --to s3://bucket/masks --overlay --limit 100
  winnow export masks --task parts --to masks/ --where "split = 'test'"
"""
)
@click.option("--task", required=True, help="The segmentation task.")
@click.option("--to", required=True, help="The folder: a path, or s3://bucket/prefix (gs://, az://).")
@click.option("--overlay", is_flag=True, help="Also draw each mask on its image, as JPEG.")
@click.option("--where", metavar="SQL", help="Only images for which this holds: a condition over current_images.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many images, in the order of image_id.")
@click.option("--overwrite", is_flag=True, help="Write files anew that are there; they are kept without it.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@click.pass_obj
def masks(
    call: Call, task: str, to: str, overlay: bool, where: str | None, limit: int | None, overwrite: bool, as_json: bool
) -> None:
    """The masks of a segmentation task: one PNG per image, whose values are the ids of the classes.

    Each has the size of its image. `classes.json` says what the values mean, `index.csv` which file belongs to which
    image. An export that was stopped goes on where it was.
    """
    from winnow_jobs.cli.output import print_masks

    written = call.workspace.export_masks(task, to, overlay=overlay, where=where, limit=limit, overwrite=overwrite)
    print_masks(written, "json" if as_json else "table")
