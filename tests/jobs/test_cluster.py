"""Jobs on a Ray cluster that runs already, of two nodes on this machine."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import workspaces as ws
from winnow_jobs.ports import find_free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

RAY = Path(sys.executable).with_name("ray")


@pytest.fixture
def nodes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Raylets that a test started; ended with all that they started."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    family = [child for each in started for child in psutil.Process(each.pid).children(recursive=True)]
    for process in (*family, *(psutil.Process(each.pid) for each in started)):
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=20)
    for each in started:
        each.wait(20)


def start_node(arguments: list[str], *, prefix: list[str] | None = None) -> subprocess.Popen[bytes]:
    command = [*(prefix or []), str(RAY), "start", "--num-cpus=2", "--node-ip-address=127.0.0.1", "--block", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_local_warehouse_is_refused_where_a_node_does_not_see_it(
    tmp_path: Path, nodes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path / "warehouse")]
    config = ws.write_config(tmp_path)
    workspace = ws.ingested(config, 20)
    if subprocess.run([*hide, "true"], capture_output=True, timeout=20, check=False).returncode != 0:
        pytest.skip("needs the right to mount in a namespace of its own (root)")

    address = f"127.0.0.1:{find_free_port()}"
    for name, value in (("ADDRESS", address), ("AUTH_MODE", "token"), ("AUTH_TOKEN", secrets.token_hex(32))):
        monkeypatch.setenv(f"RAY_{name}", value)
    nodes.append(start_node(["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]))
    wait_for_nodes(address, 1)
    ws.run(config, "predict")  # the only node sees it
    ws.check_conserved(workspace, 20)

    ws.ingested(config, 30)
    nodes.append(start_node([f"--address={address}"], prefix=hide))
    wait_for_nodes(address, 2)
    said = ws.run(config, "predict", code=2)
    assert "1 of 2 nodes do not see" in said
    assert workspace.warehouse.ledger.open_runs() == []
    assert not list((tmp_path / "warehouse").glob("probe-*"))
    assert nodes[0].poll() is None  # the cluster is left as it was

    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    said = ws.run(config, "predict", code=2)
    assert f"the Ray cluster at {address} cannot be joined" in said
    assert "token" in said
    assert ".cc:" not in said
    assert "Traceback" not in said


def wait_for_nodes(address: str, num_nodes: int) -> None:
    """Wait until the cluster has so many living nodes."""

    def count() -> int:
        script = f"import ray; ray.init({address!r}, logging_level=40); print(sum(n['Alive'] for n in ray.nodes()))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        return int(done.stdout or -1)

    ws.wait_until(lambda: count() == num_nodes, timeout_s=90, what=f"{num_nodes} nodes")


def test_a_cluster_that_is_not_there_is_one_message_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ws.write_config(tmp_path)
    workspace = ws.ingested(config, 2)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{find_free_port()}")
    said = ws.run(config, "predict", code=2, timeout_s=60)
    assert "no Ray cluster answers at 127.0.0.1" in said
    assert workspace.warehouse.ledger.open_runs() == []


def test_weights_that_cannot_be_had_stop_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "winnow.toml"
    config.write_text('[tasks.objects]\nmodel = "torchvision/resnet18@IMAGENET1K_V1"\n')
    workspace = ws.ingested(config, 2)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    # A proxy where nothing listens: the download fails wherever the tests run.
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{find_free_port()}")
    said = ws.run(config, "predict", code=1, timeout_s=60)
    assert "the weights of torchvision/resnet18@IMAGENET1K_V1 are not in the cache" in said
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in said
    assert "Traceback" not in said
    assert workspace.warehouse.ledger.open_runs() == []
