"""The jobs of Winnow, its command line, and the same verbs for notebooks: ``Workspace("winnow.toml").predict()``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow_jobs.workspace import Workspace

__all__ = ["Workspace"]


def __getattr__(name: str) -> Any:
    """Load the workspace when it is first asked for: the command line starts quickly without it."""
    if name == "Workspace":
        from winnow_jobs.workspace import Workspace

        return Workspace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
