"""``winnow init``."""

from __future__ import annotations

import json

import click

from winnow_jobs.cli.main import Call
from winnow_jobs.template import write_template


@click.command(
    epilog="""\b
Examples:
  winnow init                          # warehouse in ./warehouse
  winnow init --warehouse s3://lab/winnow
"""
)
@click.option(
    "--warehouse", default="./warehouse", show_default=True, help="Folder or object-store prefix for the tables."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def command(call: Call, warehouse: str, as_json: bool) -> None:
    """Write a commented winnow.toml, unless there is one, and create the warehouse."""
    written = write_template(call.config_path, warehouse=warehouse)
    created = call.workspace.init()
    result = {
        "config": str(call.config_path),
        "config_written": written,
        "warehouse": call.workspace.warehouse.uri,
        "warehouse_created": created,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"{'wrote' if written else 'kept '}   {call.config_path}")
    click.echo(f"{'created' if created else 'found  '} {call.workspace.warehouse.uri}")
    click.echo("next: winnow ingest FOLDER_OR_BUCKET && winnow predict")
