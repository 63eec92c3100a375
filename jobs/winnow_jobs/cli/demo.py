"""``winnow demo``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from winnow_jobs.cli.main import Call


@click.command(
    epilog="""\b
Examples:
  winnow demo                                # photographs, then the whole loop on rendered surfaces
  DEMO_HUMAN=1 winnow demo                   # the same, and you answer in Label Studio
  winnow demo --images ~/Pictures            # your own images: ingest, predict, query
  winnow demo --images s3://bucket/prefix --folder ./my-demo
"""
)
@click.option("--images", help="A folder or URL with your own images instead of photographs and surfaces.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="The demo's workspace; winnow-demo by default, winnow-demo-own for your own images.",
)
@click.pass_obj
def command(call: Call, images: str | None, folder: Path | None) -> None:
    """Show everything from nothing: the main job on real photographs, then the whole loop on rendered surfaces.

    The loop: a bucket, 60 labels, models, the images that people should see, their answers in a local Label Studio,
    better models, a blind audit, and the answers that need no person. Who answers is simulated, unless DEMO_HUMAN=1 is
    set: then it waits for you. Stopped or killed, the same command goes on where it was.
    """
    from winnow_jobs.cli.ingest import print_result
    from winnow_jobs.cli.output import print_predict, print_table
    from winnow_jobs.demo.loop import play
    from winnow_jobs.demo.photographs import fetch_weights, prepare

    if folder is None:
        folder = Path("winnow-demo" if images is None else "winnow-demo-own")
    if images is not None and "://" not in images:
        images = str(Path(images).expanduser().absolute())
    click.secho("1 · a workspace", bold=True)
    workspace, source = prepare(folder.absolute(), images, click.echo)
    click.echo(f"workspace    {folder}/winnow.toml, warehouse in {folder}/warehouse")
    fetch_weights(click.echo)

    click.secho(f"\n2 · winnow ingest {source}", bold=True)
    print_result(workspace.ingest([source]))

    click.secho("\n3 · winnow predict", bold=True)
    print_predict(workspace.predict())

    click.secho("\n4 · the results", bold=True)
    print_table(
        workspace.query(
            "SELECT regexp_extract(uri, '[^/]*$') AS image, label, round(confidence, 3) AS confidence, "
            "round(margin, 3) AS margin, round(entropy, 2) AS entropy FROM latest_predictions "
            "ORDER BY confidence DESC LIMIT 20"
        ),
        "table",
    )
    click.secho("\n5 · the failures: a bad image costs only its own row", bold=True)
    print_table(
        workspace.query("SELECT regexp_extract(uri, '[^/]*$') AS image, stage, error, message FROM failures LIMIT 20"),
        "table",
    )
    if images is not None:
        _say_what_next(folder, images)
        return
    click.secho("\nThe whole loop, on rendered surfaces", bold=True)
    human = os.environ.get("DEMO_HUMAN", "") not in ("", "0")
    play(folder.absolute() / "surfaces", human=human, first=6)
    _say_what_next(folder, images)


def _say_what_next(folder: Path, images: str | None) -> None:
    click.secho("\nWhat to look at next", bold=True)
    own = Path(sys.executable).with_name("winnow")
    winnow = "winnow" if shutil.which("winnow") else str(own)
    for text, line in (
        ("go there", f"cd {folder}"),
        ("nothing is pending, so it ends at once", f"{winnow} predict"),
        ("any question", f'{winnow} query "SELECT label, count(*) FROM predictions GROUP BY 1"'),
        (
            "the doubtful ones first",
            f'{winnow} query "SELECT uri, label, margin FROM latest_predictions ORDER BY margin"',
        ),
        ("what each run did, and what bounded it", f"{winnow} runs"),
        ("is all well here?", f"{winnow} doctor"),
        *([] if images else [("stop the S3 server", f"{winnow} services down")]),
    ):
        click.echo(f"  {line}")
        click.secho(f"      {text}", dim=True)
