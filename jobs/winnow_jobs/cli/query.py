"""``winnow query``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from winnow_jobs.cli.main import Call


@click.command(
    epilog="""\b
Examples:
  winnow query "SELECT label, count(*) FROM predictions GROUP BY 1"
  winnow query "SELECT uri, error, message FROM failures" --format csv > failures.csv
  winnow query "FROM results WHERE confidence < 0.5" --format parquet --output doubtful.parquet
  winnow query "SHOW TABLES"
  winnow query - < report.sql
"""
)
@click.argument("statement")
@click.option(
    "--format",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    help="How rows are written; a table by default, or as the name of --output ends. Parquet needs --output.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--output", type=click.Path(path_type=Path), help="Write to this file, whole or not at all.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --output.")
@click.option(
    "--max-rows",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Rows drawn on a terminal; every other output has all.",
)
@click.pass_obj
def command(
    call: Call, statement: str, format: str | None, as_json: bool, output: Path | None, overwrite: bool, max_rows: int
) -> None:
    """Ask the tables and views with SQL (of DuckDB), read-only; `-` reads the statement from standard input.

    Views: results, current_images, latest_predictions, latest_outcomes, failures, current_labels. SHOW TABLES lists
    all, DESCRIBE results shows the columns. A wrong query shows the engine's message and the columns there are.
    """
    from winnow_jobs.cli.output import choose_format, print_table

    format = choose_format(format, as_json, output)
    if statement == "-":
        statement = sys.stdin.read()
    print_table(call.workspace.query_reader(statement), format, output=output, overwrite=overwrite, max_rows=max_rows)
