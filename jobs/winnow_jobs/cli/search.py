"""``winnow search``."""

from __future__ import annotations

from pathlib import Path

import click

from winnow_jobs.cli.main import Call


@click.command(
    epilog="""\b
Examples:
  winnow search photo.jpg
  winnow search s3://photos/2026/000123.jpg -k 30 --sheet alike.png
  winnow search 4f1b7d2c9be04ef5a3c8d0f6e7a19b22 --where "split = 'train'"
  winnow search photo.jpg --json | jq '.[0].uri'
  winnow search photo.jpg -k 1000 --output alike.csv
"""
)
@click.argument("image", metavar="IMAGE|IMAGE_ID|URI")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="How many images.")
@click.option("--task", help="The embedding task whose vectors are compared; the only one of winnow.toml by default.")
@click.option("--where", help="SQL condition over current_images: only images that meet it.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also draw a contact sheet, as PNG, to this file.")
@click.option(
    "--format",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    help="How rows are written; a table by default, or as the name of --output ends. Parquet needs --output.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--output", type=click.Path(path_type=Path), help="Write to this file, whole or not at all.")
@click.option("--overwrite", is_flag=True, help="Replace the files of --output and --sheet.")
@click.pass_obj
def command(
    call: Call,
    image: str,
    k: int,
    task: str | None,
    where: str | None,
    sheet: Path | None,
    format: str | None,
    as_json: bool,
    output: Path | None,
    overwrite: bool,
) -> None:
    """Find the images most like one image: a file, a known image_id, or a URI, which need not be known.

    Compares the vector of the image with those of all current images that the task's model has answered, exactly.
    Similarity is the cosine, 1 for the same picture. The image itself is left out.
    """
    from winnow_jobs.cli.output import choose_format, print_table

    format = choose_format(format, as_json, output)
    result = call.workspace.search(image, k=k, task=task, where=where)
    if sheet is not None:
        from winnow_jobs.search import draw_sheet

        draw_sheet(call.workspace, result, sheet, overwrite=overwrite)
    print_table(result.rows, format, output=output, overwrite=overwrite, max_rows=k)
