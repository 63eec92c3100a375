from __future__ import annotations

import re
from pathlib import Path

import pytest

from delta_tables import HandMade
from winnow.schemas import TABLES
from winnow_connectors.query import QueryEngine
from winnow_connectors.views import VIEWS

DOC = (Path(__file__).resolve().parents[2] / "docs" / "tables.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    made = HandMade(tmp_path_factory.mktemp("doc") / "warehouse" / "tables")
    made.add("predictions", image_id="a", label="cat")
    return made


def documented(name: str) -> str:
    """The section of a table or view."""
    found = re.search(rf"^### {name}\n(.*?)(?=^##)", DOC, re.MULTILINE | re.DOTALL)
    assert found, f"docs/tables.md has no section {name}"
    return found[1]


def columns(section: str) -> list[str]:
    """First cells of the table in a section, header and rule left out."""
    cells = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    return [name.strip() for cell in cells[1:] for name in cell.split(",")]


@pytest.mark.parametrize("name", TABLES)
def test_every_column_of_every_table_is_described_in_order(name: str) -> None:
    assert columns(documented(name)) == TABLES[name].names


@pytest.mark.parametrize("name", VIEWS)
def test_every_column_of_every_view_is_described(name: str, warehouse: HandMade) -> None:
    section = documented(name)
    same_as = re.search(r"Columns\s+as\s+in\s+\[(\w+)\]", section)
    expected = columns(documented(same_as[1])) if same_as else columns(section)
    assert sorted(expected) == sorted(QueryEngine(warehouse).sql(f"FROM {name} LIMIT 0").column_names)


def test_every_section_is_a_table_or_view() -> None:
    tables, views = (DOC.split(f"\n## {title}\n")[1].split("\n## ")[0] for title in ("Tables", "Views"))
    assert sorted(re.findall(r"^### (\w+)$", tables, re.MULTILINE)) == sorted(TABLES)
    assert sorted(re.findall(r"^### (\w+)$", views, re.MULTILINE)) == sorted(VIEWS)


def test_the_examples_run(
    warehouse: HandMade, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those over the local folder, one after the other, as a reader would paste them."""
    monkeypatch.chdir(warehouse.folder.parents[1])
    blocks = [block for block in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL) if '"warehouse/tables/' in block]
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/tables.md", "exec"), names)
    assert capsys.readouterr().out.count("cat") == 3
