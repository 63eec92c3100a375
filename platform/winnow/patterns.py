"""Patterns over paths: what a path says about its image, and which paths are images at all.

Three small languages, all compiled to RE2 expressions that Arrow applies to whole columns:

- *path patterns* such as ``{split}/{label}/*`` name the parts of a path. ``{name}`` is text without ``/``, ``*`` is one
  whole part (or any text inside one), ``**`` is any number of parts, everything else stands for itself.
- *globs* such as ``*.json`` keep or leave out paths. ``*`` is any text, also across ``/``, ``?`` one character,
  ``[abc]`` one of them, ``[!abc]`` none of them.
- *junk* is what tools leave in folders: ``.DS_Store``, ``__MACOSX/``, zero-byte "directories".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow.errors import CallError

FIELDS = ("label", "split", "group")
"""Names in a path pattern with a meaning of their own; any other name becomes metadata."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(r"\{([^{}]*)\}|(\*)|([^{}*]+)|([{}])")

_SYSTEM = r"(?i)(?:^|/)(?:\.DS_Store|\._[^/]*|Thumbs\.db|ehthumbs\.db|desktop\.ini)$"
_ARCHIVE = r"(?:^|/)__MACOSX/"
_DIRECTORY = r"(?:^$|/$|_\$folder\$$)"
_HIDDEN_ANYWHERE = r"(?:^|/)\."
_HIDDEN_NAME = r"(?:^|/)\.[^/]*$"


class PathPattern:
    """A compiled path pattern.

    Attributes:
        text: as it was written.
        names: the names in it, in order.

    Raises:
        CallError: it names nothing, names something twice, or cannot be understood.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        names: list[str] = []
        parts = text.strip("/").split("/")
        expression = ""
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            if part == "**":
                expression += ".*" if last else "(?:[^/]+/)*"
            else:
                expression += self._part(part, names) + ("" if last else "/")
        if not names:
            raise CallError(
                f"pattern {text!r} names nothing; write parts of the path as names, such as '{{split}}/{{label}}/*'"
            )
        self.names = tuple(names)
        self._expression = f"(?s)^{expression}$"

    def __repr__(self) -> str:
        return f"PathPattern({self.text!r})"

    def extract(self, paths: pa.Array) -> tuple[pa.Array, dict[str, pa.Array]]:
        """Match every path.

        Args:
            paths: string (N,), relative to the source.

        Returns:
            bool (N,): which paths match; and for each name string (N,), null where the path does not match.
        """
        found = pc.extract_regex(paths, self._expression)
        matched = pc.is_valid(found)
        return matched, {
            name: pc.if_else(matched, pc.struct_field(found, name), pa.scalar(None, pa.string())) for name in self.names
        }

    def _part(self, part: str, names: list[str]) -> str:
        if not part:
            raise CallError(f"pattern {self.text!r} has an empty part ('//')")
        if "**" in part:
            raise CallError(f"pattern {self.text!r}: '**' must stand alone between slashes")
        if part == "*":
            return "[^/]+"
        expression, was_name = "", False
        for name, star, literal, stray in _TOKEN.findall(part):
            if literal:
                expression += re.escape(literal)
            elif star:
                expression += "[^/]*"
            elif stray or not _NAME.fullmatch(name):
                wrong = stray or "{" + name + "}"
                raise CallError(
                    f"pattern {self.text!r}: {wrong!r} is not understood; names look like {{label}}: letters, digits, _"
                )
            elif name in names:
                raise CallError(f"pattern {self.text!r} has {{{name}}} twice")
            elif was_name:
                raise CallError(f"pattern {self.text!r}: {{{names[-1]}}} and {{{name}}} need something between them")
            else:
                names.append(name)
                expression += f"(?P<{name}>[^/]+)"
            was_name = bool(name)
        return expression


def compile_globs(globs: Sequence[str]) -> str:
    """One RE2 expression that matches what any of the globs matches as a whole."""
    return f"(?s)^(?:{'|'.join(_glob(text) for text in globs)})$"


def _glob(text: str) -> str:
    expression, at = "", 0
    while at < len(text):
        character = text[at]
        closing = text.find("]", at + 3 if text[at + 1 : at + 2] == "!" else at + 2) if character == "[" else -1
        if character == "*":
            expression += ".*"
        elif character == "?":
            expression += "."
        elif closing > 0:
            inside = text[at + 1 : closing]
            negated = inside.startswith("!")
            # Only ranges keep their meaning; everything else in the brackets is itself.
            inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside[1:] if negated else inside)
            expression += f"[{'^' if negated else ''}{inside}]"
            at = closing
        else:
            expression += re.escape(character)
        at += 1
    return expression


class PathFilter:
    """Which paths are taken.

    Args:
        include: globs; a path must match one of them.
        exclude: globs; a path that matches one of them is left out.
        hidden: also take names that start with a dot.
        whole_path: judge every folder of the path; False looks for hidden names in the last part only, for paths that
            someone listed on purpose and that may lie in a hidden folder.

    Raises:
        CallError: a glob cannot be understood.
    """

    def __init__(
        self,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        *,
        hidden: bool = False,
        whole_path: bool = True,
    ) -> None:
        self._reasons: dict[str, str] = {"directory": _DIRECTORY, "system": _SYSTEM, "archive": _ARCHIVE}
        if not hidden:
            self._reasons["hidden"] = _HIDDEN_ANYWHERE if whole_path else _HIDDEN_NAME
        if exclude:
            self._reasons["excluded"] = self._checked(exclude)
        self._include = None if "*" in include else self._checked(include)

    def judge(self, paths: pa.Array) -> tuple[pa.Array, Mapping[str, int]]:
        """Which of the paths to take.

        Args:
            paths: string (N,).

        Returns:
            bool (N,), and how many are left out by reason: ``directory``, ``system``, ``archive``, ``hidden``,
            ``excluded``, ``not_included``.
        """
        kept = np.ones(len(paths), dtype=bool)
        skipped: dict[str, int] = {}
        for reason, expression in self._reasons.items():
            hit = _matches(paths, expression) & kept
            if hit.any():
                skipped[reason] = int(hit.sum())
                kept &= ~hit
        if self._include is not None:
            missed = kept & ~_matches(paths, self._include)
            if missed.any():
                skipped["not_included"] = int(missed.sum())
                kept &= ~missed
        return pa.array(kept), skipped

    @staticmethod
    def _checked(globs: Sequence[str]) -> str:
        for text in globs:
            try:
                _matches(pa.array([""]), compile_globs([text]))
            except pa.ArrowInvalid as error:
                raise CallError(f"pattern {text!r} is not understood: {error}") from None
        return compile_globs(globs)


def _matches(paths: pa.Array, expression: str) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    hits = pc.fill_null(pc.match_substring_regex(paths, expression), False)
    result: np.ndarray[tuple[int], np.dtype[np.bool_]] = hits.to_numpy(zero_copy_only=False)
    return result
