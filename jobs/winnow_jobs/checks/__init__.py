"""What ``winnow doctor`` looks at: each check is a function that gives one ``Check`` and changes nothing for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``warn``: works, but not well or not yet; ``fail``: jobs will not work.
        detail: what was found; holds no secret.
        mend: what to do about it; None when there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    mend: str | None = None


def ok(name: str, detail: str) -> Check:
    """All is well."""
    return Check(name, "ok", detail)


def warn(name: str, detail: str, mend: str) -> Check:
    """It works, but not well or not yet."""
    return Check(name, "warn", detail, mend)


def fail(name: str, detail: str, mend: str) -> Check:
    """Jobs will not work."""
    return Check(name, "fail", detail, mend)
