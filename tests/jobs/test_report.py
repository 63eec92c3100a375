"""``winnow report`` over tables made by hand and real images: what it says, what it keeps to itself, what it leaves."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import workspaces as ws
from audited import Audited
from delta_tables import HandMade, at
from model_versions import MEASURED, make_version
from reviewed import SECRET, telling_jpeg
from winnow.errors import CallError, StorageError
from winnow.masks import encode_classes
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli
from winnow_jobs.report import charts
from winnow_jobs.report.gather import EpochPoint, gather
from winnow_jobs.selection import answerer_of

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

TASK = ws.TASK
HOSTILE = ("<script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "{{ 7 * 7 }}", "]]> & \u202eolleh")
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """What a page holds; fails where tags are not closed as they were opened."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text("utf-8")
        self.tags: Counter[str] = Counter()
        self.pictures: list[bytes] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.html)
        self.close()
        assert self._open == []
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert not any(name.startswith("on") for name, _ in attrs)
        values = {name: value or "" for name, value in attrs}
        if tag == "img":
            assert values["alt"]
            self.pictures.append(base64.b64decode(values["src"].removeprefix("data:image/jpeg;base64,")))
        if tag == "svg":
            assert values.get("aria-label") or values.get("aria-hidden")
        if "id" in values:
            self.ids.append(values["id"])
        if values.get("href", "").startswith("#"):
            assert f'id="{values["href"][1:]}"' in self.html
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def write(workspace: Workspace, **options: Any) -> Page:
    return Page(Path(workspace.report(**options).path))


def labels_of(tables: HandMade, ids: list[str], labels: list[str], **columns: Any) -> None:
    """Imported labels."""
    tables.add_rows(
        "labels",
        (
            {"image_id": each, "task": TASK, "event": "imported", "origin": "imported", "label": label, **columns}
            for each, label in zip(ids, labels, strict=True)
        ),
    )


def answers_of(tables: HandMade, model: str, ids: list[str], labels: list[str], confidences: list[float]) -> None:
    tables.add_rows(
        "predictions",
        (
            {"image_id": each, "task": TASK, "model": model, "label": label, "confidence": confidence}
            for each, label, confidence in zip(ids, labels, confidences, strict=True)
        ),
    )


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(ws.write_config(tmp_path))
    workspace.init()
    return workspace


def tables_of(workspace: Workspace) -> HandMade:
    return HandMade(workspace.folder / "warehouse" / "tables", exist=True)


# -- what it says ------------------------------------------------------------------------------------------------------


def test_an_empty_warehouse_gives_a_page_that_says_what_to_do(workspace: Workspace) -> None:
    page = write(workspace)
    for said in (
        "The warehouse knows no images yet: winnow ingest makes them known.",
        f"No image has an answer yet: winnow predict --task {TASK} asks the model.",
        "No answered image of the test split has a label yet",
        "Nobody has looked at the blind audit yet",
        "No model version was trained yet",
        "Nothing was queued for people yet",
        "No image that is there now has failed.",
        "Nothing was run yet.",
    ):
        assert said in page.text
    assert page.tags["svg"] == 0
    workspace.config_path.write_text("")
    assert "no task of classification or segmentation" in write(Workspace(workspace.config_path)).text


