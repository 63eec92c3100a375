"""The ``winnow`` command: options common to all, exit codes, and one message instead of a traceback.

Exit codes: 0 done, 1 the job failed, 2 the call was wrong, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import importlib
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from winnow import __version__
from winnow.errors import WinnowError
from winnow_jobs import logs

_COMMANDS = {
    "init": "Write a commented winnow.toml and create the warehouse.",
    "ingest": "Make images known: folders, buckets, lists, manifests.",
    "predict": "Answer every pending image exactly once.",
    "augment": "Write augmented copies of images, as images with their parent.",
    "train": "Make a model version from labels.",
    "evaluate": "Compare a model version with another one on the same test images.",
    "models": "List and show model versions, choose the one that answers.",
    "search": "Find the images most like one image.",
    "duplicates": "Find images that show the same, and images unlike all others.",
    "select": "Choose the images that people should see next.",
    "review": "Send queued images to Label Studio, bring the answers back, show how far people are.",
    "accept": "Accept the answers that need no person, with a bound on their error rate.",
    "report": "Write what the tables say as one HTML file for people.",
    "query": "Ask the tables with SQL.",
    "export": "Write results for other engines (Parquet, CSV, COCO), and masks.",
    "runs": "List, show, resume or abandon runs.",
    "submit": "Run a job on a Ray cluster elsewhere.",
    "jobs": "List, follow or stop the jobs of a cluster.",
    "doctor": "Check this machine, the configuration and the storage.",
    "services": "Start, stop or show the local S3 server and Label Studio.",
    "demo": "Everything from nothing: photographs, then the whole loop on rendered surfaces.",
}

_MODULES = {"select": "selection"}
"""Where a command's module has another name: ``select`` is one of the standard library's."""


class Call:
    """What a subcommand gets: the configuration's path, and the workspace once it is asked for."""

    def __init__(self, config_path: Path) -> None:
        self.config_path = config_path

    @cached_property
    def workspace(self) -> Any:
        """The workspace of the configuration; read only by commands that need it."""
        from winnow_jobs.workspace import Workspace

        return Workspace(self.config_path)


class _Group(click.Group):
    """Loads a subcommand's module only when it is called, so that ``winnow --help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"winnow_jobs.cli.{_MODULES.get(name, name)}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
        if close and args[0] not in _COMMANDS:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("winnow.toml"),
    envvar="WINNOW_CONFIG",
    show_default=True,
    help="The configuration file.",
)
@click.option("-v", "--verbose", count=True, help="Log more; twice for debugging.")
@click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    default="text",
    envvar="WINNOW_LOG_FORMAT",
    show_default=True,
    help="json: one object per line on standard error, with run_id and job.",
)
@click.version_option(__version__, prog_name="winnow")
@click.pass_context
def cli(ctx: click.Context, config_path: Path, verbose: int, log_format: str) -> None:
    """Winnow turns a bucket of images into tables that anyone can query."""
    logs.configure(log_format, verbose)
    ctx.obj = Call(config_path)


def main() -> None:
    """Run the command line, and end the process with its exit code; the entry point of ``winnow``.

    Python itself is not taken down: threads of Arrow may still be letting go of a table's files, and one that asks for
    the interpreter by then aborts the process, after all its work is done (apache/arrow#36389). What was registered to
    run at exit since here (Ray's, temporary folders') runs before.
    """
    code = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        code = _run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BrokenPipeError:
        pass  # whoever read the output has gone
    sys.exit(code)


def _run() -> int:
    """Exit code of the command line in ``sys.argv``."""
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()  # what cannot be written any more is no success
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        logs.say_last("stopped; nothing half-done is visible. Run the same command to continue.", lead="\n")
        return 130
    except WinnowError as error:
        logs.say_last(str(error))
        return error.exit_code
    return code if isinstance(code, int) else 0
