"""``winnow services up|down|status``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from winnow.config import Config, load_config
from winnow.errors import ConfigError
from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_jobs.daemons import ServiceStatus

_S3, _LABEL_STUDIO = _NAMES = ("s3", "label-studio")

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_only_option = click.option("--only", type=click.Choice(_NAMES), help="This one and not the other.")


@click.group(
    epilog="""\b
Examples:
  winnow services up --bucket photos
  winnow services up --only s3
  winnow services status
  winnow services down
"""
)
def command() -> None:
    """Run a local S3 server and a local Label Studio for this workspace: for trying things out, on this machine only.

    Their keys, data and logs are in .winnow/services beside winnow.toml. S3 needs the extra `local`:
    pip install 'winnow-vision[local]'. Label Studio is installed there at the first start: about 1 GB, some minutes.
    """


@command.command(
    epilog="""\b
Examples:
  winnow services up
  winnow services up --bucket photos --bucket tables --port 8333
  winnow services up --only label-studio
"""
)
@click.option("--bucket", "buckets", multiple=True, help="Create this bucket if it is not there; may be repeated.")
@click.option(
    "--port", type=click.IntRange(1024, 55535), help="Where S3 answers. By default a free one, kept for the next start."
)
@click.option("--label-studio-port", type=click.IntRange(1024, 65535), help="Where Label Studio answers; likewise.")
@_only_option
@_json_option
@click.pass_obj
def up(
    call: Call,
    buckets: tuple[str, ...],
    port: int | None,
    label_studio_port: int | None,
    only: str | None,
    as_json: bool,
) -> None:
    """Start the local servers, or find them running; they go on when this command ends."""
    from winnow_jobs import services

    folder = call.config_path.absolute().parent
    found = []
    if only != _LABEL_STUDIO:
        status = services.up(folder, port=port, buckets=buckets)
        found.append(status)
        if not as_json:
            _print(status)
            if status.config_section is not None and not _names(call.config_path, status.address):
                click.echo(f"\nput this into {call.config_path}:\n\n{status.config_section}")
    if only != _S3:
        if not as_json and not services.has_label_studio(folder):
            click.echo("installing Label Studio: about 1 GB, some minutes …", err=True)
        status = services.up_label_studio(folder, port=label_studio_port, files=_review_folder(call.config_path))
        found.append(status)
        if not as_json:
            _print(status)
            click.echo("\nits address and token as environment variables:\n")
            click.echo(f"set -a; . {shlex.quote(str(status.credentials_file))}; set +a")
    if as_json:
        _print_json(found)


@command.command(epilog="Example: winnow services down")
@_only_option
@_json_option
@click.pass_obj
def down(call: Call, only: str | None, as_json: bool) -> None:
    """End the local servers; their data stay for the next start."""
    from winnow_jobs import services

    _print_all(call, {_S3: services.down, _LABEL_STUDIO: services.down_label_studio}, only, as_json)


@command.command(epilog="Example: winnow services status --json")
@_only_option
@_json_option
@click.pass_obj
def status(call: Call, only: str | None, as_json: bool) -> None:
    """Show whether the local servers run, where they answer, and where their files are."""
    from winnow_jobs import services

    _print_all(call, {_S3: services.status, _LABEL_STUDIO: services.status_label_studio}, only, as_json)


def _review_folder(config_path: Path) -> Path | None:
    """Where review copies lie when the warehouse is a local folder: Label Studio may show them from there."""
    try:
        config = load_config(config_path)
    except ConfigError:
        config = Config()
    uri = config.warehouse.uri
    return None if "://" in uri else config_path.absolute().parent / uri / "review"


def _names(config_path: Path, address: str | None) -> bool:
    """True when winnow.toml sends requests there already."""
    try:
        config = load_config(config_path)
    except ConfigError:
        return False
    return any(section.endpoint == address for section in config.storage.values())


def _print_all(call: Call, verbs: dict[str, Callable[[Path], ServiceStatus]], only: str | None, as_json: bool) -> None:
    found = [verb(call.config_path.absolute().parent) for name, verb in verbs.items() if only in (None, name)]
    if as_json:
        _print_json(found)
        return
    for status in found:
        _print(status)


def _print_json(found: Sequence[ServiceStatus]) -> None:
    click.echo(json.dumps({"services": [status.as_dict() for status in found]}))


def _print(status: ServiceStatus) -> None:
    click.echo(f"{status.name:12} {status.detail}")
    if status.address is None:
        return
    click.echo(f"{'address':12} {status.address}")
    if status.pid is not None:
        click.echo(f"{'process':12} {status.pid}")
    click.echo(f"{'data':12} {status.data}")
    click.echo(f"{'log':12} {status.log}")
    if status.user is not None:
        click.echo(f"{'log in as':12} {status.user}, password in {status.credentials_file}")
    else:
        click.echo(f"{'credentials':12} {status.credentials_file}, profile {status.profile}")