def test_figures_are_those_of_the_tables(workspace: Workspace) -> None:
    """Against the same figures computed another way."""
    rng = np.random.default_rng(0)
    ids = [f"{number:032x}" for number in range(400)]
    confidence = rng.beta(4, 2, 400).astype(np.float32)
    answers = rng.choice(ws.CLASSES, 400)
    said = np.where(rng.random(400) < confidence, answers, rng.choice(ws.CLASSES, 400))
    tables = tables_of(workspace)
    tables.add_rows(
        "images",
        (
            {"image_id": each, "split": "test" if number < 300 else "train", "metadata": {"site": f"site {number % 3}"}}
            for number, each in enumerate(ids)
        ),
    )
    tables.add("images", image_id="f" * 32, split="test", audit=True)
    tables.add("images", image_id="e" * 32, split="test", parent=ids[0])  # a copy counts nowhere
    model = answerer_of(workspace, TASK)
    answers_of(tables, "objects@9", ids, ["ant"] * 400, [0.5] * 400)  # of a model that is not in production
    everything = [*ids, "f" * 32, "e" * 32]
    answers_of(tables, model, everything, [*answers, "ant", "ant"], [*confidence.tolist(), 0.1, 0.1])
    labels_of(tables, [*ids[:350], "f" * 32], [*said[:350], "bee"])
    for number in range(7):
        error = "truncated" if number < 5 else "forbidden"
        tables.add(
            "outcomes", image_id=ids[number], task=TASK, model=model, status="failed", stage="decode", error=error
        )

    report = gather(workspace)
    (task,) = report.tasks
    assert (report.num_images, report.splits, report.num_audit) == (401, {"train": 100, "val": 0, "test": 300}, 1)
    assert (task.model, task.num_answered, task.labels) == (model, 401, {"train": 50, "test": 300})
    assert list(task.histogram) == np.histogram([*confidence, 0.1], bins=20, range=(0, 1))[0].tolist()
    measured = task.measured
    assert measured is not None
    right = (answers == said)[:300]
    assert (measured.accuracy.num_hits, measured.accuracy.num) == (right.sum(), 300)
    bins = np.clip(np.ceil(confidence[:300].astype(float) * 15).astype(int) - 1, 0, 14)
    gaps = [abs(confidence[:300][bins == n].sum() - right[bins == n].sum()) for n in np.unique(bins)]
    assert measured.ece == pytest.approx(sum(gaps) / 300, abs=1e-6)
    assert [each.right.num for each in measured.calibration] == [int((bins == n).sum()) for n in np.unique(bins)]
    assert dict(measured.cells) == Counter(zip(said[:300], answers[:300], strict=True))
    assert measured.mistakes[0][2] == max(n for (a, b), n in measured.cells.items() if a != b)
    (point,) = (point for point in measured.curve if point.threshold == 0.5)
    kept = confidence[:300] >= 0.5
    assert (point.error.num, point.error.num_hits) == (kept.sum(), (~right[kept]).sum())
    assert task.slices is not None
    assert {each.column for each in task.slices} == {"site"}
    assert [each.num_images for each in report.failures] == [5, 2]
    assert report.failures[0].examples == tuple(ids[:3])
    assert all(each.image_id != "f" * 32 for each in (*task.least, *task.most))  # of the reserve nothing is shown

    page = write(workspace)
    assert f"{right.mean():.1%} of 300 labelled test images are answered right" in page.text
    assert "the image ends before its last pixel" in page.text
    assert page.tags["script"] == 0


def test_forty_classes_are_drawn_and_more_are_put_together(workspace: Workspace) -> None:
    tables, names = tables_of(workspace), [f"class {number:02}" for number in range(50)]
    ids = [f"{number:032x}" for number in range(500)]
    tables.add_rows("images", ({"image_id": each, "split": "test"} for each in ids))
    said = [names[min(number % 70, 49)] for number in range(500)]
    answers_of(
        tables, answerer_of(workspace, TASK), ids, [said[number - number % 2] for number in range(500)], [0.9] * 500
    )
    labels_of(tables, ids, said)
    (task,) = gather(workspace).tasks
    assert task.measured is not None
    assert (len(task.measured.names), len(task.measured.classes)) == (40, 50)
    assert sum(task.measured.cells.values()) == 500
    page = write(workspace)
    assert "The 40 most frequent of 50 classes; the rest stands together as “all others”." in page.text
    assert page.tags["rect"] > 40


def test_how_a_whole_network_learned_is_drawn_and_a_head_has_no_epochs(workspace: Workspace) -> None:
    warehouse = workspace.warehouse
    tables = tables_of(workspace)
    ids = [f"{number:032x}" for number in range(20)]
    tables.add_rows("images", ({"image_id": each, "split": "train"} for each in ids))
    answers_of(tables, answerer_of(workspace, TASK), ids, ["ant"] * 20, [0.9] * 20)
    make_version(warehouse.registry, warehouse.ledger, TASK)
    assert "How the network learned" not in write(workspace).text
    losses = [(0.9, 0.8, 0.5), (0.4, 0.35, 0.75), (0.2, 0.45, 0.7)]
    curve = [
        {"epoch": number, "train_loss": train, "val_loss": val, "val_accuracy": score, "learning_rate": 0.1}
        for number, (train, val, score) in enumerate(losses, start=1)
    ]
    fit = {"epochs": 3, "best_epoch": 2, "chosen_by": "val", "curve": curve}
    metrics = {**MEASURED, "train": {"n": 1234}, "fit": fit}
    make_version(warehouse.registry, warehouse.ledger, TASK, metrics=metrics)
    (task,) = gather(workspace).tasks
    assert [point.epochs for point in task.versions] == [
        (),
        tuple(EpochPoint(number, *losses[number - 1]) for number in (1, 2, 3)),
    ]
    page = write(workspace)
    assert "objects@2 saw its 1,234 images 3 times; the weights are those of epoch 2." in page.text
    assert "Loss by epoch: train 0.900 to 0.200, val 0.800 to 0.450." in page.html
    assert "0.350" in page.text


