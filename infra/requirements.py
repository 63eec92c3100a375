"""Print what Winnow and some of its extras need, one requirement a line: ``requirements.py pyproject.toml EXTRA…``.

The image installs these before Winnow itself, so that a change of Winnow's code makes a small layer.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Those of the project, then those of the extras."""
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path(sys.argv[1]), sys.argv[2:])) + "\n")
