"""What users and Ray workers get is the wheel: it must hold every module and run without the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["platform/winnow", "connectors/winnow_connectors", "jobs/winnow_jobs"]


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, so that the build leaves nothing in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    # A test, and a module next to a package: neither may come along.
    (source / "tests").mkdir()
    (source / "tests" / "test_stray.py").touch()
    (source / "jobs" / "stray.py").touch()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel, and finds its dependencies where this one has them.

    The path file names this environment's site-packages, whose own path files are not read: the editable install stays
    out of sight.
    """
    home = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(home), cwd=home.parent)
    python = home / "bin" / "python"
    site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", str(python)]
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel), cwd=home)
    return home


@pytest.fixture
def clean_env() -> dict[str, str]:
    """This environment without anything that could lead Python back to the source tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {
        str(file.relative_to((ROOT / folder).parent))
        for folder in PACKAGES
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {f"{Path(folder).name}/py.typed" for folder in PACKAGES} <= names
    assert names == modules


def test_wheel_runs_without_the_source_tree(
    wheel: Path, installed: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith(".py") and not name.endswith("__main__.py")
    )
    code = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    python = installed / "bin" / "python"
    files = run(str(python), "-P", "-W", "ignore", "-c", code, *modules, cwd=tmp_path, env=clean_env).splitlines()
    assert len(files) == len(modules) > 10
    assert [file for file in files if not file.startswith(str(installed))] == []


def test_installed_command_helps(installed: Path, clean_env: dict[str, str], tmp_path: Path) -> None:
    assert "Usage: winnow" in run(str(installed / "bin" / "winnow"), "--help", cwd=tmp_path, env=clean_env)
