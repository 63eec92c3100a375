"""How many workers of which size a run gets: planned for the whole graph, from what the cluster has.

Two stages hold CPUs for the whole run (decoding and inference actors); writing and Ray's own small tasks need some
beside them. Ray waits forever, in silence, when actors leave none. So the actors together take at most three
quarters of every node's CPUs, in shares that Ray only accounts with: how hard a node really works is set by the
number of decoder processes and of computing threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from winnow.config import PredictConfig, TrainConfig
from winnow.errors import CallError

_CPUS_PER_ACTOR = 8
"""One inference actor on CPU uses at most this many cores: a batch of 32 gives so many threads four images each."""


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers to Ray."""

    num_cpus: float
    num_gpus: float = 0.0
    node_id: str = ""
    address: str = ""


@dataclass(frozen=True)
class ResourcePlan:
    """The size of every stage.

    Attributes:
        device: ``cpu`` or ``cuda``.
        num_infer: inference actors, with ``infer_cpus`` and ``infer_gpus`` each.
        num_threads: computing threads per inference actor, each with images of its own.
        num_decode: fetching and decoding actors, with ``decode_cpus`` each.
        num_decoders: decoder processes per decoding actor.
        write_cpus: per writing task.
        total_cpus: of the cluster, for the verdict.
    """

    device: str
    num_infer: int
    infer_cpus: float
    infer_gpus: float
    num_threads: int
    num_decode: int
    decode_cpus: float
    num_decoders: int
    write_cpus: float
    total_cpus: float


def plan_resources(nodes: Sequence[Node], config: PredictConfig) -> ResourcePlan:
    """Plan the stages of predict for a cluster.

    Raises:
        CallError: the cluster has no CPU.
    """
    nodes = [node for node in nodes if node.num_cpus > 0]
    total = _total_cpus(nodes)
    num_gpus = sum(int(node.num_gpus) for node in nodes)
    if num_gpus:
        return _plan_gpu(nodes, num_gpus, total, config)
    return _plan_cpu(nodes, total, config)


def plan_copies(nodes: Sequence[Node], config: PredictConfig) -> ResourcePlan:
    """Plan ``augment``, which has one stage beside writing: an actor per core, with a decoder process each.

    Raises:
        CallError: the cluster has no CPU.
    """
    total = _total_cpus(nodes)
    num = config.num_decode_workers or sum(max(1, int(node.num_cpus)) for node in nodes if node.num_cpus > 0)
    return ResourcePlan(
        device="cpu",
        num_infer=0,
        infer_cpus=0.0,
        infer_gpus=0.0,
        num_threads=1,
        num_decode=num,
        decode_cpus=_share(0.75 * total / num),
        num_decoders=config.decoders_per_worker or 1,
        write_cpus=_share(min(0.5, 0.1 * min(node.num_cpus for node in nodes if node.num_cpus > 0))),
        total_cpus=total,
    )


def _total_cpus(nodes: Sequence[Node]) -> float:
    total = sum(node.num_cpus for node in nodes if node.num_cpus > 0)
    if total <= 0:
        raise CallError("the cluster offers no CPU to Ray; start Ray with at least --num-cpus=1")
    return total


