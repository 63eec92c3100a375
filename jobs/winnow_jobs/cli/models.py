"""``winnow models``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow_connectors.registry import Move, Version

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_HEADLINES = (("accuracy", "accuracy"), ("mean_iou", "mean IoU"))
"""The one figure by which versions of a kind are told apart, and its name for people."""


@click.group(
    epilog="""\b
Examples:
  winnow models list
  winnow models show garment@2
  winnow models promote garment@2
  winnow models rollback garment
"""
)
def command() -> None:
    """List and show model versions, and choose the one that answers.

    `predict` asks the version in production; as long as none was promoted, the model of winnow.toml.
    """


@command.command(name="list", epilog="Example: winnow models list --task garment")
@click.option("--task", help="Only versions of this task.")
@_json_option
@click.pass_obj
def list_versions(call: Call, task: str | None, as_json: bool) -> None:
    """List all model versions, by task, the newest first."""
    import pyarrow as pa

    from winnow_jobs.cli.output import print_table

    versions = call.workspace.models(task)
    if as_json:
        click.echo(json.dumps([_version_json(version) for version in versions]))
    elif not versions:
        click.echo("no model version yet; `winnow train TASK --head` makes one")
    else:
        rows = [
            {
                "version": version.name,
                "production": "yes" if version.production else "",
                "made": version.at.strftime("%Y-%m-%d %H:%M"),
                **_headline(version.metrics),
            }
            for version in versions
        ]
        print_table(pa.Table.from_pylist(rows))


@command.command(epilog="Example: winnow models show garment@2 --json")
@click.argument("version")
@_json_option
@click.pass_obj
def show(call: Call, version: str, as_json: bool) -> None:
    """Show the card of a version: what it is, what it learned from, how good it was on which images."""
    from winnow_jobs.models import show_version

    card = show_version(call.workspace, version)
    if as_json:
        click.echo(json.dumps(card))
        return
    for line in _card_lines(card):
        click.echo(line)


@command.command(
    epilog="""\b
Examples:
  winnow models promote garment@2
  winnow models promote garment@2 --force          # although it is not better; this is recorded
"""
)
@click.argument("version")
@click.option("--force", is_flag=True, help="Whatever the comparison says, and without one; this is recorded.")
@_json_option
@click.pass_obj
def promote(call: Call, version: str, force: bool, as_json: bool) -> None:
    """Let a version answer its task from now on, if it is better than what does now: all images are pending for it.

    It is compared as `winnow evaluate` does, with what is in production. It must be better, must not be worse by more
    than [promotion] margin within the 95 % interval, and no class may fall by more than max_class_drop.
    """
    move = call.workspace.promote(version, force=force)
    _print_move(move, as_json)
    if move.run_id and not as_json:
        click.echo(f"next: winnow predict --task {move.task}")


@command.command(
    epilog="""\b
Examples:
  winnow models rollback garment
  winnow models rollback garment --to garment@1
  winnow models rollback garment --to base         # the model of winnow.toml
"""
)
@click.argument("task")
@click.option("--to", metavar="VERSION", help="The version to go back to; the one before the present one by default.")
@_json_option
@click.pass_obj
def rollback(call: Call, task: str, to: str | None, as_json: bool) -> None:
    """Let the version before the one in production answer again."""
    _print_move(call.workspace.rollback(task, to), as_json)


def _print_move(move: Move, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(move)))
    else:
        print_move(move)


def print_move(move: Move) -> None:
    """What answers now, and what did before."""
    if move.run_id is None:
        click.echo(f"nothing to do: {move.production} is in production already")
    else:
        click.echo(f"{move.production} is in production; before, it was {move.before}")
        if move.why:
            click.echo(f"why: {move.why}")


def _version_json(version: Version) -> dict[str, Any]:
    return {**dataclasses.asdict(version), "at": version.at.isoformat()}


def _headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """Measure, value on test and number of test images."""
    test = metrics.get("test") or {}
    for key, name in _HEADLINES:
        if test.get(key) is not None:
            return {"measure": name, "test": round(test[key], 4), "images": test["n"]}
    return {"measure": None, "test": None, "images": test.get("n", 0)}


def _card_lines(card: dict[str, Any]) -> list[str]:
    """The card for people: one fact per line, figures as small tables."""
    state = "in production" if card["production"] else "not in production"
    lines = [
        f"{card['version']}  {card['kind']}, {state}",
        f"  {'made':13} {card['created_at'][:16].replace('T', ' ')} UTC by winnow {card['winnow_version']}, "
        f"run {card['run']}",
        f"  {'network':13} {card['architecture']} with head {card['head'] or 'of its own'}, built on {card['parent']}",
        f"  {'classes':13} {len(card['classes'])}: {_short_list(card['classes'])}",
        f"  {'labels':13} "
        + ", ".join(f"{sum(counts.values()):,} {split}" for split, counts in card["labels"]["counts"].items()),
        f"  {'temperature':13} {card['temperature']:.3f}{_fitted_on(card)}",
        f"  {'seed':13} {card['seed']}",
        f"  {'files':13} {card['location']}",
        f"  {'weights':13} sha256 {card['sha256']}",
    ]
    for event in card["events"]:
        lines.append(f"  {event['event'].replace('_', ' '):13} {event['at'][:16].replace('T', ' ')} UTC{_told(event)}")
    for split in ("val", "test"):
        measured = card["metrics"].get(split)
        if not measured or not measured.get("n"):
            lines.append(f"{split}: measured on no image")
            continue
        figures = [
            f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items() if isinstance(value, float)
        ]
        lines.append(f"{split}, {measured['n']:,} images: {', '.join(figures)}")
        calibration = card["metrics"].get("calibration", {}).get(split, {})
        if calibration.get("n"):
            lines.append(
                "  with the temperature, and without: "
                f"ECE {calibration['ece']:.4f}, {calibration['ece_before']:.4f}; "
                f"log loss {calibration['log_loss']:.4f}, {calibration['log_loss_before']:.4f}"
            )
        lines += _class_lines(measured.get("classes") or {})
    return lines


def _fitted_on(card: dict[str, Any]) -> str:
    fitted_on = card["metrics"].get("calibration", {}).get("fitted_on")
    return f", fitted on {fitted_on}" if fitted_on else ", not fitted"


def _told(event: dict[str, Any]) -> str:
    """What an event was compared with, and whether it was forced."""
    change = event.get("difference")
    compared = (
        f", {change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f}) against" if change else ", with"
    )
    return (", by force" if event.get("force") else "") + (
        f"{compared} {event['against']} on {event['n']:,} test images" if "against" in event else ""
    )


def _class_lines(classes: dict[str, dict[str, Any]]) -> list[str]:
    if not classes:
        return []
    columns = list(next(iter(classes.values())))
    width = max(len("class"), *(len(name) for name in classes))
    lines = ["  " + "  ".join([f"{'class':{width}}", *(f"{column:>9}" for column in columns)])]
    for name, row in classes.items():
        cells = [_figure(row[column]) for column in columns]
        lines.append("  " + "  ".join([f"{name:{width}}", *(f"{cell:>9}" for cell in cells)]))
    return lines


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _short_list(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
