"""How the demo tells what it does, and where it goes on when it was stopped.

A tour is a list of acts, an act a list of steps, and a step a generator: it yields the commands that a user would type
(lines that start with ``$``) and what came of them. A step that came to its end is written down and not done again;
one that was cut short is done from its beginning, which every verb of Winnow allows.
"""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

Step = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Act:
    """Steps that belong together.

    Attributes:
        title: one line.
        steps: in their order.
    """

    title: str
    steps: Sequence[Step]


class Tour:
    """Plays acts one after the other.

    Args:
        done_file: remembers which steps are done, and how long they took.
    """

    def __init__(self, done_file: Path) -> None:
        self._file = done_file
        self._seconds: dict[str, float] = json.loads(done_file.read_text()) if done_file.exists() else {}

    @property
    def seconds(self) -> float:
        """That all steps took, in this run and in those before."""
        return sum(self._seconds.values())

    def is_over(self, acts: Iterable[Act]) -> bool:
        """All of them were played."""
        return all(key in self._seconds for act in acts for key in _keys(act))

    def play(self, acts: Iterable[Act], *, first: int = 1) -> None:
        """Play what is not done yet.

        Args:
            acts: in their order.
            first: number of the first.
        """
        for number, act in enumerate(acts, start=first):
            if self.is_over([act]):
                click.secho(f"{number} · {act.title}: done before", dim=True)
                continue
            click.secho(f"\n{number} · {act.title}", bold=True)
            for key, step in zip(_keys(act), act.steps, strict=True):
                if key not in self._seconds:
                    self._play(key, step)

    def _play(self, key: str, step: Step) -> None:
        started = time.monotonic()
        for line in step():
            if line.startswith("$"):
                click.secho(line, fg="cyan")
            else:
                click.echo(textwrap.indent(line, "  "))
        seconds = time.monotonic() - started
        if seconds >= 1:
            click.secho(f"  {seconds:.0f} s", dim=True)
        self._seconds[key] = round(seconds, 1)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._seconds, indent=1))
        os.replace(temporary, self._file)  # noqa: PTH105  a rename that replaces, whatever the platform


def _keys(act: Act) -> list[str]:
    return [f"{act.title} {place}" for place, _ in enumerate(act.steps)]
