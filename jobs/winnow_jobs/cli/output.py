r"""How results look: tables for people, CSV, JSON and Parquet for machines. Commands never format.

Names of images are not ours: control characters, line breaks and escape sequences in them are shown as ``\x1b`` and
the like, so that they can neither steer the terminal nor break a row.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import click
import pyarrow as pa

from winnow.errors import CallError
from winnow_jobs.writers import atomic_file, iterate_rows, text_of, write_csv, write_json, write_parquet

if TYPE_CHECKING:
    from winnow_jobs.augment import AugmentResult
    from winnow_jobs.export import ExportResult
    from winnow_jobs.export_masks import MasksResult
    from winnow_jobs.predict import PredictResult

FORMATS = ("table", "csv", "json", "parquet")
"""What ``print_table`` knows."""

MAX_ROWS = 100
"""Rows of a table on a terminal."""

_PLAN = ["explain_key", "explain_value"]
_MIN_COLUMN = 12
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?Z")


def choose_format(format: str | None, as_json: bool, output: Path | None) -> str:
    """The format that the options ask for: --format, --json, or else as the name of --output ends.

    Raises:
        UsageError: two of them contradict each other.
    """
    if as_json and format not in (None, "json"):
        raise click.UsageError(f"--json and --format {format} contradict each other; give one of them")
    ending = output.suffix.lstrip(".").lower() if output is not None else ""
    return format or ("json" if as_json else ending if ending in FORMATS else "table")


def print_table(
    data: pa.Table | pa.RecordBatchReader,
    format: str = "table",
    file: IO[str] | None = None,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    max_rows: int = MAX_ROWS,
) -> None:
    """Show rows.

    Args:
        data: a table, or a stream, which is never in memory as a whole.
        format: ``table`` (drawn on a terminal, elsewhere all rows with tabs), ``csv``, ``json`` or ``parquet``.
        file: where to; standard output without it.
        output: a new file instead, written whole or not at all.
        overwrite: ``output`` may replace a file.
        max_rows: rows drawn on a terminal; the rest is counted.

    Raises:
        CallError: unknown format, Parquet without ``output``, or ``output`` exists.
    """
    if format not in FORMATS:
        raise CallError(f"format {format!r} is unknown; choose {', '.join(FORMATS)}")
    reader = data.to_reader() if isinstance(data, pa.Table) else data
    if output is not None:
        with atomic_file(output, overwrite=overwrite) as binary:
            _write(reader, format, binary)
        return
    if format == "parquet":
        raise CallError("Parquet is not for a terminal; add --output FILE.parquet")
    file = file or sys.stdout
    if format == "table" and reader.schema.names == _PLAN:
        # The engine draws the plan itself, on many lines.
        file.writelines(printable(plan, keep="\n") + "\n" for _, plan in iterate_rows(reader))
    elif format == "table" and file.isatty():
        _draw(reader, file, max_rows)
    else:
        _write_text(reader, format, file)
    file.flush()


def print_predict(result: PredictResult, file: IO[str] | None = None) -> None:
    """Say what a predict call did."""
    models = ", ".join(f"{task} by {model}" for task, model in sorted(result.models.items()))
    if result.status == "dry run":
        lines = [f"{result.num_asked:,} answers would be asked: {models}"]
    elif result.run_id is None:
        lines = [f"{result.status}: {models}"]
    else:
        lines = [f"run {result.run_id} {result.status}: {models}", *work_lines(result)]
    print_lines(lines, file)


def work_lines(result: PredictResult | AugmentResult) -> list[str]:
    """Counts, seconds, failures and verdict of a run that asked images."""
    rate = f", {result.images_per_s:,.1f} images/s" if result.images_per_s is not None else ""
    lines = [f"{result.num_asked:,} asked, {result.num_answered:,} answered, {result.num_failed:,} failed{rate}"]
    if result.seconds:
        lines.append("seconds: " + ", ".join(f"{stage} {s:,.1f}" for stage, s in result.seconds.items()))
    if result.failures:
        lines.append("failures:")
        ordered = sorted(result.failures.items(), key=lambda item: (-item[1], item[0]))
        lines += [f"  {count:>9,}  {kind}" for kind, count in ordered]
        lines.append('  winnow query "SELECT uri, error, message FROM failures" lists them')
    if result.verdict:
        lines.append(result.verdict)
    return lines


def print_lines(lines: Sequence[str], file: IO[str] | None = None) -> None:
    """Lines of plain text, to standard output by default."""
    file = file or sys.stdout
    file.writelines(printable(line, keep="\n") + "\n" for line in lines)
    file.flush()


def print_export(result: ExportResult, format: str = "table", file: IO[str] | None = None) -> None:
    """Say what an export wrote; ``format`` is ``table`` or ``json``."""
    file = file or sys.stdout
    if format == "json":
        json.dump({name: getattr(result, name) for name in ("uri", "format", "num_rows", "num_bytes")}, file)
        file.write("\n")
    else:
        file.write(printable(f"{result.num_rows:,} results, {result.num_bytes:,} bytes: {result.uri}") + "\n")
    file.flush()


def print_masks(result: MasksResult, format: str = "table", file: IO[str] | None = None) -> None:
    """Say what an export of masks wrote; ``format`` is ``table`` or ``json``."""
    file = file or sys.stdout
    if format == "json":
        json.dump(dataclasses.asdict(result), file)
        file.write("\n")
    elif not result.num_images:
        file.write(f"nothing to export: no current image asked for is answered by task {result.task!r}\n")
    else:
        counted = f"{result.num_images:,} images, {result.num_written:,} files written, {result.num_kept:,} kept"
        file.write(printable(f"{counted}: {result.uri}") + "\n")
        if result.num_failed:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(result.failures.items()))
            file.write(f"{result.num_failed:,} images with an error ({kinds}): see index.csv\n")
    file.flush()


def printable(text: str, keep: str = "") -> str:
    r"""Text in which every control, format and line-break character is written as its escape, such as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or c == " " or not _steers(c) else _escape(c) for c in text)


