"""Real Ray nodes on this machine, with token authentication; in networks of their own where the machine allows that.

::

    with Network() as network, RayCluster({"AWS_…": …}, network=network) as cluster:
        cluster.start_head()
        cluster.start_worker()
        cluster.address              # http://10.213.77.11:8265
        cluster.nodes[1].kill()
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import urllib3

from winnow_jobs.ports import find_free_port

BIN = Path(sys.executable).parent


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


class Network:
    """A bridge with one network namespace per machine: every machine has its own address and its own ports."""

    def __init__(self) -> None:
        self.name = f"wn{secrets.token_hex(2)}"
        self.subnet = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250) + 1}"
        self.gateway = f"{self.subnet}.1"
        """The address of this process's side of the bridge."""
        self.machines: list[str] = []

    @staticmethod
    def why_not() -> str | None:
        """Why this machine allows no such networks; None when it does."""
        probe = f"wnp{secrets.token_hex(2)}"
        try:
            _ip("netns", "add", probe)
            _ip("-n", probe, "link", "add", "wa", "type", "veth", "peer", "name", "wb")
            _ip("-n", probe, "link", "add", "wc", "type", "bridge")
        except FileNotFoundError:
            return "needs the program `ip` (package iproute2)"
        except subprocess.CalledProcessError as error:
            return f"needs the right to make network namespaces (root): {error.stderr.strip()}"
        finally:
            with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
                _ip("netns", "del", probe)
        return None

    def __enter__(self) -> Network:
        _ip("link", "add", self.name, "type", "bridge")
        try:
            _ip("addr", "add", f"{self.gateway}/24", "dev", self.name)
            _ip("link", "set", self.name, "up")
        except BaseException:
            _ip("link", "del", self.name)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for machine in self.machines:
            _ip("netns", "del", machine)
        _ip("link", "del", self.name)

    def add_machine(self) -> tuple[str, str]:
        """Name of a new namespace, and its address."""
        number = len(self.machines) + 1
        machine, address = f"{self.name}-{number}", f"{self.subnet}.{number + 10}"
        outer, inner = f"{self.name}o{number}", f"{self.name}i{number}"
        _ip("netns", "add", machine)
        self.machines.append(machine)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", machine)
        _ip("link", "set", outer, "master", self.name, "up")
        for arguments in (
            ("addr", "add", f"{address}/24", "dev", inner),
            ("link", "set", inner, "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", self.gateway),
        ):
            _ip("-n", machine, *arguments)
        return machine, address


