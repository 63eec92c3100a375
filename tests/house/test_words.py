"""The project speaks of itself alone: what anyone who clones it cannot have or need not know stands in no file."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Brackets around a first letter keep this file from matching itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.-])/(?:work|root)/"),
    "a package registry's host": re.compile(
        r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|deb\.debian\.org|crates\.io)\b", re.IGNORECASE
    ),
    "the tools it was written with": re.compile(
        r"\b(?:[c]laude|[a]nthropic|[c]hatgpt|[c]opilot|[c]odex|[A]I[ -]generated)\b"
        r"|\b[c]oding[ -](?:agent|assistant|session)",
        re.IGNORECASE,
    ),
    "data beside the checkout (only tests/conftest.py)": re.compile(r"\.\./shared\b"),
}
ALLOWED = {("data beside the checkout (only tests/conftest.py)", "tests/conftest.py")}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every text file that git tracks, or would with `git add`."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: git says which files belong to the project")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=True).stdout.decode().split("\0")
    found = {}
    for name in filter(None, listed):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in content:
            found[name] = content.decode("utf-8")
    assert len(found) > 20
    return found


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_speaks_of(what: str, texts: dict[str, str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:160]}"
        for name, text in texts.items()
        if (what, name) not in ALLOWED
        for number, line in enumerate(text.splitlines(), 1)
        if FORBIDDEN[what].search(line)
    ]
    assert found == []