def test_the_audit_is_told_as_the_last_look_said_it(tmp_path: Path) -> None:
    audited = Audited(tmp_path)
    audited.say(range(200), wrong=range(10))
    page = write(audited.workspace)
    assert "Nobody has looked at the blind audit yet" in page.text
    assert "95.0%" not in page.text
    audited.accept()
    page = write(audited.workspace)
    assert "objects: 95.0% of 200 images of the blind audit are answered right" in page.text
    assert "Look 1 of winnow accept" in page.text
    audited.say(range(200, 300), wrong=range(200, 300))
    again = write(audited.workspace)  # newer answers are not looked at without being paid for
    assert re.sub(r"\d\d:\d\d UTC|corrected the model \d+|by people \d+", "", again.text) == re.sub(
        r"\d\d:\d\d UTC|corrected the model \d+|by people \d+", "", page.text
    )
    audited.accept()
    assert (
        "Drift alarm: 0.0% of 100 new audit images are answered right, 95.0% of the 200 before"
        in write(audited.workspace).text
    )


# -- what it keeps to itself -------------------------------------------------------------------------------------------


def test_names_from_outside_stay_text(workspace: Workspace) -> None:
    tables, ids = tables_of(workspace), [f"{number:032x}" for number in range(40)]
    tables.add_rows(
        "images",
        ({"image_id": each, "split": "test", "metadata": {HOSTILE[0]: HOSTILE[n % 2]}} for n, each in enumerate(ids)),
    )
    answers_of(tables, answerer_of(workspace, TASK), ids, [HOSTILE[n % 4] for n in range(40)], [0.7] * 40)
    labels_of(tables, ids, [HOSTILE[n // 2 % 4] for n in range(40)])
    page = write(workspace)
    assert page.tags["script"] == 0
    assert page.tags["img"] == 0
    assert HOSTILE[0] in page.text
    assert HOSTILE[2] in page.text


@pytest.fixture
def photographed(tmp_path: Path) -> Workspace:
    """Twenty photographs that tell where they were taken, the first upside down, one gone, answered by hand."""
    folder = tmp_path / SECRET
    folder.mkdir()
    for number in range(20):
        (folder / f"{SECRET}-{number}.jpg").write_bytes(telling_jpeg(number))
    exif = Image.Exif()
    exif[0x0112] = 6  # the right of what is stored is up
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[:, :300] = 255
    Image.fromarray(pixels).save(folder / f"{SECRET}-0.jpg", exif=exif)
    workspace = Workspace(ws.write_config(tmp_path, predict="[splits]\naudit = 0.0"))  # all may be shown
    workspace.init()
    workspace.ingest([str(folder)])
    (folder / f"{SECRET}-1.jpg").unlink()
    rows = workspace.query("SELECT image_id FROM current_images ORDER BY uri")["image_id"].to_pylist()
    answers_of(tables_of(workspace), answerer_of(workspace, TASK), rows, ["cat"] * 20, [n / 20 for n in range(20)])
    return workspace


def test_thumbnails_are_small_upright_and_tell_nothing_else(photographed: Workspace) -> None:
    page = write(photographed)
    result = photographed.report()
    assert (result.num_pictures, result.num_unreadable) == (19, 1)
    assert "the object is gone" in page.text
    for data in page.pictures:
        with Image.open(io.BytesIO(data)) as picture:
            assert max(picture.size) <= 160
            assert not picture.getexif()
            assert {"exif", "comment", "icc_profile"}.isdisjoint(picture.info)
    sizes = [Image.open(io.BytesIO(data)).size for data in page.pictures]
    (upright,) = (data for data, size in zip(page.pictures, sizes, strict=True) if size == (107, 160))
    shades = np.asarray(Image.open(io.BytesIO(upright)).convert("L"))
    assert shades[10].mean() > 250  # what was stored on the left is on top
    assert shades[-10].mean() < 5
    for telling in (SECRET, "TellingCamera", "TellingComment", "Jones", str(photographed.folder), ".jpg"):
        assert telling not in page.html
        assert telling.encode() not in b"".join(page.pictures)


def test_images_can_be_left_out(photographed: Workspace) -> None:
    page = write(photographed, images=False)
    assert (page.tags["img"], "image/jpeg" in page.html) == (0, False)
    assert "Images were left out of this page on request." in page.text


def test_masks_are_drawn_on_the_thumbnails(tmp_path: Path) -> None:
    config = ws.write_config(tmp_path)
    config.write_text(
        config.read_text()
        + '[tasks.parts]\nkind = "segmentation"\nmodel = "./small.safetensors"\narchitecture = "timm/test_resnet"\n'
        + 'classes = ["background", "left", "right"]\n[splits]\naudit = 0.0\n'
    )
    (tmp_path / "images").mkdir()
    Image.new("RGB", (200, 100), (128, 128, 128)).save(tmp_path / "images" / "grey.png")
    workspace = Workspace(config)
    workspace.init()
    workspace.ingest([str(tmp_path / "images")])
    (image_id,) = workspace.query("SELECT image_id FROM current_images")["image_id"].to_pylist()
    labels = np.zeros((100, 200), np.uint8)
    labels[:, :80] = 1
    tables_of(workspace).add_rows(
        "segments",
        (
            {"image_id": image_id, "label": ["background", "left"][mask.value], "area_share": [0.6, 0.4][mask.value]}
            | {"confidence": [0.9, 0.5][mask.value], "rle": dict(mask.rle)}
            for mask in encode_classes(labels)
        ),
    )
    page = write(workspace, tasks=["parts"])
    picture = np.asarray(Image.open(io.BytesIO(page.pictures[0])).convert("RGB")).astype(int)
    assert np.ptp(picture[40, 120:], axis=1).max() < 12  # grey as it was
    assert np.ptp(picture[40, 20]) > 40  # tinted
    assert "left 74.0%" in page.text  # 0.6 · 0.9 + 0.4 · 0.5
    assert "objects" not in page.text


# -- how it is called --------------------------------------------------------------------------------------------------


def test_a_wrong_call_says_what_is_wrong_and_leaves_the_old_file(workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(CallError, match="task 'other' is unknown"):
        workspace.report(["other"], to=path)
    assert path.read_text() == "old"
    with pytest.raises(CallError, match=r"folder .*missing does not exist"):
        workspace.report(to=tmp_path / "missing" / "r.html")
    with pytest.raises(CallError, match="is a folder"):
        workspace.report(to=tmp_path)
    with pytest.raises(StorageError, match="cannot be written"):
        workspace.report(to="/proc/r.html")
    workspace.report(to=path)
    assert path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.glob(".winnow-*.part")) == []


def test_the_command_speaks_to_people_and_machines(workspace: Workspace) -> None:
    def run(*arguments: str) -> str:
        found = CliRunner().invoke(cli, ["--config", str(workspace.config_path), "report", *arguments])
        assert found.exit_code == 0, found.output
        return found.output

    path = workspace.folder / "report.html"
    assert run().startswith(f"{path}: 0.0 MB about 0 images (objects) with 0 thumbnails, in ")
    found = json.loads(run("--json", "--no-images", "--task", TASK))
    assert (found["path"], found["tasks"], found["num_bytes"]) == (str(path), [TASK], path.stat().st_size)


def test_ctrl_c_leaves_the_old_file(workspace: Workspace) -> None:
    path = workspace.folder / "report.html"
    path.write_text("old")
    command = [str(ws.WINNOW), "--config", str(workspace.config_path), "report"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(workspace.folder.glob(".winnow-*.part")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert path.read_text() == "old"
    assert list(workspace.folder.glob(".winnow-*.part")) == []


def test_ticks_are_round_and_reach_the_highest() -> None:
    assert charts.ticks_to(797) == [0, 200, 400, 600, 800]
    assert charts.ticks_to(1) == [0, 0.25, 0.5, 0.75, 1]
    for highest in (0, 0.003, 7, 1_000_000):
        ticks = charts.ticks_to(highest)
        assert ticks[-1] >= highest
        assert 2 <= len(ticks) <= 6


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture
def chrome() -> Iterator[Chrome]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (the extra `dev`)")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        browser.set_page_load_timeout(90)
        yield browser
    finally:
        browser.quit()


@pytest.mark.browser
def test_a_browser_shows_it_without_network_and_on_every_width(
    photographed: Workspace, chrome: Chrome, pytestconfig: pytest.Config
) -> None:
    tables = tables_of(photographed)
    rows = photographed.query("SELECT image_id, uri, version, size FROM current_images ORDER BY uri").to_pylist()
    tables.add_rows("images", ({**row, "split": "test", "seen_at": at(10**8)} for row in rows))
    names = [*["cat"] * 12, *ws.CLASSES, "an extraordinarily-long-name-of-a-class", *["dog"] * 2]
    labels_of(tables, [row["image_id"] for row in rows], names)
    page = Path(photographed.report().path)
    assert pytestconfig.cache is not None
    pictures = pytestconfig.cache.mkdir("screenshots")
    for width, scheme in ((1200, "light"), (320, "dark")):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        chrome.get(page.as_uri())
        (pictures / f"report-{width}-{scheme}.png").write_bytes(
            base64.b64decode(chrome.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"])
        )
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
        widths = chrome.execute_script("return [...document.images].map(each => each.naturalWidth)")
        assert len(widths) == 19
        assert min(widths) > 100
        ground = chrome.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 64) == (scheme == "dark")
    assert chrome.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in asked
    assert [url for url in asked if url != page.as_uri() and not url.startswith("data:")] == []
