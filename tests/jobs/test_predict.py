"""predict end to end on Ray: plans, open runs, failures as rows, and stopping when storage fails."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import workspaces as ws
from faulty_http import FaultyHttp
from winnow.errors import CallError, OpenRunError, QueryError, StoppedError
from winnow_jobs import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ws.save_model(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def workspace(tmp_path: Path, model_file: Path) -> Workspace:
    """An empty workspace with a folder ``images`` and the small model."""
    (tmp_path / "small.safetensors").write_bytes(model_file.read_bytes())
    (tmp_path / "images").mkdir()
    workspace = Workspace(ws.write_config(tmp_path))
    workspace.init()
    return workspace


def add(workspace: Workspace, start: int, stop: int) -> None:
    for number in range(start, stop):
        (workspace.folder / "images" / f"{number:05d}.jpg").write_bytes(ws.small_jpeg(number))
    workspace.ingest([str(workspace.folder / "images")])


def count(workspace: Workspace, what: str) -> int:
    return int(workspace.query(f"SELECT count(*) AS n FROM {what}")["n"][0].as_py())


def test_bad_images_become_rows_and_only_new_images_are_asked(workspace: Workspace) -> None:
    images = workspace.folder / "images"
    (images / "text.jpg").write_bytes(b"not an image")
    (images / "empty.png").write_bytes(b"")
    (images / "cut.jpg").write_bytes(ws.small_jpeg(1)[:300])
    add(workspace, 0, 60)
    first = workspace.predict()
    assert (first.num_asked, first.num_answered, first.num_failed) == (63, 60, 3)
    assert first.failures == {"not_an_image": 1, "empty": 1, "truncated": 1}
    ws.check_conserved(workspace, 63, num_failed=3)
    failures = workspace.query("SELECT uri, stage, error, message, sha256 FROM failures ORDER BY uri").to_pylist()
    assert [(row["stage"], row["error"]) for row in failures] == [
        ("decode", "truncated"),
        ("fetch", "empty"),
        ("decode", "not_an_image"),
    ]
    assert all(len(row["message"]) > 20 for row in failures)
    assert all(len(row["sha256"]) == 64 for row in failures if row["stage"] == "decode")

    again = workspace.predict()
    assert (again.status, again.num_asked, again.run_id) == ("nothing to do", 0, None)

    add(workspace, 60, 70)
    second = workspace.predict()
    assert (second.num_asked, second.num_answered) == (10, 10)
    assert count(workspace, "outcomes") == 73
    assert count(workspace, "runs WHERE job = 'predict'") == 2


def test_rows_say_what_the_model_said(workspace: Workspace) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    add(workspace, 0, 20)
    (workspace.folder / "winnow.toml").write_text(
        (workspace.folder / "winnow.toml").read_text().replace("[predict]", "store_probabilities = true\n[predict]")
    )
    workspace = Workspace(workspace.folder / "winnow.toml")
    workspace.predict()
    rows = workspace.query("SELECT p.*, i.uri FROM predictions p JOIN current_images i USING (image_id)").to_pylist()
    model = timm.create_model("test_resnet", pretrained=False, num_classes=5)
    model.load_state_dict(load_file(workspace.folder / "small.safetensors"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    from PIL import Image

    for row in rows:
        with Image.open(row["uri"].removeprefix("file://")) as image, torch.inference_mode():
            expected = model.eval()(transform(image.convert("RGB"))[None]).softmax(-1)[0]
        assert row["probabilities"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert row["label"] == ws.CLASSES[int(expected.argmax())]
        ordered = sorted(expected.tolist(), reverse=True)
        assert row["confidence"] == pytest.approx(ordered[0], abs=1e-4)
        assert row["margin"] == pytest.approx(ordered[0] - ordered[1], abs=1e-4)
        assert row["entropy"] == pytest.approx(-float((expected * expected.log()).sum()), abs=1e-3)
        assert [entry["score"] for entry in row["top5"]] == pytest.approx(ordered, abs=1e-4)
        assert row["top5"][0]["label"] == row["label"]


def test_where_limit_and_dry_run_narrow_the_plan(workspace: Workspace) -> None:
    add(workspace, 0, 40)
    dry = workspace.predict(where="uri LIKE '%/0000_.jpg'", dry_run=True)
    assert (dry.status, dry.num_asked, dry.run_id) == ("dry run", 10, None)
    assert count(workspace, "outcomes") == 0
    assert workspace.predict(where="uri LIKE '%/0000_.jpg' -- a comment").num_answered == 10
    assert workspace.predict(limit=7).num_answered == 7
    assert workspace.predict().num_answered == 23
    ids = workspace.query("SELECT image_id FROM outcomes")["image_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 40


def test_new_asks_only_images_that_no_version_has_answered(workspace: Workspace) -> None:
    add(workspace, 0, 10)
    workspace.predict()
    ws.save_model(workspace.folder / "other.safetensors", architecture="test_vit")
    text = (workspace.folder / "winnow.toml").read_text()
    text = text.replace("./small.safetensors", "./other.safetensors").replace("timm/test_resnet", "timm/test_vit")
    (workspace.folder / "winnow.toml").write_text(text)
    other = Workspace(workspace.folder / "winnow.toml")
    add(other, 10, 15)
    assert other.predict(new=True).num_answered == 5
    assert other.predict(new=True).num_asked == 0
    assert other.predict().num_answered == 10
    assert count(other, "latest_predictions") == 15


def test_an_open_run_is_joined_by_the_same_call_and_refused_to_others(workspace: Workspace) -> None:
    add(workspace, 0, 30)
    run_id = ws.leave_open(workspace)
    with pytest.raises(OpenRunError, match=f"winnow runs abandon {run_id}"):
        workspace.predict(limit=3)
    assert workspace.runs().to_pylist()[0]["status"] == "open"
    assert workspace.predict(dry_run=True).run_id == run_id

    (workspace.folder / "moved").mkdir()  # as on a cluster, where a submitted checkpoint lies elsewhere each time
    (workspace.folder / "small.safetensors").rename(workspace.folder / "moved" / "small.safetensors")
    text = workspace.config_path.read_text()
    workspace.config_path.write_text(text.replace('"./small', '"./moved/small'))
    joined = Workspace(workspace.config_path).predict()
    assert (joined.run_id, joined.num_answered) == (run_id, 30)
    ws.check_conserved(workspace, 30)


def test_an_open_run_is_resumed_with_its_own_options_or_abandoned(workspace: Workspace) -> None:
    add(workspace, 0, 30)
    run_id = ws.leave_open(workspace, limit=4)
    assert workspace.resume(run_id).num_answered == 4
    with pytest.raises(CallError, match="finished already"):
        workspace.resume(run_id)
    second = ws.leave_open(workspace, limit=5)
    assert workspace.abandon(second) == "abandoned"
    with pytest.raises(CallError, match="abandoned already"):
        workspace.abandon(second)
    with pytest.raises(CallError, match="run 'nonsense' is unknown"):
        workspace.resume("nonsense")
    assert workspace.predict().num_answered == 26
    statuses = workspace.query("SELECT status FROM runs WHERE job = 'predict' ORDER BY started_at")[
        "status"
    ].to_pylist()
    assert statuses == ["finished", "abandoned", "finished"]


@pytest.fixture
def web() -> Iterator[FaultyHttp]:
    with FaultyHttp() as server:
        yield server


def ingest_urls(workspace: Workspace, web: FaultyHttp, names: list[str]) -> None:
    manifest = workspace.folder / "list.csv"
    rows = []
    for name in names:
        item = web.items[f"/{name}"]
        rows.append(f'{web.url}/{name},"{(item.etag or "").replace(chr(34), chr(34) * 2)}",{len(item.body)}')
    manifest.write_text("uri,etag,size\n" + "\n".join(rows) + "\n")
    workspace.ingest([str(manifest)])


def test_storage_faults_are_typed_rows_and_only_those_are_retried(workspace: Workspace, web: FaultyHttp) -> None:
    text = (workspace.folder / "winnow.toml").read_text()
    patience = "fetch_timeout_s = 1.0\nretry_timeout_s = 4.0\nmax_bytes = 100000\n"
    (workspace.folder / "winnow.toml").write_text(text.replace("[predict]", f"[predict]\n{patience}"))
    workspace = Workspace(workspace.folder / "winnow.toml")
    faults: dict[str, list[int | str]] = {
        "forbidden": [403] * 99,
        "missing": [404] * 99,
        "slow_down": [503, 503],
        "unavailable": [503] * 999,
        "stalled": ["stall"] * 99,
        "incomplete": ["truncate"] * 99,
        "good": [],
    }
    for number, (name, plan) in enumerate(faults.items()):
        web.put(f"/{name}.jpg", ws.small_jpeg(number), faults=plan)
    web.put("/changed.jpg", ws.small_jpeg(50))
    web.put("/text.jpg", b"no image at all")
    web.put("/big.jpg", ws.small_jpeg(51) + bytes(200_000))
    ingest_urls(workspace, web, [f"{name}.jpg" for name in (*faults, "changed", "text", "big")])
    web.put("/changed.jpg", ws.small_jpeg(52))

    result = workspace.predict()
    assert (result.num_asked, result.num_answered) == (10, 2)
    kinds = {
        row["uri"].rsplit("/", 1)[1].removesuffix(".jpg"): row["error"]
        for row in workspace.query("SELECT uri, error FROM failures").to_pylist()
    }
    assert kinds == {
        "forbidden": "forbidden",
        "missing": "missing",
        "unavailable": "unavailable",
        "stalled": "stalled",
        "incomplete": "incomplete",
        "changed": "changed",
        "text": "not_an_image",
        "big": "too_many_bytes",
    }
    assert web.hits["/slow_down.jpg"] >= 3

    hits = dict(web.hits)
    for name in faults:
        web.items[f"/{name}.jpg"].faults.clear()
    retried = workspace.predict(retry_failures="storage")
    assert (retried.num_asked, retried.num_answered) == (5, 5)
    assert {name for name in web.hits if web.hits[name] > hits[name]} == {
        f"/{name}.jpg" for name in ("forbidden", "missing", "unavailable", "stalled", "incomplete")
    }
    assert count(workspace, "failures") == 3
    assert count(workspace, "latest_predictions") == 7


def test_expired_credentials_stop_the_run_and_the_same_command_continues_it(
    workspace: Workspace, web: FaultyHttp
) -> None:
    names = [f"{number:04d}.jpg" for number in range(600)]
    for number, name in enumerate(names):
        web.put(f"/{name}", ws.small_jpeg(number), faults=[403] * 9 if number % 2 else [])
    ingest_urls(workspace, web, names)
    with pytest.raises(StoppedError, match=r"more than max_failure_share = 0.2.*same command"):
        workspace.predict()
    assert count(workspace, "outcomes") == 0
    assert "stopped for failures" in workspace.runs().to_pylist()[0]["verdict"]
    for item in web.items.values():
        item.faults.clear()
    result = workspace.predict()
    assert (result.num_answered, result.num_failed) == (600, 0)
    ws.check_conserved(workspace, 600)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tasks": ["nonsense"]}, CallError, "task 'nonsense' is unknown; configured tasks: objects"),
        ({"where": "no_such_column = 1"}, QueryError, "no_such_column"),
        ({"where": "1 = 1) OR (1 = 1; DROP TABLE images"}, QueryError, "one statement|syntax|parse"),
        ({"limit": 0}, CallError, "--limit 0"),
        ({"retry_failures": "some"}, CallError, "choose storage or all"),
        ({"new": True, "retry_failures": "all"}, CallError, "exclude each other"),
    ],
)
def test_a_wrong_call_writes_nothing(
    workspace: Workspace, options: dict[str, object], error: type[Exception], match: str
) -> None:
    add(workspace, 0, 3)
    before = sorted(info.key for info in workspace.warehouse.store.list(""))
    with pytest.raises(error, match=match):
        workspace.predict(**options)  # type: ignore[arg-type]
    assert sorted(info.key for info in workspace.warehouse.store.list("")) == before


@pytest.mark.parametrize("num_cpus", [1, 4])
def test_it_flows_on_few_cpus(workspace: Workspace, num_cpus: int) -> None:
    add(workspace, 0, 300)
    ws.run(workspace.config_path, "predict", "--num-cpus", str(num_cpus), timeout_s=200)
    ws.check_conserved(workspace, 300)


def test_a_rerun_after_success_starts_no_ray_and_is_quick_at_100_000_images(workspace: Workspace) -> None:
    publish_answers(workspace, 100_000)
    started = time.monotonic()
    script = (
        "import sys; sys.argv = ['winnow', '--config', sys.argv[1], 'predict']\n"
        "from winnow_jobs.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, workspace.config_path], capture_output=True, text=True, timeout=60, check=False
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert done.stdout.strip().endswith("[]")
    assert seconds < 5


def publish_answers(workspace: Workspace, num_images: int) -> None:
    """Rows of images and outcomes as a finished run of the workspace's model leaves them."""
    from datetime import UTC, datetime

    from winnow_connectors.ledger import Plan, new_run_id

    task = workspace.config.task(ws.TASK)
    now = datetime.now(UTC)
    same = {
        "images": {
            "event": "added",
            "version": "v",
            "source": "made",
            "split": "train",
            "audit": False,
            "seen_at": now,
        },
        "outcomes": {
            "task": ws.TASK,
            "model": workspace.resolve_model(task).id,
            "status": "answered",
            "at": now,
        },
    }
    ledger = workspace.warehouse.ledger
    ids = [f"{number:032x}" for number in range(num_images)]
    plan = Plan(new_run_id("made"), "made", (("made", 1),), "", {}, 0, now.isoformat(), "0")
    run = ledger.begin(plan)
    assert run is not None
    fragments = []
    for table, values in same.items():
        columns = {name: pa.array([value] * num_images) for name, value in values.items()}
        columns |= {"image_id": pa.array(ids), "run": pa.array([run.run_id] * num_images)}
        if table == "images":
            columns |= {"uri": pa.array([f"file:///made/{name}" for name in ids]), "group": pa.array(ids)}
        fragments.append(run.stage(table, pa.table(columns)))
    run.decide("finished", fragments, {})
    run.close()