def _plan_cpu(nodes: Sequence[Node], total: float, config: PredictConfig) -> ResourcePlan:
    # One pair of actors per group of cores; the smallest group decides the size, so that every pair fits somewhere.
    groups = [node.num_cpus / math.ceil(node.num_cpus / _CPUS_PER_ACTOR) for node in nodes]
    cores = min(groups)
    pairs = sum(int(node.num_cpus // cores) for node in nodes)
    num_infer = config.num_inference_workers or pairs
    num_decode = config.num_decode_workers or pairs
    infer_cores, decode_cores = cores / math.ceil(num_infer / pairs), cores / math.ceil(num_decode / pairs)
    return ResourcePlan(
        device="cpu",
        num_infer=num_infer,
        infer_cpus=_share(0.5 * infer_cores),
        infer_gpus=0.0,
        num_threads=max(1, round(infer_cores)),
        num_decode=num_decode,
        decode_cpus=_share(0.25 * decode_cores),
        num_decoders=config.decoders_per_worker or max(1, round(decode_cores)),
        write_cpus=_share(min(1.0, 0.125 * cores)),
        total_cpus=total,
    )


def _plan_gpu(nodes: Sequence[Node], num_gpus: int, total: float, config: PredictConfig) -> ResourcePlan:
    # The GPUs must stay busy: nearly all CPUs decode, in actors of up to four processes; one CPU, or less on small
    # machines, feeds each GPU.
    num_infer = config.num_inference_workers or num_gpus
    gpu_nodes = [node for node in nodes if node.num_gpus >= 1]
    infer_cpus = _share(min(1.0, min(node.num_cpus / node.num_gpus for node in gpu_nodes) / 4))
    free = [max(0.0, 0.9 * node.num_cpus - infer_cpus * int(node.num_gpus)) for node in nodes]
    size = min(4.0, max(0.25, min(share for share in free if share > 0)))
    num_decode = config.num_decode_workers or max(1, sum(int(share // size) for share in free))
    decode_cpus = _share(sum(free) * 0.95 / num_decode if config.num_decode_workers else size)
    return ResourcePlan(
        device="cuda",
        num_infer=num_infer,
        infer_cpus=infer_cpus,
        infer_gpus=1.0 if num_infer <= num_gpus else math.floor(100 * num_gpus / num_infer) / 100,
        num_threads=1,
        num_decode=num_decode,
        decode_cpus=min(decode_cpus, _share(max(free))),
        num_decoders=config.decoders_per_worker or max(1, round(size)),
        write_cpus=_share(min(0.5, 0.05 * total)),
        total_cpus=total,
    )


@dataclass(frozen=True)
class WorkerPlan:
    """The size of a training.

    Attributes:
        num_workers: that train, with ``cpus`` and ``gpus`` each, as Ray accounts for them.
        num_threads: of torch in each.
        num_readers: actors that read and decode for each, with ``reader_cpus`` each.
    """

    num_workers: int
    cpus: float
    gpus: float
    num_threads: int
    num_readers: int
    reader_cpus: float


def plan_workers(nodes: Sequence[Node], config: TrainConfig) -> WorkerPlan:
    """A worker per GPU; without any, a worker per node. Half of the CPUs at most train, a quarter reads."""
    nodes = [node for node in nodes if node.num_cpus > 0]
    gpus = sum(int(node.num_gpus) for node in nodes)
    num = config.num_workers or gpus or len(nodes)
    num = min(num, config.batch_size)
    cores = sum(node.num_cpus for node in nodes) / num
    if gpus:
        share = min(1.0, gpus / num)
        return WorkerPlan(num, min(1.0, 0.25 * cores), share, 1, max(1, math.floor(0.5 * cores)), min(0.5, 0.2 * cores))
    # Threads wait for each other after every layer, so one that shares its CPU with the readers holds up all.
    threads = max(1, math.floor(0.75 * min(cores, min(node.num_cpus for node in nodes))))
    return WorkerPlan(num, _share(0.5 * cores), 0.0, threads, 1, _share(0.25 * cores))


def _share(cpus: float) -> float:
    """Rounded down to a hundredth, which Ray can account for, and whole above one, which Ray demands."""
    if cpus > 1:
        return float(math.floor(cpus))
    return max(0.01, math.floor(cpus * 100) / 100)


def plan_batch_size(config: PredictConfig, *, device: str, pixel_bytes: int) -> int:
    """Images per forward pass. On a GPU as many as make about 128 MB of uint8 pixels, at most 256."""
    if config.batch_size:
        return config.batch_size
    if device == "cpu":
        return 32
    return max(8, min(256, 128_000_000 // max(1, pixel_bytes)))


def plan_fragment_rows(config: PredictConfig, num_planned: int) -> int:
    """Images per written file: few enough that a crash costs little, many enough that files stay large."""
    if config.fragment_rows:
        return config.fragment_rows
    return max(256, min(20_000, num_planned // 64))
