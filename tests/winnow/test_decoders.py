"""Decoder processes that are killed, hang, run out of memory, or lose their parent."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from winnow.decoders import Decoded, DecoderPool
from winnow.errors import JobError
from winnow.images import DecodeLimits, View, attempt, decode

LIMITS = DecodeLimits(max_bytes=20_000_000, max_pixels=20_000_000, timeout_s=60.0)
VIEWS = (View(256, (224, 224)), View(64, (64, 48), "bicubic"))
WAIT_S = 90.0


def photograph(seed: int = 0) -> bytes:
    pixels = np.roll(skimage.data.astronaut(), seed, axis=1)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def slow_image() -> bytes:
    """A valid picture on which Pillow works for many seconds: numbers as text."""
    return b"P2 3000 3000 255\n" + b"7 " * (3000 * 3000)


def one_bit_png(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    return stream.getvalue()


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def wait_until_gone(pids: tuple[int, ...], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if not is_gone(pid)]}"
        time.sleep(0.02)


def wait_for_pids(pool: DecoderPool, count: int) -> tuple[int, ...]:
    deadline = time.monotonic() + WAIT_S
    while len(pool.pids) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return pool.pids


def wait_until_busy(pool: DecoderPool, data: bytes) -> tuple[Future[Decoded], int]:
    """Submit to a pool of one process and wait until it works on the image."""
    pool.submit(photograph()).result(WAIT_S)
    (pid,) = pool.pids
    before = cpu_ticks(pid)
    future = pool.submit(data)
    deadline = time.monotonic() + WAIT_S
    while cpu_ticks(pid) < before + 20:  # 0.2 s: far beyond reading the bytes
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return future, pid


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def check_good(decoded: Decoded, data: bytes) -> None:
    assert decoded.error is None
    assert decoded.image is not None
    reference = decode(data, limits=LIMITS, views=VIEWS)
    assert (decoded.image.width, decoded.image.height, decoded.image.format) == (512, 512, "JPEG")
    for ours, theirs in zip(decoded.image.views, reference.views, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert decoded.sha256 == hashlib.sha256(data).hexdigest()


def test_the_pool_answers_like_decode_from_many_threads() -> None:
    files = [photograph(seed) for seed in range(24)]
    results: dict[int, Decoded] = {}
    with DecoderPool(2, limits=LIMITS, views=VIEWS) as pool:

        def submit_all(numbers: range) -> None:
            for number, future in [(number, pool.submit(files[number])) for number in numbers]:
                results[number] = future.result(WAIT_S)

        threads = [threading.Thread(target=submit_all, args=(range(start, 24, 3),)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        pids = pool.pids
    assert sorted(results) == list(range(24))
    for number, decoded in results.items():
        check_good(decoded, files[number])
        assert 0.0 < decoded.decode_s < 10.0
        assert decoded.image is not None
        assert all(view.flags.writeable for view in decoded.image.views)
    assert len(pids) == 2
    wait_until_gone(pids)


def test_fingerprints_arrive_from_the_child() -> None:
    data = photograph()
    with DecoderPool(1, limits=LIMITS, views=VIEWS, fingerprints=True) as pool:
        decoded = pool.submit(data).result(WAIT_S)
    expected = attempt(data, limits=LIMITS, views=VIEWS, fingerprints=True).image
    assert decoded.image is not None
    assert expected is not None
    assert expected.pixel_hash is not None
    assert (decoded.image.pixel_hash, decoded.image.phash) == (expected.pixel_hash, expected.phash)


def test_a_failed_image_keeps_its_hash_and_header() -> None:
    data = photograph()[:9000]
    with DecoderPool(1, limits=LIMITS, views=VIEWS) as pool:
        decoded = pool.submit(data).result(WAIT_S)
        too_big = pool.submit(bytes(LIMITS.max_bytes + 1)).result(WAIT_S)
        empty = pool.submit(b"").result(WAIT_S)
    assert decoded.image is None
    assert decoded.error is not None
    assert (decoded.error.stage, decoded.error.kind) == ("decode", "truncated")
    assert decoded.sha256 == hashlib.sha256(data).hexdigest()
    assert decoded.header is not None
    assert (decoded.header.width, decoded.header.height, decoded.header.format) == (512, 512, "JPEG")
    assert too_big.error is not None
    assert too_big.error.kind == "too_many_bytes"
    assert empty.error is not None
    assert empty.error.kind == "empty"
    assert empty.sha256 == hashlib.sha256(b"").hexdigest()


def test_a_killed_decoder_costs_exactly_its_image() -> None:
    data = slow_image()
    with DecoderPool(1, limits=LIMITS, views=VIEWS) as pool:
        future, pid = wait_until_busy(pool, data)
        following = [pool.submit(photograph(seed)) for seed in range(3)]
        os.kill(pid, signal.SIGKILL)
        decoded = future.result(WAIT_S)
        assert decoded.error is not None
        assert decoded.error.kind == "crashed"
        assert decoded.sha256 == hashlib.sha256(data).hexdigest()
        for seed, other in enumerate(following):
            check_good(other.result(WAIT_S), photograph(seed))
        assert pool.pids != (pid,)


def test_a_segmentation_fault_is_named() -> None:
    with DecoderPool(1, limits=LIMITS) as pool:
        future, pid = wait_until_busy(pool, slow_image())
        os.kill(pid, signal.SIGSEGV)
        error = future.result(WAIT_S).error
    assert error is not None
    assert error.kind == "crashed"
    assert "Segmentation fault" in error.message


def test_a_decoder_killed_while_idle_costs_nothing() -> None:
    with DecoderPool(1, limits=LIMITS, views=VIEWS) as pool:
        check_good(pool.submit(photograph()).result(WAIT_S), photograph())
        os.kill(pool.pids[0], signal.SIGKILL)
        check_good(pool.submit(photograph(1)).result(WAIT_S), photograph(1))


def test_a_slow_image_is_stopped_at_the_deadline() -> None:
    limits = DecodeLimits(max_bytes=20_000_000, max_pixels=20_000_000, timeout_s=0.7)
    with DecoderPool(1, limits=limits, views=VIEWS) as pool:
        wait_for_pids(pool, 1)
        started = time.monotonic()
        decoded = pool.submit(slow_image()).result(WAIT_S)
        assert decoded.error is not None
        assert decoded.error.kind == "timeout"
        assert "0.7 s" in decoded.error.message
        assert time.monotonic() - started < 20.0


def test_a_hanging_decoder_is_replaced() -> None:
    limits = DecodeLimits(max_bytes=20_000_000, max_pixels=20_000_000, timeout_s=5.0)
    with DecoderPool(1, limits=limits, views=VIEWS) as pool:
        future, pid = wait_until_busy(pool, slow_image())
        os.kill(pid, signal.SIGSTOP)
        following = pool.submit(photograph())
        error = future.result(WAIT_S).error
        assert error is not None
        assert error.kind == "timeout"
        check_good(following.result(WAIT_S), photograph())
        wait_until_gone((pid,))


def test_memory_is_bounded_and_the_process_survives() -> None:
    limits = DecodeLimits(10_000_000, 200_000_000, 60.0, max_memory_bytes=600 * 2**20)
    with DecoderPool(1, limits=limits, views=VIEWS, scaled=False) as pool:
        check_good(pool.submit(photograph()).result(WAIT_S), photograph())
        pids = pool.pids
        decoded = pool.submit(one_bit_png(12_000)).result(WAIT_S)  # as RGB: 576 MB in Pillow
        assert decoded.error is not None
        assert decoded.error.kind == "out_of_memory"
        assert "12000 x 12000" in decoded.error.message
        check_good(pool.submit(photograph()).result(WAIT_S), photograph())
        assert pool.pids == pids


PARENT = """
import sys, time
from winnow.decoders import DecoderPool
from winnow.images import DecodeLimits
pool = DecoderPool(2, limits=DecodeLimits(100_000_000, 100_000_000, 600.0))
good = b"P5 1 1 255\\n7"
for future in [pool.submit(good) for _ in range(20)]:
    future.result(60)