@dataclass
class Node:
    """One raylet with all that it started."""

    process: subprocess.Popen[bytes]
    address: str
    namespace: str | None

    def family(self) -> list[psutil.Process]:
        """Its processes, workers and drivers included."""
        if self.namespace is not None:
            listed = subprocess.run(
                ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, timeout=20, check=True
            )
            pids = [int(pid) for pid in listed.stdout.split()]
        else:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = psutil.Process(self.process.pid)
                return [own, *own.children(recursive=True)]
            return []
        found = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def titled(self, *words: str) -> list[psutil.Process]:
        """Its processes whose command line holds all the words."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if all(word in line for word in words):
                    found.append(process)
        return found

    def drivers(self) -> list[psutil.Process]:
        """Its processes that run a submitted command; with --retries also the one above that runs it again."""
        return self.titled("-m winnow_jobs.entrypoint")

    def kill(self) -> None:
        """As a power cut would end the machine."""
        for _ in range(20):
            family = self.family()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if not family:
                break
            psutil.wait_procs(family, timeout=5)
        self.process.wait(20)


@dataclass
class RayCluster:
    """A head and workers.

    Attributes:
        environment: what the nodes have beside PATH and HOME: the cluster's own secrets.
        network: each node gets a machine of it; all share this machine's addresses when None.
        token: of the cluster.
    """

    environment: dict[str, str]
    network: Network | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    nodes: list[Node] = field(default_factory=list)

    def __enter__(self) -> RayCluster:
        self.folder = Path(tempfile.mkdtemp(prefix="wr"))  # short: Unix sockets have 107 characters
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def client_environment(self) -> dict[str, str]:
        """What a machine needs that submits jobs."""
        return {"RAY_API_SERVER_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start_head(self, num_cpus: int = 2) -> Node:
        """Start the head and wait until it takes jobs."""
        machine, host = self.network.add_machine() if self.network else (None, "127.0.0.1")
        self.port, dashboard = (6379, 8265) if machine else (find_free_port(), find_free_port())
        self.address = f"http://{host}:{dashboard}"
        arguments = ["--head", f"--port={self.port}", f"--dashboard-host={host}", f"--dashboard-port={dashboard}"]
        node = self._start(arguments, machine, host, num_cpus)
        pool, headers = urllib3.PoolManager(retries=False, timeout=5.0), {"Authorization": f"Bearer {self.token}"}
        try:
            self._wait(lambda: pool.request("GET", f"{self.address}/api/jobs/", headers=headers).status == 200, 280)
        finally:
            pool.clear()
        return node

    def start_worker(self, num_cpus: int = 2) -> Node:
        """Start another node and wait until the cluster has it."""
        machine, host = self.network.add_machine() if self.network else (None, "127.0.0.1")
        before = self.num_alive(host)
        node = self._start([f"--address={self.nodes[0].address}:{self.port}"], machine, host, num_cpus)
        self._wait(lambda: self.num_alive(host) > before, 280)
        return node

    def num_alive(self, host: str | None = None) -> int:
        """Living nodes, as the head counts them, which learns late of a death; those of one address if given."""
        headers = {"Authorization": f"Bearer {self.token}"}
        pool = urllib3.PoolManager(retries=False, timeout=10.0)
        try:
            answer: Any = pool.request("GET", f"{self.address}/nodes?view=summary", headers=headers).json()
        finally:
            pool.clear()
        alive = [node for node in answer["data"]["summary"] if node["raylet"].get("state") == "ALIVE"]
        return sum(host is None or node["ip"] == host for node in alive)

    def _start(self, arguments: list[str], machine: str | None, host: str, num_cpus: int) -> Node:
        options = [f"--num-cpus={num_cpus}", f"--node-ip-address={host}", "--object-store-memory=150000000", "--block"]
        options += ["--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]
        if machine is None:
            options += [f"--ray-client-server-port={find_free_port()}", "--dashboard-agent-listen-port=0"]
        if "--head" in arguments:
            options += [f"--temp-dir={self.folder}/ray"]
        environment = {name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ}
        environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        # On a busy machine nodes start and answer late, and Ray takes them for dead; killed ones refuse at once.
        late_ms = {"health_check_timeout_ms": "60000", "agent_register_timeout_ms": "240000"}
        environment |= {f"RAY_{name}": value for name, value in late_ms.items()}
        environment["RAY_raylet_start_wait_time_s"] = "250"
        (self.folder / "ray").mkdir(exist_ok=True)
        prefix = []
        if machine is not None:
            # A disk of its own: where nodes share one, each unpacks a job's files anew under the feet of the others.
            disk = self.folder / f"disk-{len(self.nodes)}"
            disk.mkdir()
            mount = 'mount --bind "$0" "$1" && shift && exec "$@"'
            inside = ["unshare", "--mount", "sh", "-c", mount, str(disk), str(self.folder / "ray")]
            prefix = ["ip", "netns", "exec", machine, *inside]
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*prefix, str(BIN / "ray"), "start", *arguments, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | self.environment,
                start_new_session=True,
            )
        node = Node(process, host, machine)
        self.nodes.append(node)
        return node

    def _wait(self, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(urllib3.exceptions.HTTPError, ValueError, KeyError):
                if condition():
                    return
            log = self.folder / f"node-{len(self.nodes) - 1}.log"
            assert self.nodes[-1].process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, f"waited {timeout_s} s; {log.read_text(errors='replace')[-3000:]}"
            time.sleep(0.3)


class Relay:
    """Carries TCP from an address to a server, late or not at all for a while.

    Args:
        host: address to listen at.
        upstream: port of the server on 127.0.0.1.
        delay_s: how long each piece that a client sends waits: about the time that a request takes longer.
    """

    def __init__(self, host: str, upstream: int, delay_s: float = 0.0) -> None:
        self.host, self.upstream, self.delay_s = host, upstream, delay_s

    def __enter__(self) -> Relay:
        code = Path(__file__).with_name("relay.py")
        self.port = find_free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(code), self.host, str(self.port), str(self.upstream), str(self.delay_s)]
        )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((self.host, self.port), timeout=1).close()
                return self
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(20)

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def hold(self) -> None:
        """From now on nothing is carried: connections stay open and silent, and new ones are not answered."""
        self._process.send_signal(signal.SIGSTOP)

    def release(self) -> None:
        self._process.send_signal(signal.SIGCONT)
