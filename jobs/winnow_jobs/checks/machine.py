"""Checks of this machine: Python, packages, Ray, the device, weights, disk and memory."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from winnow.config import TaskConfig
from winnow.models.downloads import torch_hub_folder
from winnow_jobs.checks import Check, fail, ok, warn
from winnow_jobs.cluster import address_fault, is_local

GB = 1_000_000_000
_PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "deltalake", "duckdb", "obstore", "pillow")
_LARGEST_HASHED = GB // 2
_CONNECT_TIMEOUT_S = 4.0


def check_python() -> Check:
    """Python itself."""
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    if sys.platform != "linux":
        return warn("python", detail, "Winnow is tested on Linux; elsewhere expect rough edges")
    return ok("python", detail)


def check_packages() -> Check:
    """The packages that jobs need, by their metadata: nothing is imported."""
    from packaging.requirements import Requirement  # Ray depends on it
    from packaging.utils import canonicalize_name

    try:
        lines = importlib.metadata.requires("winnow-vision") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        lines = list(_PACKAGES)
    needed = [need for need in map(Requirement, lines) if need.marker is None or need.marker.evaluate({"extra": ""})]
    versions: dict[str, str] = {}
    faults: list[str] = []
    for need in needed:
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{need.name} is missing")
            continue
        versions[canonicalize_name(need.name)] = version
        if not need.specifier.contains(version, prereleases=True):
            faults.append(f"{need.name} {version} does not meet {need.specifier}")
    if faults:
        return fail("packages", "; ".join(faults), "pip install --upgrade winnow-vision")
    return ok("packages", ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions))


def check_ray() -> Check:
    """Whether jobs start Ray here, and otherwise whether the cluster's address answers."""
    if is_local():
        return ok("ray", "jobs start it on this machine; set RAY_ADDRESS to use a cluster")
    fault = address_fault()
    return fail("ray", *fault) if fault else ok("ray", f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: takes connections")


def check_torch() -> Check:
    """The device that this machine's jobs infer on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return fail("torch", f"cannot be imported: {error}", "pip install --force-reinstall torch torchvision")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        memory = torch.cuda.get_device_properties(0).total_memory
        return ok("torch", f"{torch.__version__}, {count} GPU: {torch.cuda.get_device_name(0)}, {memory / GB:.0f} GB")
    level = torch.backends.cpu.get_cpu_capability()
    flags = _cpu_flags() & {"avx512_bf16", "amx_bf16"}
    bf16 = f"bfloat16 in hardware ({', '.join(sorted(flags))})" if flags else "no bfloat16 in hardware"
    detail = f"{torch.__version__}, CPU: {level}, {bf16}, {torch.get_num_threads()} threads"
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return warn(
            "torch",
            f"{detail}; there is an NVIDIA GPU that torch cannot use",
            "install the driver for it, or a torch built for the driver you have (compare `nvidia-smi`)",
        )
    return ok("torch", detail)


def check_weights_cache() -> Check:
    """The folder where torchvision keeps downloaded weights."""
    folder = torch_hub_folder()
    detail = f"{folder}"
    if not _is_writable(folder):
        return fail("weights cache", f"{detail} cannot be written", "set TORCH_HOME to a folder that you may write")
    free = shutil.disk_usage(_nearest_existing(folder)).free
    if free < GB:
        return warn(
            "weights cache", f"{detail} has {free / GB:.1f} GB free", "free some disk or set TORCH_HOME elsewhere"
        )
    return ok("weights cache", f"{detail}, writable")


def check_weights(task: str, config: TaskConfig, base_dir: Path) -> Check:
    """Whether a task's weights are here already, or can be had."""
    name = f"weights of {task}"
    library, _, rest = config.model.partition("/")
    if library == "torchvision":
        return _check_torchvision_weights(name, *rest.partition("@")[::2])
    if library == "timm":
        try:
            version = importlib.metadata.version("timm")
        except importlib.metadata.PackageNotFoundError:
            return fail(name, f"{config.model} needs timm", "pip install 'winnow-vision[timm]'")
        return ok(name, f"{config.model}: timm {version} gets them from its hub when they are not cached")
    if "://" in config.model:
        return ok(name, f"{config.model} is read when a job starts")
    path = base_dir / Path(config.model).expanduser()
    if not path.is_file():
        return fail(name, f"{path} does not exist", f"mend tasks.{task}.model in winnow.toml, or put the file there")
    return ok(name, f"{path}, {path.stat().st_size / 1e6:.0f} MB")


def _check_torchvision_weights(name: str, model: str, weights: str) -> Check:
    from torchvision.models import get_model_weights, list_models

    try:
        known = get_model_weights(model)
    except ValueError:
        close = difflib.get_close_matches(model, list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see torchvision.models.list_models()"
        return fail(name, f"torchvision has no model {model!r}", f"mend the task's model in winnow.toml; {hint}")
    if weights and weights not in known.__members__:
        choices = ", ".join(known.__members__)
        return fail(name, f"torchvision/{model} has no weights {weights!r}", f"choose one of {choices}")
    member = known[weights or "DEFAULT"]
    what = f"torchvision/{model}@{member.name}"
    path = torch_hub_folder() / Path(urlsplit(member.url).path).name
    if path.exists():
        if not _hash_matches(path):
            return fail(name, f"{path} is damaged: its hash is not the one in its name", f"delete it: rm {path}")
        return ok(name, f"{what} is in the cache")
    host = urlsplit(member.url).hostname
    size = f"{member.meta['_file_size']:.0f} MB" if "_file_size" in member.meta else "size unknown"
    try:
        request = urllib.request.Request(member.url, method="HEAD")
        with urllib.request.urlopen(request, timeout=_CONNECT_TIMEOUT_S):
            return ok(name, f"{what} will be downloaded from {host} ({size}) when first used")
    except OSError as error:
        return warn(
            name,
            f"{what} is not in the cache, and {host} cannot be reached from here ({_reason(error)})",
            f"get {path.name} ({size}) on a machine that can, and put it at {path}",
        )


def check_disk(name: str, folder: Path) -> Check:
    """Free space of the file system of a folder that may not exist yet."""
    usage = shutil.disk_usage(_nearest_existing(folder))
    free_share = usage.free / usage.total
    detail = f"{usage.free / GB:.1f} GB free ({free_share:.0%}) at {folder}"
    if usage.free < GB:
        return fail(name, detail, "free some disk, or use a folder on another one")
    if usage.free < 10 * GB or free_share < 0.05:
        return warn(name, detail, "free some disk: Ray stops spilling when its disk is 95 % full")
    return ok(name, detail)


def check_ray_disk() -> Check:
    """Free space where Ray keeps its sessions and spills objects."""
    return check_disk("disk of ray", Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()))


def check_memory() -> Check:
    """Memory, and whether Ray's object store (30 % of what is available) fits into shared memory."""
    memory = psutil.virtual_memory()
    limit = _container_limit()
    total = min(memory.total, limit) if limit else memory.total
    available = min(memory.available, total)
    detail = f"{available / GB:.1f} of {total / GB:.1f} GB available"
    if available < 2 * GB:
        return warn("memory", detail, "end other programs, or run with fewer workers (predict.num_decode_workers = 1)")
    shared = Path("/dev/shm")
    if sys.platform != "linux" or not shared.is_dir():
        return ok("memory", detail)
    free = shutil.disk_usage(shared).free
    store = min(0.3 * available, 10 * GB)
    detail += f"; /dev/shm has {free / GB:.1f} GB for Ray's object store"
    if free < store:
        return warn(
            "memory",
            f"{detail}, which wants {store / GB:.1f} GB; Ray will use the slower disk",
            f"give the container more shared memory: docker run --shm-size={1.1 * store / GB:.0f}g",
        )
    return ok("memory", detail)


def _hash_matches(path: Path) -> bool:
    """Torchvision's file names end in the first digits of their SHA-256; very large files are not read."""
    found = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if found is None or path.stat().st_size > _LARGEST_HASHED:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(found[1])


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _container_limit() -> int | None:
    """Memory limit of the control group, in bytes; None when there is none."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None


def _nearest_existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _is_writable(folder: Path) -> bool:
    nearest = _nearest_existing(folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error)