slow = b"P2 3000 3000 255\\n" + b"7 " * 9_000_000
pool.submit(slow)  # one process works, one waits
time.sleep(0.5)
print(*pool.pids, flush=True)
time.sleep(600)
"""


def test_decoders_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    # A file of a library's name in the working directory must not reach the children.
    (tmp_path / "socket.py").write_text("raise SystemExit('the wrong module')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-P", str(script)], stdout=subprocess.PIPE, env=environment, cwd=tmp_path
    ) as parent:
        try:
            assert parent.stdout is not None
            pids = tuple(int(word) for word in parent.stdout.readline().split())
            assert len(pids) == 2
            assert not any(is_gone(pid) for pid in pids)
        finally:
            parent.kill()
        wait_until_gone(pids)


def test_decoders_see_no_credentials_and_load_no_model_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-decoders")
    with DecoderPool(1, limits=LIMITS) as pool:
        pool.submit(photograph()).result(WAIT_S)
        (pid,) = pool.pids
        assert b"not-for-decoders" not in Path(f"/proc/{pid}/environ").read_bytes()
        loaded = Path(f"/proc/{pid}/maps").read_text()
    assert "_imaging" in loaded
    assert not [name for name in ("torch", "ray/", "pyarrow") if f"/{name}" in loaded]


def test_damage_that_a_c_library_mended_is_a_warning() -> None:
    stream = io.BytesIO()
    page = Image.fromarray(skimage.data.page()).convert("1")
    page.save(stream, "TIFF", compression="group4")
    data = bytearray(stream.getvalue())
    middle = len(data) // 2
    data[middle : middle + 8] = b"\xa5" * 8
    with DecoderPool(1, limits=LIMITS, views=VIEWS) as pool:
        decoded = pool.submit(bytes(data)).result(WAIT_S)
    assert decoded.image is not None
    assert "Fax4Decode" in decoded.image.warnings[-1]


def test_close_cancels_what_waits_and_ends_what_runs() -> None:
    pool = DecoderPool(1, limits=DecodeLimits(20_000_000, 20_000_000, 2.0))
    running, _ = wait_until_busy(pool, slow_image())
    waiting = [pool.submit(photograph()) for _ in range(5)]
    pool.close()
    pool.close()
    assert running.result(0).error is not None
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(0)
    with pytest.raises(JobError, match="closed"):
        pool.submit(photograph())
    assert pool.pids == ()


def test_a_machine_that_starts_no_decoders_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named numpy' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with DecoderPool(1, limits=LIMITS) as pool, pytest.raises(JobError, match="No module named numpy"):
        pool.submit(photograph()).result(WAIT_S)


def test_a_pool_needs_a_process() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        DecoderPool(0, limits=LIMITS)