def _steers(character: str) -> bool:
    """Control, bidirectional override, zero width, surrogate, private use or line break; spaces are harmless."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


# --------------------------------------------------------------------------------------------------------- for machines


def _write(reader: pa.RecordBatchReader, format: str, file: BinaryIO) -> None:
    if format == "parquet":
        write_parquet(reader, file)
        return
    with text_of(file) as text:
        _write_text(reader, format, text)


def _write_text(reader: pa.RecordBatchReader, format: str, file: IO[str]) -> None:
    if format == "csv":
        write_csv(reader, file)
    elif format == "json":
        write_json(reader, file)
    else:
        file.write("\t".join(map(printable, reader.schema.names)) + "\n")
        for row in iterate_rows(reader):
            file.write("\t".join("" if value is None else _cell(value) for value in row) + "\n")


# ----------------------------------------------------------------------------------------------------------- for people


def _draw(reader: pa.RecordBatchReader, file: IO[str], max_rows: int) -> None:
    """Draw the first rows on a terminal and count the rest."""
    names = [printable(name) for name in reader.schema.names]
    rows: list[list[str | None]] = []
    num_rows = 0
    for batch in reader:
        if len(rows) < max_rows:
            head = batch.slice(0, max_rows - len(rows))
            rows += ([None if v is None else _cell(v) for v in row] for row in iterate_rows([head]))
        num_rows += batch.num_rows
    numbers = [_is_number(field.type) for field in reader.schema]
    width = shutil.get_terminal_size().columns
    if num_rows and _needed_width(names, rows) > width:
        file.writelines(_records(names, rows, width))
    else:
        _draw_grid(names, rows, numbers, file, width)
    if num_rows > len(rows):
        file.write(f"… {num_rows - len(rows):,} more rows (--format csv or --output FILE gives all)\n")


def _needed_width(names: Sequence[str], rows: Sequence[Sequence[str | None]]) -> int:
    """Columns of the terminal below which a table is no longer readable."""
    return sum(min(width, _MIN_COLUMN) + 3 for width in _natural_widths(names, rows)) + 1


def _natural_widths(names: Sequence[str], rows: Sequence[Sequence[str | None]]) -> list[int]:
    """Terminal cells of the widest value of each column."""
    from rich.cells import cell_len

    return [
        max([cell_len(name), *(4 if row[i] is None else cell_len(row[i] or "") for row in rows)])
        for i, name in enumerate(names)
    ]


def _fit(widths: Sequence[int], room: int) -> list[int]:
    """Widths that add up to ``room`` at most: the widest columns give way, narrow ones stay whole."""
    low, high = 1, max([*widths, 1])
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(w, middle) for w in widths) <= room else (low, middle - 1)
    return [min(width, low) for width in widths]


def _draw_grid(
    names: Sequence[str], rows: Sequence[Sequence[str | None]], numbers: Sequence[bool], file: IO[str], width: int
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ROUNDED if _is_unicode(file) else box.ASCII)
    widths = _fit(_natural_widths(names, rows), width - 3 * len(names) - 1)
    for name, number, room in zip(names, numbers, widths, strict=True):
        table.add_column(
            Text(name), justify="right" if number else "left", no_wrap=True, overflow="ellipsis", width=room
        )
    for row in rows:
        table.add_row(*(Text("null", style="dim") if cell is None else Text(cell) for cell in row))
    Console(file=file, width=width, highlight=False).print(table)


def _records(names: Sequence[str], rows: Sequence[Sequence[str | None]], width: int) -> Iterator[str]:
    """One line per value, for rows with too many columns."""
    indent = max(map(len, names))
    for number, row in enumerate(rows, start=1):
        yield f"{f'── row {number:,} ':─<{min(width, 60)}}\n"
        for name, cell in zip(names, row, strict=True):
            text = "null" if cell is None else cell
            room = max(width - indent - 2, 8)
            yield f"{name:>{indent}}  {text if len(text) <= room else text[: room - 1] + '…'}\n"


def _is_unicode(file: IO[str]) -> bool:
    return (getattr(file, "encoding", None) or "").lower().replace("-", "") == "utf8"


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _cell(value: Any) -> str:
    """One value on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        return printable(json.dumps(value, ensure_ascii=False))
    if isinstance(value, str) and (found := _TIME.fullmatch(value)):
        return f"{found[1]} {found[2]} UTC"
    return printable(str(value))
