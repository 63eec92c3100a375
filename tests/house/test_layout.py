"""The traps of this layout, each of which has cost somebody a day."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "winnow": ROOT / "platform" / "winnow",
    "winnow_connectors": ROOT / "connectors" / "winnow_connectors",
    "winnow_jobs": ROOT / "jobs" / "winnow_jobs",
}
FLOORS = [package.parent for package in PACKAGES.values()]
SOURCES = sorted(file for package in PACKAGES.values() for file in package.rglob("*.py"))


def relative(files: list[Path]) -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for file in files)


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 10
    assert {file.relative_to(floor).parts[0] for floor in FLOORS for file in SOURCES if floor in file.parents} == set(
        PACKAGES
    )


def test_platform_is_never_a_package() -> None:
    # It would shadow Python's own `platform`: pytest, uuid and `import ray` break.
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "tests" / "platform" / "__init__.py").exists()


def test_test_folders_are_not_packages() -> None:
    assert relative(list((ROOT / "tests").rglob("__init__.py"))) == []


def test_test_files_have_unique_names() -> None:
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert names
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor.name)
def test_nothing_lies_next_to_a_package(floor: Path) -> None:
    # A module there works in an editable install and is missing from the wheel.
    package = next(package for package in PACKAGES.values() if package.parent == floor)
    strangers = [entry for entry in floor.iterdir() if entry.name not in {package.name, "__pycache__"}]
    assert relative(strangers) == []


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {file.parent for file in SOURCES}
    assert relative([folder for folder in folders if not (folder / "__init__.py").exists()]) == []


def test_every_package_is_typed() -> None:
    assert relative([package for package in PACKAGES.values() if not (package / "py.typed").exists()]) == []


def test_no_module_is_named_as_one_of_the_standard_library() -> None:
    named = [file.parent if file.name == "__init__.py" else file for file in SOURCES]
    assert relative([module for module in named if module.stem in sys.stdlib_module_names]) == []


def test_every_module_is_named_by_a_noun() -> None:
    vague = {"common", "helper", "helpers", "misc", "util", "utils"}
    assert relative([file for file in SOURCES if vague & {file.stem, file.parent.name}]) == []


def test_only_the_cluster_starts_ray() -> None:
    starters = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"), str(file))):
            attribute = isinstance(node, ast.Attribute) and node.attr == "init" and isinstance(node.value, ast.Name)
            if attribute and node.value.id == "ray":
                starters.append(file)
            if isinstance(node, ast.ImportFrom) and node.module == "ray" and "init" in {a.name for a in node.names}:
                starters.append(file)
    assert relative(list(set(starters))) == ["jobs/winnow_jobs/cluster.py"]


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    heavy = ["deltalake", "duckdb", "pandas", "ray", "timm", "torch", "torchvision"]
    code = (
        f"import json, sys, winnow_jobs.cli.main; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
