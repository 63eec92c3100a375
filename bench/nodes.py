"""How predict grows with the nodes when it waits: images/s on 1, 2 and 4 nodes of a storage that is slow on purpose.

    python bench/nodes.py [--images 1024] [--delay 0.2] [--nodes 1 2 4]

Each node is a raylet in a network namespace of its own (root), with one CPU as Ray counts them. Every request to the
S3 server waits `--delay` seconds in a relay before it is carried on, and each node keeps 4 requests in flight, so a
node reads at most 4 / delay images per second, which the table calls the ceiling. "images/s" counts from the first
answers, as `winnow runs show` does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from click import echo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import workspaces as ws
from ray_nodes import Network, RayCluster, Relay
from winnow_jobs import Workspace
from winnow_jobs.local_s3 import REGION, LocalS3

FETCHES = 4


def measure(folder: Path, server: LocalS3, num_nodes: int, num_images: int, delay_s: float) -> float:
    """Images per second of one predict on so many nodes."""
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    bucket = f"nodes-{num_nodes}"
    server.create_bucket(bucket)
    upstream = int(server.endpoint.rpartition(":")[2])
    predict = f"fetch_concurrency = {FETCHES}\ndecoders_per_worker = 1"
    with Network() as network, Relay(network.gateway, upstream, delay_s) as relay, RayCluster(keys, network) as cluster:
        cluster.start_head(num_cpus=1)
        for _ in range(num_nodes - 1):
            cluster.start_worker(num_cpus=1)
        os.environ.update(keys | cluster.client_environment)
        place = folder / bucket
        place.mkdir()

        def config(endpoint: str) -> Path:
            storage = f'[storage."s3://"]\nendpoint = "{endpoint}"\nregion = "{REGION}"\n'
            return ws.write_config(place, warehouse=f"s3://{bucket}/warehouse", storage=storage, predict=predict)

        workspace = Workspace(config(server.endpoint))  # filled without the relay
        workspace.init()
        ws.fill(workspace, f"s3://{bucket}/images", num_images)
        workspace.ingest([f"s3://{bucket}/images"])
        done = subprocess.run(
            [ws.WINNOW, "--config", config(relay.endpoint), "submit", "predict", "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        ws.check_conserved(workspace, num_images)
        return float(json.loads(done.stdout)["result"]["images_per_s"])


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="images per node")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that each request waits")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="numbers of nodes")
    options = parser.parse_args()
    if reason := Network.why_not():
        echo(f"several nodes are not measured: {reason}")
        return
    echo(f"{options.images:,} images per node, {options.delay:g} s per request, load {os.getloadavg()[0]:.1f}\n")
    echo("| nodes | images/s | times one node | ceiling |")
    echo("|---|---|---|---|")
    first = 0.0
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as name:
        server = LocalS3(Path(name) / "s3")
        server.start()
        try:
            for num_nodes in options.nodes:
                rate = measure(Path(name), server, num_nodes, options.images * num_nodes, options.delay)
                first = first or rate / num_nodes
                ceiling = num_nodes * FETCHES / options.delay
                echo(f"| {num_nodes} | {rate:.1f} | {rate / first:.2f} | {ceiling:.0f} |")
        finally:
            server.kill9()


if __name__ == "__main__":
    main()
