from __future__ import annotations

import csv
import io
import json
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delta_tables import HandMade, at
from winnow.config import StorageConfig
from winnow.errors import CallError, QueryError, StorageError
from winnow.masks import encode_classes, resize_to_source
from winnow.schemas import SCORED_LABEL
from winnow_connectors.object_store import ObjectStores
from winnow_connectors.query import QueryEngine
from winnow_jobs.cli.output import print_export, print_table, printable
from winnow_jobs.export import FORMATS, export_results
from winnow_jobs.writers import write_csv, write_json

ODD_URI = 'file:///a,b "c"\n\x1b[31md.jpg'


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> QueryEngine:
    """Four images, three of them answered, one of these for two tasks."""
    warehouse = HandMade(tmp_path_factory.mktemp("warehouse"))
    for image_id, uri in [("a", ODD_URI), ("b", "file:///b.jpg"), ("c", "file:///c.jpg"), ("d", "file:///d.jpg")]:
        warehouse.add("images", image_id=image_id, uri=uri)
    warehouse.add("outcomes", image_id="a", width=640, height=480)
    warehouse.add("outcomes", image_id="d", status="failed", error="corrupt")
    warehouse.add("predictions", image_id="a", label="cat", confidence=0.1)
    warehouse.add("predictions", image_id="a", label="red", task="colour", model="colour@1", confidence=0.7)
    warehouse.add("predictions", image_id="b", label="dog", confidence=0.9)
    warehouse.add("labels", image_id="c", label="cat")
    return QueryEngine(warehouse)


@pytest.fixture
def stores(tmp_path: Path) -> ObjectStores:
    return ObjectStores({}, tmp_path)


# -------------------------------------------------------------------------------------------------------------- export


def test_parquet_holds_the_view(engine: QueryEngine, stores: ObjectStores, tmp_path: Path) -> None:
    written = export_results(engine, "out.parquet", stores=stores)
    table = pq.read_table(tmp_path / "out.parquet").sort_by([("image_id", "ascending"), ("task", "ascending")])
    assert table.equals(engine.sql("FROM results ORDER BY image_id, task"))
    assert (written.uri, written.num_rows) == ((tmp_path / "out.parquet").as_uri(), 4)
    assert written.num_bytes == (tmp_path / "out.parquet").stat().st_size


def test_csv_survives_commas_quotes_and_line_breaks(engine: QueryEngine, stores: ObjectStores, tmp_path: Path) -> None:
    assert export_results(engine, "out.csv", "csv", stores=stores).num_rows == 4
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["image_id"], row["task"]))
    assert [(row["image_id"], row["uri"], row["label"], row["confidence"]) for row in rows] == [
        ("a", ODD_URI, "red", "0.7"),
        ("a", ODD_URI, "cat", "0.1"),
        ("b", "file:///b.jpg", "dog", "0.9"),
        ("c", "file:///c.jpg", "cat", ""),
    ]
    assert rows[0]["at"] == "2026-01-01T00:00:00Z"


def test_coco_ids_refer_to_each_other(engine: QueryEngine, stores: ObjectStores, tmp_path: Path) -> None:
    assert export_results(engine, "out.json", "coco", stores=stores).num_rows == 4
    coco = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    images = {image["id"]: image for image in coco["images"]}
    categories = {category["id"]: category for category in coco["categories"]}
    assert len(images) == 3
    assert images[1] == {
        "id": 1, "file_name": ODD_URI, "width": 640, "height": 480, "split": "train", "winnow_image_id": "a",
    }  # fmt: skip
    assert [annotation["id"] for annotation in coco["annotations"]] == [1, 2, 3, 4]
    found = {
        (
            images[entry["image_id"]]["winnow_image_id"],
            categories[entry["category_id"]]["supercategory"],
            categories[entry["category_id"]]["name"],
            entry["score"],
            entry["source"],
        )
        for entry in coco["annotations"]
    }
    assert found == {
        ("a", "colour", "red", 0.7, "prediction"),
        ("a", "kind", "cat", 0.1, "prediction"),
        ("b", "kind", "dog", 0.9, "prediction"),
        ("c", "kind", "cat", None, "person"),
    }
    assert len(categories) == 3


