"""``winnow evaluate``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from winnow_jobs.cli.main import Call

if TYPE_CHECKING:
    from winnow.evaluation import Comparison, Estimate, Slice
    from winnow_jobs.evaluate import EvaluateResult

_NUM_WORST = 10
"""Slices that are shown when no column was asked for."""


@click.command(
    epilog="""\b
Examples:
  winnow evaluate garment                                    # the newest version against what is in production
  winnow evaluate garment --candidate garment@3 --against garment@1
  winnow evaluate garment --by camera --by folder            # which images is it bad at?
  winnow evaluate garment --json | jq .comparison.difference
"""
)
@click.argument("task")
@click.option("--candidate", metavar="VERSION", help="Such as garment@2; the newest version by default.")
@click.option(
    "--against", metavar="VERSION", help="Such as garment@1 or garment@base; what is in production by default."
)
@click.option(
    "--by",
    metavar="COLUMN",
    multiple=True,
    help="Show all slices by this column: folder, format, width, height, size, source, group, last_modified, or a key "
    "of the images' metadata. May be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    call: Call, task: str, candidate: str | None, against: str | None, by: tuple[str, ...], as_json: bool
) -> None:
    """Compare a model version with another one on the same labelled images of the test split.

    Images that one of them has not answered yet are asked first. Shows both scores with the interval of their
    difference, every class, the slices of the images on which the candidate is worst, and whether `winnow models
    promote` would promote it. The same labels and versions are compared once.
    """
    result = call.workspace.evaluate(task, candidate=candidate, against=against, by=by)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
    else:
        print_result(result, all_slices=bool(by))


def print_result(result: EvaluateResult, *, all_slices: bool = False) -> None:
    """Scores, classes, slices, and whether the candidate may be promoted."""
    import pyarrow as pa

    from winnow_jobs.cli.output import print_table

    comparison = result.comparison
    before = "compared before, " if result.status == "nothing to do" else ""
    click.echo(
        f"{result.candidate} against {result.against}, {comparison.n:,} test images ({before}run {result.run_id})"
    )
    for line in _score_lines(result):
        click.echo(f"  {line}")
    for note in result.notes:
        click.echo(f"note: {note}")
    together = "; the intervals of all changes hold together at 95 %" if comparison.baseline else ""
    click.echo(f"\nclasses{together}:")
    print_table(pa.Table.from_pylist(list(_class_rows(comparison))))
    shown = result.slices if all_slices else result.slices[:_NUM_WORST]
    if shown:
        more = "" if len(shown) == len(result.slices) else f"; the worst {len(shown)}, see --by COLUMN"
        click.echo(f"\nslices of {result.candidate}, worst first (by the upper end of the interval){more}:")
        print_table(pa.Table.from_pylist([_slice_row(each, comparison) for each in shown]))
    click.echo()
    if result.decision.doubtful:
        names = ", ".join(result.decision.doubtful)
        click.echo(f"note: {names} got worse, but on too few images to tell that from chance")
    if result.decision.promote:
        click.echo(f"may be promoted: {'; '.join(result.decision.reasons)}")
        click.echo(f"next: winnow models promote {result.candidate}")
    else:
        click.echo("may not be promoted:")
        for reason in result.decision.reasons:
            click.echo(f"  - {reason}")


def _score_lines(result: EvaluateResult) -> Iterator[str]:
    from winnow.evaluation import MEASURES

    comparison = result.comparison
    name = MEASURES[comparison.measure]
    rows = [(f"{name} of {result.candidate}", _with_interval(comparison.candidate.score))]
    if comparison.baseline and comparison.difference:
        rows.append((f"{name} of {result.against}", _with_interval(comparison.baseline.score)))
        rows.append(("difference", _with_interval(comparison.difference, "+.4f")))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        yield f"{label:{width}}  {value}"


def _with_interval(found: Estimate, form: str = ".4f") -> str:
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def _class_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Of each class both models, those that lost most first."""
    score = "recall" if comparison.measure == "accuracy" else "IoU"
    changes, before = comparison.classes, comparison.baseline
    for name in sorted(comparison.candidate.classes, key=lambda name: changes[name].value if changes else 0.0):
        after = comparison.candidate.classes[name]
        row: dict[str, Any] = {"class": name, "images": after.n}
        if before is None:
            row[score] = f"{after.score:.3f}"
        else:
            change = changes[name]
            row[score] = f"{before.classes[name].score:.3f} → {after.score:.3f}"
            row |= {"change": f"{change.value:+.3f}", "interval": f"{change.low:+.2f} to {change.high:+.2f}"}
        if comparison.measure == "accuracy":
            row["F1"] = f"{after.f1:.3f}" if before is None else f"{before.classes[name].f1:.3f} → {after.f1:.3f}"
        yield row


def _slice_row(found: Slice, comparison: Comparison) -> dict[str, Any]:
    """The slice, with a remark where it lies below the whole."""
    row: dict[str, Any] = {"column": found.column, "value": found.value, "images": found.n}
    before = "" if found.baseline is None else f"{found.baseline:.3f} → "
    row |= {"score": f"{before}{found.score:.3f}", "interval": f"{found.low:.2f} to {found.high:.2f}"}
    return {**row, "": "below the whole" if found.high < comparison.candidate.score.value else ""}
