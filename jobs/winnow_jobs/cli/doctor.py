"""``winnow doctor``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_jobs.checks import Check

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


@click.command(
    epilog="""\b
Examples:
  winnow doctor
  winnow --config lab/winnow.toml doctor
  winnow doctor --json | jq '.checks[] | select(.status != "ok")'
"""
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check this machine, the configuration and the storage; say how to mend each fault.

    Works with a broken configuration too. Exit code 1 when a check fails; warnings alone give 0.
    """
    from winnow_jobs.doctor import diagnose

    call: Call = ctx.obj
    # Before `winnow init` there is no winnow.toml, and that is no fault; a file named by the caller must be there.
    absent = call.config_path == Path("winnow.toml") and not call.config_path.exists()
    checks = diagnose(None if absent else call.config_path)
    num_failed = sum(check.status == "fail" for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": num_failed == 0, "checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        _print(checks)
    if num_failed:
        ctx.exit(1)


def _print(checks: list[Check]) -> None:
    if sys.stdout.isatty():
        _print_table(checks)
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            indent = " " * (width + 5)
            detail = check.detail.replace("\n", f"\n{indent}")
            click.echo(f"{_MARKS[check.status][0]}  {check.name:<{width}}  {detail}")
            if check.mend is not None:
                click.echo(f"{indent}→ {check.mend}")
    count = {status: sum(check.status == status for check in checks) for status in _MARKS}
    click.echo(f"\n{count['ok']} well, {count['warn']} to note, {count['fail']} to mend")


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in checks:
        mark, colour = _MARKS[check.status]
        grid.add_row(Text(mark, style=f"bold {colour}"), Text(check.name, style="bold"), Text(check.detail))
        if check.mend is not None:
            grid.add_row("", "", Text(f"→ {check.mend}", style=colour))
    Console(highlight=False).print(grid)
