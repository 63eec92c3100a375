"""Jobs on several machines: each node in a network namespace of its own, storage at another address, token on.

The images come late on purpose, so that what is killed is killed in the middle of its work.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import workspaces as ws
from coloured import COLOURS, picture
from ray_nodes import Network, Node, RayCluster, Relay
from winnow_jobs import Workspace
from winnow_jobs.local_s3 import LocalS3

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(1800)]

DELAY_S = 0.05
SIZES = [pytest.param(800, id="800"), pytest.param(20_000, id="20000", marks=pytest.mark.chaos)]
ALIKE = """
[tasks.alike]
kind = "embedding"
model = "./small.safetensors"
architecture = "timm/test_resnet"
"""
COLOUR = f"""
model = "./small.safetensors"
architecture = "timm/test_resnet"
classes = {json.dumps(list(COLOURS))}

[train]
num_workers = 2
epochs = 8
batch_size = 16
learning_rate = 0.003
head_learning_rate = 0.03
patience = 0
"""


@dataclass
class Site:
    """A cluster of two machines, storage on a third, and this machine, from which jobs are submitted."""

    cluster: RayCluster
    relay: Relay
    server: LocalS3

    @property
    def keys(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.server.access_key, "AWS_SECRET_ACCESS_KEY": self.server.secret_key}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := Network.why_not():
        pytest.skip(reason)
    server = LocalS3(tmp_path_factory.mktemp("s3"))
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    try:
        upstream = int(server.endpoint.rpartition(":")[2])
        with (
            Network() as network,
            Relay(network.gateway, upstream, DELAY_S) as relay,
            RayCluster(keys, network) as cluster,
        ):
            cluster.start_head()
            cluster.start_worker()
            yield Site(cluster, relay, server)
    finally:
        server.kill9()


@dataclass
class Desk:
    """A workspace on this machine whose images and warehouse lie on the site's storage."""

    config: Path
    workspace: Workspace
    site: Site
    log: Path

    @property
    def nodes(self) -> list[Node]:
        """Those that live."""
        return [node for node in self.site.cluster.nodes if node.process.poll() is None]

    def submit(self, *arguments: str) -> str:
        """Submit a job and wait for its end; its log."""
        return ws.run(self.config, "submit", *arguments, timeout_s=600)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return ws.start(self.config, "submit", *arguments, log=self.log)

    def wait_until_at_work(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until workers read images, and every living node has some of the run's workers; and a moment more."""

        def at_work() -> bool:
            reading = any(node.titled("FetchDecode", ".submit") for node in self.nodes)
            return reading and all(node.titled("ray::MapWorker") for node in self.nodes)

        ws.wait_until(
            lambda: process.poll() is not None or at_work(),
            timeout_s=500,
            what=f"workers on {len(self.nodes)} nodes; see {self.log}",
        )
        time.sleep(1)
        assert process.poll() is None, self.log.read_text()[-4000:]


@pytest.fixture
def desk(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Desk:
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
        monkeypatch.delenv(name)
    for name, value in (site.keys | site.cluster.client_environment).items():
        monkeypatch.setenv(name, value)
    if not any(node.process.poll() is None for node in site.cluster.nodes[1:]):
        site.cluster.start_worker()
    bucket = f"b{abs(hash(request.node.name)) % 10**9}"
    site.server.create_bucket(bucket)
    storage = f'[storage."s3://"]\nendpoint = "{site.relay.endpoint}"\nregion = "us-east-1"\n'
    config = ws.write_config(
        tmp_path, warehouse=f"s3://{bucket}/warehouse", storage=storage, predict="fetch_concurrency = 2"
    )
    workspace = Workspace(config)
    workspace.init()
    num_images = request.getfixturevalue("num_images") if "num_images" in request.fixturenames else 600
    ws.fill(workspace, f"s3://{bucket}/images", num_images)
    workspace.ingest([f"s3://{bucket}/images"])
    return Desk(config, workspace, site, tmp_path / "log.txt")


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    ws.kill_all_started()


def test_predict_duplicates_and_select_run_on_all_nodes(desk: Desk) -> None:
    desk.config.write_text(desk.config.read_text() + ALIKE)
    process = desk.start("predict")
    desk.wait_until_at_work(process)
    assert process.wait(600) == 0, desk.log.read_text()[-4000:]
    counts = ws.one(desk.workspace, "SELECT count(*) AS n, count(DISTINCT image_id) AS images FROM outcomes")
    assert counts == {"n": 1200, "images": 600}
    assert "nothing to do" in desk.submit("predict")

    found = json.loads(desk.submit("duplicates", "--json"))
    assert found["exit_code"] == 0
    chosen = json.loads(desk.submit("select", "--budget", "10", "--task", ws.TASK, "--json"))
    assert chosen["exit_code"] == 0
    # A model with random weights finds nearly all images alike, and people see one of those that are.
    assert 1 <= ws.one(desk.workspace, "SELECT count(*) AS n FROM queue_waiting")["n"] <= 10


@pytest.mark.parametrize("num_images", [1])
def test_two_workers_on_two_nodes_train_one_network(desk: Desk, num_images: int) -> None:
    desk.config.write_text(f"{desk.config.read_text()}\n[tasks.colour]\n{COLOUR}")
    workspace = Workspace(desk.config)
    source = desk.workspace.warehouse.uri.replace("warehouse", "colours")
    number = 0
    for split, num in {"train": 16, "val": 17, "test": 6}.items():
        for name, colour in COLOURS.items():
            for _ in range(num):
                workspace.stores.at(source).put(f"{split}/{name}/{number}.png", picture(colour, number))
                number += 1
    workspace.ingest([source], pattern="{split}/{label}/*", task="colour")
    process = desk.start("train", "colour")
    ws.wait_until(
        lambda: process.poll() is not None or all(node.titled("ray::", "TrainWorker") for node in desk.nodes),
        timeout_s=300,
        what=f"a worker on each node; see {desk.log}",
    )
    assert process.wait(600) == 0, desk.log.read_text()[-4000:]
    (version,) = workspace.warehouse.registry.versions("colour")
    metrics = workspace.warehouse.registry.card(version).metrics
    assert metrics["fit"]["num_workers"] == 2
    assert metrics["test"]["accuracy"] >= 0.9
    assert "nothing to do" in desk.submit("train", "colour")


@pytest.mark.parametrize("num_images", SIZES)
def test_predict_outlives_silent_storage_a_dead_node_and_a_dead_driver(desk: Desk, num_images: int) -> None:
    process = desk.start("predict", "--retries", "1")
    desk.wait_until_at_work(process)
    desk.site.relay.hold()
    try:
        time.sleep(20)
        assert process.poll() is None
    finally:
        desk.site.relay.release()

    desk.site.cluster.nodes[-1].kill()
    time.sleep(5)
    drivers = {process.pid: process for process in desk.site.cluster.nodes[0].drivers()}
    (driver,) = [each for each in drivers.values() if each.ppid() in drivers]
    driver.kill()
    assert process.wait(600) == 0, desk.log.read_text()[-4000:]
    assert "was killed by signal 9; running it again" in desk.log.read_text()
    ws.check_conserved(desk.workspace, num_images)
    assert "nothing to do" in desk.submit("predict")