def test_coco_holds_segments_with_masks_in_the_size_of_the_image(tmp_path: Path, stores: ObjectStores) -> None:
    from pycocotools.coco import COCO

    warehouse = HandMade(tmp_path / "tables")
    labels = np.zeros((26, 39), dtype=np.uint8)
    labels[3:9, 5:20] = 1
    labels[20:, 30:] = 2
    for image_id, found, size in (("a", labels, (78, 52)), ("b", labels, (40, 30)), ("c", labels * 0, (39, 26))):
        warehouse.add("images", image_id=image_id)
        warehouse.add("outcomes", image_id=image_id, task="parts", model="parts@1", width=size[0], height=size[1])
        for entry in encode_classes(found):
            name = ("__background__", "cat", "dog")[entry.value]
            warehouse.add("segments", image_id=image_id, label=name, rle=entry.rle, confidence=0.75)
    warehouse.add("predictions", image_id="a", label="background", confidence=0.5)  # of a whole image: a class
    warehouse.add("segments", image_id="gone", label="cat", rle=encode_classes(labels)[1].rle)
    written = export_results(QueryEngine(warehouse), "out.json", "coco", stores=stores)
    assert written.num_rows == 5

    coco = COCO(tmp_path / "out.json")
    assert sorted((entry["supercategory"], entry["name"]) for entry in coco.loadCats(coco.getCatIds())) == [
        ("kind", "background"), ("parts", "cat"), ("parts", "dog"),
    ]  # fmt: skip
    images = {image["winnow_image_id"]: image for image in coco.loadImgs(coco.getImgIds())}
    assert images.keys() == {"a", "b", "c"}, "an image of background alone is an image"
    assert coco.getAnnIds(imgIds=images["c"]["id"]) == []
    for name, width, height in (("a", 78, 52), ("b", 40, 30)):
        expected = resize_to_source(labels, width, height)
        for value, label in ((1, "cat"), (2, "dog")):
            wanted = coco.getAnnIds(imgIds=images[name]["id"], catIds=coco.getCatIds(catNms=[label]))
            (annotation,) = coco.loadAnns(wanted)
            assert np.array_equal(coco.annToMask(annotation), expected == value)
            rows, columns = np.nonzero(expected == value)
            assert annotation["area"] == len(rows)
            assert annotation["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert (annotation["iscrowd"], annotation["score"], annotation["model"]) == (0, 0.75, "parts@1")


def test_a_damaged_mask_in_the_table_stops_the_export_and_is_named(tmp_path: Path, stores: ObjectStores) -> None:
    warehouse = HandMade(tmp_path / "tables")
    warehouse.add("images", image_id="a")
    warehouse.add("outcomes", image_id="a", task="parts", model="parts@1", width=4, height=4)
    warehouse.add("segments", image_id="a", label="cat", rle={"size": [2, 2], "counts": "9"})
    with pytest.raises(StorageError, match=r"damaged mask for image a and task 'parts': .* covers 9 pixels"):
        export_results(QueryEngine(warehouse), "out.json", "coco", stores=stores)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_warehouse_gives_a_valid_file(tmp_path: Path, stores: ObjectStores, format: str) -> None:
    empty = QueryEngine(HandMade(tmp_path / "tables"))
    assert export_results(empty, "out", format, stores=stores).num_rows == 0
    out = tmp_path / "out"
    if format == "parquet":
        assert pq.read_table(out).schema == empty.sql("FROM results").schema
    elif format == "csv":
        assert out.read_bytes() == b"image_id,uri,split,task,label,source,confidence,model,at\r\n"
    else:
        assert {name: json.loads(out.read_text())[name] for name in ("images", "categories", "annotations")} == {
            "images": [], "categories": [], "annotations": [],
        }  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_an_existing_file_is_kept_unless_overwrite_is_asked(
    engine: QueryEngine, stores: ObjectStores, tmp_path: Path, format: str
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(CallError, match=r"out exists; .*--overwrite"):
        export_results(engine, "out", format, stores=stores)
    assert out.read_text() == "mine"
    export_results(engine, "out", format, stores=stores, overwrite=True)
    assert out.stat().st_size > 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class _Breaking:
    """An engine whose results break off after some rows."""

    def __init__(self, engine: QueryEngine) -> None:
        self._engine = engine

    def reader(self, statement: str, **_: Any) -> pa.RecordBatchReader:
        batch = self._engine.sql(statement).to_batches()[0]

        def batches() -> Any:
            yield batch
            raise QueryError("broke off")

        return pa.RecordBatchReader.from_batches(batch.schema, batches())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_export_that_breaks_off_leaves_nothing(
    engine: QueryEngine, stores: ObjectStores, tmp_path: Path, format: str, overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        out.write_text("mine")
    with pytest.raises(QueryError, match="broke off"):
        export_results(_Breaking(engine), "out", format, stores=stores, overwrite=overwrite)  # type: ignore[arg-type]
    assert [path.read_text() for path in tmp_path.iterdir()] == (["mine"] if overwrite else [])


def test_faults_in_the_call_are_named(engine: QueryEngine, stores: ObjectStores, tmp_path: Path) -> None:
    with pytest.raises(CallError, match="'xlsx' is unknown; choose parquet, csv, coco"):
        export_results(engine, "out", "xlsx", stores=stores)
    with pytest.raises(CallError, match="does not exist; create it"):
        export_results(engine, "no/such/out", stores=stores)
    with pytest.raises(CallError, match="is a folder"):
        export_results(engine, str(tmp_path), stores=stores)
    with pytest.raises(CallError, match="names no file"):
        export_results(engine, "s3://bucket", stores=stores)
    (tmp_path / "file").touch()
    with pytest.raises((CallError, StorageError)):
        export_results(engine, "file/out", stores=stores)


@pytest.mark.s3
@pytest.mark.parametrize("format", FORMATS)
def test_exports_to_a_bucket(engine: QueryEngine, s3_env: Any, tmp_path: Path, format: str) -> None:
    stores = ObjectStores({"s3://": StorageConfig(endpoint=s3_env.endpoint, region=s3_env.region)}, tmp_path)
    bucket = s3_env.make_bucket("export")
    uri = f"s3://{bucket}/folder/results of today.{format}"
    written = export_results(engine, uri, format, stores=stores)
    assert (written.uri, written.num_rows) == (uri, 4)
    data = stores.at(f"s3://{bucket}/folder").get(f"results of today.{format}")
    assert len(data) == written.num_bytes
    export_results(engine, "local", format, stores=stores)
    if format == "coco":
        assert data == (tmp_path / "local").read_bytes()
    with pytest.raises(CallError, match="--overwrite"):
        export_results(engine, uri, format, stores=stores)
    export_results(engine, uri, format, stores=stores, overwrite=True)


# -------------------------------------------------------------------------------------------------------------- output


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def drawn(data: pa.Table, monkeypatch: pytest.MonkeyPatch, *, columns: int = 80, **options: Any) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    file = _Terminal()
    print_table(data, file=file, **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())  # bold and dim


def plain(data: pa.Table, format: str = "table") -> str:
    file = io.StringIO(newline="")
    print_table(data, format, file)
    return file.getvalue()


def test_a_terminal_gets_a_table_with_aligned_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(pa.table({"label": ["cat", None], "count": [1, 2000]}), monkeypatch)
    assert "│ label │ count │" in text
    assert "│ cat   │     1 │" in text
    assert "│ null  │  2000 │" in text


def test_a_terminal_gets_so_many_rows_and_a_count_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(pa.table({"i": range(250)}), monkeypatch, max_rows=20)
    assert "│ 19 │" in text
    assert "│ 20 │" not in text
    assert "… 230 more rows" in text
    assert "more rows" not in drawn(pa.table({"i": range(20)}), monkeypatch, max_rows=20)


def test_no_line_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    long = pa.table({"uri": ["s3://bucket/" + "x" * 500], "label": ["cat"]})
    text = drawn(long, monkeypatch, columns=60)
    assert max(map(len, text.splitlines())) <= 60
    assert "│ cat   │" in text
    wide = pa.table({f"column_{i}": ["x" * 40] for i in range(30)})
    text = drawn(wide, monkeypatch, columns=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "column_29" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_names_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    evil = "a\x1b]0;owned\x07\n\r\tb\u202egpj.exe\x9b31m[red]x[/red]\u2028\x7f"
    table = pa.table({evil: [evil]})
    text = drawn(table, monkeypatch, columns=300) if terminal else plain(table)
    assert not set(text) & set("\x1b\x07\r\u202e\x9b\u2028\x7f\t")
    assert len(text.splitlines()) == (5 if terminal else 2)
    assert text.count(r"a\x1b]0;owned\x07\n\r\tb\u202egpj.exe\x9b31m[red]x[/red]\u2028\x7f") == 2


def test_ordinary_unicode_is_printed_as_it_is() -> None:
    for text in ("Käse 猫 🐈 naïve e\u0301", "with\u00a0space", "plain"):
        assert printable(text) == text


def test_a_pipe_gets_all_rows_with_tabs() -> None:
    lines = plain(pa.table({"label": ["cat"] * 500, "n": [None] * 500})).splitlines()
    assert lines[0] == "label\tn"
    assert lines[1:] == ["cat\t"] * 500


NESTED = pa.table(
    {
        "text": pa.array(['a,"b"\r\nc', None, ""]),
        "flag": pa.array([True, False, None]),
        "small": pa.array([0.1, math.nan, math.inf], pa.float32()),
        "real": pa.array([0.1, math.nan, -math.inf]),
        "big": pa.array([Decimal(2**70), Decimal(1), None], pa.decimal128(38, 0)),
        "time": pa.array([at(1), None, at(0)], pa.timestamp("us", tz="UTC")),
        "top": pa.array([[{"label": "cat", "score": 0.1}], [], None], pa.list_(SCORED_LABEL)),
        "tags": pa.array([[("k", "v")], [], None], pa.map_(pa.string(), pa.string())),
        "raw": pa.array([b"\x00\xff", None, b""]),
    }
)  # fmt: skip


def test_json_is_one_array_with_finite_numbers_and_iso_times() -> None:
    first, second, third = json.loads(plain(NESTED, "json"), parse_constant=pytest.fail)
    assert first == {
        "text": 'a,"b"\r\nc', "flag": True, "small": 0.1, "real": 0.1, "big": 2**70,
        "time": "2026-01-01T00:01:00Z",
        "top": [{"label": "cat", "score": 0.1}], "tags": {"k": "v"}, "raw": "00ff",
    }  # fmt: skip
    assert (second["small"], second["real"], second["text"], second["big"]) == (None, None, None, 1)
    assert (third["small"], third["real"], third["top"], third["raw"]) == (None, None, None, "")
    assert json.loads(plain(NESTED.slice(0, 0), "json")) == []


def test_json_keeps_columns_of_the_same_name() -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["id", "id"])
    assert json.loads(plain(table, "json")) == [{"id": 1, "id_2": 2}]


def test_csv_is_rfc_4180() -> None:
    text = plain(NESTED, "csv")
    assert text.count("\r\n") == 5  # header, three rows, and the line break within the quotes
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert rows[0]["text"] == 'a,"b"\r\nc'
    assert rows[0]["flag"] == "true"
    assert json.loads(rows[0]["top"]) == [{"label": "cat", "score": 0.1}]
    assert rows[1]["small"] == rows[2]["time"].removeprefix("2026-01-01T00:00:00Z") == ""


def test_parquet_and_others_go_to_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    print_table(NESTED, "parquet", output=out)
    finite = NESTED.drop_columns(["small", "real"])  # NaN equals nothing
    assert pq.read_table(out).select(finite.column_names).equals(finite)
    with pytest.raises(CallError, match="exists"):
        print_table(NESTED, "parquet", output=out)
    print_table(NESTED.to_reader(), "json", output=out, overwrite=True)
    assert len(json.loads(out.read_text())) == 3
    with pytest.raises(CallError, match="--output FILE"):
        print_table(NESTED, "parquet")
    with pytest.raises(CallError, match="'xml' is unknown"):
        print_table(NESTED, "xml")
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_a_plan_is_shown_on_many_lines(engine: QueryEngine) -> None:
    text = plain(engine.sql("EXPLAIN SELECT label FROM results"))
    assert len(text.splitlines()) > 5
    assert "\\n" not in text


def test_writers_count_rows_over_batches() -> None:
    table = pa.table({"i": range(1000)})
    for write in (write_csv, write_json):
        assert write(pa.RecordBatchReader.from_batches(table.schema, table.to_batches(64)), io.StringIO()) == 1000


def test_what_was_exported_is_said(engine: QueryEngine, stores: ObjectStores) -> None:
    written = export_results(engine, "out.csv", "csv", stores=stores)
    file = io.StringIO()
    print_export(written, file=file)
    assert file.getvalue() == f"4 results, {written.num_bytes} bytes: {written.uri}\n"
    file = io.StringIO()
    print_export(written, "json", file)
    assert json.loads(file.getvalue())["num_rows"] == 4
